//! What each rank owns, and the tensors that it owns parts of.

use std::path::Path;

use qwen3_model::Config;
use qwen3_model::heads::HeadPlan;
use qwen3_model::names::{TensorRole, tensor_specs};
use serde_json::json;

fn config(heads: usize, kv_heads: usize, columns: usize, vocabulary: usize) -> Config {
    let value = json!({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": columns, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16, "vocab_size": vocabulary,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    Config::from_json(Path::new("config.json"), &value).expect("a valid configuration")
}

fn sparse() -> Config {
    let value = json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1],
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    });
    Config::from_json(Path::new("config.json"), &value).expect("a valid configuration")
}

#[test]
fn every_query_head_is_on_one_rank_beside_its_kv_head() {
    for (heads, kv_heads) in
        [(1, 1), (2, 1), (6, 3), (8, 2), (8, 8), (16, 8), (40, 8), (12, 4), (64, 4)]
    {
        let config = config(heads, kv_heads, 32, 32);
        for ranks in 1..=heads + 3 {
            let mut next = 0;
            for rank in 0..ranks {
                let plan = HeadPlan::new(&config, ranks, rank);
                let label = format!("{heads}/{kv_heads} heads, rank {rank} of {ranks}: {plan:?}");
                assert_eq!(
                    plan.query_heads.start,
                    if plan.query_heads.is_empty() { heads } else { next },
                    "{label}"
                );
                next = plan.query_heads.end;
                assert!(plan.query_heads.len().abs_diff(heads / ranks) <= 1, "{label}");
                assert_eq!(plan.groups.len(), plan.kv_heads.len(), "{label}");
                let mut covered = 0;
                for (kv, group) in plan.kv_heads.clone().zip(&plan.groups) {
                    assert_eq!(group.start, covered, "{label}");
                    assert!(!group.is_empty(), "{label}");
                    covered = group.end;
                    for local in group.clone() {
                        let head = plan.query_heads.start + local;
                        assert_eq!(head / config.group_size(), kv, "{label}");
                    }
                }
                assert_eq!(covered, plan.query_heads.len(), "{label}");
            }
            assert_eq!(next, heads);
        }
    }
}

#[test]
fn kv_heads_are_replicated_where_ranks_share_one() {
    let config = config(6, 3, 32, 32);
    let plan = |rank| HeadPlan::new(&config, 4, rank);
    // 2, 2, 1 and 1 query heads: the last two ranks share the last KV head.
    assert_eq!((plan(0).query_heads, plan(0).kv_heads), (0..2, 0..1));
    assert_eq!((plan(2).query_heads, plan(2).kv_heads), (4..5, 2..3));
    assert_eq!((plan(3).query_heads, plan(3).kv_heads), (5..6, 2..3));
    // 8 heads in groups of 4 on 3 ranks: the middle rank sees both KV heads.
    let config = self::config(8, 2, 32, 32);
    let middle = HeadPlan::new(&config, 3, 1);
    assert_eq!(
        (middle.query_heads, middle.kv_heads, middle.groups),
        (3..6, 0..2, vec![0..1, 1..3])
    );
}

#[test]
fn tensors_of_a_published_checkpoint() {
    let specs: Vec<_> = tensor_specs(&sparse()).collect();
    let shape = |name: &str| {
        let spec = specs
            .iter()
            .find(|spec| spec.name == name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        (spec.shape.clone(), spec.role)
    };
    assert_eq!(shape("model.embed_tokens.weight"), (vec![100, 64], TensorRole::Matrix));
    assert_eq!(shape("model.layers.0.self_attn.q_norm.weight"), (vec![16], TensorRole::Norm));
    assert_eq!(shape("model.layers.2.self_attn.k_proj.weight"), (vec![32, 64], TensorRole::Matrix));
    assert_eq!(
        shape("model.layers.0.mlp.experts.4.down_proj.weight"),
        (vec![64, 40], TensorRole::Matrix)
    );
    assert_eq!(shape("model.layers.0.mlp.gate.weight"), (vec![5, 64], TensorRole::Router));
    assert_eq!(shape("model.layers.1.mlp.gate_proj.weight"), (vec![96, 64], TensorRole::Matrix));
    assert_eq!(shape("lm_head.weight"), (vec![100, 64], TensorRole::Matrix));
    // 3 outside of layers, 8 a layer, 3 * 5 + 1 in the two sparse ones, 3 in the dense one.
    assert_eq!(specs.len(), 3 + 3 * 8 + 2 * 16 + 3);
    let total: usize = specs.iter().map(|spec| spec.elements()).sum();
    assert_eq!(total as u64, sparse().parameters());
}
