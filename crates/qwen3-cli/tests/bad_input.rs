//! Whatever is wrong with the input: one clear line, a non-zero status, on one rank and on two.

mod program;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use program::{AUSTEN, Copy, Run, assert_one_line, program, run, run_while, run_with};
use serde_json::json;

fn generate(model: &str, args: &[&str], ranks: &str) -> Run {
    let mut all = vec!["generate", "--model", model, "--max-new-tokens", "4", "--ranks", ranks];
    all.extend(args);
    run(&all)
}

/// Generates with a broken copy on 1 and on 2 ranks; both have to fail with one line that holds
/// `words`.
fn copy_fails(copy: &Copy, words: &[&str]) {
    fails(copy.path(), &["--prompt", "Elizabeth was"], words);
}

fn fails(model: &str, args: &[&str], words: &[&str]) {
    for ranks in ["1", "2"] {
        assert_one_line(&generate(model, args, ranks), words);
    }
}

#[test]
fn missing_folders_and_files() {
    fails("nowhere", &["--prompt", "x"], &["nowhere"]);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let copy = Copy::new();
        fs::remove_file(copy.file(name)).unwrap();
        copy_fails(&copy, &[name]);
    }
    fails(AUSTEN, &["--prompt-file", "nowhere.txt"], &["nowhere.txt"]);
}

#[test]
fn a_model_that_is_not_there_is_no_reason_to_wait_for_the_prompt() {
    for ranks in ["1", "2"] {
        let (done, typed) = mpsc::channel::<()>();
        let command = program(&[
            "generate",
            "--model",
            "nowhere",
            "--ranks",
            ranks,
            "--prompt-file",
            "/dev/stdin",
        ]);
        let run = run_while(command, move |_stdin| _ = typed.recv());
        assert_one_line(&run, &["nowhere"]);
        drop(done);
    }
}

#[test]
fn broken_configs() {
    let copy = Copy::new();
    fs::write(copy.file("config.json"), "{").unwrap();
    copy_fails(&copy, &["config.json"]);
    let copy = Copy::new();
    copy.config(|config| drop(config.remove("hidden_size")));
    copy_fails(&copy, &["config.json", "hidden_size"]);
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("num_key_value_heads".into(), json!(3))));
    copy_fails(&copy, &["config.json", "num_key_value_heads", "3"]);
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("hidden_size".into(), json!("wide"))));
    copy_fails(&copy, &["config.json", "hidden_size"]);
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("vocab_size".into(), json!(4095))));
    copy_fails(&copy, &["embed_tokens", "4096", "4095"]);
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("eos_token_id".into(), json!(4096))));
    // The ids of generation_config.json, if it has any, are taken instead.
    fs::write(copy.file("generation_config.json"), "{}").unwrap();
    copy_fails(&copy, &["config.json", "eos_token_id", "4096", "vocab_size"]);
    let copy = Copy::new();
    fs::write(copy.file("generation_config.json"), r#"{"eos_token_id": [4089, 5000]}"#).unwrap();
    copy_fails(&copy, &["generation_config.json", "eos_token_id", "5000", "vocab_size = 4096"]);
    // Fewer layers than there are weights would give answers, and wrong ones.
    let copy = Copy::new();
    copy.config(|config| drop(config.insert("num_hidden_layers".into(), json!(3))));
    copy_fails(
        &copy,
        &["config.json", "num_hidden_layers", "3", "model.layers.3.input_layernorm.weight"],
    );
    let copy = Copy::new();
    fs::write(copy.file("generation_config.json"), "[]").unwrap();
    copy_fails(&copy, &["generation_config.json"]);
}

#[test]
fn broken_weights() {
    let copy = Copy::new();
    let whole = fs::read(copy.file("model.safetensors")).unwrap();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(copy.file("model.safetensors"), &whole[..len]).unwrap();
        copy_fails(&copy, &["model.safetensors"]);
    }
    let mut longer = whole;
    longer.push(0);
    fs::write(copy.file("model.safetensors"), &longer).unwrap();
    copy_fails(&copy, &["model.safetensors"]);

    let q_proj = "model.layers.1.self_attn.q_proj.weight";
    let copy = Copy::new();
    copy.header(|header| {
        let other = header["model.layers.1.self_attn.k_proj.weight"]["data_offsets"].clone();
        header[q_proj]["data_offsets"][0] = other[0].clone();
    });
    copy_fails(&copy, &["model.safetensors"]);
    let copy = Copy::new();
    copy.header(|header| header[q_proj]["dtype"] = json!("I32"));
    copy_fails(&copy, &["model.safetensors", q_proj]);
    let copy = Copy::new();
    copy.header(|header| header[q_proj]["shape"] = json!([128, 512]));
    copy_fails(&copy, &[q_proj, "128", "256"]);
    let copy = Copy::new();
    copy.header(|header| {
        let tensor = header.remove(q_proj).unwrap();
        header.insert("another.weight".into(), tensor);
    });
    copy_fails(&copy, &[q_proj]);
}

#[test]
fn prompts_that_the_model_cannot_take() {
    fails(AUSTEN, &["--tokens", "1,4096"], &["4096", "vocabulary"]);
    fails(AUSTEN, &["--tokens", "1,4294967295"], &["4294967295"]);
    fails(AUSTEN, &["--tokens", "1,x"], &["--tokens", "x"]);
    fails(AUSTEN, &["--tokens", ""], &["--tokens"]);
    fails(AUSTEN, &["--prompt", ""], &["--prompt", "empty"]);
    let long = vec!["7"; 4097].join(",");
    fails(AUSTEN, &["--tokens", &long], &["4097", "4096"]);
    fails(AUSTEN, &[], &["--prompt"]);
    fails(AUSTEN, &["--prompt", "x", "--tokens", "1"], &["--prompt", "--tokens"]);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, b"\xff\xfe").unwrap();
    fails(AUSTEN, &["--prompt-file", file.to_str().unwrap()], &["prompt.txt", "UTF-8"]);
}

#[test]
fn unknown_options_and_values() {
    for (option, value) in [
        ("--strategy", "both"),
        ("--grid", "tp=2"),
        ("--grid", "tp=3,sp=1"),
        ("--grid", "heads"),
        ("--attention", "flash"),
        ("--mlp", "split"),
        ("--isa", "sse4"),
        ("--weights", "q2"),
        ("--kv", "q4"),
        ("--comm-timeout", "-1"),
        ("--chunk", "0"),
        ("--temperature", "nan"),
        ("--top-p", "1.5"),
    ] {
        fails(AUSTEN, &["--prompt", "x", option, value], &[option, value]);
    }
    fails(AUSTEN, &["--prompt", "x", "--threads", "0"], &["--threads", "0"]);
    assert_one_line(&generate(AUSTEN, &["--prompt", "x"], "0"), &["--ranks"]);
    fails(AUSTEN, &["--prompt", "x", "--frobnicate"], &["--frobnicate"]);
    assert_one_line(&run(&["frobnicate"]), &["frobnicate"]);
    assert_one_line(&run(&["synth", "--preset", "9b", "out"]), &["9b"]);
    for layers in ["0", "1025", "2000000000"] {
        let refused = run(&["synth", "--preset", "tiny", "--layers", layers, "/dev/null/x"]);
        assert_one_line(&refused, &["--layers", layers, "1..=1024"]);
    }
}

/// The template of a model that always thinks begins the thought; it is refused before the weights
/// are read.
#[test]
fn a_model_that_always_thinks_is_not_asked_to_answer_at_once() {
    let copy = Copy::new();
    fs::write(
        copy.file("chat_template.jinja"),
        "{{ messages[0].content }}<|im_start|>assistant\n<think>\n",
    )
    .unwrap();
    fs::remove_file(copy.file("model.safetensors")).unwrap();
    let words = ["--no-thinking", "begins a thought"];
    fails(copy.path(), &["--chat", "--no-thinking", "--prompt", "x"], &words);
    assert_one_line(&run(&["chat", "--no-thinking", "--model", copy.path()]), &words);
    fails(copy.path(), &["--chat", "--prompt", "x"], &["model.safetensors"]);
}

#[test]
fn options_that_would_do_nothing_are_refused() {
    let greedy = Copy::new();
    fs::write(greedy.file("generation_config.json"), r#"{"do_sample": false}"#).unwrap();
    assert_one_line(
        &run(&["chat", "--model", greedy.path(), "--top-p", "0.9"]),
        &["--top-p", "--temperature"],
    );
    for option in ["--top-k", "--top-p", "--min-p", "--seed"] {
        fails(AUSTEN, &["--prompt", "x", option, "1"], &[option, "--temperature"]);
    }
    let bench = ["bench", "--model", AUSTEN, "--prompt-len", "4", "--gen-len", "0", "--depth", "9"];
    assert_one_line(&run(&bench), &["--depth", "--gen-len"]);
}

#[test]
fn a_variable_with_a_bad_value_is_named() {
    for args in
        [&["bench", "--model", AUSTEN] as &[&str], &["calibrate", "--output", "/nowhere/c.json"]]
    {
        let mut command = program(args);
        command.env("SIMD_KERNELS_ISA", "avx3");
        assert_one_line(&run_with(command, ""), &["SIMD_KERNELS_ISA", "avx3"]);
    }
    // It decides only where the command line does not.
    let args = [
        "generate",
        "--model",
        AUSTEN,
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
        "--isa",
        "scalar",
    ];
    let mut command = program(&args);
    command.env("SIMD_KERNELS_ISA", "avx3");
    let answer = run_with(command, "");
    assert!(answer.success, "{answer:?}");
}

#[test]
fn other_commands_fail_alike() {
    for ranks in ["1", "2"] {
        let with = |args: &[&str]| {
            let mut all = args.to_vec();
            all.extend(["--ranks", ranks, "--threads", "1"]);
            run(&all)
        };
        assert_one_line(
            &with(&["perplexity", "--model", AUSTEN, "--file", "nowhere.txt"]),
            &["nowhere.txt"],
        );
        assert_one_line(
            &with(&["perplexity", "--model", AUSTEN, "--file", "/dev/null"]),
            &["/dev/null"],
        );
        assert_one_line(&with(&["bench", "--model", "nowhere"]), &["nowhere"]);
        assert_one_line(
            &with(&["bench", "--model", AUSTEN, "--prompt-len", "5000"]),
            &["--prompt-len", "4096"],
        );
        assert_one_line(&with(&["chat", "--model", "nowhere"]), &["nowhere"]);
        let output = "/nowhere/logits.safetensors";
        assert_one_line(
            &with(&["logits", "--model", AUSTEN, "--tokens", "1", "--output", output]),
            &[output],
        );
        assert_one_line(
            &with(&["logits", "--model", AUSTEN, "--tokens", "9999", "--output", "/dev/null"]),
            &["9999"],
        );
    }
}

#[test]
fn what_is_soon_found_is_said_before_the_model_is_loaded() {
    // Weights that cannot be loaded: whoever tries says so.
    let copy = Copy::new();
    fs::write(copy.file("model.safetensors"), "cut").unwrap();
    let long = copy.file("long.txt");
    fs::write(&long, "sister ".repeat(5000)).unwrap();
    let (long, folder) = (long.to_str().unwrap(), copy.path());
    let says = |args: &[&str], words: &[&str]| {
        for ranks in ["1", "2"] {
            let run =
                run(&[args, &["--model", folder, "--ranks", ranks, "--threads", "1"]].concat());
            assert_one_line(&run, words);
        }
    };
    says(&["generate", "--prompt", "x"], &["model.safetensors"]);
    says(&["generate", "--prompt", ""], &["--prompt: the prompt is empty"]);
    says(&["generate", "--prompt-file", "nowhere.txt"], &["nowhere.txt"]);
    says(&["generate", "--prompt-file", folder], &[folder, "directory"]);
    says(&["generate", "--prompt-file", long], &["--prompt-file: the prompt has ", "at most 4096"]);
    says(&["generate", "--tokens", "1,4096"], &["token 1 has id 4096"]);
    says(&["logits", "--output", "/nowhere/x", "--tokens", "1"], &["/nowhere/x"]);
    says(&["logits", "--output", folder, "--tokens", "1"], &[folder, "directory"]);
    says(
        &["logits", "--output", "/dev/null", "--tokens", &["7"; 4097].join(",")],
        &["--tokens", "4097", "4096"],
    );
    says(&["perplexity", "--file", "nowhere.txt"], &["nowhere.txt"]);
    says(&["perplexity", "--file", long, "--context", "4097"], &["4097", "expected 2 to 4096"]);
    says(&["bench", "--prompt-len", "5000"], &["--prompt-len", "at most 4096"]);
    says(&["bench", "--depth", "5000"], &["--depth", "at most 4096"]);
    says(&["bench", "--trace", "/nowhere/x"], &["/nowhere/x"]);
    fs::write(copy.file("generation_config.json"), "{").unwrap();
    says(&["generate", "--temperature", "1", "--prompt", "x"], &["generation_config.json"]);
    says(&["chat"], &["generation_config.json"]);
    fs::write(copy.file("tokenizer_config.json"), "{").unwrap();
    for command in [&["generate", "--chat", "--prompt", "x"] as &[&str], &["chat"], &["demo"]] {
        says(command, &["tokenizer_config.json"]);
    }
    fs::remove_file(copy.file("tokenizer.json")).unwrap();
    for command in [
        &["generate", "--prompt", "x"] as &[&str],
        &["chat"],
        &["demo"],
        &["perplexity", "--file", long],
    ] {
        says(command, &["tokenizer.json"]);
    }
    // Nothing is left where something could have been written.
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        "config.json",
        "generation_config.json",
        "long.txt",
        "model.safetensors",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
}

#[test]
fn a_pipe_in_place_of_a_file_is_written_and_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("logits.safetensors");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().unwrap();
    let done =
        run(&["logits", "--model", AUSTEN, "--tokens", "1", "--output", pipe.to_str().unwrap()]);
    assert!(done.success, "{done:?}");
    let read = reader.wait_with_output().unwrap().stdout;
    let header = u64::from_le_bytes(read[..8].try_into().unwrap()) as usize;
    assert_eq!(read.len(), 8 + header + 4096 * 4);
    assert!(!fs::metadata(&pipe).unwrap().is_file());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn checkpoints_are_not_written_over() {
    assert_one_line(&run(&["synth", "--preset", "tiny", AUSTEN]), &["exists"]);
    assert_one_line(&run(&["quantize", "--model", AUSTEN, "--weights", "q8", AUSTEN]), &["exists"]);
    assert_one_line(
        &run(&["quantize", "--model", "nowhere", "--weights", "q8", "out"]),
        &["nowhere"],
    );
    assert_one_line(&run(&["synth", "--preset", "tiny", "/dev/null/x"]), &["/dev/null/x"]);
}

#[test]
fn logits_do_not_overwrite_the_model() {
    let copy = Copy::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let weights = elsewhere.path().join("blob");
    fs::rename(copy.file("model.safetensors"), &weights).unwrap();
    std::os::unix::fs::symlink(&weights, copy.file("model.safetensors")).unwrap();
    let before = fs::metadata(&weights).unwrap().len();
    for output in [&weights, &copy.file("model.safetensors"), &copy.file("config.json")] {
        let output = output.to_str().unwrap();
        let run = run(&["logits", "--model", copy.path(), "--tokens", "1", "--output", output]);
        assert_one_line(&run, &["--output", output, "is a file of the model"]);
    }
    assert_eq!(fs::metadata(&weights).unwrap().len(), before);
    assert!(copy.file("model.safetensors").is_symlink());
}

#[test]
fn what_an_interrupt_left_of_a_checkpoint_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let names = || {
        let entries = fs::read_dir(out)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.collect();
        names.sort();
        names
    };
    for next in [
        &["synth", "--preset", "tiny", out] as &[&str],
        &["quantize", "--model", AUSTEN, "--weights", "q8", out],
    ] {
        for name in names() {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        // A gigabyte, of which little is written by then. (Not SIGINT: who starts the tests in the
        // background may have had it ignored.)
        let mut synth = program(&["synth", "--preset", "0.6b", out]).spawn().unwrap();
        while names().is_empty() {
            assert_eq!(synth.try_wait().unwrap(), None, "it ended without a file");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(
            Command::new("kill")
                .args(["-TERM", &synth.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        assert!(!synth.wait().unwrap().success());
        assert_eq!(names(), ["model.safetensors.part"]);
        let done = run(next);
        assert!(done.success, "{done:?}");
        assert!(
            names().contains(&"model.safetensors".to_owned())
                && names().contains(&"config.json".to_owned())
        );
        assert!(!names().iter().any(|name| name.ends_with(".part")), "{:?}", names());
    }
}

#[test]
fn arguments_that_are_no_text_and_a_full_disk_are_said() {
    use std::os::unix::ffi::OsStrExt as _;

    let args = ["generate", "--model", "x", "--prompt"].map(std::ffi::OsStr::new);
    let run =
        run_with(program(&[&args[..], &[std::ffi::OsStr::from_bytes(b"a\xff")]].concat()), "");
    assert_one_line(&run, &["--prompt a\u{fffd}", "expected UTF-8"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let help = program(&["--help"]).stdout(full).output().unwrap();
    let said = String::from_utf8(help.stderr).unwrap();
    assert!(
        !help.status.success()
            && said.starts_with("error: standard output: ")
            && said.lines().count() == 1,
        "{said}"
    );
}

#[test]
fn more_threads_than_the_system_gives_are_said() {
    let mut command = std::process::Command::new("sh");
    // A gigabyte of addresses is enough for the model, and for some hundreds of stacks. The
    // allocator takes its memory before the stacks do: without any for small pieces the program
    // would not say, but abort.
    command.env("MALLOC_ARENA_MAX", "1").env("MALLOC_TOP_PAD_", "16777216");
    command.args([
        "-c",
        "ulimit -v 1000000; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_qwen3"),
        "generate",
        "--model",
    ]);
    command.arg(AUSTEN).args(["--prompt", "x", "--threads", "1024"]);
    assert_one_line(&run_with(command, ""), &["cannot start thread", "of 1024"]);
}

/// A checkpoint of 65 GB, all holes, and 30 GB of address space.
#[test]
fn a_model_that_does_not_fit_is_refused_before_it_loads() {
    use qwen3_model::Config;
    use qwen3_model::names::tensor_specs;
    use qwen3_model::presets::Preset;
    let folder = tempfile::tempdir().unwrap();
    let value = Preset::Dense32B.config(None);
    let config = Config::from_json(folder.path(), &value).unwrap();
    std::fs::write(folder.path().join("config.json"), value.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for spec in tensor_specs(&config) {
        let (start, shape) = (end, spec.shape.clone());
        end += 2 * spec.elements() as u64;
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(spec.name, tensor);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, &bytes).unwrap();
    let sparse = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    sparse.set_len(bytes.len() as u64 + end).unwrap();

    let output = folder.path().join("logits.safetensors");
    let mut command = std::process::Command::new("sh");
    let script =
        "ulimit -v 30000000; exec \"$0\" logits --model \"$1\" --tokens 1,2 --output \"$2\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_qwen3")]);
    command.arg(folder.path()).arg(&output);
    let words = ["1 rank(s) here need 6", "of address space (ulimit -v) are free", "--weights q8"];
    assert_one_line(&run_with(command, ""), &words);
}

#[test]
fn a_launcher_without_mpi_is_one_line_from_its_first_process() {
    if cfg!(feature = "mpi") {
        return;
    }
    let start = |rank: &str, args: &[&str]| {
        let mut all = vec!["generate", "--model", AUSTEN, "--prompt", "x"];
        all.extend(args);
        let mut command = program(&all);
        command.env("OMPI_COMM_WORLD_RANK", rank).env("OMPI_COMM_WORLD_SIZE", "2");
        run_with(command, "")
    };
    assert_one_line(&start("0", &[]), &["launcher", "MPI"]);
    assert_one_line(&start("0", &["--ranks", "2"]), &["--ranks"]);
    assert_one_line(&start("0", &["--strategy", "both"]), &["--strategy"]);
    let second = start("1", &[]);
    // It waits for a launcher to end it, now that the first one has spoken; here there is none.
    assert_one_line(&second, &["rank 1", "launcher", "MPI"]);
}
