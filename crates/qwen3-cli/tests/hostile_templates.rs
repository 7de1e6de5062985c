//! Chat templates that exhaust the stack, time or memory, or print control characters.

mod program;

use std::fs;
use std::path::Path;

use program::{AUSTEN, Run, run};

/// Templates of the set that do little work and render as in Python.
const HARMLESS: [&str; 8] =
    ["count", "esc-out", "int-min", "int-overflow", "mod-min", "ns-cycle-eq", "round", "strip"];

/// Takes about as long as a template may: whether it renders depends on the machine.
const BORDERLINE: &str = "sort-quadr";

fn check(name: &str, run: &Run) {
    if HARMLESS.contains(&name) || (name == BORDERLINE && run.success) {
        assert!(run.success && run.stderr.is_empty(), "{name}: {run:?}");
        return;
    }
    let line = run.stderr.strip_suffix('\n').unwrap_or(&run.stderr);
    assert!(!run.success && run.stdout.is_empty(), "{name}: {run:?}");
    assert!(line.starts_with("error: ") && line.contains("chat template"), "{name}: {run:?}");
    assert!(!line.contains(char::is_control), "{name}: {run:?}");
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(AUSTEN).unwrap() {
        let file = file.unwrap();
        let name = file.file_name();
        if Path::new(&name).extension().is_none_or(|extension| extension != "txt") {
            fs::copy(file.path(), dir.path().join(name)).unwrap();
        }
    }
    dir
}

#[test]
fn each_ends_with_one_line() {
    let folder = folder();
    let (model, chat) = (folder.path(), folder.path().join("chat.json"));
    fs::write(&chat, r#"[{"role": "user", "content": "x"}]"#).unwrap();
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hostile-templates");
    let mut count = 0;
    for file in fs::read_dir(templates).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, model.join("chat_template.jinja")).unwrap();
        let args = ["tokenize", "--model", model.to_str().unwrap(), "--chat"];
        let found = run(&[&args[..], &[chat.to_str().unwrap()]].concat());
        check(path.file_stem().unwrap().to_str().unwrap(), &found);
        count += 1;
    }
    assert_eq!(count, 50);
}

#[test]
fn every_rank_ends() {
    let folder = folder();
    let model = folder.path();
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hostile-templates");
    for name in ["nested-list-eq", "recursive-macro", "nested-loops", "format-method"] {
        let from = templates.join(format!("{name}.jinja"));
        fs::copy(from, model.join("chat_template.jinja")).unwrap();
        let args = ["generate", "--ranks", "3", "--chat", "--prompt", "x", "--model"];
        check(name, &run(&[&args[..], &[model.to_str().unwrap()]].concat()));
    }
}
