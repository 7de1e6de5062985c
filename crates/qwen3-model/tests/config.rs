//! Configuration files: published forms, defaults, and one malformed input for each error.

mod configs;

use configs::{parse, rejected, with};
use qwen3_model::config::ConfigError;
use qwen3_model::rope_config::RopeScaling;
use qwen3_model::{Config, LogitRows, ModelSource};
use serde_json::{Value, json};

fn dense() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936
    })
}

fn sparse() -> Value {
    let moe = json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "tie_word_embeddings": false, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true, "num_experts": 128,
        "num_experts_per_tok": 8
    });
    configs::merged(dense(), &moe)
}

#[test]
fn published_dense() {
    let config = parse(&dense()).expect("a published configuration");
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.group_size()), (1024, 28, 2));
    assert_eq!((config.query_size(), config.key_value_size()), (2048, 1024));
    assert_eq!(config.eos_token_ids, [151645]);
    assert_eq!(config.bos_token_id, Some(151643));
    assert_eq!((config.rope.theta, &config.rope.scaling), (1e6, &RopeScaling::Default));
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    assert_eq!((config.context_length(), config.rms_norm_eps), (40960, 1e-6));
    assert!(config.tie_word_embeddings && config.moe.is_none() && !config.is_sparse(0));
}

#[test]
fn counts_of_the_published_sizes() {
    let dense = parse(&dense()).expect("dense");
    // 596,049,920 is the size of the published 0.6B file.
    assert_eq!(dense.parameters(), 596_049_920);
    let moe = parse(&sparse()).expect("sparse");
    assert_eq!(moe.parameters(), 30_532_122_624);
    // Each of 48 layers: attention, 8 experts, the router.
    let layer: u64 = 2048 * (2 * (4096 + 512) + 8 * 3 * 768 + 128);
    // The second token finds 1 of 16 experts visited; a dense model has none to choose.
    let expert = (48 * 2048 * 3 * 768_u64) as f64;
    for (tokens, further) in [(1, 0.0), (2, 7.5), (100_000, 120.0)] {
        let (found, expected) =
            (moe.visited_matrix_elements(tokens), (48 * layer) as f64 + further * expert);
        assert!((found / expected - 1.0).abs() < 1e-12, "{tokens} tokens: {found}, {expected}");
        let all = (dense.parameters() - dense.head_parameters()) as f64;
        let found = dense.visited_matrix_elements(tokens);
        // All but norms.
        assert!(found < all && found > 0.999 * all, "{tokens} tokens: {found} of {all}");
    }
}

#[test]
fn flops_count_each_weight_and_each_key_that_is_seen() {
    let config = with(dense(), json!({"num_hidden_layers": 1})).expect("one layer");
    let layer = 2.0 * 1024.0 * (2.0 * (2048.0 + 1024.0) + 3.0 * 3072.0);
    // Three tokens after five others see 6, 7 and 8 keys.
    let attention = (6.0 + 7.0 + 8.0) * 4.0 * 2048.0;
    assert_eq!(config.forward_flops(3, 5, LogitRows::None), 3.0 * layer + attention);
    let head = 2.0 * 151_936.0 * 1024.0;
    assert_eq!(config.forward_flops(3, 5, LogitRows::Last), 3.0 * layer + attention + head);
    let moe = parse(&sparse()).expect("sparse");
    let layer = 2.0 * 2048.0 * (2.0 * (4096.0 + 512.0) + 8.0 * 3.0 * 768.0 + 128.0);
    let found = moe.forward_flops(3, 0, LogitRows::None);
    let expected = 48.0 * (3.0 * layer + (1.0 + 2.0 + 3.0) * 4.0 * 4096.0);
    assert!((found / expected - 1.0).abs() < 1e-12, "{found}, {expected}");
}

#[test]
fn newer_fields_mean_the_same() {
    let older = parse(&dense()).expect("older");
    let newer = with(
        dense(),
        json!({
            "rope_theta": null, "torch_dtype": null, "dtype": "bfloat16",
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "layer_types": vec!["full_attention"; 28]
        }),
    );
    assert_eq!(newer.expect("newer"), older);
    let older = parse(&sparse()).expect("older");
    let newer = with(sparse(), json!({"num_experts": null, "num_local_experts": 128}));
    assert_eq!(newer.expect("newer"), older);
}

#[test]
fn yarn_in_both_forms() {
    let scaling =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    let older = with(dense(), json!({"rope_scaling": scaling})).expect("older");
    let RopeScaling::Yarn(yarn) = &older.rope.scaling else {
        panic!("found {:?}", older.rope.scaling)
    };
    assert_eq!(
        (yarn.factor, yarn.original_max_position_embeddings, yarn.truncate),
        (4.0, 32768, true)
    );
    assert_eq!((yarn.beta_fast, yarn.beta_slow), (32.0, 1.0));
    assert_eq!(yarn.attention_factor, 0.1 * 4f64.ln() + 1.0);
    assert_eq!(older.context_length(), 131_072);

    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(1e6);
    let newer =
        with(dense(), json!({"rope_theta": null, "rope_parameters": parameters})).expect("newer");
    assert_eq!(newer, older);
    // Who adds the older field to a newer file means it, wherever theta is.
    let plain = json!({"rope_theta": 1e6, "rope_type": "default"});
    let both = json!({"rope_theta": null, "rope_scaling": scaling, "rope_parameters": plain});
    assert_eq!(with(dense(), both).expect("added"), older);
    let both =
        json!({"rope_theta": null, "rope_scaling": parameters, "rope_parameters": parameters});
    assert_eq!(with(dense(), both).expect("the same twice"), older);
    assert_eq!(
        with(dense(), json!({"rope_theta": null, "rope_scaling": parameters})).expect("inside"),
        older
    );
    let mut oldest = scaling;
    oldest["type"] = oldest["rope_type"].take();
    assert_eq!(with(dense(), json!({"rope_scaling": oldest})).expect("oldest"), older);
}

#[test]
fn yarn_attention_factor_variants() {
    let factor = |fields: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 8.0});
        for (field, value) in fields.as_object().expect("an object") {
            scaling[field] = value.clone();
        }
        match with(dense(), json!({"rope_scaling": scaling})).expect("yarn").rope.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            RopeScaling::Default => panic!("expected YaRN"),
        }
    };
    let scale = |mscale: f64| 0.1 * mscale * 8f64.ln() + 1.0;
    assert_eq!(factor(json!({})), scale(1.0));
    assert_eq!(
        factor(json!({"attention_factor": 0.75, "mscale": 2.0, "mscale_all_dim": 1.0})),
        0.75
    );
    assert_eq!(factor(json!({"mscale": 2.0, "mscale_all_dim": 0.5})), scale(2.0) / scale(0.5));
    assert_eq!(factor(json!({"mscale": 2.0})), scale(1.0));
    assert_eq!(factor(json!({"factor": 1.0})), 1.0);
}

#[test]
fn defaults() {
    let config = with(
        dense(),
        json!({
            "head_dim": null, "tie_word_embeddings": null, "attention_bias": null, "hidden_act": null, "eos_token_id": null,
            "use_sliding_window": null, "torch_dtype": null, "bos_token_id": null
        }),
    );
    let config = config.expect("optional fields may be absent");
    assert_eq!(config.head_dim, 128);
    let absent = json!({"head_dim": null, "hidden_size": 1024, "num_attention_heads": 16});
    assert_eq!(with(sparse(), absent).expect("a share of the width").head_dim, 64);
    assert!(
        !config.tie_word_embeddings && config.eos_token_ids.is_empty() && config.dtype.is_none()
    );
    let list = with(dense(), json!({"eos_token_id": [151645, 151643]})).expect("a list");
    assert_eq!(list.eos_token_ids, [151645, 151643]);
}

#[test]
fn which_layers_are_sparse() {
    let config = with(
        sparse(),
        json!({"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3], "max_window_layers": 8}),
    );
    let config = config.expect("every second layer");
    let found: Vec<_> = (0..8).filter(|&layer| config.is_sparse(layer)).collect();
    assert_eq!(found, [1, 5, 7]);
    // The dense layers need their size; a model without any does not.
    let field = |error: ConfigError| match error {
        ConfigError::Missing { field, .. } => field,
        other => panic!("found {other}"),
    };
    let error = with(sparse(), json!({"decoder_sparse_step": 2, "intermediate_size": null}));
    assert_eq!(field(error.expect_err("dense layers without a size")), "intermediate_size");
    assert_eq!(
        with(sparse(), json!({"intermediate_size": null})).expect("all sparse").intermediate_size,
        0
    );
}

#[test]
fn windows_and_chunks_without_effect() {
    for fields in [
        json!({"use_sliding_window": false, "sliding_window": 128, "max_window_layers": 0}),
        json!({"use_sliding_window": true, "sliding_window": null}),
        json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 28}),
        json!({"use_sliding_window": true, "sliding_window": 40960, "max_window_layers": 0}),
        json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": null}),
        json!({"dual_chunk_attention_config": {"chunk_size": 40960}}),
    ] {
        assert!(with(dense(), fields.clone()).is_ok(), "{fields}");
    }
    for fields in [
        json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 27}),
        json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": null, "num_hidden_layers": 29}),
        json!({"layer_types": (0..28).map(|i| if i == 9 { "sliding_attention" } else { "full_attention" }).collect::<Vec<_>>()}),
    ] {
        let error = with(dense(), fields.clone()).expect_err("a window that has an effect");
        assert!(matches!(error, ConfigError::Unsupported { .. }), "{fields}: {error}");
    }
    // A window that is not stated is one of 4096, unlike one that is null.
    let mut unstated = sparse();
    unstated["use_sliding_window"] = json!(true);
    unstated.as_object_mut().expect("an object").remove("sliding_window");
    assert!(matches!(parse(&unstated), Err(ConfigError::Unsupported { .. })));
    // The mixture of experts slides in every layer, whatever max_window_layers says, or the types
    // of the layers, which decide in a dense model.
    let fields =
        json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 48});
    assert!(matches!(with(sparse(), fields), Err(ConfigError::Unsupported { .. })));
    let types = |layers| json!({"use_sliding_window": true, "sliding_window": 128, "layer_types": vec!["full_attention"; layers]});
    assert!(with(dense(), types(28)).is_ok());
    assert!(matches!(with(sparse(), types(48)), Err(ConfigError::Unsupported { .. })));
}

#[test]
fn sizes_that_would_take_minutes_are_refused_at_once() {
    for text in [include_str!("data/slow-config.json"), include_str!("data/slow-config-400.json")] {
        let value: Value = serde_json::from_str(text).expect("JSON");
        let error = parse(&value).expect_err("2147483647 layers");
        assert!(matches!(&error, ConfigError::Range { field, .. } if field == "num_hidden_layers"));
        assert!(error.to_string().contains("2147483647, expected a whole number in 1..=1024"));
    }
    let long = json!({"mlp_only_layers": vec![0; 1025]});
    assert!(matches!(with(sparse(), long), Err(ConfigError::Range { .. })));
    assert!(matches!(with(sparse(), json!({"num_experts": 8193})), Err(ConfigError::Range { .. })));
}

#[test]
fn values_that_programs_write_in_other_forms() {
    let heads = with(dense(), json!({"num_key_value_heads": null})).expect("as many as queries");
    assert_eq!(heads.num_key_value_heads, heads.num_attention_heads);
    let none = with(dense(), json!({"quantization_config": {}})).expect("nothing is quantized");
    assert_eq!(none.quantization_bits, None);
    let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 64.0}});
    let RopeScaling::Yarn(yarn) = with(dense(), yarn).expect("a whole number").rope.scaling else {
        panic!("YaRN is asked for");
    };
    assert_eq!(yarn.original_max_position_embeddings, 64);
    for length in [json!(64.5), json!(0.0), json!(1e12)] {
        let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": length}});
        with(dense(), yarn).expect_err("not a length");
    }
    // An id that no answer needs may be beyond the vocabulary.
    assert_eq!(
        with(dense(), json!({"eos_token_id": 151936})).expect("ids").eos_token_ids,
        [151936]
    );
    for kind in ["linear", "dynamic"] {
        let error = with(dense(), json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}}))
            .expect_err("not computed");
        assert!(
            error.to_string().contains(&format!("rope_scaling.rope_type is {kind}")),
            "{error}"
        );
    }
}

#[test]
fn quantized_by_this_project() {
    for bits in [4, 8] {
        let fields = json!({"quantization_config": {"quant_method": "group32", "bits": bits}});
        assert_eq!(with(dense(), fields).expect("quantized").quantization_bits, Some(bits));
    }
}

#[test]
fn sizes_of_codes() {
    let config = |fields: &str| {
        let value: Value = serde_json::from_str(fields).expect("JSON");
        json!({"quantization_config": value})
    };
    for valid in [
        r#"{"quant_method": "gptq", "bits": 4, "group_size": -1}"#,
        r#"{"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128}"#,
        r#"{"quant_method": "fp8", "weight_block_size": [128, 64]}"#,
        r#"{"quant_method": "fp8", "weight_block_size": null}"#,
    ] {
        with(dense(), config(valid)).expect(valid);
    }
    for (fields, variant, name) in [
        (r#"{"quant_method": "gptq", "bits": "4"}"#, "type", "bits"),
        (r#"{"quant_method": "gptq", "bits": 0}"#, "range", "bits"),
        (r#"{"quant_method": "awq", "group_size": 0}"#, "range", "group_size"),
        (r#"{"quant_method": "awq", "group_size": "128"}"#, "type", "group_size"),
        (r#"{"quant_method": "fp8", "weight_block_size": [0, 128]}"#, "range", "weight_block_size"),
        (r#"{"quant_method": "fp8", "weight_block_size": [128]}"#, "range", "weight_block_size"),
        (r#"{"quant_method": "fp8", "weight_block_size": 128}"#, "type", "weight_block_size"),
    ] {
        rejected(dense, &[(config(fields), variant, &format!("quantization_config.{name}"))]);
    }
}

#[test]
fn missing_fields() {
    let required = [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ];
    let cases: Vec<_> = required.map(|field| (json!({field: null}), "missing", field)).into();
    rejected(dense, &cases);
    let required = ["num_experts", "num_experts_per_tok", "moe_intermediate_size"];
    let mut cases: Vec<_> = required.map(|field| (json!({field: null}), "missing", field)).into();
    cases.push((json!({"head_dim": null, "hidden_size": 1000}), "missing", "head_dim"));
    rejected(sparse, &cases);
    rejected(
        dense,
        &[
            (json!({"rope_scaling": {"rope_type": "yarn"}}), "missing", "rope_scaling.factor"),
            (
                json!({"quantization_config": {"bits": 4}}),
                "missing",
                "quantization_config.quant_method",
            ),
            (
                json!({"quantization_config": {"quant_method": "group32"}}),
                "missing",
                "quantization_config.bits",
            ),
        ],
    );
}

#[test]
fn mistyped_fields() {
    rejected(
        dense,
        &[
            (json!({"model_type": 3}), "type", "model_type"),
            (json!({"hidden_size": "1024"}), "type", "hidden_size"),
            (json!({"hidden_size": 1024.5}), "type", "hidden_size"),
            (json!({"hidden_size": [1024]}), "type", "hidden_size"),
            (json!({"rms_norm_eps": "1e-6"}), "type", "rms_norm_eps"),
            (json!({"tie_word_embeddings": 1}), "type", "tie_word_embeddings"),
            (json!({"attention_bias": "no"}), "type", "attention_bias"),
            (json!({"eos_token_id": "x"}), "type", "eos_token_id"),
            (json!({"eos_token_id": [1, -1]}), "type", "eos_token_id"),
            (json!({"eos_token_id": 1u64 << 40}), "type", "eos_token_id"),
            (json!({"rope_scaling": "yarn"}), "type", "rope_scaling"),
            (json!({"rope_scaling": {"rope_type": 7}}), "type", "rope_scaling.rope_type"),
            (json!({"rope_parameters": 5}), "type", "rope_parameters"),
            (json!({"torch_dtype": 16}), "type", "torch_dtype"),
            (json!({"layer_types": "full_attention"}), "type", "layer_types"),
            (json!({"quantization_config": true}), "type", "quantization_config"),
        ],
    );
    rejected(
        sparse,
        &[
            (json!({"mlp_only_layers": 3}), "type", "mlp_only_layers"),
            (json!({"mlp_only_layers": ["3"]}), "type", "mlp_only_layers"),
            (json!({"norm_topk_prob": "true"}), "type", "norm_topk_prob"),
        ],
    );
    let error = parse(&json!([1, 2])).expect_err("a list is no configuration");
    assert_eq!(
        error.to_string(),
        "models/x/config.json: field (the whole file) is [1,2], expected an object"
    );
}

#[test]
fn fields_out_of_range() {
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
    ];
    for value in [json!(0), json!(-1), json!(1u64 << 31), json!(u64::MAX)] {
        let cases: Vec<_> = sizes.map(|field| (json!({field: value}), "range", field)).into();
        rejected(dense, &cases);
    }
    rejected(
        dense,
        &[
            (json!({"head_dim": 127}), "range", "head_dim"),
            (json!({"rms_norm_eps": -1e-6}), "range", "rms_norm_eps"),
            (json!({"rms_norm_eps": 2.0}), "range", "rms_norm_eps"),
            (json!({"rope_theta": 1.0}), "range", "rope_theta"),
            (json!({"rope_theta": -5.0}), "range", "rope_theta"),
            (json!({"rope_theta": 1e300}), "range", "rope_theta"),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}),
                "range",
                "rope_scaling.factor",
            ),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": -1}}),
                "range",
                "rope_scaling.beta_slow",
            ),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": 0}}),
                "range",
                "rope_scaling.attention_factor",
            ),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}}),
                "range",
                "rope_scaling.original_max_position_embeddings",
            ),
            // Each size is allowed by itself, all together are not.
            (
                json!({"hidden_size": 2147483646, "intermediate_size": 2147483647, "head_dim": 128}),
                "range",
                "hidden_size",
            ),
        ],
    );
    rejected(
        sparse,
        &[
            (json!({"num_experts": 0}), "range", "num_experts"),
            (json!({"num_local_experts": 0}), "range", "num_local_experts"),
            (json!({"num_experts_per_tok": 0}), "range", "num_experts_per_tok"),
            (json!({"moe_intermediate_size": 0}), "range", "moe_intermediate_size"),
            (json!({"decoder_sparse_step": 0}), "range", "decoder_sparse_step"),
        ],
    );
}

#[test]
fn contradictions() {
    rejected(
        dense,
        &[
            (json!({"num_key_value_heads": 3}), "contradiction", "num_attention_heads"),
            (json!({"num_key_value_heads": 32}), "contradiction", "num_attention_heads"),
            (json!({"rope_parameters": {"rope_theta": 5e6}}), "contradiction", "rope_theta"),
            (json!({"rope_scaling": {"rope_theta": 5e6}}), "contradiction", "rope_theta"),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_parameters": {"type": "yarn", "factor": 4}}),
                "contradiction",
                "rope_scaling",
            ),
            (json!({"layer_types": ["full_attention"]}), "contradiction", "layer_types"),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}}),
                "contradiction",
                "rope_scaling.beta_fast",
            ),
        ],
    );
    rejected(
        sparse,
        &[
            (json!({"num_experts_per_tok": 129}), "contradiction", "num_experts_per_tok"),
            (json!({"num_local_experts": 64}), "contradiction", "num_experts"),
        ],
    );
}

#[test]
fn unsupported_variants() {
    rejected(
        dense,
        &[
            (json!({"model_type": "llama"}), "unsupported", "model_type"),
            (json!({"attention_bias": true}), "unsupported", "attention_bias"),
            (
                json!({"dual_chunk_attention_config": {"chunk_size": 9}}),
                "unsupported",
                "dual_chunk_attention_config",
            ),
            (json!({"hidden_act": "gelu"}), "unsupported", "hidden_act"),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}),
                "unsupported",
                "rope_scaling.rope_type",
            ),
            (
                json!({"rope_scaling": {"partial_rotary_factor": 0.5}}),
                "unsupported",
                "rope_scaling.partial_rotary_factor",
            ),
            (
                json!({"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}),
                "unsupported",
                "quantization_config.quant_method",
            ),
            (
                json!({"quantization_config": {"quant_method": "group32", "bits": 3}}),
                "unsupported",
                "quantization_config.bits",
            ),
        ],
    );
}

#[test]
fn files_that_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let error =
        Config::read(&ModelSource::open(folder.path()).expect("a model")).expect_err("no file");
    assert!(
        matches!(&error, ConfigError::Document(_)) && error.to_string().contains("no config.json"),
        "{error}"
    );
    for text in ["{\"hidden_size\": ", "", "\u{feff}{}", "not json", "{\"a\": NaN}"] {
        std::fs::write(folder.path().join("config.json"), text).expect("writable");
        let error = Config::read(&ModelSource::open(folder.path()).expect("a model"))
            .expect_err("not JSON");
        assert!(matches!(&error, ConfigError::Json { .. }), "{text:?}: {error}");
        assert!(error.to_string().contains("config.json: is not JSON: "), "{error}");
    }
    std::fs::write(folder.path().join("config.json"), [0xff, 0xfe, 0x00]).expect("writable");
    assert!(matches!(
        Config::read(&ModelSource::open(folder.path()).expect("a model")),
        Err(ConfigError::Json { .. })
    ));
    std::fs::write(folder.path().join("config.json"), dense().to_string()).expect("writable");
    assert_eq!(
        Config::read(&ModelSource::open(folder.path()).expect("a model")).expect("valid"),
        parse(&dense()).expect("valid")
    );
}
