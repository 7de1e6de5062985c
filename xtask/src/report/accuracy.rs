//! What quantized weights cost in accuracy, on the bundled model and its sample text.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::Section;
use super::lab::Lab;
use crate::workspace;

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let model = workspace::root().join("models/austen");
    let (file, model) = (
        model.join("sample.txt").to_string_lossy().into_owned(),
        model.to_string_lossy().into_owned(),
    );
    let mut found = Vec::new();
    for format in ["bf16", "q8", "q4"] {
        let answer = lab.json(&[
            "perplexity",
            "--json",
            "--model",
            &model,
            "--file",
            &file,
            "--weights",
            format,
        ])?;
        found.push((
            format,
            answer["perplexity"].as_f64().context("qwen3 perplexity gave no perplexity")?,
        ));
    }
    let mut text = String::from(
        "Perplexity of `models/austen` on `models/austen/sample.txt`, windows of 512 tokens, cache f32.\n\n",
    );
    text.push_str(&table(&found));
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

fn table(found: &[(&str, f64)]) -> String {
    let mut out = String::from("| weights | perplexity | against the first |\n|---|---|---|\n");
    for (format, perplexity) in found {
        let _ = writeln!(
            out,
            "| {format} | {perplexity:.4} | {:+.2} % |",
            (perplexity / found[0].1 - 1.0) * 100.0
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn differences_are_in_percent_of_the_first() {
        let table = table(&[("bf16", 20.0), ("q8", 20.01), ("q4", 20.4)]);
        assert!(
            table.contains("| bf16 | 20.0000 | +0.00 % |\n| q8 | 20.0100 | +0.05 % |\n| q4 | 20.4000 | +2.00 % |"),
            "{table}"
        );
    }
}
