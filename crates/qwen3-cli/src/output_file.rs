//! Files that appear as a whole, under another name until then.

use std::path::{Path, PathBuf};

/// What to write before it takes the name `path`, so that a reader sees the old file or the new
/// one; nothing where the name belongs to a device or a pipe, which is written itself and not
/// replaced.
pub fn part_of(path: &Path) -> Option<PathBuf> {
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        return None;
    }
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    Some(part.into())
}
