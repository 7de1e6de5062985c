//! `plan`, `calibrate`, the strategy that follows them, and emulated links.

mod program;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use program::{AUSTEN, assert_one_line, json, keys, program, read_json, run, run_with};
use serde_json::{Value, json};

fn plan(extra: &[&str]) -> Value {
    json(&[&["plan", "--json", "--model", AUSTEN], extra].concat())
}

fn bench(extra: &[&str]) -> Value {
    let quick = ["--prompt-len", "16", "--gen-len", "4", "--reps", "1", "--threads", "1"];
    json(&[&["bench", "--json", "--model", AUSTEN][..], &quick, extra].concat())
}

/// A file of `calibrate` for `ranks` ranks with these GB/s.
fn calibration(ranks: usize, nodes: usize, read: Value) -> Value {
    let link = json!({"alpha_us": 1.0, "beta_gb_s": 10.0});
    let rate = json!({"format": "bf16", "start_us": 1.0, "read_gb_s": read, "gflops": 50.0});
    let attention = json!({"format": "f16", "start_us": 1.0, "read_gb_s": 10.0, "gflops": 30.0});
    json!({"machines": [{
        "transport": "threads", "processor": null, "ranks": ranks, "nodes": nodes, "threads": 1, "inside": link, "between": link,
        "a field of another version": {},
        "rates": [rate], "attention": [attention],
    }]})
}

fn write(dir: &Path, name: &str, content: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_plan_tells_memory_traffic_speed_and_imbalance_of_every_way() {
    let found = plan(&["--ranks", "3"]);
    assert_eq!(
        keys(&found),
        ["model", "ranks", "nodes", "figures", "machine", "ways", "recommended"]
    );
    assert!(found["figures"].as_str().unwrap().starts_with("typical"), "{}", found["figures"]);
    let ways = found["ways"].as_array().unwrap();
    let strategies: Vec<_> = ways.iter().map(|way| way["strategy"].as_str().unwrap()).collect();
    assert_eq!(strategies, ["heads", "sequence"]);
    for way in ways {
        let names = [
            "strategy",
            "mlp",
            "experts",
            "weight_bytes",
            "kv_bytes",
            "activation_bytes",
            "imbalance",
            "prompt",
            "token",
        ];
        assert_eq!(keys(way), names, "{way}");
        for phase in ["prompt", "token"] {
            assert_eq!(
                keys(&way[phase]),
                ["calls", "bytes", "work_ms", "collectives_ms", "tokens_per_s"]
            );
            assert!(way[phase]["tokens_per_s"].as_f64().unwrap() > 0.0);
        }
        let strategy = way["strategy"].as_str().unwrap();
        let loaded = bench(&["--ranks", "3", "--strategy", strategy]);
        assert_eq!(way["weight_bytes"], loaded["weight_bytes"], "{strategy}");
    }
    // 8 query heads on 3 ranks are 3, 3 and 2; each rank sees the KV heads of its queries.
    let heads = &ways[0]["imbalance"];
    assert_eq!(keys(heads), ["query_heads", "kv_heads", "columns", "vocabulary"]);
    assert_eq!(
        heads["query_heads"],
        json!({"most": 3, "least": 2, "sum": 8, "total": 8, "imbalance": 1.125})
    );
    assert_eq!(heads["columns"]["sum"], 768);
    assert_eq!(
        ways[1]["imbalance"]["query_heads"]["imbalance"], 1.0,
        "positions are split, heads are not"
    );

    let table = run(&["plan", "--model", AUSTEN, "--ranks", "4", "--nodes", "2", "--all"]);
    assert!(table.success, "{table:?}");
    for word in [
        "4 ranks on 2 machines;",
        "inside a machine: ",
        "between machines: ",
        "heads fused",
        "heads gathered",
        "sequence local",
        "tp=2,sp=2 fused",
        "recommended: ",
    ] {
        assert!(table.stdout.contains(word), "{word:?} is missing: {}", table.stdout);
    }
    // Only links that there are.
    let alone = run(&["plan", "--model", AUSTEN, "--ranks", "1"]).stdout;
    assert!(alone.starts_with("1 rank on 1 machine; ") && !alone.contains("µs"), "{alone}");
    // Machines that do not divide the ranks have blocks of them, the first ones one longer.
    assert_eq!(plan(&["--ranks", "5", "--nodes", "2"])["nodes"], 2);
}

#[test]
fn a_link_is_taken_for_the_slowest_one() {
    let token = |extra: &[&str]| plan(extra)["ways"][0]["token"].clone();
    let alone = token(&["--ranks", "2"]);
    let far = token(&[
        "--ranks",
        "2",
        "--nodes",
        "2",
        "--alpha-us",
        "1000",
        "--beta-gb-s",
        "1",
        "--wire",
        "f32",
    ]);
    // 4 layers of 2 Allreduce, and the choice of the token.
    assert_eq!((&alone["calls"], &alone["bytes"]), (&9.into(), &far["bytes"]));
    let collectives = far["collectives_ms"].as_f64().unwrap();
    assert!((9.0..9.1).contains(&collectives), "{collectives}");
    // Between machines sums are bf16 unless the user has it otherwise.
    let short = token(&["--ranks", "2", "--nodes", "2"]);
    assert_eq!(short["bytes"], 8 * 256 * 2 + 16);
    assert_eq!(far["bytes"], 8 * 256 * 4 + 16);
}

#[test]
fn what_cannot_be_planned_is_refused_in_one_line() {
    let fails = |extra: &[&str], words: &[&str]| {
        assert_one_line(&run(&[&["plan", "--model", AUSTEN], extra].concat()), words);
    };
    fails(&["--ranks", "2", "--nodes", "3"], &["--nodes", "3", "at most 2"]);
    fails(&["--ranks", "2", "--alpha-us", "3"], &["--beta-gb-s"]);
    fails(
        &["--ranks", "2", "--alpha-us", "-3", "--beta-gb-s", "1"],
        &["--alpha-us", "-3", "from 0"],
    );
    for bad in ["0", "-1", "nan", "inf"] {
        fails(
            &["--ranks", "2", "--alpha-us", "0", "--beta-gb-s", bad],
            &["--beta-gb-s", bad, "above 0"],
        );
    }
    fails(&["--ranks", "2", "--alpha-us", "nan", "--beta-gb-s", "1"], &["--alpha-us", "nan"]);
    fails(&["--ranks", "2", "--nodes", "0"], &["--nodes", "0"]);
    fails(&["--ranks", "0"], &["--ranks", "0"]);
    fails(&["--ranks", "2", "--prompt", "5000"], &["--prompt", "5256", "4096"]);
    fails(&["--ranks", "2", "--calibration", "nowhere.json"], &["nowhere.json"]);
    assert_one_line(&run(&["plan", "--model", "nowhere", "--ranks", "2"]), &["nowhere"]);

    let dir = tempfile::tempdir().unwrap();
    let cut = write(dir.path(), "cut.json", "{\"machines\": [");
    fails(&["--ranks", "2", "--calibration", &cut], &["cut.json"]);
    let negative = write(dir.path(), "negative.json", &calibration(2, 1, json!(-3.0)).to_string());
    fails(
        &["--ranks", "2", "--calibration", &negative],
        &["negative.json", "read_gb_s of bf16 is -3"],
    );
    let other = write(dir.path(), "other.json", &calibration(3, 1, json!(9.0)).to_string());
    fails(
        &["--ranks", "2", "--calibration", &other],
        &["other.json", "3 ranks on 1 machine", "expected 2 ranks on 1 machine"],
    );
}

#[test]
fn calibrations_of_several_layouts_are_kept_in_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("folder/that/is/made/calibration.json");
    let path = file.to_str().unwrap();
    let calibrate = |ranks| {
        json(&[
            "calibrate",
            "--quick",
            "--force",
            "--json",
            "--threads",
            "1",
            "--ranks",
            ranks,
            "--output",
            path,
        ])
    };
    let found = calibrate("2");
    assert_eq!((keys(&found), &found["file"]), (vec!["file", "machine"], &path.into()));
    for (what, formats) in
        [("rates", &["bf16", "f32", "f16", "q8", "q4"][..]), ("attention", &["f16", "f32", "q8"])]
    {
        let rates = found["machine"][what].as_array().unwrap();
        assert_eq!(
            rates.iter().map(|rate| rate["format"].as_str().unwrap()).collect::<Vec<_>>(),
            formats
        );
        for rate in rates {
            assert!((0.01..10_000.0).contains(&rate["read_gb_s"].as_f64().unwrap()), "{rate}");
            assert!((0.01..100_000.0).contains(&rate["gflops"].as_f64().unwrap()), "{rate}");
        }
    }
    assert!(found["machine"]["inside"]["beta_gb_s"].as_f64().unwrap() > 0.01);
    let read = || read_json(&file);
    assert_eq!(read(), json!({"machines": [found["machine"]]}));
    let planned = plan(&["--ranks", "2", "--calibration", path]);
    assert_eq!(planned["machine"], found["machine"]);
    assert_eq!(planned["figures"], format!("calibrated (threads, {path})"));

    // One of another kind joins it; one of the same kind takes its place.
    let kept = calibration(3, 1, json!(9.0))["machines"][0].clone();
    let mut stale = calibration(2, 1, json!(9.0))["machines"][0].clone();
    stale["processor"] = found["machine"]["processor"].clone();
    fs::write(&file, json!({"machines": [stale, kept]}).to_string()).unwrap();
    let again = calibrate("2");
    assert_eq!(read(), json!({"machines": [kept, again["machine"]]}));

    // A pipe is written and not read.
    let piped = run(&[
        "calibrate",
        "--quick",
        "--force",
        "--json",
        "--threads",
        "1",
        "--output",
        "/dev/stdout",
    ]);
    assert!(piped.success && piped.stderr.is_empty(), "{piped:?}");
    let (said, written) = piped.stdout.split_once('\n').unwrap();
    let [said, written]: [Value; 2] =
        [said, written].map(|text| serde_json::from_str(text).unwrap());
    assert_eq!(written, json!({"machines": [said["machine"]]}));

    fs::write(&file, "[]").unwrap();
    let failed = run(&["calibrate", "--threads", "1", "--output", path]);
    assert_one_line(&failed, &["calibration.json"]);
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "[]",
        "what could not be read is not overwritten"
    );
}

#[test]
fn figures_of_a_busy_machine_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("calibration.json");
    let done = AtomicBool::new(false);
    let run = std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let output = file.to_str().unwrap();
        let run = run(&["calibrate", "--quick", "--threads", "1", "--output", output]);
        done.store(true, Ordering::Relaxed);
        run
    });
    assert!(run.success && run.stdout.contains("GFLOP/s"), "{run:?}");
    assert!(run.stderr.starts_with("warning: other programs use "), "{run:?}");
    assert!(!file.exists(), "noise was saved");
}

#[test]
fn a_preset_or_a_config_alone_can_be_planned() {
    let preset = json(&["plan", "--json", "--preset", "32b", "--ranks", "4", "--nodes", "4"]);
    assert_eq!(preset["model"], "32b");
    // 64 layers and the head of the published shape in bf16; the embedding stays in the file.
    let layer = 5120 * (2 * (8192 + 1024) + 3 * 25_600);
    let bytes: u64 = 2 * (64 * layer + 151_936 * 5120);
    let held = |found: &Value| -> u64 {
        let weights = found["ways"][0]["weight_bytes"].as_array().unwrap();
        weights.iter().map(|bytes| bytes.as_u64().unwrap()).sum()
    };
    assert_eq!(held(&preset), bytes);

    // The bundled model's config alone gives the plan of the whole folder.
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::copy(Path::new(AUSTEN).join("config.json"), &config).unwrap();
    let alone = json(&["plan", "--json", "--model", config.to_str().unwrap(), "--ranks", "3"]);
    assert_eq!(alone["ways"], plan(&["--ranks", "3"])["ways"]);
    let fails = |extra: &[&str], words: &[&str]| {
        assert_one_line(&run(&[&["plan", "--ranks", "2"], extra].concat()), words);
    };
    fails(&["--preset", "33b"], &["--preset", "33b"]);
    let broken = write(dir.path(), "broken.json", "{");
    fails(&["--model", &broken], &["--model", "broken.json"]);
    let empty = write(dir.path(), "empty.json", "{}");
    fails(&["--model", &empty], &["empty.json"]);
}

#[test]
fn an_emulated_link_costs_time_and_changes_no_answer() {
    let ids = |extra: &[&str]| {
        let args = [
            "generate",
            "--json",
            "--model",
            AUSTEN,
            "--prompt",
            "Elizabeth was",
            "--max-new-tokens",
            "6",
        ];
        json(&[&args[..], &["--ranks", "2", "--threads", "1"], extra].concat())["ids"].clone()
    };
    let link = ["--emulate-link", "2000,1"];
    let exact = [&link[..], &["--wire", "f32"]].concat();
    for strategy in ["heads", "sequence"] {
        assert_eq!(
            ids(&["--strategy", strategy]),
            ids(&[&exact[..], &["--strategy", strategy]].concat())
        );
    }
    // 4 layers of 2 Allreduce of 2 ms, and the choice of the token.
    let slow = bench(&[&link[..], &["--ranks", "2", "--strategy", "heads"]].concat());
    let decode = slow["results"]
        .as_array()
        .unwrap()
        .iter()
        .find(|result| result["phase"] == "decode")
        .unwrap();
    assert!(decode["ms"].as_f64().unwrap() >= 4.0 * 9.0 * 2.0, "{decode}");

    let fails = |extra: &[&str], words: &[&str]| {
        let args = ["generate", "--model", AUSTEN, "--prompt", "x", "--ranks", "2"];
        assert_one_line(&run(&[&args[..], extra].concat()), words);
    };
    for bad in ["40", "x,1", "-1,1", "40,0", "40,inf"] {
        fails(&["--emulate-link", bad], &["--emulate-link", bad]);
    }
    fails(
        &["--emulate-link", "40,1", "--emulate-nodes", "3"],
        &["--emulate-nodes", "3", "at most 2"],
    );
    fails(&["--emulate-nodes", "2"], &["--emulate-link"]);
}

#[test]
fn the_strategy_follows_the_plan_for_the_real_layout() {
    let one = bench(&["--ranks", "1"]);
    assert_eq!(
        (&one["strategy"], &one["plan"]),
        (&"heads".into(), &Value::Null),
        "one rank has nothing to choose"
    );
    let near = bench(&["--ranks", "2"]);
    let reason = near["plan"].as_str().unwrap();
    assert_eq!(near["strategy"], "heads");
    assert!(
        reason.starts_with("heads for 16 and 4 tokens with 2 ranks on 1 machine: sequence takes "),
        "{reason}"
    );
    assert!(reason.contains("figures typical"), "{reason}");
    // On a link that slow, one collective a layer is twice as fast as two.
    let far = bench(&["--ranks", "2", "--emulate-link", "5000,1"]);
    assert_eq!(far["strategy"], "sequence", "{}", far["plan"]);
    assert!(far["plan"].as_str().unwrap().contains("2 machines: heads takes "), "{}", far["plan"]);
    let told = bench(&["--ranks", "2", "--emulate-link", "5000,1", "--strategy", "heads"]);
    assert_eq!((&told["strategy"], &told["plan"]), (&"heads".into(), &Value::Null));

    // A calibration is found by itself, and where it is broken the plan says so.
    let home = tempfile::tempdir().unwrap();
    let reason = |content: &str| {
        fs::create_dir_all(home.path().join("qwen3")).unwrap();
        write(&home.path().join("qwen3"), "calibration.json", content);
        let args = ["plan", "--json", "--model", AUSTEN, "--ranks", "2"];
        let mut command = program(&args);
        command.env("XDG_CONFIG_HOME", home.path());
        let run = run_with(command, "");
        assert!(run.success, "{run:?}");
        serde_json::from_str::<Value>(&run.stdout).unwrap()["figures"].as_str().unwrap().to_owned()
    };
    assert!(reason(&calibration(2, 1, json!(9.0)).to_string()).starts_with("calibrated (threads"));
    assert!(
        reason(&calibration(3, 1, json!(9.0)).to_string())
            .contains("has only 3 ranks on 1 machine")
    );
    let mut foreign = calibration(2, 1, json!(9.0));
    foreign["machines"][0]["processor"] = "a Z80, 1 logical core".into();
    let elsewhere = reason(&foreign.to_string());
    assert!(
        elsewhere.starts_with("typical, since ")
            && elsewhere.contains("a Z80, 1 logical core, and this"),
        "{elsewhere}"
    );
    let broken = reason("{");
    assert!(
        broken.starts_with("typical, since ") && broken.contains("calibration.json"),
        "{broken}"
    );
}

#[test]
fn the_strategy_follows_the_length_of_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let file =
        write(dir.path(), "long.txt", &"It is a truth universally acknowledged. ".repeat(50));
    // On this link positions are split for a short prompt and weights for one of hundreds of
    // tokens. Each way rounds alike every time.
    for (prompt, expected) in [
        (["--tokens", "1,2,3"], "sequence"),
        (["--prompt", "It is a truth"], "sequence"),
        (["--prompt-file", &file], "heads"),
    ] {
        let logits = |strategy: &str| {
            let path = dir.path().join(strategy);
            let args = [
                "logits",
                "--model",
                AUSTEN,
                "--ranks",
                "2",
                "--threads",
                "1",
                "--emulate-link",
                "1000,1",
            ];
            let done = run(&[
                &args[..],
                &prompt,
                &["--strategy", strategy, "--output", path.to_str().unwrap()],
            ]
            .concat());
            assert!(done.success, "{done:?}");
            fs::read(path).unwrap()
        };
        let [auto, heads, sequence] = ["auto", "heads", "sequence"].map(logits);
        assert!(heads != sequence, "the logits do not tell the strategies apart");
        let chosen = if auto == heads { "heads" } else { "sequence" };
        assert_eq!((chosen, auto == sequence), (expected, expected == "sequence"), "{prompt:?}");
    }
}

#[test]
fn sums_are_short_between_machines_and_exact_elsewhere() {
    let wire = |extra: &[&str]| bench(&[&["--ranks", "2", "--strategy", "heads"], extra].concat());
    let reduced = |found: &Value| {
        let mut entries = found["traffic"].as_array().unwrap().iter();
        entries.find(|e| e["phase"] == "decode" && e["collective"] == "Allreduce").unwrap()["payload_bytes"].clone()
    };
    let link = ["--emulate-link", "1,10"];
    let exact = Value::from(4 * 4 * 2 * 256 * 4);
    let found = wire(&[]);
    assert_eq!((&found["wire"], reduced(&found)), (&"f32".into(), exact.clone()));
    let found = wire(&link);
    assert_eq!((&found["wire"], reduced(&found)), (&"bf16".into(), (4 * 4 * 2 * 256 * 2).into()));
    let found = wire(&[&link[..], &["--wire", "f32"]].concat());
    assert_eq!((&found["wire"], reduced(&found)), (&"f32".into(), exact));

    // `logits` is exact wherever its ranks lie.
    let dir = tempfile::tempdir().unwrap();
    let logits = |name: &str, extra: &[&str]| {
        let path = dir.path().join(name);
        let args = [
            "logits",
            "--model",
            AUSTEN,
            "--prompt",
            "Elizabeth was",
            "--ranks",
            "2",
            "--threads",
            "1",
        ];
        let args = [&args[..], &["--strategy", "heads", "--output", path.to_str().unwrap()], extra]
            .concat();
        let done = run(&args);
        assert!(done.success, "{done:?}");
        fs::read(path).unwrap()
    };
    let near = logits("near", &[]);
    assert!(near == logits("far", &link), "an emulated link changed the logits");
    assert!(near != logits("short", &["--wire", "bf16"]), "bf16 sums changed nothing");
}
