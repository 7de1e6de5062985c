//! Rules of single Rust files: how they open, how long they are, where `unsafe` is, what no finished file holds.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::lexer::{code_only, line_of, words};
use super::{Finding, has_extension, read};

/// Longer files hold more than one idea.
const MAX_LINES: usize = 450;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 6] = ["util", "utils", "common", "prelude", "types", "helpers"];

/// Checks one file; `file` is relative to the root.
pub fn check(file: &Path, source: &str) -> Vec<Finding> {
    let code = code_only(source);
    let mut findings = Vec::new();
    let mut find = |line: usize, text: String| findings.push(Finding { file: file.to_path_buf(), line, text });

    if !source.starts_with("//!") {
        find(1, "the first line is no `//!` line that says what the file is".to_owned());
    }
    let lines = source.lines().count();
    if lines > MAX_LINES {
        find(0, format!("{lines} lines; a file holds one idea in at most {MAX_LINES}"));
    }
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        find(0, format!("a file named {stem} says nothing about what is in it"));
    }
    let all: Vec<(usize, &str)> = words(&code).collect();
    for &(offset, word) in &all {
        let before = code[..offset].trim_end();
        let after = code[offset + word.len()..].trim_start();
        match word {
            "unsafe" if !unsafe_allowed(file) => {
                find(line_of(&code, offset), "unsafe is not allowed in this file".to_owned());
            }
            "todo" | "unimplemented" if after.starts_with('!') && !after.starts_with("!=") => {
                find(line_of(&code, offset), format!("{word}! is left"));
            }
            "ignore" if before.ends_with("#[") => {
                find(line_of(&code, offset), "an ignored test tests nothing".to_owned());
            }
            _ => {}
        }
    }
    for (index, line) in source.lines().enumerate() {
        let comment = line.trim_start().strip_prefix("///").or_else(|| line.trim_start().strip_prefix("//!"));
        let info = comment.and_then(|text| text.trim_start().strip_prefix("```"));
        if info.is_some_and(|info| info.split(',').any(|word| word.trim() == "ignore")) {
            find(index + 1, "an ignored example is never compiled".to_owned());
        }
    }
    findings
}

/// Files of comm with unsafe code: the memory that several ranks see, and the two protocols that hand its regions around.
const SHARED_MEMORY: [&str; 3] = ["segment.rs", "exchange.rs", "mail.rs"];

/// The places where the design has unsafe code: the kernels, comm's MPI and shared-memory files, tensor's buffer.
fn unsafe_allowed(file: &Path) -> bool {
    let parts: Vec<_> = file.iter().map(|part| part.to_string_lossy()).collect();
    let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
    match parts[..] {
        ["crates", "simd-kernels", ..] => true,
        ["crates", "comm", "src", "mpi", ..] => true,
        ["crates", "comm", "src", name] => {
            name == "mpi.rs" || name.starts_with("mpi_") || SHARED_MEMORY.contains(&name)
        }
        // Which one is checked over all files.
        ["crates", "tensor", "src", ..] => true,
        _ => false,
    }
}

/// `tensor` may have unsafe code in one file only, that of its aligned buffer.
pub fn one_unsafe_file_in_tensor(root: &Path, files: &[PathBuf]) -> Result<Vec<Finding>> {
    let mut with_unsafe = Vec::new();
    for file in files.iter().filter(|file| file.starts_with("crates/tensor/src") && has_extension(file, "rs")) {
        let code = code_only(&read(root, file)?);
        if let Some((offset, _)) = words(&code).find(|(_, word)| *word == "unsafe") {
            with_unsafe.push((file, line_of(&code, offset)));
        }
    }
    if with_unsafe.len() < 2 {
        return Ok(Vec::new());
    }
    let text = "tensor has unsafe code in more than one file; only its aligned buffer may".to_owned();
    Ok(with_unsafe.into_iter().map(|(file, line)| Finding { file: file.clone(), line, text: text.clone() }).collect())
}

#[cfg(test)]
mod tests {
    use super::super::trees::tree;
    use super::*;

    fn texts(file: &str, source: &str) -> Vec<String> {
        check(Path::new(file), source).iter().map(ToString::to_string).collect()
    }

    fn one(file: &str, source: &str) -> String {
        let texts = texts(file, source);
        assert_eq!(texts.len(), 1, "{texts:?}");
        texts[0].clone()
    }

    #[test]
    fn the_opening_line() {
        assert!(one("crates/ops/src/lib.rs", "// No doc comment.\n").contains(":1: the first line"));
        assert!(one("crates/ops/src/lib.rs", "").contains("the first line"));
        assert!(texts("crates/ops/src/lib.rs", "//! Fine.\n").is_empty());
    }

    #[test]
    fn the_length() {
        let lines = |n: usize| format!("//! Long.\n{}", "\n".repeat(n - 1));
        assert!(texts("a/b.rs", &lines(450)).is_empty());
        assert!(one("a/b.rs", &lines(451)).contains("451 lines"));
    }

    #[test]
    fn the_name() {
        assert!(one("crates/ops/src/util.rs", "//! Things.\n").contains("named util"));
        assert!(texts("crates/ops/src/utility_of_heads.rs", "//! Things.\n").is_empty());
    }

    #[test]
    fn unsafe_outside_its_places() {
        let source = "//! X.\n\nfn f(p: *const u8) -> u8 {\n    unsafe { *p }\n}\n";
        for file in [
            "crates/ops/src/a.rs",
            "crates/comm/src/threads.rs",
            "crates/comm/tests/mpi.rs",
            "xtask/src/a.rs",
            "benches/src/a.rs",
            "crates/comm/src/mpirical.rs",
        ] {
            assert!(one(file, source).ends_with(":4: unsafe is not allowed in this file"), "{file}");
        }
        for file in [
            "crates/simd-kernels/src/a/b.rs",
            "crates/comm/src/mpi.rs",
            "crates/comm/src/mpi/window.rs",
            "crates/comm/src/mpi_sys.rs",
            "crates/comm/src/segment.rs",
        ] {
            assert!(texts(file, source).is_empty(), "{file}");
        }
        let words_only = "//! unsafe\n#![forbid(unsafe_code)]\n// unsafe {}\nconst X: &str = \"unsafe { }\";\n";
        assert!(texts("crates/ops/src/a.rs", words_only).is_empty());
    }

    #[test]
    fn a_second_unsafe_file_in_tensor() {
        let source = "//! X.\nunsafe impl Send for X {}\n";
        let root = tree(&[("crates/tensor/src/buffer.rs", source), ("crates/tensor/src/safe.rs", "//! unsafe\n")]);
        let files = super::super::files(root.path()).unwrap();
        assert_eq!(one_unsafe_file_in_tensor(root.path(), &files).unwrap(), []);
        std::fs::write(root.path().join("crates/tensor/src/packed.rs"), source).unwrap();
        let files = super::super::files(root.path()).unwrap();
        let findings = one_unsafe_file_in_tensor(root.path(), &files).unwrap();
        let named: Vec<_> = findings.iter().map(|f| (f.file.to_str().unwrap(), f.line)).collect();
        assert_eq!(named, [("crates/tensor/src/buffer.rs", 2), ("crates/tensor/src/packed.rs", 2)]);
    }

    #[test]
    fn unfinished_work() {
        assert!(one("a/b.rs", "//! X.\nfn f() { todo!() }\n").ends_with(":2: todo! is left"));
        assert!(one("a/b.rs", "//! X.\nfn f() { unimplemented ! (\"later\") }\n").contains("unimplemented! is left"));
        assert!(one("a/b.rs", "//! X.\n#[test]\n#[ignore = \"slow\"]\nfn f() {}\n").contains(":3: an ignored test"));
        assert!(
            one("a/b.rs", "//! X.\n/// ```ignore\n/// f();\n/// ```\nfn f() {}\n").contains(":2: an ignored example")
        );
        let fine = "//! todo!() and #[ignore]\nfn f(todo: u8) -> bool { todo != 0 }\n/// ```no_run\n/// ```\nfn g(ignore: u8) {}\n";
        assert!(texts("a/b.rs", fine).is_empty());
    }
}
