//! Strong scaling on one machine: the same model on more and more ranks of one thread, as threads
//! and as MPI processes.

use std::fmt::Write as _;

use anyhow::Result;

use super::Section;
use super::lab::{CELLS, Lab, Measured, Ranks, cell};

const COUNTS: [usize; 5] = [1, 2, 4, 8, 16];
const FORMATS: [&str; 2] = ["bf16", "q4"];
const AFTER: usize = 128;

/// Speeds of one number of ranks: prompt and decode.
struct Row {
    ranks: Ranks,
    format: &'static str,
    prompt: Option<Measured>,
    decode: Option<Measured>,
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let (layers, prompt, reps, gen_len) =
        if lab.quick { (Some(4), 128, "1", "8") } else { (None, 512, "3", "64") };
    let model = lab.synth("0.6b", layers)?.to_string_lossy().into_owned();
    let cores = lab.cores;
    let counts: Vec<usize> = COUNTS.into_iter().filter(|count| *count <= cores).collect();
    let mut places: Vec<Ranks> = counts.iter().map(|count| Ranks::Threads(*count)).collect();
    if lab.has_mpi()? {
        places.extend(counts.iter().filter(|count| **count > 1).map(|count| Ranks::Mpi(*count)));
    }
    let lengths = format!("{prompt},{AFTER}");
    let depth = AFTER.to_string();
    let mut rows = Vec::new();
    for format in FORMATS {
        for &ranks in &places {
            let args =
                ["bench", "--json", "--model", &model, "--weights", format, "--threads", "1"];
            let what = [
                "--strategy",
                "heads",
                "--prompt-len",
                &lengths,
                "--depth",
                &depth,
                "--gen-len",
                gen_len,
                "--reps",
                reps,
            ];
            let bench = lab.json_on(ranks, &[&args[..], &what].concat())?;
            let [prompt, decode] = [("prefill", prompt), ("decode", AFTER)]
                .map(|(phase, length)| Measured::find(&bench, phase, length));
            rows.push(Row { ranks, format, prompt, decode });
        }
    }
    let mut text = format!(
        "The shape of Qwen3-0.6B, one thread a rank, prompt {prompt}, decode after {AFTER}: {CELLS}, all of those \
         ranks; then the speed over that of one rank. Decode is limited by memory, which the ranks share.\n\n"
    );
    if cores < COUNTS[COUNTS.len() - 1] {
        let _ =
            writeln!(text, "More ranks than the {cores} cores of this machine are not measured.\n");
    }
    if !lab.has_mpi()? {
        text.push_str("There is no MPI on this machine.\n\n");
    }
    text.push_str(&table(&rows));
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| weights | ranks | prompt | speed-up | decode | speed-up |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let one = rows.iter().find(|one| one.format == row.format && one.ranks.count() == 1);
        let gain = |pick: fn(&Row) -> Option<Measured>| {
            let gain = one.and_then(|one| Some(pick(row)?.speed / pick(one)?.speed));
            gain.map_or("–".to_owned(), |gain| format!("{gain:.2}"))
        };
        let (prompt, decode) = (gain(|row| row.prompt), gain(|row| row.decode));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {prompt} | {} | {decode} |",
            row.format,
            row.ranks.name(),
            cell(row.prompt),
            cell(row.decode)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_ups_are_over_one_rank_of_the_same_format() {
        let row = |ranks, format, speed: f64| {
            let measured = |speed| Some(Measured { speed, share: 0.5, limit: 30.0 });
            Row { ranks, format, prompt: measured(speed), decode: measured(speed / 10.0) }
        };
        let rows = [
            row(Ranks::Threads(1), "bf16", 100.0),
            row(Ranks::Mpi(2), "bf16", 190.0),
            row(Ranks::Threads(2), "q4", 50.0),
        ];
        let table = table(&rows);
        assert!(
            table.contains(
                "| bf16 | 1 rank | 100 (0.50 of 30.0) | 1.00 | 10.0 (0.50 of 30.0) | 1.00 |"
            ),
            "{table}"
        );
        assert!(
            table.contains(
                "| bf16 | 2 MPI ranks | 190 (0.50 of 30.0) | 1.90 | 19.0 (0.50 of 30.0) | 1.90 |"
            ),
            "{table}"
        );
        assert!(
            table.contains("| q4 | 2 ranks in one process | 50.0 (0.50 of 30.0) | – |"),
            "{table}"
        );
    }
}
