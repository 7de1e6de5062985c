//! Real TCP between network namespaces of this machine: what `cargo xtask netbench` measures, as a
//! section.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Section;
use super::lab::Lab;
use crate::netbench::{self, NetbenchArgs, Outcome};

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let file = lab.file("netbench.json");
    std::fs::remove_file(&file).ok();
    let args = NetbenchArgs {
        quick: lab.quick,
        json: Some(file.clone().into()),
        ranks: vec![2, 4],
        gbit: if lab.quick { vec![1.0] } else { vec![1.0, 10.0, 25.0] },
        delay_us: 20,
        ..NetbenchArgs::default()
    };
    Ok(Section { text: text(&netbench::run(&args)?, &file, lab.quick)?, charts: Vec::new() })
}

/// The section after a run that wrote its results to `file`.
fn text(outcome: &Outcome, file: &str, quick: bool) -> Result<String> {
    match outcome {
        Outcome::Skipped(reason) => Ok(format!("Not measured on this machine: {reason}\n")),
        Outcome::Failed(_) => {
            bail!("netbench failed; what it had measured, if anything, is in {file}")
        }
        Outcome::Done => {
            let results =
                std::fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
            let found =
                serde_json::from_str(&results).with_context(|| format!("{file} is no JSON"))?;
            let extent = if quick { "--quick --gbit 1 " } else { "" };
            Ok(format!("{}\n```sh\ncargo xtask netbench {extent}--json FILE\n```\n", page(&found)))
        }
    }
}

fn page(found: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let delay = match found["delay_us"].as_f64() {
        Some(delay) => format!("a delay of {delay:.0} µs"),
        None => "no delay of their own (this kernel has no netem)".to_owned(),
    };
    let mut out = format!(
        "{}, one rank of one thread in each of several network namespaces, links of limited speed and {delay} between them, {} over TCP; \
         all ranks share the {} cores of this machine, and with them its network's work. Prompt {}, {} tokens generated, the median of {}; \
         tokens a second, measured and as `qwen3 plan` predicted from a calibration over the same links. `sequence` sends no sums, so the \
         format on the wire makes no difference to it. The sums of a prompt travel while the ranks compute, but the packets need the same cores: \
         calibration measures what that takes from the work, and the plan charges it.\n\n\
         | Gbit/s | ranks | link as measured | strategy | wire | prompt | predicted | decode | predicted | bytes a token |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        word(&found["model"]),
        found["mpi"].as_str().unwrap_or("MPI"),
        found["cores"],
        word(&found["prompt"]),
        word(&found["generated"]),
        word(&found["reps"]),
    );
    let alone = |phase: &str| {
        let results = found["one_rank"].as_array().into_iter().flatten();
        results
            .clone()
            .find(|result| result["phase"] == phase)
            .map_or(f64::NAN, |result| number(&result["tokens_per_s"]))
    };
    let _ = writeln!(
        out,
        "| – | 1 | – | – | – | {:.1} | – | {:.1} | – | 0 |",
        alone("prefill"),
        alone("decode")
    );
    let mut ratios = [("prompts", Vec::new()), ("decoding", Vec::new())];
    for network in found["networks"].as_array().into_iter().flatten() {
        let link = &network["machine"]["between"];
        for run in network["runs"].as_array().into_iter().flatten() {
            let mut cells = Vec::new();
            for (phase, (_, ratios)) in ["prefill", "decode"].into_iter().zip(&mut ratios) {
                let [measured, predicted] =
                    ["tokens_per_s", "predicted"].map(|name| number(&run[phase][name]));
                ratios.push(measured / predicted);
                cells.push(format!("{measured:.1} | {predicted:.1}"));
            }
            let _ = writeln!(
                out,
                "| {} | {} | {:.1} µs, {:.3} GB/s | {} | {} | {} | {:.0} |",
                network["gbit"],
                network["ranks"],
                number(&link["alpha_us"]),
                number(&link["beta_gb_s"]),
                word(&run["strategy"]),
                word(&run["wire"]),
                cells.join(" | "),
                number(&run["token_bytes"]),
            );
        }
    }
    let range = |(what, ratios): &(&str, Vec<f64>)| {
        let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        format!("{least:.2} to {:.2} in {what}", ratios.iter().copied().fold(0.0, f64::max))
    };
    let _ = writeln!(
        out,
        "\nMeasured over predicted: {}.",
        ratios.iter().map(range).collect::<Vec<_>>().join(", ")
    );
    out
}

#[cfg(test)]
mod tests {
    use std::process::ExitCode;

    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_machine_without_clusters_has_no_figures() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.json").to_string_lossy().into_owned();
        let skipped =
            text(&Outcome::Skipped("not installed: tc".to_owned()), &file, false).unwrap();
        assert_eq!(skipped, "Not measured on this machine: not installed: tc\n");
        assert!(text(&Outcome::Done, &file, false).is_err(), "there are no results");
        std::fs::write(&file, "{}").unwrap();
        assert!(text(&Outcome::Failed(ExitCode::FAILURE), &file, false).is_err());
        assert!(
            text(&Outcome::Done, &file, false)
                .unwrap()
                .contains("\ncargo xtask netbench --json FILE\n")
        );
        assert!(
            text(&Outcome::Done, &file, true)
                .unwrap()
                .contains(" netbench --quick --gbit 1 --json FILE\n")
        );
    }

    #[test]
    fn a_row_for_each_run_of_each_network() {
        let speed = |measured, predicted| json!({"tokens_per_s": measured, "predicted": predicted});
        let run = json!({"strategy": "heads", "wire": "bf16", "prefill": speed(90.0, 100.0), "decode": speed(20.0, 25.0), "token_bytes": 114_688.0});
        let page = page(&json!({
            "mpi": "Open MPI 4", "cores": 2, "delay_us": null, "prompt": "256", "generated": "32", "reps": "3", "model": "0.6b",
            "one_rank": [{"phase": "prefill", "tokens_per_s": 60.0}, {"phase": "decode", "tokens_per_s": 15.0}],
            "networks": [{"gbit": 1.0, "ranks": 2, "machine": {"between": {"alpha_us": 20.0, "beta_gb_s": 0.11}}, "runs": [run]}],
        }));
        let row = "| 1.0 | 2 | 20.0 µs, 0.110 GB/s | heads | bf16 | 90.0 | 100.0 | 20.0 | 25.0 | 114688 |\n";
        assert!(
            page.contains(row) && page.contains("no netem") && page.contains("2 cores"),
            "{page}"
        );
        assert!(page.contains("| – | 1 | – | – | – | 60.0 | – | 15.0 | – | 0 |\n"), "{page}");
        assert!(
            page.ends_with(
                "Measured over predicted: 0.90 to 0.90 in prompts, 0.80 to 0.80 in decoding.\n"
            ),
            "{page}"
        );
    }
}
