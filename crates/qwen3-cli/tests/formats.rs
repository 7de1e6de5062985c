//! Files of other programs on the command line.

mod program;

use program::run;
use serde_json::Value;

const GGUF: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../qwen3-model/tests/data/gguf-ud-mix/model.gguf");
const FP8: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../qwen3-model/tests/data/fp8-block-moe");

#[test]
fn the_tokenizer_in_a_gguf_file_gives_the_ids_of_other_programs() {
    let cases = std::fs::read_to_string(GGUF.replace("model.gguf", "tokenize.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let shown = run(&["tokenize", "--model", GGUF, "--text", text, "--json"]);
        let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
        assert_eq!(shown["ids"], case["ids"], "{text:?}");
    }
}

#[test]
fn loading_says_what_it_rounds() {
    let generate = |model: &str, more: &[&str]| {
        let common = ["generate", "--model", model, "--tokens", "1,2,3", "--ranks", "2"];
        run(&[&common[..], &["--max-new-tokens", "2"], more].concat())
    };
    let rounded = generate(GGUF, &[]);
    assert!(rounded.success, "{rounded:?}");
    assert!(rounded.stderr.contains("weights: no packed format"), "{rounded:?}");
    assert!(rounded.stderr.contains("RMS error of 0."), "{rounded:?}");
    for (model, more) in [(GGUF, &["--weights", "f32"][..]), (FP8, &[])] {
        let exact = generate(model, more);
        assert!(exact.success && !exact.stderr.contains("weights:"), "{exact:?}");
    }
}
