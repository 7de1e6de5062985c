//! Whether what the documents name exists: crates, paths, links, commands.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use anyhow::Result;

use super::sources::MAX_COLUMNS;
use super::{Finding, has_extension, read};
use crate::workspace::Package;

/// Documents that must name every crate.
const NAME_EVERY_CRATE: [&str; 2] = ["README.md", "docs/architecture.md"];

/// Folders of the repository; a word of a document that begins with one of them is a path.
const ROOTS: [&str; 7] = ["crates/", "docs/", "benches/", "xtask/", "models/", ".ci/", ".github/"];

/// Folders of a crate, as its own README names them.
const CRATE_ROOTS: [&str; 4] = ["src/", "examples/", "tests/", "benches/"];

/// Checks every Markdown file, and that the main ones name every crate.
pub fn check(root: &Path, files: &[PathBuf], packages: &[Package]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let commands = crate::command_names();
    for file in files.iter().filter(|file| has_extension(file, "md")) {
        let text = read(root, file)?;
        let page = Page { root, file, files, packages, commands: &commands };
        findings.extend(page.check(&text));
    }
    for name in NAME_EVERY_CRATE {
        let file = PathBuf::from(name);
        if !files.contains(&file) {
            findings.push(Finding { file, line: 0, text: "the file is missing".to_owned() });
            continue;
        }
        let text = read(root, &file)?;
        for package in packages {
            let named = text
                .split('`')
                .any(|code| code == package.name || code == format!("crates/{}", package.name));
            if !named && package.folder.starts_with(root.join("crates")) {
                let text = format!("does not name the crate `{}`", package.name);
                findings.push(Finding { file: file.clone(), line: 0, text });
            }
        }
    }
    Ok(findings)
}

struct Page<'a> {
    root: &'a Path,
    file: &'a Path,
    files: &'a [PathBuf],
    packages: &'a [Package],
    commands: &'a [String],
}

impl Page<'_> {
    fn check(&self, text: &str) -> Vec<Finding> {
        let mut wrong: BTreeSet<(usize, String)> = BTreeSet::new();
        let mut fenced = false;
        let mut crate_table = false;
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
                continue;
            }
            let mut note = |text: Option<String>| wrong.extend(text.map(|text| (number, text)));
            let prose = !fenced && !line.trim_start().starts_with('|') && !line.contains("](");
            if prose && line.chars().count() > MAX_COLUMNS {
                note(Some(format!("a line of more than {MAX_COLUMNS} characters")));
            }
            let codes: Vec<&str> =
                if fenced { vec![line] } else { line.split('`').skip(1).step_by(2).collect() };
            for code in codes {
                let words: Vec<&str> = code
                    .split([' ', '\t', '(', ')', '"', ';', '='])
                    .filter(|w| !w.is_empty())
                    .collect();
                for word in &words {
                    note(self.path(word));
                }
                note(self.package(&words));
                note(self.command(&words));
            }
            if !fenced {
                for target in link_targets(line) {
                    note(self.link(target));
                }
                // In a table headed "crate", the first column names crates.
                let first = line
                    .trim()
                    .strip_prefix('|')
                    .and_then(|rest| rest.split('|').next())
                    .map(str::trim);
                crate_table = first.is_some_and(|cell| crate_table || cell == "crate");
                if let Some(name) = first
                    .filter(|_| crate_table)
                    .and_then(|cell| cell.strip_prefix('`')?.split('`').next())
                {
                    note(
                        (!self.is_package(name))
                            .then(|| format!("`{name}` is no crate of the workspace")),
                    );
                }
            }
        }
        wrong
            .into_iter()
            .map(|(line, text)| Finding { file: self.file.to_path_buf(), line, text })
            .collect()
    }

    fn is_package(&self, name: &str) -> bool {
        self.packages.iter().any(|package| package.name == name)
    }

    /// A word that begins like a path of the repository (or, in a crate's README, of the crate)
    /// must be one.
    fn path(&self, word: &str) -> Option<String> {
        let word = word.trim_end_matches([',', '.', ':', '/']);
        // Patterns and placeholders are no paths.
        if word.contains(['*', '<', '>', '{', '$', '…', '[']) || word.contains("...") {
            return None;
        }
        let own = self
            .file
            .parent()
            .filter(|folder| folder.starts_with("crates") && folder.iter().count() == 2);
        let path = if ROOTS.iter().any(|root| word.starts_with(root)) {
            PathBuf::from(word)
        } else if let Some(folder) =
            own.filter(|_| CRATE_ROOTS.iter().any(|root| word.starts_with(root)))
        {
            folder.join(word)
        } else {
            return None;
        };
        // `benches/` is both a folder of the repository and one of a crate.
        let in_crate = own.is_some_and(|folder| self.exists(&folder.join(word)));
        (!self.exists(&path) && !in_crate).then(|| format!("there is no {}", path.display()))
    }

    fn exists(&self, path: &Path) -> bool {
        self.files.iter().any(|file| file.starts_with(path))
    }

    /// `-p NAME` and `--package NAME` must name a package.
    fn package(&self, words: &[&str]) -> Option<String> {
        let cargo = words.iter().position(|word| *word == "cargo")?;
        // After the dashes come a program's own arguments.
        let own =
            words[cargo..].iter().take_while(|word| **word != "--").copied().collect::<Vec<_>>();
        let at = own.iter().position(|word| ["-p", "--package"].contains(word))?;
        let name = own.get(at + 1).filter(|name| {
            name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        })?;
        (!self.is_package(name)).then(|| format!("{name} is no crate of the workspace"))
    }

    /// `cargo xtask NAME` must be a command.
    fn command(&self, words: &[&str]) -> Option<String> {
        let at = words.windows(2).position(|pair| pair == ["cargo", "xtask"])?;
        let name = words.get(at + 2)?.trim_end_matches([',', '.', ':']);
        let plain = !name.is_empty()
            && name.chars().all(|c| c.is_ascii_lowercase() || c == '-')
            && !name.starts_with('-');
        (plain && !self.commands.iter().any(|command| command == name))
            .then(|| format!("cargo xtask {name} is no command"))
    }

    /// A relative link must lead to a file or folder.
    fn link(&self, target: &str) -> Option<String> {
        let path =
            target.split('#').next().filter(|path| !path.is_empty() && !path.contains(':'))?;
        let folder = self.file.parent().unwrap_or(Path::new(""));
        let Some(path) = normalized(&folder.join(path)) else {
            return Some(format!("the link to {target} leaves the repository"));
        };
        let there = self.exists(&path) || self.root.join(&path).exists();
        (!there).then(|| format!("the link leads to {}, which does not exist", path.display()))
    }
}

/// The targets of a line's Markdown links.
fn link_targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next())
}

/// The path without `.` and `..`; `None` when it climbs out of the repository.
fn normalized(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            part => out.push(part),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::super::trees::findings;

    /// The findings when the README says this (and names the crates, as it must).
    fn readme(text: &str) -> String {
        findings(&[("README.md", &format!("`comm`, `ops`\n\n{text}\n"))])
    }

    #[test]
    fn paths_that_do_not_exist() {
        assert_eq!(
            readme("See `crates/comm/src/gone.rs`."),
            "README.md:3: there is no crates/comm/src/gone.rs"
        );
        assert_eq!(
            readme("```sh\nqwen3 chat --model models/gone\n```"),
            "README.md:4: there is no models/gone"
        );
        assert_eq!(
            readme(
                "See `crates/comm/src/lib.rs`, `crates/ops/`, `crates/*/README.md`, `models/<name>`."
            ),
            ""
        );
    }

    #[test]
    fn the_width_of_prose() {
        let wide = "word ".repeat(30);
        assert!(readme(&wide).contains("README.md:3: a line of more than 100 characters"));
        assert_eq!(readme(&format!("| {wide} |\n\n```\n{wide}\n```")), "");
    }

    #[test]
    fn links_that_lead_nowhere() {
        assert_eq!(
            readme("[a](docs/gone.md#top)"),
            "README.md:3: the link leads to docs/gone.md, which does not exist"
        );
        assert!(readme("[a](../elsewhere.md)").contains("leaves the repository"));
        assert_eq!(
            readme("[a](docs/architecture.md#map) [b](https://example.org/x) [c](#here)"),
            ""
        );
    }

    #[test]
    fn crates_that_do_not_exist() {
        assert_eq!(
            readme("| crate | what |\n|---|---|\n| `comm` | x |\n| `gone` | y |"),
            "README.md:6: `gone` is no crate of the workspace"
        );
        assert_eq!(
            readme("Run `cargo test -p gone`."),
            "README.md:3: gone is no crate of the workspace"
        );
        assert_eq!(readme("Run `cargo test -p comm -- -p gone`, or `cargo test -p CRATE`."), "");
    }

    #[test]
    fn crates_that_are_not_named() {
        assert_eq!(
            findings(&[("README.md", "Only `comm`.\n")]),
            "README.md: does not name the crate `ops`"
        );
    }

    #[test]
    fn commands_that_do_not_exist() {
        assert_eq!(
            readme("Run `cargo xtask gone`."),
            "README.md:3: cargo xtask gone is no command"
        );
        assert_eq!(
            readme("```\ncargo xtask gone --now\n```"),
            "README.md:4: cargo xtask gone is no command"
        );
        assert_eq!(
            readme("Run `cargo xtask mpi-test`, `cargo xtask`, or `cargo xtask COMMAND`."),
            ""
        );
    }

    #[test]
    fn a_crate_s_readme_names_its_own_files() {
        let text =
            findings(&[("crates/comm/README.md", "See `src/lib.rs` and `examples/gone.rs`.\n")]);
        assert_eq!(text, "crates/comm/README.md:1: there is no crates/comm/examples/gone.rs");
    }
}
