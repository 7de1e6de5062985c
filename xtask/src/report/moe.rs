//! One machine, mixtures of experts: the shapes of 30B-A3B cut to a few layers, and the small ones
//! of the tests.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::Value;

use super::Section;
use super::lab::{CELLS, Lab, Measured, cell};

const PROMPT: usize = 512;
const AFTER: usize = 128;

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let models: &[(&str, Option<usize>)] =
        if lab.quick { &[("tiny-moe", None)] } else { &[("30b-a3b", Some(2)), ("tiny-moe", None)] };
    let mut rows = Vec::new();
    for &(preset, layers) in models {
        let model = lab.synth(preset, layers)?.to_string_lossy().into_owned();
        let name = layers.map_or(preset.to_owned(), |layers| format!("{preset}, {layers} layers"));
        for format in ["bf16", "q8", "q4"] {
            let (cores, lengths) = (lab.cores.to_string(), format!("{AFTER},{PROMPT}"));
            let (reps, gen_len) = if lab.quick { ("1", "8") } else { ("5", "64") };
            let args =
                ["bench", "--json", "--model", &model, "--weights", format, "--threads", &cores];
            let bench = lab.json(
                &[&args[..], &["--prompt-len", &lengths, "--gen-len", gen_len, "--reps", reps]]
                    .concat(),
            )?;
            rows.push((name.clone(), format, bench));
        }
    }
    let mut text = format!(
        "A prompt groups its tokens by expert; a decoded token reads only its experts. The figures are {CELLS}. The bytes of the \
         share are those that a token visits. What fits into a cache may exceed the limit of memory.\n\n",
    );
    text.push_str(&table(&rows));
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

fn table(rows: &[(String, &str, Value)]) -> String {
    let mut out = format!(
        "| model | weights | prompt {AFTER} | prompt {PROMPT} | decode after {AFTER} |\n|---|---|---|---|---|\n"
    );
    for (name, format, bench) in rows {
        let prompts = [AFTER, PROMPT].map(|length| cell(Measured::find(bench, "prefill", length)));
        let decode = cell(Measured::find(bench, "decode", AFTER));
        let _ = writeln!(out, "| {name} | {format} | {} | {decode} |", prompts.join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_for_each_bench() {
        let bench = json!({"results": [
            {"phase": "prefill", "tokens": 512, "depth": 0, "tokens_per_s": 300.0, "gflops": 400.0, "limit_share": 0.8},
            {"phase": "decode", "tokens": 64, "depth": 128, "tokens_per_s": 50.0, "gb_per_s": 27.0, "limit_share": 0.9},
        ]});
        let table = table(&[("tiny-moe".to_owned(), "q4", bench)]);
        assert!(
            table.ends_with("| tiny-moe | q4 | – | 300 (0.80 of 500) | 50.0 (0.90 of 30.0) |\n"),
            "{table}"
        );
    }
}
