//! The analysis from which this project started, repeated: instruction sets, schedules, strategies
//! and attention on two ranks.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::lab::{Lab, Measured, Ranks, median};
use super::{Section, machine};

const ISAS: [&str; 2] = ["scalar", "avx2"];
/// How often the schedules take turns with each: odd numbers, which have a middle. Runs with AVX2
/// are short, and the more there are of them the less a change of the machine counts.
const TURNS: [usize; 2] = [3, 7];
const SCHEDULES: [&str; 3] = ["gathered", "naive", "fused"];
const STRATEGIES: [&str; 2] = ["heads", "sequence"];
const ATTENTION: [&str; 2] = ["materialized", "streaming"];
/// Of Qwen3-0.6B, and for a quick look.
const LAYERS: [usize; 2] = [28, 4];
const PROMPT: usize = 128;
/// Schedules and attention under `heads` with which all kernels are compared: those of the
/// analysis' faster program, and the best.
const COMPARED: [(&str, &str); 2] = [("naive", "materialized"), ("fused", "streaming")];
/// For a compiler that leaves loops as they are written.
const ONE_NUMBER: &str = "-C no-vectorize-loops -C no-vectorize-slp";

/// A run.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    isa: &'static str,
    schedule: &'static str,
    strategy: &'static str,
    attention: &'static str,
    /// Milliseconds of the median turn, and of its collectives.
    ms: f64,
    collectives_ms: f64,
    calls: u64,
    bytes: u64,
    /// Allocations of rank 0's process in a repetition, and their bytes.
    allocations: u64,
    allocated: u64,
    /// Its time over that of `gathered` right before it, the median of the turns.
    of_gathered: f64,
}

/// Measures the section.
pub fn measure(lab: &mut Lab) -> Result<Section> {
    let layers = LAYERS[usize::from(lab.quick)];
    let mut plain = lab.compiled("qwen3-one-number", ONE_NUMBER)?;
    let mut lab = lab.counting()?;
    let model = lab.synth("0.6b", lab.quick.then_some(layers))?.to_string_lossy().into_owned();
    let ranks = lab.processes(2)?;
    let turns = if lab.quick { [1, 1] } else { TURNS };
    let mut rows = Vec::new();
    for (isa, turns) in ISAS.into_iter().zip(turns) {
        for strategy in STRATEGIES {
            for attention in ATTENTION {
                let mut taken = Vec::new();
                for _ in 0..turns {
                    taken.push(turn(|schedule| {
                        let bench = prefill(
                            &mut lab,
                            ranks,
                            &model,
                            "1",
                            [isa, schedule, strategy, attention],
                        )?;
                        row(&bench, isa, schedule, strategy, attention)
                    })?);
                }
                rows.extend(middle(&taken));
            }
        }
    }
    rows.sort_by_key(|row| {
        (row.isa != ISAS[0], SCHEDULES.iter().position(|schedule| *schedule == row.schedule))
    });
    let mut text = format!(
        "The analysis ran prompts of {PROMPT} tokens through Qwen3-0.6B on 2 MPI ranks, three times, and found that AVX2 made the program 14 % \
         *slower*: 40,462 ms against 34,964 ms without. Here the same shape with {layers} of its 28 layers, stored bf16 \
         weights, {}, one thread each. The schedules take turns, {} with scalar kernels and {} with AVX2, for a machine changes within \
         minutes: milliseconds of the median turn, the median of what each took over `gathered` in the same turn, calls, payload and time of \
         rank 0's collectives in one prompt, and what rank 0's process allocated in it.\n\n",
        ranks.name(),
        turns[0],
        turns[1]
    );
    if ranks == Ranks::Threads(2) {
        text.push_str("There is no MPI on this machine: the ranks are threads of one process.\n\n");
    }
    text.push_str(&table(&rows));
    text.push_str(&lessons(&rows, layers));
    text.push_str(&gains(&mut lab, &mut plain, ranks, &model)?);
    text.push_str(&decode(&mut lab, ranks, &model)?);
    text.push_str(&lab.take_commands());
    let _ = write!(
        text,
        "\nThe program compiled with `RUSTFLAGS=\"{ONE_NUMBER}\"`:\n{}",
        plain.take_commands()
    );
    Ok(Section { text, charts: Vec::new() })
}

/// A run with each schedule, one right after the other.
fn turn(run: impl FnMut(&'static str) -> Result<Row>) -> Result<Vec<Row>> {
    let mut rows = SCHEDULES.into_iter().map(run).collect::<Result<Vec<_>>>()?;
    let gathered = rows[0].ms;
    rows.iter_mut().for_each(|row| row.of_gathered = row.ms / gathered);
    Ok(rows)
}

/// For each schedule the median turn, with the median of the ratios.
fn middle(turns: &[Vec<Row>]) -> Vec<Row> {
    let of = |index: usize| {
        let mut rows: Vec<Row> = turns.iter().map(|turn| turn[index]).collect();
        let of_gathered = median(&rows.iter().map(|row| row.of_gathered).collect::<Vec<_>>());
        rows.sort_by(|a, b| a.ms.total_cmp(&b.ms));
        Row { of_gathered, ..rows[rows.len() / 2] }
    };
    (0..SCHEDULES.len()).map(of).collect()
}

/// A bench of the prompt; `values` are those of instruction set, schedule, strategy and attention.
fn prefill(
    lab: &mut Lab,
    ranks: Ranks,
    model: &str,
    reps: &str,
    values: [&str; 4],
) -> Result<Value> {
    let [isa, schedule, strategy, attention] = values;
    let prompt = PROMPT.to_string();
    let args = ["bench", "--json", "--model", model, "--threads", "1", "--gen-len", "0"];
    let what = ["--prompt-len", &prompt, "--reps", reps, "--isa", isa, "--mlp", schedule];
    let how = ["--strategy", strategy, "--attention", attention];
    lab.json_on(ranks, &[&args[..], &what, &how].concat())
}

/// Milliseconds of a prompt with each kind of kernels, and the limit of the instructions that they
/// are made of.
struct Gain {
    kernels: &'static str,
    ms: [f64; COMPARED.len()],
    gflops: f64,
}

/// What vectors gain over plain Rust as it is compiled with and without them, and over a general
/// matrix product.
fn gains(lab: &mut Lab, plain: &mut Lab, ranks: Ranks, model: &str) -> Result<String> {
    let mut kernels = vec![
        ("scalar, one number at a time", "scalar", "1"),
        ("scalar", "scalar", "3"),
        ("portable", "portable", "3"),
        ("avx2", "avx2", "3"),
    ];
    if machine::has_avx512() {
        kernels.push(("avx512", "avx512", "3"));
    }
    let mut rows = Vec::new();
    for (index, (kernels, isa, reps)) in kernels.into_iter().enumerate() {
        let (mut ms, mut gflops) = ([0.0; COMPARED.len()], 0.0);
        for ((schedule, attention), ms) in COMPARED.into_iter().zip(&mut ms) {
            let lab = if index == 0 { &mut *plain } else { &mut *lab };
            let bench = prefill(lab, ranks, model, reps, [isa, schedule, "heads", attention])?;
            *ms = bench["results"][0]["ms"].as_f64().context("the bench gave no time")?;
            let limits = &bench["limits"];
            let limit = limits.get("fma_avx512_gflops").unwrap_or(&limits["fma_gflops"]);
            gflops = limit.as_f64().context("the bench gave no limit")?;
        }
        rows.push(Gain { kernels, ms, gflops });
    }
    Ok(gain_table(&rows))
}

/// The first two rows are those that the others are compared with.
fn gain_table(rows: &[Gain]) -> String {
    let [plain, scalar, ..] = rows else { return String::new() };
    let mut out = String::from(
        "\nWhat vectors are worth, end to end under `heads`. Scalar kernels are plain Rust, in which the compiler finds vectors of four numbers \
         (SSE2) by itself, since panels have sixteen outputs side by side. Sums along a row, as C++ programs are usually written and the \
         analysis' was, may not be reordered, and so remain one number at a time; the first row is the same program as a compiler leaves it that \
         looks for no vectors. Portable kernels are the scalar ones with the crate matrixmultiply for large products, which finds AVX2 \
         itself. The limit is that of multiplications and additions in registers, compiled in the same way.\n\n\
         | kernels | naive, materialized: ms | one number takes | scalar takes | fused, streaming: ms | one number takes | scalar takes \
         | limit, GFLOP/s | of scalar's |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for Gain { kernels, ms, gflops } in rows {
        let times = |index: usize| {
            let [slow, plain] = [plain, scalar].map(|row| row.ms[index] / ms[index]);
            format!("{:.0} | {slow:.1} times | {plain:.1} times", ms[index])
        };
        let limit = gflops / scalar.gflops;
        let _ = writeln!(
            out,
            "| {kernels} | {} | {} | {gflops:.0} | {limit:.1} times |",
            times(0),
            times(1)
        );
    }
    out
}

/// What AVX2 gains in products of one token, which wait for memory.
fn decode(lab: &mut Lab, ranks: Ranks, model: &str) -> Result<String> {
    let mut found = Vec::new();
    for isa in ISAS {
        let args = [
            "bench",
            "--json",
            "--model",
            model,
            "--threads",
            "1",
            "--strategy",
            "heads",
            "--isa",
            isa,
        ];
        let bench = lab.json_on(
            ranks,
            &[&args[..], &["--prompt-len", "8", "--gen-len", "8", "--reps", "3"]].concat(),
        )?;
        found.push(Measured::find(&bench, "decode", 8).context("the bench decoded nothing")?);
    }
    let [scalar, fast] = found[..] else { unreachable!("a result for each instruction set") };
    let most = fast.at_limit();
    Ok(format!(
        "\nDecoding waits for memory: reading the weights takes so long that {most:.1} tokens/s are the limit of these ranks. Scalar kernels reach \
         {:.1}, {:.2} of it, and AVX2 {:.1}, {:.2} of it: {:.1} times as fast, where no kernels could be more than {:.1} times.\n",
        scalar.speed,
        scalar.speed / most,
        fast.speed,
        fast.share,
        fast.speed / scalar.speed,
        most / scalar.speed
    ))
}

fn row(
    bench: &Value,
    isa: &'static str,
    schedule: &'static str,
    strategy: &'static str,
    attention: &'static str,
) -> Result<Row> {
    let result = &bench["results"][0];
    let traffic: Vec<&Value> = bench["traffic"].as_array().into_iter().flatten().collect();
    let sum = |key: &str| traffic.iter().filter_map(|entry| entry[key].as_f64()).sum::<f64>();
    let count =
        |key: &str| result[key].as_u64().with_context(|| format!("the bench counted no {key}"));
    Ok(Row {
        isa,
        schedule,
        strategy,
        attention,
        ms: result["ms"].as_f64().context("the bench gave no time")?,
        collectives_ms: sum("seconds") * 1e3,
        calls: sum("calls") as u64,
        bytes: sum("payload_bytes") as u64,
        allocations: count("allocations")?,
        allocated: count("allocated_bytes")?,
        of_gathered: 1.0,
    })
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| kernels | feed-forward | strategy | attention | ms | over gathered | of it collectives | calls | MB payload | allocations | MB allocated |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row {
            isa,
            schedule,
            strategy,
            attention,
            ms,
            of_gathered,
            collectives_ms,
            calls,
            allocations,
            ..
        } = row;
        let _ = writeln!(
            out,
            "| {isa} | {schedule} | {strategy} | {attention} | {ms:.1} | {of_gathered:.2} | {collectives_ms:.1} | {calls} | {:.2} | {allocations} | {:.1} |",
            row.bytes as f64 * 1e-6,
            row.allocated as f64 * 1e-6,
        );
    }
    out
}

/// The row of a combination under `heads`, with materialized attention: the analysis knew no other.
fn of(rows: &[Row], isa: &str, schedule: &str) -> Option<Row> {
    let fits = |row: &&Row| {
        (row.isa, row.schedule, row.strategy, row.attention)
            == (isa, schedule, "heads", "materialized")
    };
    rows.iter().find(fits).copied()
}

/// What the analysis said against what was measured; nothing where a row is missing.
fn lessons(rows: &[Row], layers: usize) -> String {
    let find = |isa: &str, schedule: &str| of(rows, isa, schedule);
    let (Some(scalar_naive), Some(fast_gathered), Some(scalar_gathered)) =
        (find("scalar", "naive"), find("avx2", "gathered"), find("scalar", "gathered"))
    else {
        return String::new();
    };
    let (Some(fast_naive), Some(fused)) = (find("avx2", "naive"), find("avx2", "fused")) else {
        return String::new();
    };
    let least = |keep: &dyn Fn(&&Row) -> bool| {
        rows.iter()
            .filter(keep)
            .min_by(|a, b| a.ms.total_cmp(&b.ms))
            .copied()
            .expect("each combination has a row")
    };
    let slowest_gain = SCHEDULES
        .iter()
        .filter_map(|schedule| Some(find("scalar", schedule)?.ms / find("avx2", schedule)?.ms));
    let best = least(&|row| row.isa == "avx2");
    let range = |schedule: &str| {
        let ratios = rows
            .iter()
            .filter(|row| row.isa == "avx2" && row.schedule == schedule)
            .map(|row| row.of_gathered);
        let (least, most) =
            ratios.fold((f64::INFINITY, 0.0), |(least, most), x| (x.min(least), x.max(most)));
        format!("{least:.2} to {most:.2}")
    };
    let mlp_bytes =
        |row: Row| (row.bytes as f64 - (PROMPT * 1024 * 4 * layers) as f64) / layers as f64;
    format!(
        "\nWhat the analysis got right:\n\n\
         - What a schedule gathers costs time and memory: with AVX2 kernels, gathered, naive and fused take {:.1}, {:.1} and {:.1} ms, of it {:.1}, {:.1} and \
         {:.1} ms in collectives, although all three do the same products. Over `gathered` in the same turns, under both strategies and with both \
         kinds of attention, naive takes {} and fused {} of the time.\n\n\
         What it got wrong:\n\n\
         - That AVX2 lost 14 % was its AVX2 block gathering what it could have kept split, together with a different feed-forward schedule in \
         the program without AVX2. The same pair of combinations here, AVX2 with `gathered` against scalar with `naive`, takes {:.1} ms against \
         {:.1}: {:.1} times as fast. With the schedule held fixed, AVX2 is at least {:.1} times as fast. The fused schedule \
         makes it {:.1} times; the fastest combination ({}, {}, {} attention) {:.1} times.\n\
         - It counted 2,097,152 \"floats\" a layer for gathering and 2,621,440 for the naive schedule, and so took gathering for the \
         cheaper one. They are bytes, and gate, up and activation are as wide as the feed-forward block (3072 here, 2048 in its example, \
         worked out in [parallelism.md](parallelism.md)). The ledger counts {:.0} bytes a layer for `gathered`, {:.0} for `naive` and \
         {:.0} for `fused`.\n\
         - It blamed memory: rank 0 allocates {:.1} MB a prompt with `gathered` and {:.1} MB with `fused`.\n\
         - Its sequence strategy let a token see the keys of its own rank only. Here both strategies give the same logits.\n",
        fast_gathered.ms,
        fast_naive.ms,
        fused.ms,
        fast_gathered.collectives_ms,
        fast_naive.collectives_ms,
        fused.collectives_ms,
        range("naive"),
        range("fused"),
        fast_gathered.ms,
        scalar_naive.ms,
        scalar_naive.ms / fast_gathered.ms,
        slowest_gain.fold(f64::INFINITY, f64::min),
        scalar_naive.ms / fused.ms,
        best.schedule,
        best.strategy,
        best.attention,
        scalar_naive.ms / best.ms,
        mlp_bytes(scalar_gathered),
        mlp_bytes(scalar_naive),
        mlp_bytes(fused),
        fast_gathered.allocated as f64 * 1e-6,
        fused.allocated as f64 * 1e-6,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn made_up(isa: &'static str, schedule: &'static str, ms: f64) -> Row {
        let bench = json!({
            "results": [{"ms": ms, "allocations": 7, "allocated_bytes": 2_500_000}],
            "traffic": [
                {"collective": "Allreduce", "calls": 2, "payload_bytes": 1_048_576, "seconds": 0.001},
                {"collective": "Allgather", "calls": 1, "payload_bytes": 16, "seconds": 0.0005},
            ],
        });
        row(&bench, isa, schedule, "heads", "materialized").unwrap()
    }

    #[test]
    fn rows_add_up_the_ledger() {
        let row = made_up("avx2", "fused", 12.25);
        assert_eq!((row.calls, row.bytes), (3, 1_048_592));
        let table = table(&[row]);
        assert!(
            table.ends_with(
                "| avx2 | fused | heads | materialized | 12.2 | 1.00 | 1.5 | 3 | 1.05 | 7 | 2.5 |\n"
            ),
            "{table}"
        );
        assert!(
            super::row(&json!({"results": [{"ms": 1.0}]}), "avx2", "fused", "heads", "streaming")
                .is_err()
        );
    }

    #[test]
    fn schedules_are_compared_within_a_turn() {
        // A machine that takes twice as long in the second turn, and a run that was held up in the
        // third.
        let times = [[10.0, 9.0, 8.0], [20.0, 18.0, 16.0], [10.0, 30.0, 8.0]];
        let turns: Vec<_> = times
            .iter()
            .map(|ms| {
                let mut ms = ms.iter();
                turn(|schedule| Ok(made_up("avx2", schedule, *ms.next().unwrap()))).unwrap()
            })
            .collect();
        let found: Vec<_> =
            middle(&turns).iter().map(|row| (row.schedule, row.ms, row.of_gathered)).collect();
        assert_eq!(found, [("gathered", 10.0, 1.0), ("naive", 18.0, 0.9), ("fused", 8.0, 0.8)]);
    }

    #[test]
    fn lessons_compare_what_the_analysis_compared() {
        let rows = [
            made_up("scalar", "gathered", 120.0),
            made_up("scalar", "naive", 100.0),
            made_up("scalar", "fused", 90.0),
            made_up("avx2", "gathered", 25.0),
            made_up("avx2", "naive", 20.0),
            made_up("avx2", "fused", 10.0),
        ];
        let text = lessons(&rows, 1);
        assert!(text.contains("takes 25.0 ms against 100.0: 4.0 times as fast"), "{text}");
        assert!(text.contains("at least 4.8 times as fast"), "{text}");
        assert!(text.contains("makes it 10.0 times"), "{text}");
        // One Allreduce of attention is not the feed-forward block's.
        assert!(text.contains("524304 bytes a layer for `gathered`"), "{text}");
        assert_eq!(lessons(&rows[1..], 1), "");
    }

    #[test]
    fn gains_are_over_both_kinds_of_scalar_kernels() {
        let rows = [
            Gain { kernels: "one", ms: [840.0, 1050.0], gflops: 10.0 },
            Gain { kernels: "scalar", ms: [420.0, 350.0], gflops: 40.0 },
            Gain { kernels: "avx2", ms: [120.0, 100.0], gflops: 100.0 },
        ];
        let text = gain_table(&rows);
        assert!(
            text.contains("| scalar | 420 | 2.0 times | 1.0 times | 350 | 3.0 times | 1.0 times | 40 | 1.0 times |"),
            "{text}"
        );
        assert!(
            text.ends_with("| avx2 | 120 | 7.0 times | 3.5 times | 100 | 10.5 times | 3.5 times | 100 | 2.5 times |\n"),
            "{text}"
        );
    }
}
