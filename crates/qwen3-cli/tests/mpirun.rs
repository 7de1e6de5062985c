//! The program on MPI ranks: the answers of one rank, and one line when it fails.

mod program;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use program::{AUSTEN, Copy, Run, program, read_json, run_with};
use serde_json::Value;

/// The program on two processes, also where there are fewer cores, and for root, as in a container.
fn mpirun(args: &[&str]) -> Command {
    let program = program(args);
    let mut command = Command::new(std::env::var_os("MPIRUN").unwrap_or_else(|| "mpirun".into()));
    command.args(["-n", "2"]).arg(program.get_program()).args(args);
    for name in [
        "OMPI_ALLOW_RUN_AS_ROOT",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
        "OMPI_MCA_rmaps_base_oversubscribe",
    ] {
        command.env(name, "1");
    }
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    // A rank that is bound to one core of many says so.
    command
        .env("OMPI_MCA_hwloc_base_binding_policy", "none")
        .env("PRTE_MCA_hwloc_default_binding_policy", "none");
    command
}

/// Asserts that the program said one line that holds each of `words`; the launcher adds its own,
/// which start otherwise.
fn assert_one_error(run: &Run, words: &[&str]) {
    assert!(!run.success && run.stdout.is_empty(), "{run:?}");
    let lines: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{run:?}");
    assert!(!run.stderr.contains("panicked"), "{run:?}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is missing: {run:?}");
    }
}

/// The vectors and the probabilities of two processes are those of one, within rounding.
#[test]
fn two_processes_embed_and_rank_as_one() {
    for (command, case, field) in
        [("embed", "embedding", "embeddings"), ("rerank", "reranker", "scores")]
    {
        let model = format!("{}/tests/data/{case}", env!("CARGO_MANIFEST_DIR"));
        let args = [command, "--json", "--model", &model, "--tokens", "1,2,3", "7,8"];
        let one = program::json(&args);
        let numbers = |value: &Value| -> Vec<f64> {
            let flat = value[field].to_string().replace(['[', ']'], "");
            flat.split(',').map(|number| number.parse().unwrap()).collect()
        };
        for strategy in ["heads", "sequence"] {
            let run = run_with(mpirun(&[&args[..], &["--strategy", strategy]].concat()), "");
            assert!(run.success && run.stderr.is_empty(), "{run:?}");
            let two: Value = serde_json::from_str(&run.stdout).unwrap();
            let (one, two) = (numbers(&one), numbers(&two));
            assert_eq!(one.len(), two.len());
            assert!(one.iter().zip(&two).all(|(a, b)| (a - b).abs() < 1e-5), "{one:?} {two:?}");
        }
    }
}

#[test]
fn two_processes_answer_as_one() {
    let case = &read_json(format!("{AUSTEN}/expected.json"))[0];
    let args = ["generate", "--json", "--kv", "f32", "--chat", "--no-thinking", "--model", AUSTEN];
    for strategy in ["heads", "sequence"] {
        let mut args = args.to_vec();
        args.extend(["--prompt", case["prompt"].as_str().unwrap(), "--strategy", strategy]);
        let run = run_with(mpirun(&args), "");
        assert!(run.success && run.stderr.is_empty(), "{run:?}");
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(found["ids"], case["greedy_ids"]);
    }
}

#[test]
fn a_calibration_is_found_by_the_runs_on_the_same_machines() {
    let home = tempfile::tempdir().unwrap();
    let on_two_machines = |args: &[&str]| -> Value {
        let mut command = mpirun(args);
        command.env("COMM_NODES", "2").env("XDG_CONFIG_HOME", home.path());
        let run = run_with(command, "");
        assert!(run.success, "{run:?}");
        serde_json::from_str(&run.stdout).unwrap()
    };
    let machine = &on_two_machines(&[
        "calibrate",
        "--quick",
        "--force",
        "--json",
        "--threads",
        "1",
    ])["machine"];
    assert_eq!((&machine["ranks"], &machine["nodes"]), (&2.into(), &2.into()));
    let quick = ["--prompt-len", "16", "--gen-len", "4", "--reps", "1", "--threads", "1"];
    let found = on_two_machines(&[&["bench", "--json", "--model", AUSTEN][..], &quick].concat());
    let reason = found["plan"].as_str().unwrap();
    assert!(
        reason.contains("2 ranks on 2 machines") && reason.contains("figures calibrated (mpi, "),
        "{reason}"
    );
}

#[test]
fn a_failure_is_one_line() {
    let failed = |args: &[&str]| run_with(mpirun(args), "");
    assert_one_error(&failed(&["generate", "--model", "nowhere", "--prompt", "x"]), &["nowhere"]);
    assert_one_error(
        &failed(&["generate", "--model", AUSTEN, "--prompt", ""]),
        &["--prompt", "empty"],
    );
    assert_one_error(&failed(&["generate", "--model", AUSTEN, "--tokens", "4096"]), &["4096"]);
    assert_one_error(
        &failed(&["generate", "--model", AUSTEN, "--prompt", "x", "--strategy", "both"]),
        &["both"],
    );
    assert_one_error(
        &failed(&["generate", "--model", AUSTEN, "--prompt", "x", "--ranks", "2"]),
        &["--ranks"],
    );
    assert_one_error(
        &failed(&["perplexity", "--model", AUSTEN, "--file", "nowhere.txt"]),
        &["nowhere.txt"],
    );
}

/// The processes of the two ranks, as soon as they are there. MPICH has a process of its own
/// between launcher and ranks.
fn ranks(launcher: u32) -> Vec<String> {
    let children = |parent: &str| -> Vec<String> {
        let found = Command::new("pgrep").args(["-P", parent]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect()
    };
    let name =
        |process: &String| fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    let start = Instant::now();
    loop {
        let near = children(&launcher.to_string());
        let far = near.iter().flat_map(|child| children(child));
        let found: Vec<_> =
            near.iter().cloned().chain(far).filter(|process| name(process) == "qwen3\n").collect();
        if found.len() == 2 {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no ranks: {found:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(kind: &str, processes: &[String]) {
    assert!(Command::new("kill").arg(kind).args(processes).status().unwrap().success());
}

#[test]
fn a_killed_rank_ends_the_other() {
    let args = ["bench", "--model", AUSTEN, "--reps", "1000000", "--threads", "1"];
    // While they find each other or load, and when they compute.
    for milliseconds in [0, 200, 1000] {
        let mut launcher = mpirun(&args).spawn().unwrap();
        let found = ranks(launcher.id());
        thread::sleep(Duration::from_millis(milliseconds));
        assert!(launcher.try_wait().unwrap().is_none(), "the bench ended by itself");
        signal("-KILL", &found[1..]);
        let killed = Instant::now();
        let status = loop {
            if let Some(status) = launcher.try_wait().unwrap() {
                break status;
            }
            assert!(killed.elapsed() < Duration::from_secs(5), "the other rank still runs");
            thread::sleep(Duration::from_millis(20));
        };
        assert!(!status.success());
    }
}

#[test]
fn ranks_that_are_told_to_end_say_so_once() {
    let args = ["bench", "--model", AUSTEN, "--reps", "1000000", "--threads", "1"];
    for (memory, name, told) in [
        ("on", "TERM", 2),
        ("off", "TERM", 2),
        ("on", "INT", 2),
        ("on", "TERM", 1),
        ("on", "INT", 1),
    ] {
        let mut launcher = mpirun(&args);
        launcher.env("COMM_SHARED_MEMORY", memory).stdout(Stdio::piped()).stderr(Stdio::piped());
        let launcher = launcher.spawn().unwrap();
        let found = ranks(launcher.id());
        thread::sleep(Duration::from_secs(1));
        signal(&format!("-{name}"), &found[2 - told..]);
        let end = launcher.wait_with_output().unwrap();
        assert!(!end.status.success());
        // MPICH's launcher has both outputs of the ranks on its own first.
        let text = [end.stdout, end.stderr]
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .concat();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert!(
            lines[0].contains(&format!("it was told to end (SIG{name})")),
            "{told} told: {text}"
        );
    }
}

#[test]
fn in_a_conversation_the_user_may_take_long_and_an_interrupt_of_all_ranks_ends_an_answer() {
    // Without a token that ends a text, an answer goes on for thousands of tokens.
    let copy = Copy::new();
    copy.config(|config| drop(config.remove("eos_token_id")));
    fs::remove_file(copy.file("generation_config.json")).unwrap();
    let model = copy.path();
    let args = [
        "chat",
        "--model",
        model,
        "--no-thinking",
        "--temperature",
        "0",
        "--threads",
        "1",
        "--comm-timeout",
        "1",
    ];
    let mut launcher = mpirun(&args);
    let mut launcher = launcher
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let found = ranks(launcher.id());
    // The other rank waits for longer than a late one may take.
    thread::sleep(Duration::from_secs(3));
    let mut stdin = launcher.stdin.take().unwrap();
    stdin.write_all(b"Tell me about music.\n").unwrap();
    let mut first = [0];
    launcher.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    signal("-INT", &found);
    drop(stdin);
    let end = launcher.wait_with_output().unwrap();
    assert!(end.status.success(), "{end:?}");
    assert!(String::from_utf8_lossy(&end.stdout).ends_with(" (stopped)\n"), "{end:?}");
}

/// A server on two MPI ranks, and its address.
fn serve() -> (Child, String) {
    let args = ["serve", "--model", AUSTEN, "--port", "0", "--kv-memory", "16M", "--threads", "1"];
    let mut launcher = mpirun(&args);
    let mut launcher =
        launcher.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("mpirun starts");
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    let ready = lines.find_map(|line| {
        let line = line.expect("the program writes UTF-8");
        let rest = line.strip_prefix("ready at http://")?.to_owned();
        Some(rest.split(' ').next().unwrap_or_default().to_owned())
    });
    thread::spawn(move || lines.for_each(drop));
    (launcher, ready.expect("the server gets ready"))
}

/// A stream of tokens whose first one has come.
fn begin(address: &str, tokens: usize) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = serde_json::json!({"prompt": "The sea", "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "stream": true})
    .to_string();
    let length = body.len();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream begins");
    }
    reader
}

/// The launcher's status, which comes within `seconds`.
fn status(launcher: &mut Child, seconds: u64) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = launcher.try_wait().unwrap() {
            return status;
        }
        assert!(start.elapsed() < Duration::from_secs(seconds), "the ranks still run");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_lost_rank_ends_the_server_and_each_open_request_with_an_error() {
    let (mut launcher, address) = serve();
    let mut open: Vec<_> = (0..3).map(|_| begin(&address, 3000)).collect();
    signal("-KILL", &ranks(launcher.id())[1..]);
    assert!(!status(&mut launcher, 5).success());
    for stream in &mut open {
        let mut rest = String::new();
        // The process may end before it has closed the connection.
        let _ = stream.read_to_string(&mut rest);
        assert!(rest.contains("data: {\"error\":"), "{rest}");
    }
}

#[test]
fn sigusr1_to_all_ranks_lets_answers_finish() {
    let (mut launcher, address) = serve();
    let mut open = begin(&address, 60);
    signal("-USR1", &ranks(launcher.id()));
    let mut rest = String::new();
    open.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(status(&mut launcher, 60).success());
}
