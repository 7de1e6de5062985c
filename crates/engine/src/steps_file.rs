//! The latest steps, kept for the case that a rank is lost: shapes and ids, no text and no tokens.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::path::Path;

use tempfile::NamedTempFile;

use crate::record::Record;

/// Steps that are kept.
const STEPS: usize = 256;

/// The latest steps of a rank.
#[derive(Default)]
pub(crate) struct LatestSteps {
    step: u64,
    lines: VecDeque<String>,
}

impl LatestSteps {
    /// Adds a step, before it is carried out.
    pub fn add(&mut self, record: &Record) {
        self.step += 1;
        if self.lines.len() == STEPS {
            self.lines.pop_front();
        }
        let arrived: Vec<_> = record
            .arrived
            .iter()
            .map(|request| {
                format!("{}x{} of {} tokens", request.id, request.n, request.prompt.len())
            })
            .collect();
        let placed: Vec<_> = record
            .placed
            .iter()
            .map(|placed| {
                let pages = placed.pages.len();
                format!(
                    "{} at {} in {pages} pages from rank {}",
                    placed.id, placed.computed, placed.first
                )
            })
            .collect();
        self.lines.push_back(format!(
            "step {}: arrived {arrived:?} removed {:?} preempted {:?} copies {} placed {placed:?} \
             grown {} spans (sequence, tokens) {:?}",
            self.step,
            record.removed,
            record.preempted,
            record.copies.len(),
            record.grown.len(),
            record.spans,
        ));
    }

    /// Writes the steps to `path`, which only its owner may read.
    pub fn write(&self, path: &Path, error: &str) -> io::Result<()> {
        // A new file of mode 0600 takes the place of whatever has the name, also of a link.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut file = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
        let lines: Vec<&str> = self.lines.iter().map(String::as_str).collect();
        writeln!(file, "{}\nended by: {error}", lines.join("\n"))?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_latest_steps_are_written_for_the_owner_alone() {
        let mut steps = LatestSteps::default();
        for step in 0..300 {
            steps.add(&Record { spans: vec![(step, 7)], ..Record::default() });
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("steps");
        let other = folder.path().join("other");
        std::fs::write(&other, "another user's").expect("a file");
        std::os::unix::fs::symlink(&other, &path).expect("a link");
        steps.write(&path, "rank 1 failed").expect("the file is written");
        let text = std::fs::read_to_string(&path).expect("the file");
        assert_eq!(text.lines().count(), STEPS + 1);
        assert!(text.starts_with("step 45: ") && text.ends_with("ended by: rank 1 failed\n"));
        assert!(text.contains("spans (sequence, tokens) [(299, 7)]"));
        let mode = std::fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(&other).expect("the file"), "another user's");
    }
}
