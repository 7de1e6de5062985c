//! `cargo xtask demo`: from a fresh clone to a model that answers, on two ranks.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::mpi::{Bind, Mpi};
use crate::server::Server;
use crate::{launch, setup, workspace};

/// What the bundled model was trained on: sums, spelling and a little talk.
const QUESTIONS: [&str; 3] =
    ["What is 17 + 15?", "Spell the word \"sister\".", "Tell me about music."];
const SENTENCE: &str = "It is a truth universally acknowledged, that";
/// Most tokens of an answer.
const TOKENS: usize = 64;
const END_DEADLINE: Duration = Duration::from_secs(40);

/// Builds the program, starts a server and asks it questions; without MPI the ranks are threads of
/// one process. On a terminal the server stays until Ctrl-C.
pub fn command(model: Option<PathBuf>, ranks: usize) -> Result<ExitCode> {
    if ranks == 0 {
        bail!("-n 0: at least one rank is needed");
    }
    let model = model.unwrap_or_else(|| workspace::root().join("models/austen"));
    let (program, mpi) = prepare()?;
    let mut command = match &mpi {
        Some(mpi) => mpi.launcher(ranks, None, Bind::None, program.as_os_str()),
        None => Command::new(&program),
    };
    let shown = model.strip_prefix(workspace::root()).unwrap_or(&model);
    match &mpi {
        Some(mpi) => eprintln!("demo: {}, {ranks} MPI ranks ({})", shown.display(), mpi.version),
        None => {
            eprintln!("demo: {}, {ranks} ranks inside one process, without MPI", shown.display())
        }
    }
    command.args(["serve", "--port", "0", "--model"]).arg(&model);
    if mpi.is_none() {
        command.arg("--ranks").arg(ranks.to_string());
    }
    let mut server = Server::start(&mut command)?;
    ask(&server)?;
    let here = std::env::current_dir().unwrap_or_default();
    print!("{}", next_steps(mpi.is_some(), program.strip_prefix(here).unwrap_or(&program), ranks));
    if io::stdout().is_terminal() {
        println!("\nThe page with a chat and the view of the cluster: {}", server.url);
        println!("Ctrl-C ends the server.");
        server.wait(Duration::from_secs(u32::MAX.into()))?;
        return Ok(ExitCode::SUCCESS);
    }
    server.post("/drain", &json!({}))?;
    match server.wait(END_DEADLINE)? {
        Some(status) if status.success() => Ok(ExitCode::SUCCESS),
        Some(status) => bail!("the server failed ({status})"),
        None => bail!("the server does not end"),
    }
}

/// Asks the questions through the API and shows the answers.
fn ask(server: &Server) -> Result<()> {
    let text = |answer: &Value, at: &str| {
        let text = answer.pointer(at).and_then(Value::as_str).map(str::to_owned);
        text.with_context(|| format!("the answer has no text: {answer}"))
    };
    for question in QUESTIONS {
        let request = json!({
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": TOKENS,
            "reasoning_effort": "none",
        });
        let answer = server.post("/v1/chat/completions", &request)?;
        println!("> {question}\n{}\n", text(&answer, "/choices/0/message/content")?);
    }
    let request = json!({"prompt": SENTENCE, "temperature": 0, "max_tokens": TOKENS});
    let answer = server.post("/v1/completions", &request)?;
    println!("{SENTENCE}{}", text(&answer, "/choices/0/text")?);
    let rate = answer.pointer("/timings/predicted_per_second").and_then(Value::as_f64);
    println!("\n({:.0} tokens per second)", rate.unwrap_or_default());
    Ok(())
}

/// The built program, and the MPI that it was built with, if any.
fn prepare() -> Result<(PathBuf, Option<Mpi>)> {
    let mpi = setup::ensure(true).map_err(|missing| eprintln!("demo: {missing}")).ok();
    if let Some(mpi) = mpi {
        match launch::build_program(Some(&mpi)) {
            Ok(program) => {
                return Ok((program, Some(mpi)));
            }
            Err(error) => eprintln!("demo: building with {}: {error:#}", mpi.version),
        }
    }
    eprintln!(
        "demo: going on without MPI; the ranks are threads of one process and pass messages through memory"
    );
    Ok((launch::build_program(None)?, None))
}

fn next_steps(mpi: bool, program: &Path, ranks: usize) -> String {
    let run = if mpi {
        format!("cargo xtask mpirun -n {ranks} -- chat --model ~/models/Qwen3-0.6B")
    } else {
        format!("{} chat --model ~/models/Qwen3-0.6B --ranks {ranks}", program.display())
    };
    format!(
        "\nNext, with a model of your own:\n  \
         hf download Qwen/Qwen3-0.6B --local-dir ~/models/Qwen3-0.6B   (hf: pip install huggingface_hub)\n  \
         {run}\n\
         On a cluster: README.md, \"On a cluster\".\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_steps_fit_what_is_there() {
        assert!(
            next_steps(true, Path::new("target/release/qwen3"), 2)
                .contains("cargo xtask mpirun -n 2 -- chat")
        );
        let without = next_steps(false, Path::new("target/release/qwen3"), 3);
        assert!(
            without.contains("target/release/qwen3 chat")
                && without.contains("--ranks 3")
                && !without.contains("mpirun"),
            "{without}"
        );
    }
}
