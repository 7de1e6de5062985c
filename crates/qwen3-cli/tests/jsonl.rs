//! `generate --jsonl`: many requests of a file at once.

mod program;

use program::{AUSTEN, json, read_json, run};
use serde_json::{Value, json};

/// Runs `generate --jsonl` on a file with these lines.
fn answer(lines: &[Value], extra: &[&str]) -> program::Run {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("requests.jsonl");
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&file, lines.join("\n\n")).unwrap();
    let file = file.to_str().unwrap();
    run(&[&["generate", "--model", AUSTEN, "--jsonl", file, "--kv", "f32"], extra].concat())
}

fn results(run: &program::Run) -> Vec<Value> {
    run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn answers_are_those_that_the_requests_get_alone_in_the_order_of_the_file() {
    let cases = read_json(format!("{AUSTEN}/expected.json"));
    let cases = cases.as_array().unwrap();
    let mut lines: Vec<Value> = cases
        .iter()
        .map(|case| {
            let tokens = &case["prompt_ids"];
            json!({ "tokens": tokens, "max_new_tokens": case["greedy_ids"].as_array().unwrap().len() })
        })
        .collect();
    lines
        .push(json!({ "id": "sampled", "prompt": "Elizabeth was", "temperature": 1.0, "seed": 3 }));
    for ranks in ["1", "2"] {
        let run = answer(&lines, &["--max-new-tokens", "24", "--ranks", ranks]);
        assert!(run.success, "{run:?}");
        let results = results(&run);
        assert_eq!(results.len(), lines.len());
        for (index, (result, case)) in results.iter().zip(cases).enumerate() {
            assert_eq!((&result["id"], &result["ids"]), (&json!(index), &case["greedy_ids"]));
        }
        let alone = json(&[
            "generate",
            "--json",
            "--model",
            AUSTEN,
            "--kv",
            "f32",
            "--prompt",
            "Elizabeth was",
            "--temperature",
            "1",
            "--seed",
            "3",
            "--max-new-tokens",
            "24",
        ]);
        let last = results.last().unwrap();
        assert_eq!((last["id"].as_str(), &last["text"]), (Some("sampled"), &alone["text"]));
        assert_eq!((&last["stop"], &last["ids"]), (&alone["stop"], &alone["ids"]));
    }
}

#[test]
fn a_bad_line_has_its_own_error() {
    let lines = [
        json!({ "prompt": "one" }),
        json!({ "id": 7, "prompt": "two", "tokens": [1] }),
        json!({ "id": "three", "prompt": "three", "top_p": 2.0 }),
        json!({ "prompt": "four", "temprature": 1 }),
        json!({ "messages": [{ "role": "user", "content": "What is 17 + 15?" }] }),
        json!({ "tokens": [1, 999_999] }),
    ];
    let run = answer(&lines, &["--max-new-tokens", "3"]);
    assert!(!run.success && run.stderr.contains("4 of 6 requests failed"), "{run:?}");
    let results = results(&run);
    let ids: Vec<_> = results.iter().map(|result| result["id"].clone()).collect();
    assert_eq!(ids, [json!(0), json!(7), json!("three"), json!(3), json!(4), json!(5)]);
    for (index, words) in [
        (1, "exactly one of prompt, messages and tokens"),
        (2, "top_p is 2, expected"),
        (3, "unknown field `temprature`"),
        (5, "prompt token 1 has id 999999"),
    ] {
        let error = results[index]["error"].as_str().unwrap();
        assert!(error.contains(words), "{error}");
    }
    for index in [0, 4] {
        assert_eq!(results[index]["ids"].as_array().unwrap().len(), 3);
    }
}
