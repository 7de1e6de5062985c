//! Progress of long work on rank 0's standard error: a bar on a terminal, elsewhere (under most MPI
//! launchers, in a file) loading prints a line every few seconds.

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use ranks::Rank;

/// Time between two lines where standard error is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(3);
/// A bar that is gone at once only flickers.
const BAR_DELAY: Duration = Duration::from_millis(300);

/// The unit of the amounts of a [`Progress`].
#[derive(Clone, Copy)]
pub enum Unit {
    /// Things with this name in the plural.
    Count(&'static str),
    /// Bytes.
    Bytes,
}

/// The progress of one piece of work.
pub struct Progress {
    /// What is being done, for example `loading`.
    verb: &'static str,
    unit: Unit,
    start: Instant,
    /// On a terminal.
    bar: Option<ProgressBar>,
    /// Elsewhere: how long the work took until the last line. `None` on other ranks.
    last_line: Option<Mutex<Duration>>,
}

impl Progress {
    /// The progress of work that starts now, and of which nothing is shown before its first part is
    /// done.
    pub fn new(rank: &Rank, verb: &'static str, unit: Unit) -> Self {
        let terminal = io::stderr().is_terminal();
        let bar = (rank.is_root() && terminal).then(|| {
            let amounts = match unit {
                Unit::Count(name) => format!("{{human_pos}} of {{human_len}} {name}"),
                Unit::Bytes => "{bytes} of {total_bytes}, {bytes_per_sec}".to_owned(),
            };
            let template = format!("{verb} {{bar:40}} {amounts}, {{elapsed}}, {{eta}} left");
            let style = ProgressStyle::with_template(&template)
                .expect("the templates are fixed and well formed");
            ProgressBar::new(0).with_style(style)
        });
        Self { verb, unit, start: Instant::now(), bar, last_line: None }
    }

    /// The same, with lines on a standard error that is no terminal.
    pub fn with_lines(mut self, rank: &Rank) -> Self {
        let lines = rank.is_root() && !io::stderr().is_terminal();
        self.last_line = lines.then(Mutex::default);
        self
    }

    /// `done` of `total` are done.
    pub fn update(&self, done: u64, total: u64) {
        let elapsed = self.start.elapsed();
        if let Some(bar) = self.bar.as_ref().filter(|_| elapsed > BAR_DELAY) {
            bar.set_length(total);
            bar.set_position(done);
        }
        if let Some(last) = &self.last_line {
            let mut last = last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Some(line) = self.line(&mut last, elapsed, done, total) {
                eprintln!("{line}");
            }
        }
    }

    /// The line to print after `elapsed`, at most one per interval; `last` is the time of the last
    /// one.
    fn line(
        &self,
        last: &mut Duration,
        elapsed: Duration,
        done: u64,
        total: u64,
    ) -> Option<String> {
        if done >= total || elapsed < *last + LINE_INTERVAL {
            return None;
        }
        *last = elapsed;
        let amounts: &dyn fmt::Display = match self.unit {
            Unit::Count(name) => &format!("{done} of {total} {name}"),
            Unit::Bytes => &format!("{} of {}", HumanBytes(done), HumanBytes(total)),
        };
        Some(format!("{}: {amounts}, {} s", self.verb, elapsed.as_secs()))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_there_is_a_line_every_few_seconds() {
        let progress =
            |verb, unit| Progress { verb, unit, start: Instant::now(), bar: None, last_line: None };
        let loading = progress("loading", Unit::Count("layers"));
        let mut last = Duration::ZERO;
        let mut at = |seconds: f64, done| {
            loading.line(&mut last, Duration::from_secs_f64(seconds), done, 28)
        };
        assert_eq!(at(1.5, 1), None);
        assert_eq!(at(3.0, 2).as_deref(), Some("loading: 2 of 28 layers, 3 s"));
        assert_eq!(at(5.9, 3), None);
        assert_eq!(at(12.4, 7).as_deref(), Some("loading: 7 of 28 layers, 12 s"));
        assert_eq!(at(42.0, 28), None);
        let writing = progress("writing", Unit::Bytes);
        assert_eq!(
            writing
                .line(&mut Duration::default(), Duration::from_secs(4), 3 << 20, 5 << 30)
                .as_deref(),
            Some("writing: 3.00 MiB of 5.00 GiB, 4 s")
        );
    }
}
