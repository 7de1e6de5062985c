//! `embed` and `rerank`: the vectors and probabilities of other people's programs, on any number of
//! ranks and under every strategy.

mod program;

use std::fs;
use std::path::Path;

use program::{AUSTEN, assert_one_line, json, run};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");

/// The ways to divide a model that the tests take.
const DIVISIONS: [&[&str]; 9] = [
    &[],
    &["--isa", "scalar"],
    &["--ranks", "2"],
    &["--ranks", "2", "--strategy", "sequence"],
    &["--ranks", "3", "--strategy", "sequence"],
    &["--ranks", "3", "--strategy", "heads"],
    &["--ranks", "4", "--grid", "tp=2,sp=2"],
    &["--ranks", "5", "--strategy", "heads"],
    &["--ranks", "5", "--strategy", "sequence"],
];

fn model(case: &str) -> String {
    format!("{DATA}/{case}")
}

/// The ids of each text of a case, as the option `--tokens` takes them, and the other tensors.
fn reference(case: &str, names: &[&str]) -> (Vec<String>, Vec<Vec<f32>>) {
    let bytes = fs::read(format!("{}/expected.safetensors", model(case))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<i64> {
        let data = tensors.tensor(name).unwrap();
        data.data().as_chunks().0.iter().map(|word| i64::from_le_bytes(*word)).collect()
    };
    let (ids, mut start) = (words("input_ids"), 0);
    let lists = words("lengths").into_iter().map(|length| {
        let own: Vec<_> = ids[start..][..length as usize].iter().map(i64::to_string).collect();
        start += length as usize;
        own.join(",")
    });
    let lists = lists.collect();
    let numbers = |name: &&str| {
        let data = tensors.tensor(name).unwrap();
        data.data().as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
    };
    (lists, names.iter().map(numbers).collect())
}

fn numbers(value: &Value) -> Vec<f32> {
    let list = value.as_array().unwrap();
    list.iter()
        .flat_map(|one| match one.as_f64() {
            Some(number) => vec![number as f32],
            None => numbers(one),
        })
        .collect()
}

fn assert_near(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * largest, "{what}: {found} {expected}");
    }
}

#[test]
fn embeddings_are_those_of_the_reference() {
    let (lists, expected) = reference("embedding", &["embedding", "embedding_cut"]);
    for (index, division) in DIVISIONS.iter().enumerate() {
        let (cut, expected) = match index % 2 {
            0 => (&[][..], &expected[0]),
            _ => (&["--dimensions", "32"][..], &expected[1]),
        };
        let model = model("embedding");
        let mut args = vec!["embed", "--model", &model, "--json", "--tokens"];
        args.extend(lists.iter().map(String::as_str));
        args.extend([cut, division].concat());
        let shown = json(&args);
        assert_near(&numbers(&shown["embeddings"]), expected, 2e-4, &format!("{division:?}"));
        assert_eq!(shown["prompt_tokens"], 67);
    }
}

#[test]
fn a_model_without_head_embeds_whatever_its_config_says_of_ties_and_generates_nothing() {
    let folder = copy("embedding", |config| config["tie_word_embeddings"] = false.into());
    let path = folder.path().to_str().unwrap();
    let (lists, expected) = reference("embedding", &["embedding"]);
    let mut args = vec!["embed", "--model", path, "--ranks", "2"];
    // Without --json each embedding has its line, and all of the output is the same object.
    lists.iter().for_each(|list| args.extend(["--tokens", list]));
    let shown = run(&args);
    assert_eq!(shown.stdout.lines().count(), lists.len() + 2);
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_near(&numbers(&shown["embeddings"]), &expected[0], 2e-4, "untied");
    for command in ["generate", "logits"] {
        let output = folder.path().join("logits");
        let more: &[&str] = match command {
            "logits" => &["--output", output.to_str().unwrap()],
            _ => &[],
        };
        let refused = run(&[&[command, "--model", path, "--tokens", "1,2"], more].concat());
        assert_one_line(&refused, &["no head over the vocabulary"]);
    }
}

#[test]
fn probabilities_are_those_of_the_reference() {
    for (case, name) in [("reranker", "p_yes"), ("reranker-seqcls", "p")] {
        let (lists, expected) = reference(case, &[name]);
        let model = model(case);
        for division in DIVISIONS {
            let mut args = vec!["rerank", "--model", &model, "--json", "--tokens"];
            args.extend(lists.iter().map(String::as_str));
            args.extend(division);
            let shown = json(&args);
            let found = numbers(&shown["scores"]);
            for (found, expected) in found.iter().zip(&expected[0]) {
                assert!(
                    (found - expected).abs() <= 1e-4,
                    "{case} {division:?}: {found} {expected}"
                );
            }
            assert_eq!(found.len(), expected[0].len());
            assert_eq!(shown["prompt_tokens"], 95);
        }
    }
}

/// A text is embedded as its tokens with `<|endoftext|>` (4087 in this tokenizer) behind them.
#[test]
fn texts_lines_and_tokens_give_the_same_embeddings() {
    let shown = json(&["tokenize", "--model", AUSTEN, "--text", "Elizabeth was", "--json"]);
    let ids: Vec<String> = shown["ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::to_string)
        .chain(["4087".into()])
        .collect();
    let ids = ids.join(",");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("texts");
    fs::write(&file, "Elizabeth was\n\nElizabeth was\n").unwrap();
    let embed = |input: &[&str]| json(&[&["embed", "--model", AUSTEN, "--json"], input].concat());
    let of_text = embed(&["--text", "Elizabeth was", "", "--text", "Elizabeth was"]);
    assert_eq!(of_text, embed(&["--tokens", &ids, "4087", &ids]));
    assert_eq!(of_text, embed(&["--file", file.to_str().unwrap()]));
    let query = embed(&["--text", "Elizabeth was", "--instruct", "Find"]);
    assert_eq!(query, embed(&["--text", "Instruct: Find\nQuery:Elizabeth was"]));
    assert_ne!(query["embeddings"][0], of_text["embeddings"][0]);
    let vector = numbers(&query["embeddings"][0]);
    let norm: f32 = vector.iter().map(|x| x * x).sum();
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");
}

/// A copy of a case with another configuration.
fn copy(case: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_files(Path::new(&model(case)), folder.path());
    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut config);
    fs::write(&file, config.to_string()).unwrap();
    folder
}

fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&target).unwrap();
            copy_files(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// `rerank.json` comes before the tokenizer, which here has "yes" as two tokens.
#[test]
fn a_file_may_name_the_answers() {
    let model = program::Copy::new();
    let args = ["rerank", "--model", model.path(), "--query", "Who?", "--document", "The sea", "I"];
    let scores = |yes: u32, no: u32| -> Vec<f32> {
        fs::write(model.file("rerank.json"), json!({ "yes": yes, "no": no }).to_string()).unwrap();
        let shown = run(&args);
        assert!(shown.success, "{shown:?}");
        shown.stdout.lines().map(|line| line.parse().unwrap()).collect()
    };
    let (one, other) = (scores(304, 2154), scores(2154, 304));
    assert_eq!(one.len(), 2);
    assert!(one.iter().zip(&other).all(|(one, other)| (one + other - 1.0).abs() < 1e-5));
    for (text, words) in [
        (r#"{"yes": 1}"#, &["rerank.json", "field no"][..]),
        (r#"{"yes": 1, "no": 99999}"#, &["\"no\"", "99999", "4096"]),
        ("[", &["rerank.json", "is not JSON"]),
    ] {
        fs::write(model.file("rerank.json"), text).unwrap();
        assert_one_line(&run(&args), words);
    }
}

#[test]
fn bad_input_is_named() {
    let embedding = model("embedding");
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap();
    let long = vec!["1"; 513].join(",");
    for (args, words) in [
        (&["--tokens", "1", "--dimensions", "0"][..], &["dimensions is 0", "1 to 96"][..]),
        (&["--tokens", "1", "--dimensions", "97"], &["dimensions is 97", "1 to 96"]),
        (&["--tokens", "1", "2,333"], &["text 2", "333"]),
        (&["--tokens", "1,x"], &["--tokens", "\"x\"", "1,2,3"]),
        (&["--tokens", &long], &["text 1 has 513 tokens", "at most 512"]),
        (&["--text", "x"], &["tokenizer.json"]),
        (&["--file", empty], &["--file", "has no line"]),
        (&[], &["--text", "--file", "--tokens"]),
        (&["--text", "x", "--tokens", "1"], &["--tokens"]),
    ] {
        let shown = run(&[&["embed", "--model", &embedding], args].concat());
        assert_one_line(&shown, words);
    }
    for (model, args, words) in [
        (AUSTEN, &["--query", "q", "--document", "d"][..], &["\"yes\" has", "expected 1"][..]),
        (AUSTEN, &["--query", " ", "--document", "d"], &["--query", "an empty text"]),
        (AUSTEN, &["--query", "q", "--document", "d", ""], &["--document", "document 2 is empty"]),
        (AUSTEN, &["--document", "d"], &["--query"]),
        (&embedding, &["--tokens", "1"], &["score.weight", "expected a reranker"]),
    ] {
        assert_one_line(&run(&[&["rerank", "--model", model], args].concat()), words);
    }
}

#[test]
fn other_poolings_and_modules_are_refused() {
    let pooling = |text: &str| {
        let folder = copy("embedding", |_| {});
        fs::write(folder.path().join("1_Pooling/config.json"), text).unwrap();
        folder
    };
    let modules = |value: Value| {
        let folder = copy("embedding", |_| {});
        fs::write(folder.path().join("modules.json"), value.to_string()).unwrap();
        folder
    };
    let mean = json!({ "pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": false });
    let kind = |name: &str| format!("sentence_transformers.models.{name}");
    for (folder, words) in [
        (pooling(&mean.to_string()), &["1_Pooling/config.json", "pooling_mode_mean_tokens"][..]),
        (pooling(r#"{"pooling_mode":"cls"}"#), &["pooling_mode \"cls\""]),
        (pooling("{}"), &["no pooling mode"]),
        (pooling("{"), &["1_Pooling/config.json", "is not JSON"]),
        (modules(json!([])), &["modules.json", "no list of modules"]),
        (modules(json!([{ "type": kind("Transformer") }])), &["no module that pools"]),
        (modules(json!([{ "type": kind("Dense") }])), &["models.Dense"]),
        (modules(json!([{ "type": kind("Pooling"), "path": "../x" }])), &["leads out of"]),
        (modules(json!([{ "type": kind("Pooling"), "path": "9" }])), &["no 9/config.json"]),
    ] {
        let path = folder.path().to_str().unwrap();
        assert_one_line(&run(&["embed", "--model", path, "--tokens", "1"]), words);
    }
}
