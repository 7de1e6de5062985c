//! Tokens and chat templates against the published tokenizer and the bundled one.

mod program;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use program::{AUSTEN, assert_one_line, json, keys, read_json, run};
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// The published tokenizer in a folder of its own.
fn published() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let packed = fs::File::open(data(&format!("{name}.gz"))).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn tokenize_chat(model: &Path, chat: &Value) -> Value {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), chat.to_string()).unwrap();
    json(&[
        "tokenize",
        "--json",
        "--model",
        model.to_str().unwrap(),
        "--chat",
        file.path().to_str().unwrap(),
    ])
}

#[test]
fn conversations_read_as_the_published_template_writes_them() {
    let model = published();
    let cases = read_json(data("chat.json"));
    assert_eq!(cases.as_array().unwrap().len(), 8);
    for case in cases.as_array().unwrap() {
        let found = tokenize_chat(model.path(), case);
        assert_eq!(keys(&found), ["text", "ids"]);
        assert_eq!(found["text"], case["text"]);
        assert_eq!(found["ids"], case["ids"], "{}", case["text"]);
    }
}

#[test]
fn a_template_in_a_file_of_its_own_comes_first_and_named_ones_are_found() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(format!("{AUSTEN}/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let named = r#"{"eos_token": {"content": "<|im_end|>"}, "chat_template": [
        {"name": "default", "template": "{%- for m in messages -%}{% generation %}{{ m.content.strip('-').split(',')[1] }}{% endgeneration %}{%- endfor %}{{ eos_token }}"},
        {"name": "tool_use", "template": "{% if tools is not defined %}{{ raise_exception('no tools') }}{% endif %}{{ tools | tojson }}"}]}"#;
    fs::write(dir.path().join("tokenizer_config.json"), named).unwrap();
    let chat = serde_json::json!({"messages": [{"role": "user", "content": "--a,b"}]});
    assert_eq!(tokenize_chat(dir.path(), &chat)["text"], "b<|im_end|>");
    let tools = serde_json::json!({"messages": [{"role": "user", "content": "x"}], "tools": [{"é": 1.0, "a": null}]});
    assert_eq!(tokenize_chat(dir.path(), &tools)["text"], r#"[{"é": 1.0, "a": null}]"#);

    // Blocks take the blanks before them and the line break after them along.
    let file = "{{ messages[0].role }}\n{% for i in range(9) %}\n    {% if i == 3 %}\n{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n";
    fs::write(dir.path().join("chat_template.jinja"), file).unwrap();
    assert_eq!(tokenize_chat(dir.path(), &chat)["text"], "user\n0\n1\n2\n");
}

/// Of Qwen3-Coder: how its template guards what may be absent, and how it writes a value that is no
/// text.
#[test]
fn what_may_be_absent_is_guarded_and_values_become_texts_as_in_jinja() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(format!("{AUSTEN}/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let template = "{%- if tools is iterable and tools | length > 0 %}{{- tools[0].type | string }}{%- endif %}
        {%- for message in messages %}
            {%- if message.tool_calls is iterable and message.tool_calls | length > 0 %}{{- 'calls' }}{%- endif %}
            {{- message.role ~ ' ' ~ message.content }}
        {%- endfor %}";
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let message = serde_json::json!({"role": "user", "content": "x", "tool_calls": null});
    let chat = serde_json::json!({"messages": [message]});
    assert_eq!(tokenize_chat(dir.path(), &chat)["text"], "user x");
    let tools =
        serde_json::json!({"messages": [message], "tools": [{"type": ["string", null, 1e-7]}]});
    assert_eq!(tokenize_chat(dir.path(), &tools)["text"], "['string', None, 1e-07]user x");
}

#[test]
fn the_bundled_tokenizer_gives_the_expected_ids() {
    for case in read_json(format!("{AUSTEN}/expected.json")).as_array().unwrap() {
        let found = if case["kind"] == "text" {
            json(&[
                "tokenize",
                "--json",
                "--model",
                AUSTEN,
                "--text",
                case["prompt"].as_str().unwrap(),
            ])
        } else {
            let message = serde_json::json!({"role": "user", "content": case["prompt"]});
            tokenize_chat(
                Path::new(AUSTEN),
                &serde_json::json!({"messages": [message], "enable_thinking": false}),
            )
        };
        assert_eq!(found["text"], case["rendered"]);
        assert_eq!(found["ids"], case["prompt_ids"]);
    }
}

#[test]
fn typed_control_tokens_are_text_on_request() {
    let words = "<|im_end|>\n<|im_start|>system";
    let ids = |extra: &[&str]| {
        let args = [&["tokenize", "--json", "--model", AUSTEN, "--text", words], extra].concat();
        let found = json(&args);
        assert_eq!(found["text"], words);
        found["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect::<Vec<_>>()
    };
    let (token, literal) = (ids(&[]), ids(&["--literal-special-tokens"]));
    assert!(token.starts_with(&[4089]) && token.contains(&4088), "{token:?}");
    assert!(literal.len() > token.len() && literal.iter().all(|&id| id < 4087), "{literal:?}");

    let chat = serde_json::json!([{"role": "user", "content": words}]);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), chat.to_string()).unwrap();
    let file = file.path().to_str().unwrap();
    let args = ["tokenize", "--json", "--model", AUSTEN, "--chat", file];
    let literal = json(&[&args[..], &["--literal-special-tokens"]].concat());
    let trusted = json(&args);
    assert_eq!(literal["text"], trusted["text"]);
    let count = |found: &Value| {
        found["ids"].as_array().unwrap().iter().filter(|id| id.as_u64() == Some(4088)).count()
    };
    assert_eq!((count(&trusted), count(&literal)), (3, 2));
}

#[test]
fn fields_of_a_chat_file_reach_the_template_or_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(format!("{AUSTEN}/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "{{ a }} {{ b }} {{ c is none }}").unwrap();
    let chat = serde_json::json!({
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"a": 1.50, "c": null},
        "b": [true],
    });
    assert_eq!(tokenize_chat(dir.path(), &chat)["text"], "1.5 [True] True");
    for (field, value) in [("messages", "[]"), ("tools", "[]"), ("chat_template", "\"x\"")] {
        let file = dir.path().join("chat.json");
        let text = format!(
            r#"{{"messages": [{{"role": "user", "content": "x"}}],
                "chat_template_kwargs": {{"{field}": {value}}}}}"#
        );
        fs::write(&file, text).unwrap();
        let run = run(&["tokenize", "--model", AUSTEN, "--chat", file.to_str().unwrap()]);
        assert_one_line(&run, &["chat.json", field]);
    }
}

#[test]
fn what_cannot_be_tokenized_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("chat.json");
    let chat = |text: &str| {
        fs::write(&file, text).unwrap();
        run(&["tokenize", "--model", AUSTEN, "--chat", file.to_str().unwrap()])
    };
    assert_one_line(&chat("{"), &["chat.json", "not JSON"]);
    assert_one_line(&chat("{}"), &["chat.json", "messages", "missing"]);
    assert_one_line(&chat("[]"), &["chat.json", "messages", "empty"]);
    assert_one_line(&chat(r#"{"messages": 3}"#), &["chat.json", "messages", "a number", "a list"]);
    assert_one_line(&chat(r#"[{"content": "x"}]"#), &["messages[0]", "role"]);
    assert_one_line(
        &chat(r#"{"messages": [{"role": "user", "content": "x"}], "tools": 1}"#),
        &["tools"],
    );
    assert_one_line(&chat(r#"[{"role": "user", "content": 5}]"#), &["chat template"]);
    assert_one_line(
        &run(&["tokenize", "--model", AUSTEN, "--chat", "nowhere.json"]),
        &["nowhere.json"],
    );
    assert_one_line(
        &run(&["tokenize", "--model", "nowhere", "--text", "x"]),
        &["--model", "nowhere does not exist"],
    );
    assert_one_line(&run(&["tokenize", "--model", AUSTEN]), &["--text", "--chat"]);

    let empty = dir.path().to_str().unwrap();
    let file = file.to_str().unwrap();
    fs::write(file, r#"[{"role": "user", "content": "x"}]"#).unwrap();
    fs::copy(format!("{AUSTEN}/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    assert_one_line(&run(&["tokenize", "--model", empty, "--chat", file]), &["no chat template"]);
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert_one_line(&run(&["tokenize", "--model", empty, "--text", "x"]), &["tokenizer.json"]);
    let broken = r#"{"chat_template": "{% if %}"}"#;
    fs::write(dir.path().join("tokenizer_config.json"), broken).unwrap();
    assert_one_line(
        &run(&["tokenize", "--model", empty, "--chat", file]),
        &["chat template", "syntax"],
    );
}
