//! One machine, a dense model: prompt and decode speed of each format against the limit, and
//! against the context's length.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::Value;

use super::chart::{self, Bar, Line};
use super::lab::{CELLS, Lab, Measured, cell};
use super::{Section, splits};

const FORMATS: [&str; 3] = ["bf16", "q8", "q4"];

/// What is measured: everything, or enough to see that it works.
struct Extent {
    layers: Option<usize>,
    prompts: &'static [usize],
    /// A prompt that is too long to be repeated often.
    long: usize,
    depths: &'static [usize],
    reps: &'static str,
    long_reps: &'static str,
    gen_len: &'static str,
    splits: splits::Extent,
}

const FULL: Extent = Extent {
    layers: None,
    prompts: &[128, 32, 512],
    long: 4096,
    depths: &[1024, 2048, 4096],
    reps: "5",
    long_reps: "3",
    gen_len: "64",
    splits: splits::Extent { prompt: 512, after: 128, gen_len: "64", reps: "3", turns: 3 },
};
const QUICK: Extent = Extent {
    layers: Some(4),
    prompts: &[128, 32],
    long: 256,
    depths: &[256],
    reps: "1",
    long_reps: "1",
    gen_len: "8",
    splits: splits::Extent { prompt: 128, after: 128, gen_len: "8", reps: "1", turns: 1 },
};

/// The benches of one configuration: short prompts and decode after the first; the long prompt and
/// deep contexts.
struct Bench {
    short: Value,
    long: Value,
}

impl Bench {
    fn prefill(&self, tokens: usize) -> Option<Measured> {
        [&self.short, &self.long]
            .into_iter()
            .find_map(|bench| Measured::find(bench, "prefill", tokens))
    }

    fn decode(&self, depth: usize) -> Option<Measured> {
        [&self.short, &self.long]
            .into_iter()
            .find_map(|bench| Measured::find(bench, "decode", depth))
    }
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let extent = if lab.quick { &QUICK } else { &FULL };
    let model = lab.synth("0.6b", extent.layers)?.to_string_lossy().into_owned();
    let cores = lab.cores.to_string();
    let team = ["--ranks", "1", "--threads", &cores];
    let mut formats = Vec::new();
    for format in FORMATS {
        let args =
            [&["bench", "--json", "--model", &model, "--weights", format][..], &team].concat();
        formats.push(bench(lab, &args, extent)?);
    }
    let args =
        [&["bench", "--json", "--model", &model, "--weights", "bf16", "--kv", "q8"][..], &team]
            .concat();
    let narrow = bench(lab, &args, extent)?;
    let mut text = format!(
        "The shape of Qwen3-0.6B with random weights, cache f16 unless stated, {} threads in all: {CELLS}.\n\n",
        lab.cores
    );
    text.push_str(&speeds(extent, &formats, &narrow));
    text.push_str(&splits::measure(lab, &model, &FORMATS, &extent.splits)?);
    text.push_str(
        "\n![prompt speed](performance/prefill.svg)\n\n![decode speed](performance/decode.svg)\n\n",
    );
    text.push_str("![decode speed against context length](performance/context.svg)\n\nDashes mark the limit.\n");
    text.push_str(&lab.take_commands());
    let charts = charts(extent, &formats, &narrow);
    Ok(Section { text, charts })
}

fn bench(lab: &mut Lab, args: &[&str], extent: &Extent) -> Result<Bench> {
    let (prompts, long, depths) =
        (list(extent.prompts), extent.long.to_string(), list(extent.depths));
    let short = ["--prompt-len", &prompts, "--reps", extent.reps];
    let long = ["--prompt-len", &long, "--depth", &depths, "--reps", extent.long_reps];
    let mut run = |what: &[&str]| lab.json(&[args, what, &["--gen-len", extent.gen_len]].concat());
    Ok(Bench { short: run(&short)?, long: run(&long)? })
}

fn list(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// All prompt lengths, ascending.
fn lengths(extent: &Extent) -> Vec<usize> {
    let mut all = extent.prompts.to_vec();
    all.push(extent.long);
    all.sort_unstable();
    all
}

fn speeds(extent: &Extent, formats: &[Bench], narrow: &Bench) -> String {
    let mut out = String::from("| weights |");
    let (lengths, deepest) = (lengths(extent), extent.depths[extent.depths.len() - 1]);
    for length in &lengths {
        let _ = write!(out, " prompt {length} |");
    }
    let first = extent.prompts[0];
    let _ = writeln!(out, " decode after {first} | decode after {deepest} |");
    let _ = writeln!(out, "|---|{}---|---|", "---|".repeat(lengths.len()));
    let rows = FORMATS.into_iter().map(str::to_owned).chain([format!("{}, cache q8", FORMATS[0])]);
    for (name, bench) in rows.zip(formats.iter().chain([narrow])) {
        let _ = write!(out, "| {name} |");
        for &length in &lengths {
            let _ = write!(out, " {} |", cell(bench.prefill(length)));
        }
        let _ = writeln!(out, " {} | {} |", cell(bench.decode(first)), cell(bench.decode(deepest)));
    }
    out
}

fn charts(extent: &Extent, formats: &[Bench], narrow: &Bench) -> Vec<(String, String)> {
    let bar = |found: Option<Measured>| -> Bar {
        found.map(|found| (found.speed, Some(found.at_limit())))
    };
    let lengths = lengths(extent);
    let names: Vec<String> = lengths.iter().map(|length| format!("{length} tokens")).collect();
    let prompts: Vec<(&str, Vec<Bar>)> = names
        .iter()
        .zip(&lengths)
        .map(|(name, &length)| {
            (name.as_str(), formats.iter().map(|bench| bar(bench.prefill(length))).collect())
        })
        .collect();
    let prefill = chart::bars("Prompt", "tokens/s", &FORMATS, &prompts);
    let depths: Vec<usize> =
        [extent.prompts[0]].into_iter().chain(extent.depths.iter().copied()).collect();
    let names: Vec<String> = depths.iter().map(|depth| format!("after {depth}")).collect();
    let decodes: Vec<(&str, Vec<Bar>)> = names
        .iter()
        .zip(&depths)
        .map(|(name, &depth)| {
            (name.as_str(), formats.iter().map(|bench| bar(bench.decode(depth))).collect())
        })
        .collect();
    let decode = chart::bars("Decode", "tokens/s", &FORMATS, &decodes);
    let line = |name: String, bench: &Bench| -> Line {
        let point = |&depth: &usize| Some((depth as f64, bench.decode(depth)?.speed));
        (name, depths.iter().filter_map(point).collect())
    };
    let mut lines: Vec<Line> =
        FORMATS.iter().zip(formats).map(|(name, bench)| line((*name).to_owned(), bench)).collect();
    lines.push(line(format!("{}, cache q8", FORMATS[0]), narrow));
    let context =
        chart::lines("Decode against context length", "tokens/s", "tokens of context", &lines);
    [("prefill.svg", prefill), ("decode.svg", decode), ("context.svg", context)]
        .map(|(name, svg)| (name.to_owned(), svg))
        .into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn made_up(speed: f64) -> Bench {
        let result = |phase: &str, tokens: usize, depth: usize, limit: f64| json!({"phase": phase, "tokens": tokens, "depth": depth, "tokens_per_s": speed, "limit_share": 0.5, "gflops": limit / 2.0, "gb_per_s": 16.0});
        let short = [("prefill", 128, 0), ("prefill", 32, 0), ("decode", 8, 128)];
        let short = json!({"results": short.map(|(phase, tokens, depth)| result(phase, tokens, depth, 200.0))});
        let long =
            json!({"results": [result("prefill", 256, 0, 150.0), result("decode", 8, 256, 150.0)]});
        Bench { short, long }
    }

    #[test]
    fn tables_have_a_row_for_each_format_and_no_gap() {
        let formats = [made_up(10.0), made_up(20.0), made_up(40.0)];
        let table = speeds(&QUICK, &formats, &made_up(11.0));
        assert!(
            table
                .starts_with("| weights | prompt 32 | prompt 128 | prompt 256 | decode after 128 | decode after 256 |")
        );
        // The long prompt has a limit of its own.
        let row = "| q8 | 20.0 (0.50 of 200) | 20.0 (0.50 of 200) | 20.0 (0.50 of 150) | 20.0 (0.50 of 32.0) | 20.0 (0.50 of 32.0) |";
        assert!(table.contains(row), "{table}");
        assert_eq!((table.lines().count(), table.contains('–')), (6, false), "{table}");
    }

    #[test]
    fn charts_show_every_length_and_format() {
        let formats = [made_up(10.0), made_up(20.0), made_up(40.0)];
        let charts = charts(&QUICK, &formats, &made_up(11.0));
        let names: Vec<&str> = charts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["prefill.svg", "decode.svg", "context.svg"]);
        // Three lengths or two depths of three formats, each with its limit; two points of four
        // lines.
        let counts = [("stroke-dasharray", 9), ("stroke-dasharray", 6), ("<circle", 8)];
        for ((name, svg), (what, count)) in charts.iter().zip(counts) {
            assert_eq!(svg.matches(what).count(), count, "{name}");
        }
    }
}
