//! The same cores as one rank with threads, as ranks of one process and as MPI ranks: a part of the
//! section on a dense model.

use std::fmt::Write as _;

use anyhow::Result;

use super::lab::{Lab, Measured, Ranks, cell, median};

/// What is measured of each split.
pub struct Extent {
    pub prompt: usize,
    /// Decoding begins after so many tokens.
    pub after: usize,
    pub gen_len: &'static str,
    pub reps: &'static str,
    /// How often the splits take turns: an odd number, which has a middle.
    pub turns: usize,
}

/// Ranks, and threads of each.
type Split = (Ranks, usize);

/// Speed of the prompt and of decoding.
type Speeds = [Option<Measured>; 2];

/// Measures the splits of each format and returns their table with what it means.
pub fn measure(lab: &mut Lab, model: &str, formats: &[&str], extent: &Extent) -> Result<String> {
    let cores = lab.cores;
    let mut splits = vec![(Ranks::Threads(1), cores), (Ranks::Threads(cores), 1)];
    if lab.has_mpi()? {
        splits.push((Ranks::Mpi(cores), 1));
    }
    let Extent { prompt, after, turns, .. } = extent;
    let mut out = format!(
        "\nThe same cores as one rank with {cores} threads and as {cores} ranks with one each. The splits of a format are measured right after \
         each other, in turns ({turns}), for a machine changes within minutes: figures are those of the middle turn, ratios the \
         median of what each turn gave over its own first split.\n\n"
    );
    if splits.len() < 3 {
        out.push_str("There is no MPI on this machine.\n\n");
    }
    let _ = writeln!(
        out,
        "| weights | split | prompt {prompt} | ratio | decode after {after} | ratio |"
    );
    out.push_str("|---|---|---|---|---|---|\n");
    for format in formats {
        let mut rounds = Vec::new();
        for _ in 0..*turns {
            let round: Result<Vec<Speeds>> =
                splits.iter().map(|&split| bench(lab, model, format, split, extent)).collect();
            rounds.push(round?);
        }
        out.push_str(&rows(format, &splits, &rounds));
    }
    Ok(out)
}

fn bench(
    lab: &mut Lab,
    model: &str,
    format: &str,
    (ranks, threads): Split,
    extent: &Extent,
) -> Result<Speeds> {
    let (threads, prompt, after) =
        (threads.to_string(), extent.prompt.to_string(), extent.after.to_string());
    let args = [
        "bench",
        "--json",
        "--model",
        model,
        "--weights",
        format,
        "--threads",
        &threads,
        "--strategy",
        "heads",
    ];
    let what = [
        "--prompt-len",
        &prompt,
        "--depth",
        &after,
        "--gen-len",
        extent.gen_len,
        "--reps",
        extent.reps,
    ];
    let bench = lab.json_on(ranks, &[&args[..], &what].concat())?;
    Ok([("prefill", extent.prompt), ("decode", extent.after)]
        .map(|(phase, length)| Measured::find(&bench, phase, length)))
}

fn rows(format: &str, splits: &[Split], rounds: &[Vec<Speeds>]) -> String {
    let mut out = String::new();
    for (index, (ranks, threads)) in splits.iter().enumerate() {
        let _ = write!(out, "| {format} | {} x {threads} |", ranks.name());
        for phase in 0..2 {
            let mut turns: Vec<Measured> =
                rounds.iter().filter_map(|round| round[index][phase]).collect();
            turns.sort_by(|a, b| a.speed.total_cmp(&b.speed));
            let ratio =
                |round: &Vec<Speeds>| Some(round[index][phase]?.speed / round[0][phase]?.speed);
            let ratios: Vec<f64> = rounds.iter().filter_map(ratio).collect();
            let ratio = if ratios.is_empty() {
                "–".to_owned()
            } else {
                format!("{:.2}", median(&ratios))
            };
            let _ = write!(out, " {} | {ratio} |", cell(turns.get(turns.len() / 2).copied()));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_the_same_turn() {
        // The machine is half as fast in the second turn, which changes no ratio.
        let speeds = |prompt: f64, decode: f64| -> Speeds {
            [prompt, decode].map(|speed| Some(Measured { speed, share: 0.5, limit: 30.0 }))
        };
        let rounds = [
            vec![speeds(100.0, 20.0), speeds(90.0, 22.0)],
            vec![speeds(50.0, 10.0), speeds(45.0, 11.0)],
            vec![speeds(80.0, 18.0), speeds(88.0, 9.0)],
        ];
        let rows = rows("q4", &[(Ranks::Threads(1), 2), (Ranks::Mpi(2), 1)], &rounds);
        assert_eq!(
            rows,
            "| q4 | 1 rank x 2 | 80.0 (0.50 of 30.0) | 1.00 | 18.0 (0.50 of 30.0) | 1.00 |\n\
             | q4 | 2 MPI ranks x 1 | 88.0 (0.50 of 30.0) | 0.90 | 11.0 (0.50 of 30.0) | 1.10 |\n"
        );
        let missing = super::rows("q4", &[(Ranks::Threads(1), 2)], &[vec![[None, None]]]);
        assert_eq!(missing, "| q4 | 1 rank x 2 | – | – | – | – |\n");
    }
}
