//! Emulated clusters: what a slow link costs a token, against the least that two Allreduce a layer
//! can cost.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Section;
use super::lab::{Lab, Ranks};
use super::planning::Layout;

/// 1 Gbit/s Ethernet: microseconds and bytes a microsecond.
const ALPHA_US: f64 = 40.0;
const BETA: f64 = 117.0;
const LINK: [&str; 2] = ["40", "0.117"];
const WIRES: [&str; 3] = ["f32", "bf16", "q8"];
const HIDDEN: usize = 1024;
const AFTER: &str = "128";

/// A wire format on some ranks; milliseconds of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    ranks: usize,
    wire: &'static str,
    predicted: f64,
    measured: f64,
    /// Of the same ranks without the link.
    without: f64,
    /// Of its collectives, less the time in which a rank waits for another.
    moving: f64,
    bound: f64,
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let (layers, reps, gen_len) = if lab.quick { (4, "1", "8") } else { (28, "3", "32") };
    let model = lab.synth("0.6b", lab.quick.then_some(layers))?.to_string_lossy().into_owned();
    let mut rows = Vec::new();
    for count in [2, 4] {
        let ranks = lab.processes(count)?;
        let layout = Layout::calibrate(lab, ranks, 1)?;
        let extent =
            ["--strategy", "heads", "--prompt-len", AFTER, "--gen-len", gen_len, "--reps", reps];
        let near = layout.bench(lab, &model, &[&extent[..], &["--wire", "f32"]].concat())?;
        for wire in WIRES {
            let (nodes, link) = (count.to_string(), LINK.join(","));
            let options = ["--wire", wire, "--emulate-link", &link, "--emulate-nodes", &nodes];
            let far = layout.bench(lab, &model, &[&extent[..], &options].concat())?;
            let options =
                ["--wire", wire, "--nodes", &nodes, "--alpha-us", LINK[0], "--beta-gb-s", LINK[1]];
            let extent = ["--prompt", AFTER, "--generate", gen_len];
            let way = layout.plan(lab, &model, "heads", &[&extent[..], &options].concat())?;
            let predicted =
                way["token"]["tokens_per_s"].as_f64().context("the plan has no speed")?;
            rows.push(Row {
                ranks: count,
                wire,
                predicted: 1e3 / predicted,
                measured: token_ms(&far)?,
                without: token_ms(&near)?,
                moving: moving_ms(&far)?,
                bound: bound_ms(count, wire, layers),
            });
        }
    }
    let mut text = format!(
        "Qwen3-0.6B with {layers} layers, `heads`, one thread a rank, each rank a machine of its own behind an emulated link of {} µs and \
         {} GB/s (1 Gbit/s Ethernet); decode after {AFTER}. The bound is that of two Allreduce of {HIDDEN} elements a layer by the α–β model of \
         `crates/comm/src/cost.rs`, and nothing else: no sampling, no waiting. The last two columns are what counts: the time in which \
         collectives move bytes over the bound, and the whole token over the same token without a link plus the bound.\n\n",
        LINK[0], LINK[1]
    );
    if lab.cores < 4 {
        let _ = writeln!(
            text,
            "4 ranks share the {} cores of this machine, with and without the link; the plan knows from the calibration.\n",
            lab.cores
        );
    }
    if let Ranks::Threads(_) = lab.processes(2)? {
        text.push_str("There is no MPI on this machine: the ranks are threads of one process.\n\n");
    }
    text.push_str(&table(&rows));
    text.push_str(&lab.take_commands());
    Ok(Section { text, charts: Vec::new() })
}

/// Milliseconds of two Allreduce a layer.
fn bound_ms(ranks: usize, wire: &str, layers: usize) -> f64 {
    let bytes = match wire {
        "f32" => 4 * HIDDEN,
        "bf16" => 2 * HIDDEN,
        _ => HIDDEN + 4 * HIDDEN.div_ceil(32),
    } as f64;
    let steps = f64::from(ranks.next_power_of_two().ilog2());
    let share = bytes * (ranks - 1) as f64 / ranks as f64;
    let doubling = steps * (ALPHA_US + bytes / BETA);
    let scattering = 2.0 * (steps * ALPHA_US + share / BETA);
    2.0 * layers as f64 * doubling.min(scattering) * 1e-3
}

fn decode(bench: &Value) -> Result<&Value> {
    let mut results = bench["results"].as_array().into_iter().flatten();
    results.find(|result| result["phase"] == "decode").context("the bench did not decode")
}

fn token_ms(bench: &Value) -> Result<f64> {
    Ok(1e3 / decode(bench)?["tokens_per_s"].as_f64().context("no speed")?)
}

/// Milliseconds of a token in which its collectives move bytes.
fn moving_ms(bench: &Value) -> Result<f64> {
    let tokens = decode(bench)?["tokens"].as_f64().context("no tokens")?;
    let entries = bench["traffic"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|entry| entry["phase"] == "decode");
    let seconds = entries
        .filter_map(|entry| Some(entry["seconds"].as_f64()? - entry["wait_seconds"].as_f64()?));
    Ok(seconds.sum::<f64>() / tokens * 1e3)
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| ranks | wire | ms a token predicted | measured | error of the prediction | without the link | moving bytes | bound | moving / bound \
         | token / (without + bound) |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for Row { ranks, wire, predicted, measured, without, moving, bound } in rows {
        let _ = writeln!(
            out,
            "| {ranks} | {wire} | {predicted:.2} | {measured:.2} | {:+.1} % | {without:.2} | {moving:.2} | {bound:.2} | {:.2} | {:.2} |",
            // Of speeds, as in the other tables.
            (measured / predicted - 1.0) * 100.0,
            moving / bound,
            measured / (without + bound),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_bound_is_that_of_the_cost_model() {
        // 56 calls of 40 µs and 4096 bytes at 117 bytes a microsecond.
        assert!((bound_ms(2, "f32", 28) - 56.0 * (40.0 + 4096.0 / 117.0) * 1e-3).abs() < 1e-9);
        assert!((bound_ms(4, "bf16", 1) - 2.0 * 2.0 * (40.0 + 2048.0 / 117.0) * 1e-3).abs() < 1e-9);
        assert!(bound_ms(2, "q8", 28) < bound_ms(2, "bf16", 28));
    }

    #[test]
    fn what_ranks_wait_for_each_other_is_not_the_links() {
        let bench = json!({
            "results": [{"phase": "decode", "tokens": 10, "tokens_per_s": 25.0}],
            "traffic": [
                {"phase": "decode", "seconds": 0.05, "wait_seconds": 0.01},
                {"phase": "prefill", "seconds": 9.0, "wait_seconds": 0.0},
            ],
        });
        assert_eq!((token_ms(&bench).unwrap(), moving_ms(&bench).unwrap()), (40.0, 4.0));
        let row = Row {
            ranks: 2,
            wire: "f32",
            predicted: 40.0,
            measured: 44.0,
            without: 36.0,
            moving: 4.4,
            bound: 4.0,
        };
        let table = table(&[row]);
        assert!(
            table.ends_with(
                "| 2 | f32 | 40.00 | 44.00 | +10.0 % | 36.00 | 4.40 | 4.00 | 1.10 | 1.10 |\n"
            ),
            "{table}"
        );
    }
}
