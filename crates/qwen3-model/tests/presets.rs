//! The published shapes: names and numbers of parameters.

use std::path::Path;

use qwen3_model::Config;
use qwen3_model::names::tensor_specs;
use qwen3_model::presets::Preset;

#[test]
fn presets_have_the_published_numbers_of_parameters() {
    for (preset, parameters) in [
        (Preset::Dense0_6B, 596_049_920),
        (Preset::Dense1_7B, 1_720_574_976),
        (Preset::Dense4B, 4_022_468_096),
        (Preset::Dense8B, 8_190_735_360),
        (Preset::Dense14B, 14_768_307_200),
        (Preset::Dense32B, 32_762_123_264),
        (Preset::Moe30B, 30_532_122_624),
    ] {
        let config =
            Config::from_json(Path::new("config.json"), &preset.config(None)).expect("valid");
        assert_eq!(config.parameters(), parameters, "{preset}");
        let listed: u64 = tensor_specs(&config).map(|spec| spec.elements() as u64).sum();
        assert_eq!(listed, parameters, "{preset}");
        assert_eq!(
            (config.vocab_size, config.head_dim, config.context_length()),
            (151_936, 128, 40_960)
        );
        assert_eq!(config.eos_token_ids, [151_645]);
    }
}

/// That of Qwen3-Coder-Next is the published number without the layer that predicts a second token;
/// the others are those of the text parts.
#[test]
fn hybrid_presets_have_the_published_numbers_of_parameters() {
    for (preset, parameters) in [
        (Preset::Hybrid0_8B, 752_393_024),
        (Preset::Hybrid4B, 4_205_751_296),
        (Preset::Hybrid27B, 26_895_998_464),
        (Preset::Hybrid35BA3B, 34_660_610_688),
        (Preset::Next80B, 79_674_391_296),
    ] {
        let config =
            Config::from_json(Path::new("config.json"), &preset.config(None)).expect("valid");
        assert_eq!(config.parameters(), parameters, "{preset}");
        assert_eq!(config.attention_layers(), config.num_hidden_layers / 4);
    }
}

#[test]
fn presets_have_names() {
    for preset in Preset::ALL {
        assert_eq!(preset.to_string().parse(), Ok(preset));
    }
    let error = "0.5b".parse::<Preset>().expect_err("no such preset");
    assert_eq!(
        error.to_string(),
        "found `0.5b`, expected 0.6b, 1.7b, 4b, 8b, 14b, 32b, 30b-a3b, qwen3.5-0.8b, qwen3.5-4b, \
         qwen3.5-27b, qwen3.5-35b-a3b, qwen3-next-80b-a3b, tiny, tiny-moe, tiny-hybrid"
    );
}
