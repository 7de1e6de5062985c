//! Answers in pieces of every size.

use proptest::prelude::*;

use super::*;

fn tools() -> Vec<Json> {
    let text = r#"[{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
        "properties": {"x": {"type": "string"}, "n": {"type": "integer"},
            "o": {"type": ["object", "null"]}, "a": {"anyOf": [{"type": "string"}, {"type": "number"}]}}}}}]"#;
    match Json::parse(text).unwrap() {
        Json::Array(tools) => tools,
        other => vec![other],
    }
}

/// The events of an answer that arrives in the given pieces, neighbours of one kind joined.
fn events<'a>(options: &AnswerOptions, pieces: impl Iterator<Item = &'a str>) -> Vec<AnswerEvent> {
    let mut parser = AnswerParser::new(options.clone());
    let mut found = Vec::new();
    for piece in pieces {
        found.extend(parser.push(piece));
    }
    found.extend(parser.finish());
    let mut joined: Vec<AnswerEvent> = Vec::new();
    for event in found {
        match (joined.last_mut(), event) {
            (Some(AnswerEvent::Text(text)), AnswerEvent::Text(more))
            | (Some(AnswerEvent::Thinking(text)), AnswerEvent::Thinking(more)) => {
                text.push_str(&more)
            }
            (
                Some(AnswerEvent::CallArguments { json, .. }),
                AnswerEvent::CallArguments { json: more, .. },
            ) => json.push_str(&more),
            (_, event) => joined.push(event),
        }
    }
    joined
}

/// The events in short: thinking, text, and calls as `name(arguments)`, with `!` if incomplete.
fn summary(options: &AnswerOptions, answer: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for event in events(options, [answer].into_iter()) {
        match event {
            AnswerEvent::Thinking(text) => out.push(format!("think {text}")),
            AnswerEvent::Text(text) => out.push(format!("text {text}")),
            AnswerEvent::CallStart { index, name } => out.push(format!("{index} {name} ")),
            AnswerEvent::CallArguments { json, .. } => out.last_mut().unwrap().push_str(&json),
            AnswerEvent::CallEnd { complete: true, .. } => {
                let call = out.last().unwrap();
                let json = call.splitn(3, ' ').nth(2).unwrap();
                assert!(Json::parse(json).is_ok(), "{json}");
            }
            AnswerEvent::CallEnd { complete: false, .. } => out.last_mut().unwrap().push('!'),
        }
    }
    out
}

fn options(in_thinking: bool) -> AnswerOptions {
    AnswerOptions { in_thinking, thinking: true, tools: tools() }
}

/// Answers and their summaries; the flag says whether the template opens the thinking.
const ANSWERS: &[(bool, &str, &[&str])] = &[
    (false, "Hello <world>.\n", &["text Hello <world>.\n"]),
    (false, "\n\n x", &["text \n\n x"]),
    (false, "<think>\nhm\n\nso\n</think>\n\nYes.", &["think hm\n\nso", "text Yes."]),
    (false, "<think>\n\n</think>\n\nYes.", &["text Yes."]),
    (true, "hm</thin </think>Yes", &["think hm</thin ", "text Yes"]),
    (true, "never ends <tool_call>", &["think never ends <tool_call>"]),
    (
        false,
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"}</tool_call>\\\"\", \"n\": [1]}}\n</tool_call>",
        &["0 f {\"x\": \"}</tool_call>\\\"\", \"n\": [1]}"],
    ),
    (
        true,
        "hm\n</think>\n\nLet me see.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"arguments\": {\"x\": \"é\"}, \"name\": \"g\"}\n</tool_call>\nDone.",
        &["think hm", "text Let me see.", "0 f {}", "1 g {\"x\": \"é\"}", "text Done."],
    ),
    (false, "<tool_call>{\"name\": \"f\"}</tool_call>", &["0 f {}"]),
    (
        false,
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}</tool_call>",
        &["0 f {\"x\": 1}"],
    ),
    (false, "<tool_call>{\"name\": \"f\", \"arguments\": null}", &["0 f {}"]),
    (false, "<tool_call>no json</tool_call> x", &["text <tool_call>no json</tool_call> x"]),
    (
        false,
        "a <tool_call>{\"x\": 1}</tool_call>",
        &["text a", "text <tool_call>{\"x\": 1}</tool_call>"],
    ),
    (false, "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"cut", &["0 f {\"x\": \"cut!"]),
    (
        false,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": }}</tool_call>",
        &["0 f {\"x\": }!"],
    ),
    (false, "x <tool_call>", &["text x", "text <tool_call>"]),
    (false, "x <tool_ca", &["text x <tool_ca"]),
    (
        false,
        "Sure.\n<tool_call>\n<function=f>\n<parameter=x>\na \"b\"\n\nc\n</parameter>\n<parameter=n>\n5\n</parameter>\n<parameter=o>\n{\"k\": [true]}\n</parameter>\n<parameter=a>\n1.5\n</parameter>\n</function>\n</tool_call>",
        &[
            "text Sure.",
            "0 f {\"x\": \"a \\\"b\\\"\\n\\nc\", \"n\": 5, \"o\": {\"k\":[true]}, \"a\": 1.5}",
        ],
    ),
    (
        false,
        "<function=g>\n<parameter=any>5</parameter></function>\n</tool_call>\n<tool_call><function=f></function></tool_call>",
        &["0 g {\"any\": \"5\"}", "1 f {}"],
    ),
    (
        false,
        "<tool_call><function=f><parameter=n>\nfive\n</parameter><parameter=o>\nNone\n</parameter><parameter=x>\n\n</parameter></function></tool_call>",
        &["0 f {\"n\": \"five\", \"o\": null, \"x\": \"\"}"],
    ),
    (false, "<tool_call><function=f><parameter=x>\nhal", &["0 f {\"x\": \"hal!"]),
];

#[test]
fn answers_are_taken_apart() {
    for (in_thinking, answer, expected) in ANSWERS {
        assert_eq!(
            joined_text(summary(&options(*in_thinking), answer)),
            joined_text(expected.iter().map(|text| (*text).to_owned()).collect()),
            "{answer}"
        );
    }
}

/// Neighbouring texts joined.
fn joined_text(items: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for item in items {
        match (out.last_mut(), item.strip_prefix("text ")) {
            (Some(last), Some(text)) if last.starts_with("text ") => last.push_str(text),
            _ => out.push(item),
        }
    }
    out
}

#[test]
fn without_tools_and_thinking_everything_is_text() {
    let answer = "<think>a</think> <tool_call>{\"name\": \"f\"}</tool_call>";
    let none = AnswerOptions::default();
    assert_eq!(summary(&none, answer), [format!("text {answer}")]);
    let prompt = AnswerOptions::for_prompt("<|im_start|>assistant\n<think>\n", Vec::new());
    assert!(prompt.in_thinking);
    assert!(!AnswerOptions::for_prompt("<think>\n\n</think>\n\n", Vec::new()).in_thinking);
}

#[test]
fn arguments_arrive_in_pieces() {
    let mut parser = AnswerParser::new(options(false));
    parser.push("<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"ab");
    let events = parser.push("cd");
    assert_eq!(events, [AnswerEvent::CallArguments { index: 0, json: "cd".to_owned() }]);
}

fn cut<'a>(text: &'a str, cuts: &[usize]) -> Vec<&'a str> {
    let mut places: Vec<usize> = cuts
        .iter()
        .map(|cut| cut % (text.len() + 1))
        .filter(|at| text.is_char_boundary(*at))
        .collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

#[test]
fn one_character_at_a_time_gives_the_same_events() {
    for (in_thinking, answer, _) in ANSWERS {
        let options = options(*in_thinking);
        let places: Vec<usize> = (0..answer.len()).collect();
        let found = events(&options, cut(answer, &places).into_iter());
        assert_eq!(found, events(&options, [*answer].into_iter()), "{answer}");
    }
}

proptest! {
    /// Any cut of any text gives the same events.
    #[test]
    fn pieces_do_not_matter(
        parts in proptest::collection::vec(prop_oneof![
            Just("<think>"), Just("</think>"), Just("<tool_call>"), Just("</tool_call>"),
            Just("<function=f>"), Just("<parameter=x>"), Just("<parameter=n>"), Just("</parameter>"),
            Just("</function>"), Just("{\"name\": \"f\", "), Just("\"arguments\": "), Just("{\"x\": 1}"),
            Just("}"), Just("\n"), Just(" "), Just("é"), Just("text"), Just("<"), Just("\""), Just("\\"),
        ], 0..14),
        cuts in proptest::collection::vec(0..200_usize, 0..10),
        in_thinking: bool,
    ) {
        let text = parts.concat();
        let options = options(in_thinking);
        let whole = events(&options, [text.as_str()].into_iter());
        prop_assert_eq!(events(&options, cut(&text, &cuts).into_iter()), whole);
    }
}
