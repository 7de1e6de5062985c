//! Configuration files of hybrid models: their forms, and one malformed input for each error.

mod configs;

use configs::{parse, rejected, with};
use qwen3_model::hybrid_config::DeltaLayout;
use serde_json::{Value, json};

fn hybrid() -> Value {
    qwen3_model::presets::Preset::Hybrid0_8B.config(None)
}

#[test]
fn hybrid_models_in_every_form() {
    let flat = parse(&hybrid()).expect("valid");
    let delta = flat.hybrid.as_ref().expect("a hybrid model");
    assert_eq!((flat.attention_layers(), flat.query_rows()), (6, 2 * 8 * 256));
    assert_eq!(
        (delta.conv_channels(), delta.group_size(), delta.layout),
        (6144, 1, DeltaLayout::Split)
    );
    assert_eq!(flat.rope.rotary_dim(flat.head_dim), 64);
    // With the decoder in an object of its own, and what only the images need.
    let mut text = hybrid();
    text["rope_parameters"]["mrope_section"] = json!([11, 11, 10]);
    text["output_gate_type"] = json!("swish");
    let nested = json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": true,
        "vision_config": {"depth": 12}
    });
    assert_eq!(parse(&nested).expect("valid"), flat);
    // Without types of layers, every fourth has attention.
    let mut interval = hybrid();
    interval.as_object_mut().expect("an object").remove("layer_types");
    assert_eq!(parse(&interval).expect("valid"), flat);
    // The older form, with fused projections.
    let mut next = with(
        hybrid(),
        json!({
            "model_type": "qwen3_next", "num_experts": 0, "rope_parameters": null,
            "rope_theta": 10_000_000, "partial_rotary_factor": 0.25
        }),
    )
    .expect("valid");
    assert_eq!(next.hybrid.as_ref().expect("a hybrid model").layout, DeltaLayout::Fused);
    next.hybrid = flat.hybrid.clone();
    assert_eq!(next, flat);
}

#[test]
fn hybrid_models_that_contradict_themselves() {
    rejected(
        hybrid,
        &[
            (json!({"layer_types": vec!["linear_attention"; 24]}), "unsupported", "layer_types"),
            (json!({"layer_types": ["full_attention"]}), "contradiction", "layer_types"),
            (json!({"layer_types": vec!["sliding_attention"; 24]}), "unsupported", "layer_types"),
            (
                json!({"layer_types": null, "full_attention_interval": 99}),
                "unsupported",
                "full_attention_interval",
            ),
            (json!({"linear_num_value_heads": 17}), "contradiction", "linear_num_value_heads"),
            (json!({"linear_conv_kernel_dim": 0}), "range", "linear_conv_kernel_dim"),
            (json!({"linear_key_head_dim": 5000}), "range", "linear_key_head_dim"),
            (json!({"linear_num_key_heads": null}), "missing", "linear_num_key_heads"),
            (json!({"attn_output_gate": false}), "unsupported", "attn_output_gate"),
            (json!({"output_gate_type": "sigmoid"}), "unsupported", "output_gate_type"),
            (
                json!({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 1.5}}),
                "range",
                "rope_parameters.partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.001}}),
                "range",
                "partial_rotary_factor",
            ),
            (json!({"model_type": "qwen3_5_moe"}), "missing", "num_experts"),
        ],
    );
}
