//! `generation_config.json`: the published form, and malformed ones.

use std::path::Path;

use qwen3_model::Config;
use qwen3_model::ModelSource;
use qwen3_model::config::ConfigError;
use qwen3_model::generation_config::{GenerationConfig, eos_token_ids};
use serde_json::json;

#[test]
fn generation_config() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(
        GenerationConfig::read(&ModelSource::open(folder.path()).expect("a model"))
            .expect("absent is fine"),
        GenerationConfig::default()
    );
    let published = json!({
        "bos_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"
    });
    std::fs::write(folder.path().join("generation_config.json"), published.to_string())
        .expect("writable");
    let config = GenerationConfig::read(&ModelSource::open(folder.path()).expect("a model"))
        .expect("published");
    assert_eq!(config.eos_token_ids, [151645, 151643]);
    assert_eq!((config.do_sample, config.temperature), (Some(true), Some(0.6)));
    assert_eq!((config.top_k, config.top_p), (Some(20), Some(0.95)));
    assert_eq!((config.min_p, config.repetition_penalty), (None, None));

    let file = Path::new("generation_config.json");
    for (fields, variant) in [
        (json!({"temperature": -0.1}), "Range"),
        (json!({"top_p": 0.0}), "Range"),
        (json!({"top_p": 1.1}), "Range"),
        (json!({"top_k": -1}), "Range"),
        (json!({"min_p": 2}), "Range"),
        (json!({"repetition_penalty": 0}), "Range"),
        (json!({"do_sample": "yes"}), "Type"),
        (json!({"eos_token_id": {}}), "Type"),
    ] {
        let error = GenerationConfig::from_json(file, &fields).expect_err("malformed");
        assert!(format!("{error:?}").starts_with(variant), "{fields}: {error:?}");
        assert!(error.to_string().starts_with("generation_config.json: field "), "{error}");
    }
    // What only those who sample use is nothing to those who ask where an answer ends.
    let model: serde_json::Value =
        serde_json::from_str(include_str!("data/dense-tied-bf16/config.json")).expect("JSON");
    let model = Config::from_json(Path::new("config.json"), &model).expect("valid");
    let broken = json!({"top_p": 0.0, "eos_token_id": 3});
    std::fs::write(folder.path().join("generation_config.json"), broken.to_string())
        .expect("writable");
    assert_eq!(
        eos_token_ids(&ModelSource::open(folder.path()).expect("a model"), &model).expect("ids"),
        [3]
    );
    // Without ids of its own those of the config end an answer.
    let beyond = Config { eos_token_ids: vec![model.vocab_size as u32], ..model.clone() };
    std::fs::write(folder.path().join("config.json"), "{}").expect("writable");
    std::fs::write(folder.path().join("generation_config.json"), "{}").expect("writable");
    let error = eos_token_ids(&ModelSource::open(folder.path()).expect("a model"), &beyond);
    assert!(matches!(error, Err(ConfigError::Contradiction { .. })), "{error:?}");
    std::fs::write(folder.path().join("generation_config.json"), "{").expect("writable");
    assert!(matches!(
        eos_token_ids(&ModelSource::open(folder.path()).expect("a model"), &model),
        Err(ConfigError::Json { .. })
    ));
    assert!(matches!(
        GenerationConfig::read(&ModelSource::open(folder.path()).expect("a model")),
        Err(ConfigError::Json { .. })
    ));
}
