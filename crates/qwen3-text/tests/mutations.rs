//! Damaged tokenizers, templates and chat files give errors, never panics.
//!
//! Each loop runs for a second, or for the seconds in `QWEN3_FUZZ_SECONDS`. The sequence of inputs
//! is the same in every run.

use std::path::Path;
use std::time::{Duration, Instant};

use qwen3_text::{ChatTemplate, ControlTokens, Conversation, Json, TemplateSource, Tokenizer};

/// Numbers of the generator xorshift64*.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit.max(1)
    }

    /// A text with one to four changes: bytes removed, repeated, or replaced by one of `words`.
    fn mutated(&mut self, text: &str, words: &[&str]) -> String {
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=self.below(4) {
            let start = self.below(bytes.len() + 1);
            let end = (start + self.below(12)).min(bytes.len());
            let insert = match self.below(3) {
                0 => Vec::new(),
                1 => bytes[start..end].repeat(2),
                _ => words[self.below(words.len())].as_bytes().to_vec(),
            };
            bytes.splice(start..end, insert);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Calls `attempt` with further inputs until the time is over; returns how often it succeeded.
fn attempts(mut attempt: impl FnMut(&mut Numbers) -> bool) -> (usize, usize) {
    let seconds = std::env::var("QWEN3_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(1));
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut accepted, mut count) = (0, 0);
    while count < 20 || Instant::now() < end {
        accepted += usize::from(attempt(&mut numbers));
        count += 1;
    }
    (accepted, count)
}

const JSON_WORDS: [&str; 12] = [
    "null",
    "-1",
    "1e999",
    "99999999999999999999",
    "\"\"",
    "[]",
    "{}",
    "true",
    "\"Unigram\"",
    "[[",
    "\\ud800",
    "\u{10ffff}",
];

#[test]
fn tokenizers() {
    // A small tokenizer of the same kind as Qwen3's.
    let small = r#"{"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 5, "content": "<think>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": false}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4},
            "merges": [["a", "b"], ["Ġ", "ab"]]}}"#;
    let config = r#"{"added_tokens_decoder": {"6": {"content": "<x>", "special": true}},
        "eos_token": "<end>", "additional_special_tokens": ["<y>"]}"#;
    let whole = Tokenizer::from_json("small", small.as_bytes(), Some(config)).unwrap();
    assert_eq!(whole.encode("ab ab<think><x>").unwrap(), [2, 4, 5, 6]);
    let (accepted, count) = attempts(|numbers| {
        let json = numbers.mutated(small, &JSON_WORDS);
        let config = numbers.mutated(config, &JSON_WORDS);
        match Tokenizer::from_json("damaged", json.as_bytes(), Some(&config)) {
            Ok(tokenizer) => {
                let ids = tokenizer.encode("ab b<think> é<end>").unwrap_or_default();
                let _ = tokenizer.decode(&ids);
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains(char::is_control), "{error}");
                false
            }
        }
    });
    assert!(accepted < count, "{accepted} of {count}");
}

#[test]
fn chat_files() {
    let chat = r#"{"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant",
        "content": [{"type": "text", "text": "y"}], "thinking": null, "tool_calls": [{"function":
        {"name": "f", "arguments": {"v": 1.50}}}]}], "tools": [{"name": "f"}], "enable_thinking":
        false, "chat_template_kwargs": {"a": [1, {"b": -0}]}, "add_generation_prompt": true}"#;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen");
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let source = "{% for m in messages %}{{ m | tojson }}{{ m.content }}{% endfor %}{{ a }}";
    let source = TemplateSource::new("test", Some(source), None).unwrap();
    let template = ChatTemplate::new(source).unwrap();
    let (accepted, count) = attempts(|numbers| {
        let text = numbers.mutated(chat, &JSON_WORDS);
        let parsed = Json::parse(&text).is_ok();
        match Conversation::from_json("damaged", &text) {
            Ok(chat) => {
                assert!(parsed);
                let render = |control| template.prompt(&tokenizer, &chat, control);
                if let (Ok(trusted), Ok(literal)) =
                    (render(ControlTokens::Trusted), render(ControlTokens::Literal))
                {
                    assert_eq!(trusted.text, literal.text);
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains(char::is_control), "{error}");
                false
            }
        }
    });
    assert!(accepted > 0 && accepted < count, "{accepted} of {count}");
}

#[test]
fn templates() {
    let source = "{%- macro f(x) %}{{ x ~ 1.5 }}{% endmacro %}{% for m in messages[::-1] %}\
        {%- if m.role == 'user' and loop.first is true %}{{ '<|im_start|>' + m.role }}{% endif %}\
        {% set ns = namespace(a=[1, {'b': m.content.split('x', 1)[-1].strip()}]) %}\
        {{ ns.a | tojson(indent=2) ~ '%s' % (7 % 3) }}{{ f(m.content | upper) }}\
        {% generation %}{# c #}{% raw %}{{ ~ }}{% endraw %}{% endgeneration %}{% endfor %}";
    let words = [
        "~",
        "%",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "'",
        "\"",
        "(",
        "]",
        "|",
        "not",
        "is",
        "in",
        "1e",
        "-",
        "+",
        "\\",
        "é",
        "endif",
        "{% raw %}",
        "**",
        "**9",
        "[::-1]",
        "|length",
        ".x",
        "\r\n",
    ];
    let chat = Conversation::question("a x b", None);
    let whole = TemplateSource::new("test", Some(source), None).unwrap();
    assert!(ChatTemplate::new(whole).unwrap().render(&chat).is_ok());
    let (accepted, count) = attempts(|numbers| {
        let damaged = numbers.mutated(source, &words);
        let source = TemplateSource::new("damaged", Some(&damaged), None).unwrap();
        match ChatTemplate::new(source).and_then(|template| template.render(&chat)) {
            Ok(_) => true,
            Err(error) => {
                assert!(!error.to_string().contains(char::is_control), "{error}");
                false
            }
        }
    });
    assert!(accepted > 0 && accepted < count, "{accepted} of {count}");
}
