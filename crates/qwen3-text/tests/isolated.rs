//! Templates in a process of their own. This program is that process too, so it has its own `main`.

use std::path::Path;

use qwen3_text::{ChatTemplate, Conversation, TemplateError, TemplateSource};

fn main() {
    qwen3_text::serve_templates();
    same_text_as_in_this_process();
    limits_end_the_rendering_and_not_the_template();
    errors_are_those_of_this_process();
    println!("isolated: ok");
}

fn source(template: &str) -> TemplateSource {
    TemplateSource::new("test", Some(template), Some(r#"{"eos_token": "<end>"}"#)).unwrap()
}

fn same_text_as_in_this_process() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen");
    let chat = Conversation::question("What is 17 + 15?\u{1b}\u{2028}", Some(false));
    let expected = ChatTemplate::open(&folder).unwrap().render(&chat).unwrap();
    assert_eq!(ChatTemplate::open_isolated(&folder).unwrap().render(&chat).unwrap(), expected);

    let template = source("{{ a }} {{ tools }} {{ eos_token }} {{ messages[0].x is defined }}");
    let deep = "[".repeat(120) + &"]".repeat(120);
    let text = format!(
        r#"{{"messages": [{{"role": "user", "x": null}}], "tools": [1.50, {deep}],
            "a": 1000000000000000000001}}"#
    );
    let chat = Conversation::from_json("chat", &text).unwrap();
    let expected = ChatTemplate::new(template.clone()).unwrap().render(&chat).unwrap();
    assert!(
        expected.starts_with("1000000000000000000001 [1.5, [[[") && expected.ends_with("False")
    );
    assert_eq!(ChatTemplate::isolated(template).unwrap().render(&chat).unwrap(), expected);
}

fn limits_end_the_rendering_and_not_the_template() {
    let nested = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(100000) %}\
                  {% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}";
    let large = "{{ '{:>900000000}'.format(1) }}";
    let slow = "{{ range(100000)|map('string')|list|sort|unique|list|length }}\
                {{ range(100000)|map('string')|list|sort|unique|list|length }}";
    for work in [nested, large, slow] {
        let template = format!("{{% if messages[0].content == 'bad' %}}{work}{{% endif %}}fine");
        let template = ChatTemplate::isolated(source(&template)).unwrap();
        let render = |words: &str| template.render(&Conversation::question(words, None));
        assert_eq!(render("good").unwrap(), "fine");
        let error = render("bad").unwrap_err();
        assert!(matches!(error, TemplateError::Limit { .. }), "{work}: {error:?}");
        assert_eq!(render("good").unwrap(), "fine");
    }
}

fn errors_are_those_of_this_process() {
    let error = ChatTemplate::isolated(source("{% if %}")).unwrap_err();
    assert!(matches!(&error, TemplateError::Syntax { name, .. } if name == "default"), "{error:?}");
    let chat = Conversation::question("x", None);
    let template = source("{{ raise_exception('no\u{1b}[31m') }}");
    let here = ChatTemplate::new(template.clone()).unwrap().render(&chat).unwrap_err();
    let there = ChatTemplate::isolated(template).unwrap().render(&chat).unwrap_err();
    assert!(matches!(there, TemplateError::Render { .. }));
    assert_eq!(here.to_string(), there.to_string());
    assert!(!here.to_string().contains('\u{1b}'), "{here}");
    let error = ChatTemplate::isolated(TemplateSource::default()).unwrap_err();
    assert!(matches!(error, TemplateError::Missing { .. }), "{error:?}");
}
