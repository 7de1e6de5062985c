//! Answers under public JSON schemas, chosen at random at temperature 1.
//!
//! `tests/data/README.md` names the schemas and their licences.

use std::sync::Mutex;
use std::thread;

use serde_json::{Value, json};

use super::{Running, chat, config, small, start, with};

const SCHEMAS: &str = include_str!("../data/schemas.jsonl");
/// Longest answer in tokens.
const MAX_TOKENS: usize = 1024;
/// Requests at the same time.
const CLIENTS: usize = 16;

/// What became of one schema.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Valid,
    Invalid,
    /// The answer was cut.
    Long,
    Refused,
}

/// The outcome and the text of the answer or error.
fn outcome(running: &Running, schema: &Value, seed: usize) -> (Outcome, String) {
    let fields = json!({
        "temperature": 1, "seed": seed,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    });
    let answer = running.post("/v1/chat/completions", &with(chat("Answer.", MAX_TOKENS), fields));
    if answer.status != 200 {
        return (Outcome::Refused, answer.body);
    }
    let choice = &answer.json()["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
    if choice["finish_reason"] != "stop" {
        return (Outcome::Long, text);
    }
    let value = serde_json::from_str(&text);
    let valid = value.is_ok_and(|value| jsonschema::validate(schema, &value).is_ok());
    (if valid { Outcome::Valid } else { Outcome::Invalid }, text)
}

#[test]
fn answers_under_public_schemas_end_and_are_valid() {
    let running = start(1, config(), &small());
    let cases: Vec<Value> =
        SCHEMAS.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(cases.len(), 300);
    let next = Mutex::new(cases.iter().enumerate());
    let counts = Mutex::new([0; 4]);
    let client = || {
        loop {
            let Some((at, case)) = next.lock().unwrap().next() else { return };
            let (outcome, text) = outcome(&running, &case["schema"], at);
            let name = format!("{} {}", case["source"], case["name"]);
            assert!(!matches!(outcome, Outcome::Invalid), "{name}: {text}");
            if matches!(outcome, Outcome::Refused) {
                println!("{name}: {text}");
            }
            counts.lock().unwrap()[outcome as usize] += 1;
        }
    };
    thread::scope(|scope| (0..CLIENTS).for_each(|_| drop(scope.spawn(client))));
    let [valid, _, long, refused] = counts.into_inner().unwrap();
    println!("{valid} valid, {long} cut, {refused} refused");
    assert!(valid >= 250, "{valid} answers end");
}
