//! How many prompt rows a step may compute while other sequences wait for their next tokens.

use std::time::Duration;

/// The time that prompt rows may add to a step, as a multiple of the usual time between two tokens
/// of a sequence.
const ADDED_TIME: f64 = 1.2;
/// Prompt rows of a step before anything has been measured.
const FIRST_ROWS: usize = 64;
/// Prompt rows are a multiple of this number, and at least as many.
const ROWS: usize = 16;
/// Weight of the latest measurement in a running mean.
const LATEST: f64 = 0.3;

/// Bounds the gap between two tokens of a running sequence while prompts are computed.
pub(crate) struct Pace {
    step_rows: usize,
    /// Mean seconds of a step without prompt rows.
    decode_step: Option<f64>,
    /// Mean seconds that a prompt row adds to a step.
    prompt_row: Option<f64>,
}

impl Pace {
    /// A pace for steps of at most `step_rows` prompt rows.
    pub fn new(step_rows: usize) -> Self {
        Self { step_rows, decode_step: None, prompt_row: None }
    }

    /// The largest number of prompt rows in a step beside `decoding` sequences.
    pub fn prompt_rows(&self, decoding: usize) -> usize {
        if decoding == 0 {
            return self.step_rows;
        }
        let rows = match (self.decode_step, self.prompt_row) {
            (Some(step), Some(row)) => (ADDED_TIME * step / row) as usize / ROWS * ROWS,
            _ => FIRST_ROWS,
        };
        rows.max(ROWS).min(self.step_rows)
    }

    /// Takes the time of a step with so many rows.
    pub fn record(&mut self, decoding: usize, prompt_rows: usize, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let mean =
            |old: Option<f64>, new: f64| Some(old.map_or(new, |old| old + LATEST * (new - old)));
        if prompt_rows == 0 {
            self.decode_step = mean(self.decode_step, seconds);
            return;
        }
        let others = if decoding == 0 { 0.0 } else { self.decode_step.unwrap_or(0.0) };
        // Noise may make a step with few rows as fast as one without.
        let added = (seconds - others).max(0.1 * seconds);
        self.prompt_row = mean(self.prompt_row, (added / prompt_rows as f64).max(1e-9));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_rows_add_a_bounded_time() {
        let mut pace = Pace::new(512);
        assert_eq!((pace.prompt_rows(0), pace.prompt_rows(3)), (512, FIRST_ROWS));
        // A step of decoding takes 30 ms, a prompt row 1 ms.
        let time = |decoding: usize, rows: usize| {
            Duration::from_micros(if decoding > 0 { 30_000 } else { 0 } + 1000 * rows as u64)
        };
        for _ in 0..40 {
            pace.record(4, 0, time(4, 0));
            let rows = pace.prompt_rows(4);
            pace.record(4, rows, time(4, rows));
        }
        assert_eq!(pace.prompt_rows(4), 32);
        assert!(time(4, 32) < time(4, 0) * 22 / 10);
        // Prompts alone take all rows of a step, and very slow rows still make progress.
        assert_eq!(pace.prompt_rows(0), 512);
        (0..40).for_each(|_| pace.record(4, 16, Duration::from_secs(10)));
        assert_eq!(pace.prompt_rows(4), ROWS);
    }
}
