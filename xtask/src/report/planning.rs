//! What `qwen3 plan` predicts after `qwen3 calibrate`, beside what `qwen3 bench` measures.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Section;
use super::lab::{Lab, Ranks, median};

/// How far predictions may be off, in per cent.
const ASKED: f64 = 20.0;

/// Something predicted and measured.
struct Row {
    model: String,
    layout: String,
    format: &'static str,
    strategy: &'static str,
    /// `prompt 512` or `decode after 128`.
    what: String,
    predicted: f64,
    measured: f64,
}

impl Row {
    /// Per cent by which the prediction is too high.
    fn error(&self) -> f64 {
        (self.predicted / self.measured - 1.0) * 100.0
    }
}

/// Benches of one layout, right after its calibration.
pub struct Layout {
    ranks: Ranks,
    threads: String,
    file: String,
}

impl Layout {
    /// Calibrates these ranks, in a file of their own.
    pub fn calibrate(lab: &mut Lab, ranks: Ranks, threads: usize) -> Result<Self> {
        let kind = if matches!(ranks, Ranks::Mpi(_)) { "mpi" } else { "threads" };
        let file = lab.file(&format!("calibration-{kind}-{}x{threads}.json", ranks.count()));
        std::fs::remove_file(&file).ok();
        let threads = threads.to_string();
        lab.json_on(
            ranks,
            &["calibrate", "--json", "--force", "--threads", &threads, "--output", &file],
        )?;
        Ok(Self { ranks, threads, file })
    }

    /// The plan of one strategy, with further options.
    pub fn plan(
        &self,
        lab: &mut Lab,
        model: &str,
        strategy: &str,
        options: &[&str],
    ) -> Result<Value> {
        let ranks = self.ranks.count().to_string();
        let args =
            ["plan", "--json", "--model", model, "--ranks", &ranks, "--threads", &self.threads];
        let plan = lab.json(&[&args[..], &["--calibration", &self.file], options].concat())?;
        let mut ways = plan["ways"].as_array().into_iter().flatten();
        ways.find(|way| way["strategy"] == strategy)
            .cloned()
            .with_context(|| format!("the plan has no way {strategy}"))
    }

    /// A bench with further options.
    pub fn bench(&self, lab: &mut Lab, model: &str, options: &[&str]) -> Result<Value> {
        let args = ["bench", "--json", "--model", model, "--threads", &self.threads];
        lab.json_on(self.ranks, &[&args[..], options].concat())
    }

    fn name(&self) -> String {
        format!("{} x {}", self.ranks.name(), self.threads)
    }
}

/// What is benched on a layout.
struct Work<'a> {
    name: &'a str,
    model: &'a str,
    formats: &'a [&'static str],
    strategies: &'a [&'static str],
    prompts: &'a str,
    depths: &'a str,
    reps: &'a str,
    gen_len: usize,
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let quick = lab.quick;
    let dense = lab.synth("0.6b", quick.then_some(4))?.to_string_lossy().into_owned();
    let sparse =
        lab.synth("30b-a3b", Some(if quick { 1 } else { 2 }))?.to_string_lossy().into_owned();
    let (prompts, depths) = if quick { ("64,128", "128") } else { ("128,512", "128") };
    let (reps, gen_len) = if quick { ("1", 16) } else { ("3", 64) };
    let formats: &[_] = if quick { &["q4"] } else { &["bf16", "q8", "q4"] };
    let short = Work {
        name: "0.6b",
        model: &dense,
        formats,
        strategies: &["heads"],
        prompts,
        depths,
        reps,
        gen_len,
    };
    let both = Work { strategies: &["heads", "sequence"], ..short };
    let long =
        Work { formats: &["bf16", "q4"], prompts: "4096", depths: "4096", reps: "1", ..short };
    let moe = Work { name: "30b-a3b, 2 layers", model: &sparse, formats: &["bf16", "q4"], ..short };
    let cores = lab.cores;
    let mut plans = vec![
        (Ranks::Threads(1), cores, vec![&short, &moe]),
        (Ranks::Threads(cores), 1, vec![&both]),
    ];
    if lab.has_mpi()? {
        plans.push((Ranks::Mpi(cores), 1, vec![&both]));
    }
    if !quick {
        plans[0].2.push(&long);
        plans[1].2.push(&long);
    }
    let mut rows = Vec::new();
    for (ranks, threads, works) in plans {
        for work in works {
            // Memory of a virtual machine changes within minutes: each piece of work has its own
            // calibration.
            let layout = Layout::calibrate(lab, ranks, threads)?;
            compare(lab, &layout, work, &mut rows)?;
        }
    }
    let mut text = String::from(
        "`qwen3 calibrate` on the ranks at hand, then `qwen3 plan` and `qwen3 bench`, in tokens a second; the error is that of the \
         prediction, in per cent of the measured speed. A rank works with one thread or with as many as there are cores.\n\n",
    );
    text.push_str(&table(&rows));
    text.push_str(&summary(&rows));
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

fn compare(lab: &mut Lab, layout: &Layout, work: &Work<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let gen_len = work.gen_len.to_string();
    for &strategy in work.strategies {
        for &format in work.formats {
            let options =
                ["--weights", format, "--strategy", strategy, "--prompt-len", work.prompts];
            let extent = ["--depth", work.depths, "--gen-len", &gen_len, "--reps", work.reps];
            let bench = layout.bench(lab, work.model, &[&options[..], &extent].concat())?;
            for result in bench["results"].as_array().into_iter().flatten() {
                let decode = result["phase"] == "decode";
                let length = &result[if decode { "depth" } else { "tokens" }];
                let (prompt, answer) = (length.to_string(), if decode { &*gen_len } else { "1" });
                let options = ["--weights", format, "--prompt", &prompt, "--generate", answer];
                let way = layout.plan(lab, work.model, strategy, &options)?;
                let what = if decode {
                    format!("decode after {length}")
                } else {
                    format!("prompt {length}")
                };
                let speed = |object: &Value| object["tokens_per_s"].as_f64().context("no speed");
                rows.push(Row {
                    model: work.name.to_owned(),
                    layout: layout.name(),
                    format,
                    strategy,
                    what,
                    predicted: speed(&way[if decode { "token" } else { "prompt" }])?,
                    measured: speed(result)?,
                });
            }
        }
    }
    Ok(())
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| model | ranks x threads | strategy | weights | what | predicted | measured | error |\n|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row { model, layout, format, strategy, what, predicted, measured } = row;
        let error = row.error();
        let _ = writeln!(
            out,
            "| {model} | {layout} | {strategy} | {format} | {what} | {predicted:.1} | {measured:.1} | {error:+.1} % |"
        );
    }
    out
}

fn summary(rows: &[Row]) -> String {
    let errors: Vec<f64> = rows.iter().map(|row| row.error().abs()).collect();
    if errors.is_empty() {
        return String::new();
    }
    let (median, largest) = (median(&errors), errors.iter().copied().fold(0.0, f64::max));
    let within = errors.iter().filter(|error| **error <= ASKED).count();
    format!(
        "\nOf {} predictions {within} are within {ASKED:.0} % of the measurement; the median error is {median:.1} %, the largest {largest:.1} %. \
         `--strategy auto` leaves `heads` only for a way that promises less time by the margin in `crates/planner/src/plan.rs`.\n",
        errors.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_those_of_the_prediction() {
        let row = |predicted, measured| Row {
            model: "0.6b".to_owned(),
            layout: "2 MPI ranks x 1".to_owned(),
            format: "q4",
            strategy: "heads",
            what: "prompt 512".to_owned(),
            predicted,
            measured,
        };
        let rows = [row(110.0, 100.0), row(95.0, 100.0), row(70.0, 100.0)];
        assert!(
            table(&rows).ends_with(
                "| 0.6b | 2 MPI ranks x 1 | heads | q4 | prompt 512 | 70.0 | 100.0 | -30.0 % |\n"
            ),
            "{}",
            table(&rows)
        );
        let summary = summary(&rows);
        assert!(summary.contains("Of 3 predictions 2 are within 20 %"), "{summary}");
        assert!(summary.contains("median error is 10.0 %, the largest 30.0 %"), "{summary}");
        let two = super::summary(&rows[1..]);
        assert!(two.contains("median error is 17.5 %"), "{two}");
    }
}
