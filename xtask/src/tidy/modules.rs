//! Whether each Rust file is compiled: some other file names it as a module.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Finding, read};

/// Files that cargo finds by themselves, relative to the folder of a package.
const ROOTS: [&str; 3] = ["src/lib.rs", "src/main.rs", "build.rs"];

/// Folders of a package whose direct files cargo finds by themselves.
const ROOT_FOLDERS: [&str; 4] = ["src/bin", "tests", "examples", "benches"];

/// Checks that `file`, relative to `root`, is a root of a cargo target or is declared with `mod` in
/// the file above it.
pub fn check(root: &Path, file: &Path) -> Result<Vec<Finding>> {
    let Some(package) =
        file.ancestors().skip(1).find(|dir| root.join(dir).join("Cargo.toml").is_file())
    else {
        return Ok(Vec::new());
    };
    let inside = file.strip_prefix(package).unwrap_or(file);
    let folder = inside.parent().unwrap_or(Path::new(""));
    if ROOTS.iter().any(|name| inside == Path::new(name))
        || ROOT_FOLDERS.iter().any(|name| folder == Path::new(name))
    {
        return Ok(Vec::new());
    }
    let stem = inside.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (name, folder) = match stem.as_str() {
        "mod" | "main" => {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, folder.parent().unwrap_or(Path::new("")))
        }
        _ => (stem, folder),
    };
    let parents = parents(&package.join(folder));
    for parent in parents.iter().filter(|parent| root.join(parent).is_file()) {
        if declares(&read(root, parent)?, &name) {
            return Ok(Vec::new());
        }
    }
    // A module of several tests stands in a folder of its own and is declared by each test.
    let tests = package.join(folder);
    if ROOT_FOLDERS.iter().any(|name| folder == Path::new(name)) {
        for entry in std::fs::read_dir(root.join(&tests))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "rs")
                && declares(&std::fs::read_to_string(&path)?, &name)
            {
                return Ok(Vec::new());
            }
        }
    }
    let text = format!("no module declares this file (`mod {name};`)");
    Ok(vec![Finding { file: file.to_path_buf(), line: 0, text }])
}

/// The files in which a module of `folder` may be declared.
fn parents(folder: &Path) -> Vec<PathBuf> {
    let beside = folder.with_extension("rs");
    ["lib.rs", "main.rs", "mod.rs"]
        .map(|name| folder.join(name))
        .into_iter()
        .chain([beside])
        .collect()
}

fn declares(source: &str, name: &str) -> bool {
    let declared = |line: &str| {
        let rest = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        rest.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')).is_some_and(|m| m == name)
    };
    source.lines().any(declared)
}

#[cfg(test)]
mod tests {
    use super::super::trees::findings;

    #[test]
    fn a_file_that_no_module_names() {
        let text = findings(&[
            ("crates/ops/src/lib.rs", "//! O.\nmod known;\n"),
            ("crates/ops/src/known.rs", "//! K.\npub mod inner;\n"),
            ("crates/ops/src/known/inner.rs", "//! I.\n"),
            ("crates/ops/src/orphan.rs", "//! O.\n"),
            ("crates/ops/src/bin/tool.rs", "//! T.\n"),
            ("crates/ops/tests/suite/mod.rs", "//! S.\n"),
            ("crates/ops/tests/all.rs", "//! A.\nmod suite;\n"),
        ]);
        assert_eq!(text, "crates/ops/src/orphan.rs: no module declares this file (`mod orphan;`)");
    }
}
