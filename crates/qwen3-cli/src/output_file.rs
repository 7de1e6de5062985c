//! Output files that appear as a whole: they are written under a new random name and renamed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::{Builder, TempPath};

use crate::failure::CliError;

/// A file that is being written. A reader of its name sees the old file or the new one, also if two
/// programs write it at once. A file that is not finished is removed.
pub struct OutputFile {
    path: PathBuf,
    file: File,
    /// The random name; `None` for a device or a pipe, which is written itself.
    temporary: Option<TempPath>,
}

impl OutputFile {
    /// Starts to write the file `path`. Waits for the reader of a pipe.
    pub fn create(path: &Path) -> Result<Self, CliError> {
        let error = |source| CliError::file(path, source);
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            let file = File::options().write(true).open(path).map_err(error)?;
            return Ok(Self { path: path.to_owned(), file, temporary: None });
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let name = path.file_name().ok_or_else(|| error(io::ErrorKind::IsADirectory.into()))?;
        // The system takes the bits of the umask away, as from any new file.
        let (file, temporary) = Builder::new()
            .prefix(&*format!("{}.", name.to_string_lossy()))
            .suffix(".part")
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(folder.unwrap_or(Path::new(".")))
            .map_err(error)?
            .into_parts();
        Ok(Self { path: path.to_owned(), file, temporary: Some(temporary) })
    }

    /// Checks that the file can be written, without a change. A device or a pipe is not opened.
    pub fn check(path: &Path) -> Result<(), CliError> {
        match path.metadata() {
            Ok(found) if !found.is_file() && !found.is_dir() => Ok(()),
            _ => Self::create(path).map(drop),
        }
    }

    /// The name under which the file is written.
    pub fn written_path(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.path)
    }

    /// Writes all of `bytes`.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.file.write_all(bytes).map_err(|source| CliError::file(&self.path, source))
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<(), CliError> {
        match self.temporary.map(|temporary| temporary.persist(&self.path)) {
            Some(Err(error)) => Err(CliError::file(&self.path, error.error)),
            Some(Ok(())) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn two_writers_of_one_file_do_not_mix_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut writers = [0, 1].map(|_| OutputFile::create(&path).unwrap());
        for piece in 0..3 {
            writers[0].write_all(format!("a{piece}").as_bytes()).unwrap();
            writers[1].write_all(format!("b{piece}").as_bytes()).unwrap();
        }
        let [first, second] = writers;
        first.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "a0a1a2");
        second.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "b0b1b2");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn a_link_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [path, fixed, target] = ["out", "out.part", "target"].map(|name| dir.path().join(name));
        fs::write(&target, "private").unwrap();
        symlink(&target, &path).unwrap();
        symlink(&target, &fixed).unwrap();
        let mut output = OutputFile::create(&path).unwrap();
        output.write_all(b"text").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "private");
        assert!(fixed.is_symlink() && !path.is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    #[test]
    fn a_file_that_is_not_finished_or_only_checked_leaves_everything_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        OutputFile::check(&path).unwrap();
        OutputFile::create(&path).unwrap().write_all(b"text").unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
        fs::write(&path, "old").unwrap();
        OutputFile::check(&path).unwrap();
        drop(OutputFile::create(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        for wrong in [dir.path(), &dir.path().join("no/such/folder")] {
            let error = OutputFile::check(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&wrong.display().to_string()), "{error}");
        }
        OutputFile::check(Path::new("/dev/null")).unwrap();
        OutputFile::create(Path::new("/dev/null")).unwrap().finish().unwrap();
    }
}
