//! Gives the program the digest of its sources, by which ranks that run another build are told apart: the version alone stays the same
//! from one commit to the next.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The crates of the program, in folders beside each other; of a published crate there is only its own.
const CRATES: [&str; 6] = ["tensor", "simd-kernels", "comm", "ops", "qwen3-model", "qwen3-cli"];

fn main() -> io::Result<()> {
    let own = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let beside = own.parent().expect("a crate lies in a folder");
    let folders = CRATES.map(|name| beside.join(name).join("src"));
    let mut files = Vec::new();
    for folder in folders.iter().filter(|folder| folder.is_dir()).chain([&own.join("src")]) {
        println!("cargo:rerun-if-changed={}", folder.display());
        list(folder, &mut files)?;
    }
    files.sort();
    files.dedup();
    // FNV-1a: the same on all machines.
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for file in files {
        for byte in fs::read(file)? {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    println!("cargo:rustc-env=QWEN3_SOURCES={digest:016x}");
    Ok(())
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { list(&path, files)? } else { files.push(path) }
    }
    Ok(())
}
