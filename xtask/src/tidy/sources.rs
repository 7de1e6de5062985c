//! Rules of single Rust files: how they open, how long they are, how they are named, and that all
//! their tests run.

use std::path::Path;

use super::Finding;

/// Most lines of a file that does not say in its header why it is longer.
const MAX_LINES: usize = 600;

/// How the header of a longer file begins the line that gives the reason.
const LENGTH_REASON: &str = "//! Longer than 600 lines because ";

/// Most characters of a comment line or of a line of Markdown; rustfmt keeps code to the same.
pub const MAX_COLUMNS: usize = 100;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 6] = ["util", "utils", "common", "prelude", "types", "helpers"];

/// Where unsafe code may be allowed, which the compiler refuses otherwise.
const UNSAFE: [&str; 3] =
    ["crates/comm/src/lib.rs", "crates/simd-kernels/src/lib.rs", "crates/tensor/src/lib.rs"];

/// Checks one file; `file` is relative to the root.
pub fn check(file: &Path, source: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find =
        |line: usize, text: String| findings.push(Finding { file: file.to_path_buf(), line, text });

    if !source.starts_with("//!") {
        find(1, "the first line is no `//!` line that says what the file is".to_owned());
    }
    let lines = source.lines().count();
    let header = || source.lines().take_while(|line| line.starts_with("//!"));
    if lines > MAX_LINES && !header().any(|line| line.starts_with(LENGTH_REASON)) {
        find(
            0,
            format!(
                "{lines} lines, expected at most {MAX_LINES}, or a header line that starts with \
                 `{LENGTH_REASON}`"
            ),
        );
    }
    let name = file.to_str().unwrap_or_default();
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        find(0, format!("a file named {stem} says nothing about what is in it"));
    }
    for (index, source_line) in source.lines().enumerate() {
        let line = source_line.trim_start();
        // rustfmt gives an attribute a line of its own.
        if line.starts_with("#[ignore") {
            find(index + 1, "an ignored test tests nothing".to_owned());
        }
        if line.trim_start_matches(['#', '!', '[']).starts_with("allow(unsafe_code")
            && !UNSAFE.contains(&name)
        {
            find(index + 1, format!("unsafe code may be allowed in {} only", UNSAFE.join(", ")));
        }
        if line.starts_with("//")
            && source_line.chars().count() > MAX_COLUMNS
            && !line.contains("| ")
        {
            find(index + 1, format!("a comment line of more than {MAX_COLUMNS} characters"));
        }
        let comment = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        let info = comment.and_then(|text| text.trim_start().strip_prefix("```"));
        if info.is_some_and(|info| info.split(',').any(|word| word.trim() == "ignore")) {
            find(index + 1, "an ignored example is never compiled".to_owned());
        }
    }
    findings
}

#[cfg(test)]
mod tests {
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
        assert!(
            one("crates/ops/src/lib.rs", "// No doc comment.\n").contains(":1: the first line")
        );
        assert!(one("crates/ops/src/lib.rs", "").contains("the first line"));
        assert!(texts("crates/ops/src/lib.rs", "//! Fine.\n").is_empty());
    }

    #[test]
    fn the_length() {
        let lines = |n: usize| format!("//! Long.\n{}", "\n".repeat(n - 1));
        assert!(texts("a/b.rs", &lines(600)).is_empty());
        assert!(one("a/b.rs", &lines(601)).contains("601 lines"));
    }

    #[test]
    fn a_reason_for_the_length() {
        let source = format!("//! Long.\n{LENGTH_REASON}it is one table.\n{}", "\n".repeat(700));
        assert!(texts("a/b.rs", &source).is_empty());
    }

    #[test]
    fn the_width_of_comments() {
        let wide = "x".repeat(MAX_COLUMNS);
        assert!(one("a/b.rs", &format!("//! X.\n    // {wide}\n")).contains(":2: a comment line"));
        assert!(texts("a/b.rs", &format!("//! X.\n//! | {wide} | a table |\n")).is_empty());
    }

    #[test]
    fn the_name() {
        assert!(one("crates/ops/src/util.rs", "//! Things.\n").contains("named util"));
        assert!(texts("crates/ops/src/utility_of_heads.rs", "//! Things.\n").is_empty());
    }

    #[test]
    fn unsafe_code() {
        for source in [
            "//! X.\n#[allow(unsafe_code)]\nmod a;\n",
            "//! X.\n#![allow(unsafe_code, reason = \"\")]\n",
        ] {
            assert!(
                one("crates/ops/src/lib.rs", source)
                    .contains(":2: unsafe code may be allowed in crates/comm")
            );
            assert!(texts("crates/tensor/src/lib.rs", source).is_empty());
        }
    }

    #[test]
    fn tests_and_examples_that_never_run() {
        assert!(
            one("a/b.rs", "//! X.\n#[test]\n#[ignore = \"slow\"]\nfn f() {}\n")
                .contains(":3: an ignored test")
        );
        assert!(
            one("a/b.rs", "//! X.\n/// ```ignore\n/// f();\n/// ```\nfn f() {}\n")
                .contains(":2: an ignored example")
        );
        let fine = "//! #[ignore]\n/// ```no_run\n/// ```\nfn g(ignore: u8) {}\n";
        assert!(texts("a/b.rs", fine).is_empty());
    }
}
