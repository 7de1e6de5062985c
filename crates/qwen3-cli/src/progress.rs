//! Progress bars: on standard error, on rank 0, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};
use qwen3_model::ExportProgress;
use ranks::Rank;

/// A bar that counts `things`; it has no length yet.
pub fn counting(rank: &Rank, things: &str) -> ProgressBar {
    bar(rank, &format!("{{bar:40}} {{human_pos}} of {{human_len}} {things}, {{elapsed}}"))
}

/// A bar that counts bytes written, with a function that moves it.
pub fn writing(rank: &Rank) -> (ProgressBar, impl FnMut(ExportProgress) + use<>) {
    let bar = bar(rank, "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}");
    let moved = bar.clone();
    let progress = move |progress: ExportProgress| {
        moved.set_length(progress.total);
        moved.set_position(progress.written);
    };
    (bar, progress)
}

fn bar(rank: &Rank, template: &str) -> ProgressBar {
    // A bar on standard error hides itself where that is no terminal.
    let bar = if rank.is_root() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style =
        ProgressStyle::with_template(template).expect("the templates are fixed and well formed");
    bar.with_style(style)
}
