//! Answers of a given structure, and calls that are asked for.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Answer, Running, chat, config, send, small, start, with};

/// A bounded schema, so that every answer ends.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["hero", "rake"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

fn follows_schema(text: &str) -> bool {
    let Ok(Value::Object(found)) = serde_json::from_str(text) else { return false };
    found.len() == 3
        && found["name"].as_str().is_some_and(|name| name.chars().count() <= 12)
        && found["age"].as_u64().is_some_and(|age| age <= 120)
        && (found["kind"] == "hero" || found["kind"] == "rake")
}

/// A request whose tokens are chosen at random.
fn random(seed: u64, fields: Value) -> Value {
    with(with(chat("Who is she?", 200), json!({"temperature": 1, "seed": seed})), fields)
}

const CHAT: &str = "/v1/chat/completions";

/// The text and the reason of the end, of the whole answer and of the streamed one.
fn both(running: &Running, request: &Value) -> [(String, String); 2] {
    let whole = running.ok(CHAT, request);
    let choice = &whole["choices"][0];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let streamed = running.post(CHAT, &with(request.clone(), json!({"stream": true})));
    assert_eq!(streamed.status, 200, "{}", streamed.body);
    let mut joined = (String::new(), String::new());
    for event in streamed.events() {
        let choice = &event["choices"][0];
        joined.0 += &text(&choice["delta"]["content"]);
        joined.1 += &text(&choice["finish_reason"]);
    }
    [(text(&choice["message"]["content"]), text(&choice["finish_reason"])), joined]
}

#[test]
fn answers_follow_their_structure_on_any_number_of_ranks() {
    let format = json!({"response_format": {
        "type": "json_schema",
        "json_schema": {"name": "person", "strict": true, "schema": schema()},
    }});
    let outputs = |fields: Value| json!({"structured_outputs": fields});
    let lark = "start: WORD (\" and \" WORD)? \".\"\nWORD: /[a-z]{1,8}/";
    let is_word =
        |word: &str| (1..=8).contains(&word.len()) && word.chars().all(|c| c.is_ascii_lowercase());
    let in_lark = move |text: &str| {
        text.strip_suffix('.').is_some_and(|text| text.split(" and ").all(is_word))
    };
    let is_date = |text: &str| {
        text.len() == 7
            && text[..4].parse::<u32>().is_ok()
            && text[4..5] == *"-"
            && text[5..].parse::<u32>().is_ok_and(|month| month <= 19)
    };
    type Check<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(Value, Check); 6] = [
        (format, &follows_schema),
        (outputs(json!({"json": schema()})), &follows_schema),
        (outputs(json!({"json": schema().to_string()})), &follows_schema),
        (outputs(json!({"regex": "1[78][0-9]{2}-[01][0-9]"})), &is_date),
        (outputs(json!({"choice": ["yes", "no", "perhaps"]})), &|text| {
            ["yes", "no", "perhaps"].contains(&text)
        }),
        (outputs(json!({"grammar": lark})), &in_lark),
    ];
    let mut all = BTreeSet::new();
    for ranks in [1, 2, 3] {
        let running = start(ranks, config(), &small());
        for (seed, (fields, check)) in cases.iter().enumerate() {
            for (text, reason) in both(&running, &random(seed as u64, fields.clone())) {
                assert!(check(&text), "{fields}: {text:?}");
                assert_eq!(reason, "stop", "{fields}: {text:?}");
                all.insert((seed, text));
            }
        }
    }
    // The same seed gives the same answer, streamed or not, on any number of ranks.
    assert_eq!(all.len(), cases.len(), "{all:?}");
}

#[test]
fn each_of_several_answers_follows_the_structure() {
    let running = start(2, config(), &small());
    let request = random(
        5,
        json!({
            "n": 4, "logprobs": true, "top_logprobs": 3,
            "structured_outputs": {"json": schema()},
        }),
    );
    let answer = running.ok(CHAT, &request);
    let mut different = BTreeSet::new();
    for choice in answer["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(follows_schema(text), "{text:?}");
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(joined, text);
        different.insert(text);
    }
    assert!(different.len() > 1, "{different:?}");
    // A JSON object without a schema may be long, and is one as far as it goes.
    let object = random(1, json!({"response_format": {"type": "json_object"}}));
    for (text, _) in both(&running, &object) {
        assert!(text.starts_with('{'), "{text:?}");
    }
    let object = json!({
        "prompt": ["She said", "He said"], "temperature": 1, "seed": 2,
        "structured_outputs": {"choice": ["yes", "no"]},
    });
    for choice in running.ok("/v1/completions", &object)["choices"].as_array().unwrap() {
        assert!(["yes", "no"].contains(&choice["text"].as_str().unwrap()), "{choice}");
    }
}

#[test]
fn a_structure_holds_only_after_thinking() {
    let running = start(1, config(), &small());
    let think = running.ok("/tokenize", &json!({"prompt": "<think>"}));
    let think = think["tokens"][0].as_u64().unwrap().to_string();
    // A bias makes the model think, and a budget ends that.
    let request = random(
        3,
        json!({
            "chat_template_kwargs": {}, "logit_bias": {think: 100}, "thinking_token_budget": 5,
            "structured_outputs": {"json": schema()},
        }),
    );
    let answer = running.ok(CHAT, &request);
    let message = &answer["choices"][0]["message"];
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty(), "{answer}");
    assert!(follows_schema(message["content"].as_str().unwrap()), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 6, "{answer}");
}

fn tools(strict: bool) -> Value {
    json!([
        {"type": "function", "function": {"name": "person", "parameters": schema(), "strict": strict}},
        {"type": "function", "function": {"name": "now", "strict": strict}},
    ])
}

/// The names and arguments of the calls of a message.
fn calls(message: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
    calls
        .iter()
        .map(|call| (text(&call["function"]["name"]), text(&call["function"]["arguments"])))
        .collect()
}

fn check_calls(calls: &[(String, String)]) {
    assert!(!calls.is_empty());
    for (name, arguments) in calls {
        match &**name {
            "person" => assert!(follows_schema(arguments), "{arguments}"),
            "now" => assert_eq!(arguments, "{}"),
            name => panic!("{name} is no tool"),
        }
    }
}

#[test]
fn calls_that_are_asked_for_are_made() {
    let running = start(2, config(), &small());
    for seed in 0..4 {
        let required = random(
            seed,
            json!({
                "tools": tools(false), "tool_choice": "required", "parallel_tool_calls": seed % 2 == 0,
                "max_tokens": 400,
            }),
        );
        let answer = running.ok(CHAT, &required);
        let choice = &answer["choices"][0];
        let found = calls(&choice["message"]);
        check_calls(&found);
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(choice["message"]["content"], Value::Null, "{answer}");
        assert!(seed % 2 == 0 || found.len() == 1, "{answer}");

        // Streamed pieces join to the same arguments.
        let mut streamed: Vec<(String, String)> = Vec::new();
        for event in running.post(CHAT, &with(required, json!({"stream": true}))).events() {
            for call in event["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten()
            {
                let at = call["index"].as_u64().unwrap() as usize;
                if let Some(name) = call["function"]["name"].as_str() {
                    assert_eq!(at, streamed.len());
                    streamed.push((name.to_owned(), String::new()));
                }
                streamed[at].1 += call["function"]["arguments"].as_str().unwrap_or_default();
            }
        }
        assert_eq!(streamed, found);

        let named = random(
            seed,
            json!({
                "tools": tools(false),
                "tool_choice": {"type": "function", "function": {"name": "person"}},
            }),
        );
        let answer = running.ok(CHAT, &named);
        let found = calls(&answer["choices"][0]["message"]);
        check_calls(&found);
        assert!(found.len() == 1 && found[0].0 == "person", "{answer}");
    }
    let none = random(1, json!({"tools": tools(true), "tool_choice": "none", "max_tokens": 20}));
    assert!(calls(&running.ok(CHAT, &none)["choices"][0]["message"]).is_empty());
}

#[test]
fn strict_tools_and_structures_leave_the_choice_to_the_model() {
    let running = start(1, config(), &small());
    let call = running.ok("/tokenize", &json!({"prompt": "<tool_call>"}));
    let call = call["tokens"][0].as_u64().unwrap().to_string();
    for seed in 0..3 {
        let fields = json!({"tools": tools(true), "parallel_tool_calls": false});
        let text = running.ok(CHAT, &random(seed, with(fields.clone(), json!({"max_tokens": 20}))));
        assert!(text["choices"][0]["message"]["content"].is_string(), "{text}");
        let biased = with(fields, json!({"logit_bias": {&call: 100}}));
        let answer = running.ok(CHAT, &random(seed, biased.clone()));
        check_calls(&calls(&answer["choices"][0]["message"]));

        let structure = json!({"structured_outputs": {"json": {"type": "boolean"}}});
        let answer = running.ok(CHAT, &random(seed, with(biased, structure.clone())));
        check_calls(&calls(&answer["choices"][0]["message"]));
        let unbiased = with(structure, json!({"tools": tools(false), "logit_bias": {&call: -100}}));
        let answer = running.ok(CHAT, &random(seed, unbiased));
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(["true", "false"].contains(&text), "{answer}");
    }
}

#[test]
fn the_other_apis_have_structures_and_enforced_calls() {
    let running = start(1, config(), &small());
    let tool = json!([{"type": "function", "name": "person", "parameters": schema()}]);
    let responses = |fields: Value| {
        let request =
            json!({"input": "Who?", "max_output_tokens": 300, "reasoning": {"effort": "none"}});
        running.ok("/v1/responses", &with(request, fields))
    };
    let format =
        json!({"text": {"format": {"type": "json_schema", "name": "p", "schema": schema()}}});
    let answer = responses(format);
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap_or_default();
    assert!(follows_schema(text), "{answer}");
    for choice in [json!("required"), json!({"type": "function", "name": "person"})] {
        let answer =
            responses(json!({"tools": tool, "tool_choice": choice, "parallel_tool_calls": false}));
        let item = &answer["output"][0];
        assert_eq!(item["type"], "function_call", "{answer}");
        assert!(follows_schema(item["arguments"].as_str().unwrap()), "{answer}");
    }
    let tool = json!([{"name": "person", "input_schema": schema()}]);
    for choice in [json!({"type": "any"}), json!({"type": "tool", "name": "person"})] {
        let choice = with(choice, json!({"disable_parallel_tool_use": true}));
        let request = json!({
            "model": "austen", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 300,
            "tools": tool, "tool_choice": choice,
        });
        let answer = running.ok("/v1/messages", &request);
        let block = &answer["content"][0];
        assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
        assert!(follows_schema(&block["input"].to_string()), "{answer}");
    }
}

/// The field that an error names, and its message.
fn refused(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 400, "{}", answer.body);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let error = &answer.json()["error"];
    (text(&error["param"]), text(&error["message"]))
}

#[test]
fn a_structure_that_does_not_compile_is_refused_with_its_reason() {
    let running = start(1, config(), &small());
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let outputs = |fields: Value| json!({"structured_outputs": fields});
    let tool = |schema: Value| json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]);
    let reference = |to: &str| json!({"type": "object", "properties": {"a": {"$ref": to}}});
    let required = json!({"tool_choice": "required"});
    for (fields, param, word) in [
        (format(json!({"type": "nothing"})), "response_format", "nothing"),
        (
            format(reference("http://127.0.0.1:1/x.json")),
            "response_format",
            "http://127.0.0.1:1/x.json",
        ),
        (format(reference("file:///etc/passwd")), "response_format", "file:///etc/passwd"),
        (outputs(json!({"json": "{"})), "structured_outputs", "not JSON"),
        (outputs(json!({"regex": "("})), "structured_outputs", "regex"),
        (outputs(json!({"grammar": "start: missing"})), "structured_outputs", "missing"),
        (outputs(json!({"choice": []})), "structured_outputs", "empty"),
        (outputs(json!({"regex": "a", "choice": ["b"]})), "structured_outputs", "2"),
        (
            with(required.clone(), json!({"tools": tool(reference("http://x/"))})),
            "tool_choice",
            "http://x/",
        ),
        (json!({"guided_json": {"type": "object"}}), "guided_json", "guided_json"),
        (json!({"guided_regex": "a"}), "guided_regex", "guided_regex"),
        (json!({"guided_choice": ["a"]}), "guided_choice", "guided_choice"),
        (json!({"guided_grammar": "start: /a/"}), "guided_grammar", "guided_grammar"),
    ] {
        let (found, message) = refused(&running.post(CHAT, &random(1, fields.clone())));
        assert_eq!(found, param, "{fields}: {message}");
        assert!(message.contains(word), "{fields}: {message}");
    }
    let request = json!({"prompt": "x", "structured_outputs": {"regex": "("}});
    assert_eq!(refused(&running.post("/v1/completions", &request)).0, "structured_outputs");
    let format = json!({"type": "json_schema", "name": "x", "schema": {"$ref": "http://x/"}});
    let request = json!({"input": "x", "text": {"format": format}});
    assert_eq!(refused(&running.post("/v1/responses", &request)).0, "text.format");
}

#[test]
fn a_schema_that_takes_long_is_refused_and_delays_nobody() {
    let running = start(1, config(), &small());
    let branches = |n: usize| -> Value {
        (0..n).map(|i| json!({"properties": {format!("p{i}"): {"enum": [i, "x"]}}})).collect()
    };
    let product: Value = (0..14).map(|_| json!({"anyOf": branches(14)})).collect();
    let texts: Value = (0..300_000).map(|i| format!("{i:x}")).collect();
    let pattern = "(.*a){300}(.*b){300}";
    let bombs = [
        json!({"allOf": product}),
        json!({"enum": texts}),
        json!({"type": "string", "pattern": pattern, "minLength": 70000}),
        json!({"$ref": "#"}),
    ];
    let begun = Instant::now();
    let open: Vec<_> = bombs
        .iter()
        .map(|schema| {
            let mut stream = running.connect();
            let request = random(1, json!({"structured_outputs": {"json": schema}}));
            send(&mut stream, "POST", CHAT, "", &request.to_string());
            stream
        })
        .collect();
    let other = running.ok(CHAT, &chat("Who?", 4));
    assert_eq!(other["usage"]["completion_tokens"], 4);
    for (stream, schema) in open.into_iter().zip(&bombs) {
        let answer = Answer::read(&mut std::io::BufReader::new(stream));
        let short: String = schema.to_string().chars().take(80).collect();
        assert!([400, 429].contains(&answer.status), "{short}: {} {}", answer.status, answer.body);
    }
    // Generous for a busy machine: without limits these take minutes.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}
