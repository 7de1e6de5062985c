//! Gives the program the digest of its sources, by which ranks that run another build are told
//! apart: the version alone stays the same from one commit to the next. Gives it the commit, too.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

fn main() -> io::Result<()> {
    let own = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    // All crates of the workspace; a published crate has other crates beside it, and only its own
    // sources count.
    let all = own
        .parent()
        .filter(|folder| folder.file_name() == Some(OsStr::new("crates")))
        .unwrap_or(&own);
    let mut files = Vec::new();
    for entry in fs::read_dir(all)? {
        let entry = entry?.path();
        // Not its tests; of a published crate alone, the one folder there is.
        let sources = if all == own { entry } else { entry.join("src") };
        if sources.is_dir() && sources.file_name() == Some(OsStr::new("src")) {
            println!("cargo:rerun-if-changed={}", sources.display());
            list(&sources, &mut files)?;
        }
    }
    files.sort();
    // FNV-1a: the same on all machines.
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for file in files {
        let name = file.strip_prefix(all).unwrap_or(&file).to_string_lossy().into_owned();
        for byte in name.into_bytes().into_iter().chain([0]).chain(fs::read(file)?) {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    println!("cargo:rustc-env=QWEN3_SOURCES={digest:016x}");
    println!("cargo:rustc-env=QWEN3_COMMIT={}", commit(&own).unwrap_or_default());
    Ok(())
}

/// The commit of the sources, marked if files differ from it; `None` without git or outside of a
/// repository.
fn commit(folder: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").current_dir(folder).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        Some(text.trim().to_owned())
    };
    // The log changes with each commit; a path that does not exist would build anew each time.
    let log = folder.join(git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    if log.is_file() {
        println!("cargo:rerun-if-changed={}", log.display());
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "."])?;
    Some(if changed.is_empty() { commit } else { commit + "-changed" })
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if path.extension() == Some(OsStr::new("rs")) {
            files.push(path);
        }
    }
    Ok(())
}
