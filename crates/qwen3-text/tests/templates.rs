//! Rendered templates against Hugging Face transformers.

use std::path::{Path, PathBuf};

use qwen3_text::{ChatTemplate, Conversation, Json, TemplateSource};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn published() -> String {
    let packed = std::fs::File::open(data("tokenizer_config.json.gz")).unwrap();
    std::io::read_to_string(flate2::read::GzDecoder::new(packed)).unwrap()
}

/// Expressions and statements as Jinja 3.1.6 renders them with the settings of transformers, or
/// refuses them.
#[test]
fn expressions_of_jinja_render_alike() {
    let text = std::fs::read_to_string(data("jinja.json")).unwrap();
    let recorded = Json::parse(&text).unwrap();
    let chat = recorded.get("chat").unwrap().to_string();
    let chat = Conversation::from_json("chat", &chat).unwrap();
    let Some(Json::Array(cases)) = recorded.get("cases") else {
        panic!("expected a list of cases");
    };
    let differences = cases.iter().filter_map(|case| {
        let template = case.get("template").and_then(Json::as_str).unwrap();
        let rendered = TemplateSource::new("test", Some(template), None)
            .and_then(ChatTemplate::new)
            .and_then(|template| template.render(&chat));
        match (rendered, case.get("expected").and_then(Json::as_str)) {
            (Ok(found), Some(expected)) if found == expected => None,
            (Err(_), None) => None,
            (found, expected) => {
                Some(format!("{template}\n  found    {found:?}\n  expected {expected:?}"))
            }
        }
    });
    let differences: Vec<String> = differences.collect();
    let (count, of) = (differences.len(), cases.len());
    assert!(differences.is_empty(), "{count} of {of}:\n{}", differences.join("\n"));
}

/// Cases that render otherwise than expected, each in a few lines.
fn differences(cases: &str) -> Vec<String> {
    let config = published();
    let Json::Array(cases) = Json::parse(cases).unwrap() else {
        panic!("expected a list of cases");
    };
    assert!(!cases.is_empty());
    let found = cases.iter().filter_map(|case| {
        let text = |field: &str| case.get(field).and_then(Json::as_str);
        let source = TemplateSource::new("test", text("template"), Some(&config));
        let rendered = source.and_then(ChatTemplate::new).and_then(|template| {
            let chat = case.get("chat").expect("a case has a chat").to_string();
            template.render(&Conversation::from_json("case", &chat)?)
        });
        let expected = text("expected").expect("a case has an expected text");
        match rendered {
            Ok(rendered) if rendered == expected => None,
            Ok(rendered) => Some(format!(
                "{:?}\n  found    {rendered:?}\n  expected {expected:?}",
                text("name")
            )),
            Err(error) => Some(format!("{:?}\n  {error}\n  expected {expected:?}", text("name"))),
        }
    });
    found.collect()
}

#[test]
fn templates_of_transformers_render_alike() {
    let cases = std::fs::read_to_string(data("templates.json")).unwrap();
    let differences = differences(&cases);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
