//! What the program answers for the bundled model, and the shapes of its JSON.

mod program;

use std::fs;
use std::io::Write as _;
use std::process::{ChildStdout, Command};
use std::thread;
use std::time::Duration;

use program::{AUSTEN, json, keys, program, read_json, run, run_read, run_while, run_with};
use serde_json::Value;

/// What `generate --json` prints.
const KEYS: [&str; 6] =
    ["prompt_tokens", "ids", "text", "prefill_tokens_per_s", "decode_tokens_per_s", "stop"];

fn expected() -> Value {
    read_json(format!("{AUSTEN}/expected.json"))
}

fn ids(value: &Value) -> String {
    let ids: Vec<String> = value.as_array().unwrap().iter().map(Value::to_string).collect();
    ids.join(",")
}

#[test]
fn ranks_wait_for_a_prompt_as_long_as_it_takes() {
    let args = [
        "generate",
        "--model",
        AUSTEN,
        "--ranks",
        "2",
        "--comm-timeout",
        "2",
        "--max-new-tokens",
        "4",
    ];
    let mut command = program(&args);
    command.args(["--prompt-file", "/dev/stdin"]);
    let run = run_while(command, |mut stdin| {
        // The model is loaded long before.
        thread::sleep(Duration::from_secs(4));
        stdin.write_all(b"Elizabeth was").unwrap();
    });
    assert!(run.success && !run.stdout.is_empty(), "{run:?}");
}

#[test]
fn greedy_answers_are_those_of_the_reference() {
    for (i, case) in expected().as_array().unwrap().iter().enumerate() {
        let length = case["greedy_ids"].as_array().unwrap().len().to_string();
        let ids = ids(&case["prompt_ids"]);
        let mut args = vec![
            "generate",
            "--json",
            "--model",
            AUSTEN,
            "--kv",
            "f32",
            "--max-new-tokens",
            &length,
            "--threads",
            "1",
        ];
        // Each case on one rank, and on more in one of several ways.
        let ways: [&[&str]; 5] = [
            &["--ranks", "4", "--grid", "tp=2,sp=2"],
            &["--ranks", "2"],
            &["--ranks", "3", "--strategy", "sequence"],
            &["--ranks", "2", "--mlp", "naive", "--attention", "materialized"],
            &["--ranks", "5", "--mlp", "gathered", "--chunk", "3"],
        ];
        if case["kind"] == "text" {
            args.extend(["--prompt", case["prompt"].as_str().unwrap()]);
        } else if i % 2 == 0 {
            args.extend(["--chat", "--no-thinking", "--prompt", case["prompt"].as_str().unwrap()]);
        } else {
            args.extend(["--tokens", &ids]);
        }
        for way in [&[] as &[&str], ways[i % ways.len()]] {
            let mut args = args.clone();
            args.extend(way);
            let found = json(&args);
            assert_eq!(found["ids"], case["greedy_ids"], "{args:?}");
            assert_eq!(found["text"], case["text"], "{args:?}");
            assert_eq!(found["prompt_tokens"], case["prompt_ids"].as_array().unwrap().len());
            assert_eq!(keys(&found), KEYS);
            assert!(found["prefill_tokens_per_s"].as_f64().unwrap() > 0.0);
            assert!(found["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn text_is_streamed_as_it_is_and_files_are_prompts_too() {
    let case = &expected()[6];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, case["prompt"].as_str().unwrap()).unwrap();
    let run = run(&[
        "generate",
        "--model",
        AUSTEN,
        "--kv",
        "f32",
        "--prompt-file",
        file.to_str().unwrap(),
    ]);
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
    assert_eq!(run.stdout, format!("{}\n", case["text"].as_str().unwrap()));
}

#[test]
fn seeds_decide_and_ends_can_be_ignored() {
    let draw = |seed: &str, ranks: &str| {
        let sampling = [
            "--temperature",
            "1.5",
            "--top-k",
            "50",
            "--ignore-eos",
            "--max-new-tokens",
            "24",
            "--seed",
            seed,
        ];
        let mut args =
            vec!["generate", "--json", "--model", AUSTEN, "--kv", "f32", "--prompt", "Emma"];
        args.extend(sampling);
        args.extend(["--ranks", ranks, "--threads", "1"]);
        json(&args)["ids"].clone()
    };
    let one = draw("1", "1");
    assert_eq!(one.as_array().unwrap().len(), 24);
    assert_eq!(one, draw("1", "2"));
    assert_ne!(one, draw("2", "1"));
}

#[test]
fn perplexity_is_that_of_the_reference() {
    let expected = read_json(format!("{AUSTEN}/perplexity.json"));
    let file = format!("{AUSTEN}/sample.txt");
    let found = json(&[
        "perplexity",
        "--json",
        "--model",
        AUSTEN,
        "--file",
        &file,
        "--ranks",
        "2",
        "--threads",
        "1",
    ]);
    assert_eq!(keys(&found), ["file", "context", "tokens", "scored", "perplexity"]);
    for key in ["context", "tokens", "scored"] {
        assert_eq!(found[key], expected[key]);
    }
    let (found, expected) =
        (found["perplexity"].as_f64().unwrap(), expected["perplexity"].as_f64().unwrap());
    assert!((found / expected - 1.0).abs() < 1e-3, "found {found}, expected {expected}");
}

#[test]
fn logits_are_the_ones_that_greedy_answers_come_from() {
    let dir = tempfile::tempdir().unwrap();
    let case = &expected()[4];
    let prompt = ids(&case["prompt_ids"]);
    let tokens = case["prompt_ids"].as_array().unwrap().len();
    let mut all: Vec<Vec<f32>> = Vec::new();
    for (ranks, strategy, chunk) in
        [("1", "heads", "512"), ("2", "heads", "4"), ("3", "sequence", "10")]
    {
        let file = dir.path().join(format!("{ranks}.safetensors"));
        let path = file.to_str().unwrap();
        let args = ["logits", "--model", AUSTEN, "--tokens", &prompt, "--output", path];
        let mut args = args.to_vec();
        args.extend(["--ranks", ranks, "--strategy", strategy, "--chunk", chunk, "--threads", "1"]);
        let run = run(&args);
        assert!(run.success && run.stderr.is_empty() && run.stdout.is_empty(), "{run:?}");
        let bytes = fs::read(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = tensors.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [tokens, 4096]);
        assert_eq!(logits.dtype(), safetensors::Dtype::F32);
        all.push(
            logits
                .data()
                .chunks(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
                .collect(),
        );
    }
    let last = &all[0][(tokens - 1) * 4096..];
    let best = (0..4096).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    assert_eq!(case["greedy_ids"][0], best);
    let largest = all[0].iter().fold(0.0_f32, |max, logit| max.max(logit.abs()));
    for other in &all[1..] {
        let apart = all[0].iter().zip(other).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(apart <= 2e-4 * largest, "{apart} apart, the largest logit is {largest}");
    }
}

#[test]
fn bench_reports_results_and_the_ledger() {
    let args = [
        "bench",
        "--json",
        "--model",
        AUSTEN,
        "--prompt-len",
        "16,33",
        "--gen-len",
        "5",
        "--reps",
        "2",
    ];
    let mut args = args.to_vec();
    args.extend(["--ranks", "2", "--threads", "1"]);
    let found = json(&args);
    let mut expected = vec![
        "model",
        "weights",
        "ranks",
        "threads",
        "comm",
        "strategy",
        "attention",
        "mlp",
        "results",
        "traffic",
    ];
    expected.extend(["limits", "kv", "isa", "experts", "wire", "plan", "weight_bytes"]);
    assert_eq!(keys(&found), expected);
    assert_eq!(found["weights"], "bf16");
    assert_eq!((&found["ranks"], &found["threads"]), (&Value::from(2), &Value::from(1)));
    assert_eq!(found["comm"], "threads");
    assert_eq!(
        (&found["strategy"], &found["attention"], &found["mlp"]),
        (&"heads".into(), &"streaming".into(), &"fused".into())
    );
    let results = found["results"].as_array().unwrap();
    let phases: Vec<_> = results
        .iter()
        .map(|result| (result["phase"].as_str().unwrap(), result["tokens"].as_u64().unwrap()))
        .collect();
    assert_eq!(phases, [("prefill", 16), ("prefill", 33), ("decode", 5)]);
    for result in results {
        let measured = ["tokens_per_s", "ms", "gflops", "gb_per_s", "limit_share"];
        assert_eq!(keys(result), [&["phase", "tokens"][..], &measured, &["depth"]].concat());
        for key in measured {
            assert!(result[key].as_f64().unwrap() > 0.0, "{key}");
        }
    }
    let traffic = found["traffic"].as_array().unwrap();
    let reduced = |phase: &str| {
        let entry = traffic
            .iter()
            .find(|entry| entry["phase"] == phase && entry["collective"] == "Allreduce")
            .unwrap();
        assert_eq!(
            keys(entry),
            ["phase", "collective", "calls", "payload_bytes", "seconds", "wait_seconds"]
        );
        (entry["calls"].as_u64().unwrap(), entry["payload_bytes"].as_u64().unwrap())
    };
    // 4 layers with 2 Allreduce each, hidden size 256; two prompts, five passes.
    assert_eq!(reduced("prefill"), (2 * 4 * 2, 2 * 4 * (16 + 33) * 256 * 4));
    assert_eq!(reduced("decode"), (5 * 4 * 2, 5 * 4 * 2 * 256 * 4));

    let table =
        run(&["bench", "--model", AUSTEN, "--prompt-len", "8", "--gen-len", "2", "--reps", "1"]);
    assert!(
        table.success && table.stdout.contains("prefill") && table.stdout.contains("GB/s"),
        "{table:?}"
    );
}

#[test]
fn the_demo_answers_and_sums_up() {
    let run = run(&["demo", "--model", AUSTEN, "--ranks", "2", "--threads", "1"]);
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
    for words in [
        "17 + 15 = 32",
        "s-i-s-t-e-r",
        "It is a truth universally acknowledged, that it is not",
        "2 (threads)",
        "8.0 Allreduce",
    ] {
        assert!(run.stdout.contains(words), "{words:?} is missing: {run:?}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [&["--help"][..], &["--version"], &["generate", "--help"], &["help", "bench"]] {
        let run = run(args);
        assert!(run.success && run.stderr.is_empty() && !run.stdout.is_empty(), "{run:?}");
    }
}

#[test]
fn made_up_and_quantized_checkpoints_can_be_run() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for preset in ["tiny", "tiny-moe"] {
        let made = folder(preset);
        let run = run(&["synth", "--preset", preset, &made, "--seed", "3"]);
        assert!(run.success && run.stderr.is_empty(), "{run:?}");
        let args = [
            "generate",
            "--json",
            "--model",
            &made,
            "--tokens",
            "1,2,3",
            "--max-new-tokens",
            "4",
            "--ignore-eos",
        ];
        let one = json(&args);
        assert_eq!(one["ids"].as_array().unwrap().len(), 4);
        assert_eq!(one["text"], "", "there is no tokenizer");
        let mut args = args.to_vec();
        args.extend(["--ranks", "2"]);
        assert_eq!(json(&args)["ids"], one["ids"]);
    }
    for format in ["q8", "q4"] {
        let out = folder(format);
        let run = run(&["quantize", "--model", AUSTEN, "--weights", format, &out]);
        assert!(run.success && run.stderr.is_empty(), "{run:?}");
        let args =
            ["generate", "--json", "--chat", "--no-thinking", "--prompt", "What is 17 + 15?"];
        let mut stored = args.to_vec();
        stored.extend(["--model", &out]);
        let mut converted = args.to_vec();
        converted.extend(["--model", AUSTEN, "--weights", format]);
        assert_eq!(json(&stored)["ids"], json(&converted)["ids"]);
        assert!(format == "q4" || json(&stored)["text"] == "17 + 15 = 32");
    }
}

/// Each of many ranks has the checkpoint's files open: more than a process may have by default.
#[test]
fn many_ranks_open_many_files() {
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "ulimit -Sn 16 && exec \"$@\"",
        "sh",
        env!("CARGO_BIN_EXE_qwen3"),
        "generate",
        "--model",
        AUSTEN,
    ]);
    command.args(["--prompt", "x", "--max-new-tokens", "1", "--threads", "1", "--ranks", "16"]);
    let run = run_with(command, "");
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
}

/// Whoever reads the answer may stop for longer than ranks wait for each other, as at a terminal
/// that is held.
#[test]
fn a_slow_reader_fails_no_rank() {
    let mut command = program(&[
        "generate",
        "--model",
        AUSTEN,
        "--prompt",
        "Emma",
        "--ignore-eos",
        "--ranks",
        "2",
    ]);
    command.args(["--threads", "1", "--max-new-tokens", "3000", "--comm-timeout", "2"]);
    let hold = |stdout: &ChildStdout| {
        // A page is what a pipe holds at least.
        assert_eq!(rustix::pipe::fcntl_setpipe_size(stdout, 4096).unwrap(), 4096);
        thread::sleep(Duration::from_secs(6));
    };
    let run = run_read(command, drop, hold);
    assert!(run.success && run.stderr.is_empty(), "{run:?}");
    assert!(run.stdout.len() > 2 * 4096, "{} bytes never filled the pipe", run.stdout.len());
}

#[test]
fn the_bundled_model_runs_in_200_mb_of_address_space() {
    let within = |rest: &str| {
        let mut command = std::process::Command::new("sh");
        let binary = env!("CARGO_BIN_EXE_qwen3");
        command.args(["-c", &format!("ulimit -v 200000; exec '{binary}' {rest}")]);
        run_with(command, "Hello\n")
    };
    for arguments in ["--threads 2", "--ranks 2", "--ranks 2 --strategy sequence"] {
        let limited = within(&format!("generate -m '{AUSTEN}' -p Elizabeth -n 4 {arguments}"));
        let free = run(&["generate", "-m", AUSTEN, "-p", "Elizabeth", "-n", "4"]);
        assert_eq!((limited.success, &limited.stdout), (true, &free.stdout), "{limited:?}");
    }
    let chat = within(&format!("chat -m '{AUSTEN}'"));
    assert!(chat.success && !chat.stdout.is_empty(), "{chat:?}");
}
