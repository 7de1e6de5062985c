//! Configurations with some fields replaced, and what must be rejected.

use std::path::Path;

use qwen3_model::Config;
use qwen3_model::config::ConfigError;
use serde_json::Value;

pub fn parse(value: &Value) -> Result<Config, ConfigError> {
    Config::from_json(Path::new("models/x/config.json"), value)
}

/// The base with some fields replaced; `null` is the same as absent.
pub fn merged(mut base: Value, fields: &Value) -> Value {
    for (field, value) in fields.as_object().expect("an object") {
        base[field] = value.clone();
    }
    base
}

pub fn with(base: Value, fields: Value) -> Result<Config, ConfigError> {
    parse(&merged(base, &fields))
}

/// (fields, the error's variant, the field it names)
pub fn rejected(base: fn() -> Value, cases: &[(Value, &str, &str)]) {
    for (fields, variant, name) in cases {
        let error = with(base(), fields.clone()).expect_err(&format!("{fields} must be rejected"));
        let (found, field) = match &error {
            ConfigError::Missing { field, .. } => ("missing", field),
            ConfigError::Type { field, .. } => ("type", field),
            ConfigError::Range { field, .. } => ("range", field),
            ConfigError::Contradiction { field, .. } => ("contradiction", field),
            ConfigError::Unsupported { field, .. } => ("unsupported", field),
            ConfigError::Document(_) | ConfigError::Json { .. } => panic!("{fields}: {error}"),
        };
        assert_eq!((found, field.as_str()), (*variant, *name), "{fields}: {error}");
        let message = error.to_string();
        assert!(message.starts_with("models/x/config.json: "), "{message}");
        assert!(message.contains("expected "), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}
