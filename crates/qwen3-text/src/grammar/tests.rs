//! Texts that grammars allow and refuse, with both tokenizers, and grammars that are refused.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Instant;

use serde_json::json;

use super::*;
use crate::answer::{AnswerEvent, AnswerOptions, AnswerParser};
use crate::chat_template::CallForm;
use crate::json::Json;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn austen() -> Tokenizer {
    Tokenizer::open(&Path::new(ROOT).join("models/austen")).unwrap()
}

/// The tokenizer of Qwen3, where it lies beside the repository.
fn qwen3() -> Option<Tokenizer> {
    Tokenizer::open(&Path::new(ROOT).join("../shared/qwen3-tokenizer")).ok()
}

/// Preparing a vocabulary takes longer than a test.
static PREPARED: LazyLock<Vec<(Tokenizer, Grammars)>> = LazyLock::new(|| {
    let prepare = |tokenizer: Tokenizer| {
        let eos = tokenizer.added_token("<|im_end|>").unwrap();
        let grammars = Grammars::new(&tokenizer, &[eos]).unwrap();
        (tokenizer, grammars)
    };
    std::iter::once(austen()).chain(qwen3()).map(prepare).collect()
});

fn each_tokenizer(check: impl Fn(&Tokenizer, &Grammars)) {
    // A compiler that other tests use is busy now and then.
    static ONE_TEST: Mutex<()> = Mutex::new(());
    let _turn = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
    PREPARED.iter().for_each(|(tokenizer, grammars)| check(tokenizer, grammars));
}

/// Whether the grammar allows the text and lets the answer end after it.
fn allows(tokenizer: &Tokenizer, guide: &Guide, text: &str) -> bool {
    let mut guide = guide.clone();
    let eos = tokenizer.added_token("<|im_end|>").unwrap();
    let mut ids = tokenizer.encode(text).unwrap();
    ids.push(eos);
    let last = ids.len() - 1;
    for (at, id) in ids.into_iter().enumerate() {
        match guide.mask().unwrap() {
            None => return at == last,
            Some(mask) if mask[id as usize / 32] >> (id % 32) & 1 == 0 => return false,
            Some(_) => guide.accept(id).unwrap(),
        }
    }
    true
}

fn check(grammar: &Grammar, allowed: &[&str], refused: &[&str]) {
    each_tokenizer(|tokenizer, grammars| {
        let guide = grammars.compile(grammar).unwrap();
        for text in allowed {
            assert!(allows(tokenizer, &guide, text), "{grammar:?} refuses {text:?}");
        }
        for text in refused {
            assert!(!allows(tokenizer, &guide, text), "{grammar:?} allows {text:?}");
        }
    });
}

#[test]
fn a_schema_allows_its_json_and_no_other() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
            "child": {"$ref": "#"},
        },
        "required": ["name", "age"],
    });
    check(
        &Grammar::JsonSchema(schema),
        &[
            r#"{"name": "Emma", "age": 21}"#,
            r#"{"name":"","age":0,"tags":["a", "b"]}"#,
            r#"{"name": "é你", "age": 7, "child": {"name": "x", "age": 1}}"#,
        ],
        &[
            "",
            r#"{"name": "Emma"}"#,
            r#"{"name": "Emma", "age": -1}"#,
            r#"{"name": "far too long", "age": 1}"#,
            r#"{"name": "Emma", "age": 21} and more"#,
            r#"{"name": "Emma", "age": 21, "tags": ["c"]}"#,
            r#"{"name": "Emma",  "age": 21}"#,
        ],
    );
}

#[test]
fn counts_may_be_written_as_decimals() {
    let schema = json!({"type": "array", "items": {"const": 1}, "minItems": 1.0, "maxItems": 2.0,
        "uniqueItems": false});
    check(&Grammar::JsonSchema(schema), &["[1]", "[1, 1]"], &["[]", "[1, 1, 1]"]);
}

#[test]
fn a_schema_of_true_allows_any_json() {
    check(&Grammar::JsonSchema(json!(true)), &["1", "[]", r#"{"a": [null]}"#], &["x", "[1"]);
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    let grammar = Grammar::Regex(r"[0-9]{4}-(0[1-9]|1[0-2])/x".to_owned());
    check(&grammar, &["1813-01/x", "1815-12/x"], &["1813-13/x", "1813-01/x ", "x1813-01/x", ""]);
}

#[test]
fn an_answer_is_one_of_the_choices() {
    let choices = ["yes", "no", "a \"quoted\"\nline", "<tool_call>"];
    let grammar = Grammar::Choice(choices.map(str::to_owned).to_vec());
    // The last choice is text, in which no token is a control token.
    check(&grammar, &choices[..3], &["maybe", "yesno", "yes ", "<tool_call>"]);
}

#[test]
fn a_lark_grammar_is_followed() {
    let grammar =
        Grammar::Lark("start: sum\nsum: NUMBER (\" + \" NUMBER)*\nNUMBER: /[0-9]+/".into());
    check(&grammar, &["1", "1 + 23 + 4"], &["1 +", "+", "1+2"]);
}

fn tools() -> Vec<Tool> {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    });
    let time = json!({});
    [("weather", weather), ("time", time)]
        .map(|(name, parameters)| Tool { name: name.to_owned(), parameters })
        .to_vec()
}

#[test]
fn calls_have_the_form_of_the_template() {
    let json = |one| Grammar::Calls(Calls { form: CallForm::Json, tools: tools(), one });
    let call =
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bath\"}}\n</tool_call>";
    let time = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    let both = format!("{call}\n{time}");
    let refused = [
        "Bath",
        "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n",
    ];
    check(&json(false), &[call, time, &both], &refused);
    check(&json(true), &[call, time], &[&both]);
}

#[test]
fn calls_in_tags_have_the_form_of_the_template() {
    let grammar = Grammar::Calls(Calls { form: CallForm::Tagged, tools: tools(), one: false });
    let value = |name: &str, value: &str| format!("<parameter={name}>\n{value}\n</parameter>\n");
    let call = |inside: &str| {
        format!("<tool_call>\n<function=weather>\n{inside}</function>\n</tool_call>")
    };
    let city = value("city", "Bath\n<b> \"quoted\"");
    let whole = format!("{city}{}{}", value("days", "3"), value("unit", "F"));
    check(
        &grammar,
        &[&call(&city), &call(&whole), "<tool_call>\n<function=time>\n</function>\n</tool_call>"],
        &[
            &call(""),
            &call(&format!("{city}{}", value("days", "three"))),
            &call(&format!("{city}{}", value("unit", "K"))),
            &call(&format!("{city}{}", value("other", "1"))),
        ],
    );
}

#[test]
fn arguments_of_calls_that_a_grammar_allows_join_to_json() {
    let json = "<tool_call>\n{\"name\": \"weather\", \"arguments\": \
                {\"city\": \"</think> \\\"<tool_call>\", \"days\": 3}}\n</tool_call>";
    let tagged = "<tool_call>\n<function=weather>\n<parameter=city>\n</think> \"<tool_call>\n\
                  </parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
    let listed = tools().into_iter().map(|tool| {
        Json::from(json!({"type": "function",
            "function": {"name": tool.name, "parameters": tool.parameters}}))
    });
    let listed: Vec<Json> = listed.collect();
    for text in [json, tagged] {
        let options = AnswerOptions { tools: listed.clone(), ..AnswerOptions::default() };
        let mut parser = AnswerParser::new(options);
        let mut events: Vec<_> =
            text.chars().flat_map(|c| parser.push(c.encode_utf8(&mut [0; 4]))).collect();
        events.extend(parser.finish());
        let mut joined = String::new();
        for event in &events {
            match event {
                AnswerEvent::CallArguments { index: 0, json } => joined += json,
                AnswerEvent::CallStart { index: 0, name } => assert_eq!(name, "weather"),
                AnswerEvent::CallEnd { index: 0, complete } => assert!(complete),
                event => panic!("{event:?} in {text}"),
            }
        }
        let expected = json!({"city": "</think> \"<tool_call>", "days": 3});
        assert_eq!(serde_json::from_str::<Value>(&joined).unwrap(), expected, "{text}");
    }
}

#[test]
fn calls_or_json_are_one_of_both() {
    let calls = Calls { form: CallForm::Json, tools: tools(), one: true };
    let grammar = Grammar::CallsOrJson(calls, json!({"type": "integer"}));
    let time = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    check(&grammar, &["12", time], &["x", "12<tool_call>"]);
}

#[test]
fn calls_stand_between_texts() {
    let grammar = |one| Grammar::CallsInText(Calls { form: CallForm::Json, tools: tools(), one });
    let time = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    let between = format!("First\n{time}\n{time} and so on");
    let wrong = "x <tool_call>\n{\"name\": \"time\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    check(&grammar(false), &["", "only text", time, &between], &[wrong, "<tool_call>"]);
    check(&grammar(true), &["", "only text", time], &[&between, wrong]);
}

#[test]
fn a_grammar_that_is_wrong_says_why() {
    each_tokenizer(|_, grammars| {
        let error = |grammar: Grammar| grammars.compile(&grammar).err().expect("it is wrong");
        let schema = |schema: Value| error(Grammar::JsonSchema(schema));
        for reference in ["http://localhost:1/x.json", "file:///etc/passwd", "other.json#/a"] {
            assert_eq!(
                schema(json!({"properties": {"a": {"$ref": reference}}})),
                GrammarError::Reference { reference: reference.to_owned() }
            );
        }
        for (wrong, word) in [
            (schema(json!({"type": "nothing"})), "nothing"),
            (schema(json!({"$ref": "#/$defs/absent"})), "absent"),
            (schema(json!({"type": "string", "pattern": "["})), "regex"),
            (schema(json!(false)), "false"),
            (schema(json!({"not": {"type": "string"}})), "not"),
            (error(Grammar::Regex("(".to_owned())), "regex"),
            (error(Grammar::Lark("start: missing".to_owned())), "missing"),
            (error(Grammar::Lark(String::new())), "start"),
        ] {
            assert!(matches!(wrong, GrammarError::Compile { .. }), "{wrong}");
            assert!(wrong.to_string().contains(word), "{wrong}: expected {word:?}");
        }
        assert_eq!(schema(nested(70)), GrammarError::Depth { limit: 128 });
        let long = "x".repeat(MAX_GRAMMAR_BYTES);
        assert!(matches!(error(Grammar::Regex(long)), GrammarError::TooLarge { .. }));
    });
}

/// A schema that nests objects so deep.
fn nested(depth: usize) -> Value {
    (0..depth).fold(json!({"type": "integer"}), |inner, _| json!({"properties": {"a": inner}}))
}

#[test]
fn work_that_a_grammar_causes_is_bounded() {
    let tokenizer = austen();
    let grammars = Grammars::new(&tokenizer, &[0]).unwrap();
    let branches = |n: usize| -> Value {
        (0..n).map(|i| json!({"properties": {format!("p{i}"): {"enum": [i, "x"]}}})).collect()
    };
    let product: Value = (0..14).map(|_| json!({"anyOf": branches(14)})).collect();
    let texts: Value = (0..60_000).map(|i| format!("{i:x}")).collect();
    let doubled: serde_json::Map<String, Value> = (0..40)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (format!("d{i}"), json!({"allOf": [next, next]}))
        })
        .chain([("d40".to_owned(), json!({"type": "object"}))])
        .collect();
    let pattern = "(.*a){300}(.*b){300}";
    let bombs = [
        (false, Grammar::Regex("(a|a)*b".repeat(200) + "(.{0,3000}x){1000}")),
        (false, Grammar::Regex("((((a{0,99}){0,99}){0,99}){0,99}){0,99}".to_owned())),
        (false, Grammar::Regex("(x+x+)+y".repeat(5000))),
        (false, Grammar::Lark("start: start start | \"a\" | \"\"".to_owned())),
        (false, Grammar::JsonSchema(json!({"enum": texts}))),
        (false, Grammar::JsonSchema(nested(60))),
        (true, Grammar::JsonSchema(json!({"allOf": product}))),
        (false, Grammar::JsonSchema(json!({"$ref": "#/$defs/d0", "$defs": doubled}))),
        (
            true,
            Grammar::JsonSchema(json!({"type": "string", "pattern": pattern, "minLength": 70000})),
        ),
        (true, Grammar::JsonSchema(json!({"$ref": "#"}))),
        (true, Grammar::JsonSchema(nested(70))),
    ];
    for (at, (refused, bomb)) in bombs.into_iter().enumerate() {
        let start = Instant::now();
        let result = grammars.compile(&bomb).map(|_| ());
        let taken = start.elapsed();
        println!("{at}: {taken:?} {result:?}");
        assert!(taken < MAX_COMPILE_TIME * 2, "{at}: {taken:?}");
        assert!(!refused || result.is_err(), "{at} compiles");
    }
}

#[test]
fn a_compilation_waits_for_others_and_then_gives_up() {
    let tokenizer = austen();
    let grammars = Grammars::new(&tokenizer, &[0]).unwrap();
    let grammar = Grammar::Regex("a".to_owned());
    let mut places: Vec<_> =
        (0..MAX_COMPILATIONS).map(|_| Place::take(&grammars.running).unwrap()).collect();
    let busy = GrammarError::Busy { running: MAX_COMPILATIONS };
    assert_eq!(grammars.compile(&grammar).err(), Some(busy));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| grammars.compile(&grammar).is_ok());
        places.pop();
        assert!(waiting.join().unwrap());
    });
}

#[test]
fn ids_that_end_an_answer_are_of_the_vocabulary() {
    let tokenizer = austen();
    for ids in [&[][..], &[4096]] {
        assert!(matches!(Grammars::new(&tokenizer, ids), Err(GrammarError::Vocabulary { .. })));
    }
}
