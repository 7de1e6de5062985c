//! What quantized weights cost in accuracy on the bundled model, quantized at load and as a
//! checkpoint of their own.

mod program;

use program::{AUSTEN, json, read_json, run};

fn perplexity(model: &str, extra: &[&str]) -> f64 {
    let file = format!("{AUSTEN}/sample.txt");
    let mut args =
        vec!["perplexity", "--json", "--model", model, "--file", &file, "--threads", "1"];
    args.extend(extra);
    json(&args)["perplexity"].as_f64().unwrap()
}

#[test]
fn perplexity_stays_near_the_stored_weights() {
    let reference = perplexity(AUSTEN, &[]);
    let dir = tempfile::tempdir().unwrap();
    for (format, bound) in [("q8", 0.005), ("q4", 0.05)] {
        let at_load = perplexity(AUSTEN, &["--weights", format]);
        assert!(
            (at_load / reference - 1.0).abs() < bound,
            "{format}: {at_load}, stored {reference}"
        );
        assert_ne!(at_load, reference, "{format} was not used");

        let copy = dir.path().join(format);
        let copy = copy.to_str().unwrap();
        let written = run(&["quantize", "--model", AUSTEN, "--weights", format, copy]);
        assert!(written.success, "{written:?}");
        let loaded = perplexity(copy, &["--ranks", "2"]);
        assert!(
            (loaded / reference - 1.0).abs() < bound,
            "{format} from its own checkpoint: {loaded}, stored {reference}"
        );
    }
}

#[test]
fn sums_and_spellings_survive_eight_bits() {
    let mut asked = 0;
    for case in read_json(format!("{AUSTEN}/expected.json")).as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        if !(prompt.starts_with("What is") || prompt.starts_with("Spell")) {
            continue;
        }
        let args = ["generate", "--json", "--model", AUSTEN, "--weights", "q8", "--threads", "1"];
        let found = json(&[&args[..], &["--chat", "--no-thinking", "--prompt", prompt]].concat());
        assert_eq!(found["text"], case["text"], "{prompt}");
        asked += 1;
    }
    assert!(asked >= 4, "only {asked} questions among the reference's cases");
}
