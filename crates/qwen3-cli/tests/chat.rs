//! Conversations: history, its limits, and Ctrl-C.

mod program;

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use program::{AUSTEN, Copy, assert_one_line, json, program, run_with};
use serde_json::json as value;

/// The program in a conversation that answers the same each time.
fn chat(model: &str, ranks: &str) -> Command {
    let args = [
        "chat",
        "--model",
        model,
        "--no-thinking",
        "--temperature",
        "0",
        "--kv",
        "f32",
        "--threads",
        "1",
    ];
    let mut command = program(&args);
    command.args(["--ranks", ranks]);
    command
}

#[test]
fn a_conversation_keeps_its_history_and_ends_with_its_input() {
    for ranks in ["1", "2"] {
        let run = run_with(chat(AUSTEN, ranks), "What is 17 + 15?\n\nWhat is 20 - 13?\n");
        assert!(run.success && run.stderr.is_empty(), "{run:?}");
        assert_eq!(run.stdout, "17 + 15 = 32\n20 - 13 = 7\n");
    }
}

#[test]
fn a_key_that_is_no_character_ends_no_conversation() {
    let input = b"hello \xff\nWhat is 17 + 15?\n";
    let run = run_with(chat(AUSTEN, "2"), input);
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
    assert!(run.stdout.ends_with("\n17 + 15 = 32\n"), "{run:?}");
}

#[test]
fn a_system_text_without_room_is_refused_at_once() {
    let mut command = chat(AUSTEN, "2");
    command.args(["--system", &"sister ".repeat(5000)]);
    let run = run_with(command, "What is 17 + 15?\n");
    assert!(!run.success && run.stdout.is_empty() && run.stderr.lines().count() == 1, "{run:?}");
    assert!(
        run.stderr.starts_with("error: --system: ") && run.stderr.contains("expected at most 3840"),
        "{run:?}"
    );
}

#[test]
fn a_template_that_makes_nothing_of_a_conversation_ends_it_in_one_line() {
    let copy = Copy::new();
    fs::write(copy.file("chat_template.jinja"), "{{ messages[5] }}").unwrap();
    let run = run_with(chat(copy.path(), "2"), "What is 17 + 15?\n");
    assert_one_line(
        &run,
        &["chat template: it makes nothing of this conversation", "chat_template.jinja"],
    );
}

#[test]
fn what_is_reused_of_the_cache_is_what_a_whole_prompt_gives() {
    let questions = ["Spell the word \"sister\".", "Tell me about music.", "Write about marriage."];
    let run = run_with(chat(AUSTEN, "2"), &(questions.join("\n") + "\n"));
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
    let answers: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(answers.len(), questions.len(), "{run:?}");
    let mut messages = Vec::new();
    for (question, answer) in questions.into_iter().zip(answers) {
        messages.push(value!({ "role": "user", "content": question }));
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            file.path(),
            value!({ "messages": messages, "enable_thinking": false }).to_string(),
        )
        .unwrap();
        let tokens = json(&[
            "tokenize",
            "--json",
            "--model",
            AUSTEN,
            "--chat",
            file.path().to_str().unwrap(),
        ]);
        let ids: Vec<String> =
            tokens["ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
        let whole = json(&[
            "generate",
            "--json",
            "--model",
            AUSTEN,
            "--kv",
            "f32",
            "--tokens",
            &ids.join(","),
        ]);
        assert_eq!(whole["text"], answer, "after {question}");
        messages.push(value!({ "role": "assistant", "content": answer }));
    }
}

#[test]
fn the_oldest_messages_make_room_and_a_message_without_room_is_dropped() {
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("max_position_embeddings".into(), value!(96))));
    let long = "sister ".repeat(100);
    let input =
        format!("What is 17 + 15?\nWhat is 20 - 13?\nWhat is 7 x 8?\n{long}\nWhat is 17 + 15?\n");
    let run = run_with(chat(copy.path(), "2"), &input);
    assert!(run.success, "{run:?}");
    assert_eq!(run.stdout, "17 + 15 = 32\n20 - 13 = 7\n7 x 8 = 56\n17 + 15 = 32\n");
    let notes: Vec<&str> = run.stderr.lines().collect();
    assert_eq!(notes.len(), 2, "{run:?}");
    assert!(notes[0].contains("oldest 2 messages"), "{run:?}");
    assert!(notes[1].contains("longer than the model's context"), "{run:?}");
}

#[test]
fn an_answer_that_is_cut_says_why() {
    let copy = Copy::new();
    copy.config(|config| {
        config.remove("eos_token_id");
        config.insert("max_position_embeddings".into(), value!(64));
    });
    fs::remove_file(copy.file("generation_config.json")).unwrap();
    for ranks in ["1", "2"] {
        for (extra, end) in [
            (&[] as &[&str], " (the context is full)\n"),
            (&["--max-new-tokens", "99"], " (the context is full)\n"),
            (&["--max-new-tokens", "3"], " (--max-new-tokens reached)\n"),
        ] {
            let mut command = chat(copy.path(), ranks);
            command.args(extra);
            let run = run_with(command, "Tell me about music.\n");
            assert!(run.success && run.stderr.is_empty() && run.stdout.ends_with(end), "{run:?}");
        }
    }
    let stop = |model: &str, tokens: &str| {
        let args = [
            "generate",
            "--json",
            "--chat",
            "--no-thinking",
            "--prompt",
            "What is 17 + 15?",
            "--model",
        ];
        json(&[&args[..], &[model, "--max-new-tokens", tokens]].concat())["stop"].clone()
    };
    assert_eq!(
        [stop(AUSTEN, "64"), stop(AUSTEN, "3"), stop(copy.path(), "99")],
        ["end", "limit", "context"]
    );
}

#[test]
fn an_interrupt_ends_the_answer_and_not_the_program() {
    // Without a token that ends a text, an answer goes on for thousands of tokens.
    let copy = Copy::new();
    copy.config(|config| drop(config.remove("eos_token_id")));
    fs::remove_file(copy.file("generation_config.json")).unwrap();
    for ranks in ["1", "2"] {
        let mut child = chat(copy.path(), ranks)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"Tell me about music.\n").unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut first = [0];
        stdout.read_exact(&mut first).unwrap();
        let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        let end = child.wait_with_output().unwrap();
        assert!(end.status.success() && end.stderr.is_empty(), "{end:?}");
        assert!(rest.ends_with(" (stopped)\n"), "{rest:?}");
    }
}
