//! What `qwen3 bench` shows beyond speed: limits, depth, the table of operations, the trace.

mod program;

use std::fs;
use std::thread;
use std::time::Duration;

use program::{AUSTEN, assert_one_line, json, keys, program, run};
use serde_json::Value;

const QUICK: [&str; 6] = ["--prompt-len", "16", "--gen-len", "3", "--reps", "1"];

fn bench<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    [&["bench", "--model", AUSTEN][..], &QUICK, extra].concat()
}

#[test]
fn limits_and_depth_are_part_of_the_results() {
    let extra = ["--json", "--depth", "16,64", "--weights", "q8", "--kv", "q8", "--threads", "2"];
    let found = json(&bench(&extra));
    assert_eq!((&found["weights"], &found["kv"]), (&"q8".into(), &"q8".into()));
    let limits = keys(&found["limits"]);
    let wide: &[&str] = if found["isa"] == "avx512" { &["fma_avx512_gflops"] } else { &[] };
    assert_eq!(limits, [&["fma_gflops", "read_gb_per_s"], wide].concat());
    for key in limits {
        let limit = found["limits"][key].as_f64().unwrap();
        assert!((0.1..100_000.0).contains(&limit), "{key}: {limit}");
    }
    let results = found["results"].as_array().unwrap();
    let depths: Vec<_> = results
        .iter()
        .map(|result| (result["phase"].as_str().unwrap(), &result["depth"]))
        .collect();
    assert_eq!(depths, [("prefill", &0.into()), ("decode", &16.into()), ("decode", &64.into())]);
    // The looks around the only repetition are those of the medians.
    let share = results[0]["limit_share"].as_f64().unwrap();
    let expected =
        results[0]["gflops"].as_f64().unwrap() / found["limits"]["fma_gflops"].as_f64().unwrap();
    assert!((share / expected - 1.0).abs() < 1e-6, "{share}, from the limits {expected}");
    let bytes = |index: usize| {
        results[index]["gb_per_s"].as_f64().unwrap() * results[index]["ms"].as_f64().unwrap()
    };
    assert!(bytes(2) > bytes(1), "a longer context is more to read");
}

#[test]
fn several_sequences_are_measured_together_on_any_ranks() {
    let batch = ["--json", "--batch", "3,1", "--depth", "140", "--weights", "q8"];
    for ranks in [
        &["--threads", "2"][..],
        &["--ranks", "3", "--kv", "q8"],
        &["--ranks", "4", "--grid", "tp=2,sp=2"],
    ] {
        let found = json(&bench(&[&batch, ranks].concat()));
        let results = found["results"].as_array().unwrap();
        let kinds: Vec<_> = results
            .iter()
            .map(|one| {
                let number = |key: &str| one[key].as_u64().unwrap();
                (one["phase"].as_str().unwrap(), number("batch"), number("depth"))
            })
            .collect();
        assert_eq!(kinds, [("decode", 3, 140), ("decode", 1, 140)]);
        for one in results {
            let number = |key: &str| one[key].as_f64().unwrap();
            assert!(number("limit_share") > 0.0);
            assert!(number("prompt_rows_ratio") > 0.0);
            // Three tokens of each sequence were decoded.
            let tokens = number("tokens_per_s") * number("ms") / 1e3;
            assert!((tokens - 3.0 * number("batch")).abs() < 1e-6, "{one}");
        }
    }
    assert_one_line(&run(&bench(&["--batch", "2", "--depth", "5000"])), &["--depth", "4096"]);
    let none = run(&["bench", "--model", AUSTEN, "--batch", "2", "--gen-len", "0"]);
    assert_one_line(&none, &["--batch", "--gen-len above 0"]);
    assert_one_line(&run(&bench(&["--batch", "0"])), &["--batch"]);
}

#[test]
fn a_prompt_reads_the_experts_of_all_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("mixture");
    let made = run(&["synth", "--preset", "tiny-moe", model.to_str().unwrap()]);
    assert!(made.success, "{made:?}");
    // What prompts of these lengths read, as a share of all weights of all ranks.
    let shares = |extra: &[&str]| -> Vec<f64> {
        let args = [
            "bench",
            "--json",
            "--model",
            model.to_str().unwrap(),
            "--reps",
            "1",
            "--threads",
            "1",
        ];
        let found =
            json(&[&args[..], &["--prompt-len", "1,2,256,257", "--gen-len", "0"], extra].concat());
        let held: f64 = found["weight_bytes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|bytes| bytes.as_f64().unwrap())
            .sum();
        let bytes =
            |of: &Value| of["gb_per_s"].as_f64().unwrap() * of["ms"].as_f64().unwrap() * 1e6;
        found["results"].as_array().unwrap().iter().map(|result| bytes(result) / held).collect()
    };
    let [one, two, all, longer] = shares(&["--chunk", "256"])[..] else { panic!("four prompts") };
    // 2 of 8 experts for the first token, 1.5 more for the second, all of them for many; the 257th
    // comes in another pass.
    let expert = (all - one) / 6.0;
    assert!((0.98..=1.0).contains(&all) && one < 0.6, "{one} to {all}");
    assert!(
        (two - one - 1.5 * expert).abs() < 1e-9 && (longer - all - one).abs() < 1e-9,
        "{two}, {longer}"
    );
    // Each of two ranks that split positions sees half of the tokens.
    let split = shares(&["--chunk", "256", "--ranks", "2", "--strategy", "sequence"]);
    assert!((split[1] - one).abs() < 1e-9, "{split:?}");
}

#[test]
fn a_context_that_is_too_deep_is_refused() {
    let failed = run(&bench(&["--depth", "5000"]));
    assert_one_line(&failed, &["--depth", "4096"]);
    let failed = run(&bench(&["--trace", "no/such/folder/trace.json"]));
    assert_one_line(&failed, &["no/such/folder/trace.json"]);
}

#[test]
fn what_was_measured_is_said_though_its_file_cannot_be_written() {
    let calibrate = [
        "calibrate",
        "--quick",
        "--force",
        "--json",
        "--ranks",
        "2",
        "--threads",
        "1",
        "--output",
        "/dev/null/file",
    ];
    for (args, file, key) in [
        (&bench(&["--json", "--trace", "/dev/full"])[..], "/dev/full", "results"),
        (&calibrate, "/dev/null/file", "machine"),
    ] {
        let run = run(args);
        let found: Value =
            serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("no JSON: {run:?}"));
        assert!(!run.success && !found[key].is_null(), "{run:?}");
        assert!(
            run.stderr.lines().filter(|line| !line.starts_with("warning: ")).count() == 1
                && run.stderr.contains(&format!("error: {file}: ")),
            "{run:?}"
        );
    }
}

#[test]
fn any_number_of_repetitions_can_begin() {
    let args = ["--gen-len", "0", "--threads", "1", "--prompt-len", "1"];
    let args =
        [&["bench", "--model", AUSTEN, "--reps", "18446744073709551615"][..], &args].concat();
    let mut bench = program(&args).spawn().unwrap();
    // Without room for as many times it would be over before the first one.
    thread::sleep(Duration::from_secs(3));
    let status = bench.try_wait().unwrap();
    bench.kill().unwrap();
    bench.wait().unwrap();
    assert_eq!(status, None, "it ended before all repetitions");
}

#[test]
fn the_profile_is_a_table_and_its_shares_add_up() {
    let table = run(&bench(&["--profile", "--ranks", "2", "--threads", "1"]));
    assert!(table.success, "{table:?}");
    for words in [
        "prefill of 16 tokens: where",
        "decode of 3 tokens after 16: where",
        "qkv_proj",
        "lm_head",
        "Allreduce",
    ] {
        assert!(table.stdout.contains(words), "{words:?} is missing: {}", table.stdout);
    }
    let found = json(&bench(&["--profile", "--json", "--ranks", "2", "--threads", "1"]));
    let rows = found["profile"].as_array().unwrap();
    for phase in ["prefill", "decode"] {
        let of_phase: Vec<_> = rows.iter().filter(|row| row["phase"] == phase).collect();
        let shares: f64 = of_phase.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((0.999..1.05).contains(&shares), "{phase}: {shares}");
        // 4 layers; as many passes as tokens in decode.
        let passes = if phase == "decode" { 3 } else { 1 };
        let calls = |operation: &str| {
            of_phase.iter().find(|row| row["operation"] == operation).unwrap()["calls"].as_u64()
        };
        assert_eq!((calls("qkv_proj"), calls("Allreduce")), (Some(4 * passes), Some(8 * passes)));
    }
}

#[test]
fn the_trace_has_a_row_for_each_rank_and_thread() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.json");
    let extra = ["--json", "--trace", file.to_str().unwrap(), "--ranks", "2", "--threads", "2"];
    let found = json(&bench(&extra));
    assert_eq!(found["profile"], Value::Null, "nobody asked for the table");
    let trace: Value =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).expect("the trace is JSON");
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        let of_rank = || events.iter().filter(move |event| event["pid"] == rank);
        let rows: Vec<_> = of_rank()
            .filter(|e| e["name"] == "thread_name")
            .map(|e| e["args"]["name"].clone())
            .collect();
        assert_eq!(rows, ["operations", "thread 0", "thread 1", "collectives"]);
        for row in 0..4 {
            let spans: Vec<_> =
                of_rank().filter(|event| event["ph"] == "X" && event["tid"] == row).collect();
            assert!(!spans.is_empty(), "rank {rank}, row {row}");
            for span in spans {
                assert!(
                    span["ts"].as_f64().unwrap() >= 0.0 && span["dur"].as_f64().unwrap() >= 0.0,
                    "{span}"
                );
                assert_eq!(span["cat"] == "collective", row == 3, "{span}");
            }
        }
        let reduced = of_rank().filter(|event| event["name"] == "Allreduce").count();
        assert_eq!(reduced, 8 * (1 + 3), "4 layers of 2, a prompt and three tokens");
    }
}
