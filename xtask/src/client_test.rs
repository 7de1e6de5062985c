//! `cargo xtask client-test`: independent clients against a server with the bundled model.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, kill_process};

use crate::process::{self, Output, Signal};
use crate::server::Server;
use crate::{launch, workspace};

/// Installing the clients takes a minute where nothing is cached.
const INSTALL_DEADLINE: Duration = Duration::from_secs(180);
const TEST_DEADLINE: Duration = Duration::from_secs(150);
const END_DEADLINE: Duration = Duration::from_secs(40);
/// Requests of schemathesis per operation.
const EXAMPLES: &str = "12";

/// How the clients' tests ended.
pub enum Outcome {
    /// They ran.
    Ran {
        /// Whether all passed.
        passed: bool,
        /// What ran, in a line.
        line: String,
    },
    /// The clients are not here and cannot be installed.
    Skipped(String),
}

/// Runs the clients and prints the outcome.
pub fn command() -> Result<ExitCode> {
    Ok(match run()? {
        Outcome::Ran { passed, line } => {
            println!("client-test: {line}");
            if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Outcome::Skipped(reason) => {
            println!("client-test: SKIPPED, no independent client was tried: {reason}");
            ExitCode::SUCCESS
        }
    })
}

/// Installs the clients, starts a server on two ranks, and runs everything against it.
pub fn run() -> Result<Outcome> {
    let folder = workspace::root().join("xtask/clients");
    let venv = match install(&folder) {
        Ok(venv) => venv,
        Err(reason) => return Ok(Outcome::Skipped(format!("{reason:#}"))),
    };
    let program = launch::build_program_for_tests()?;
    let mut server = start(&program)?;
    let started = Instant::now();
    let mut pytest = Command::new(venv.join("bin/python"));
    pytest.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).arg(&folder);
    pytest.env("QWEN3_URL", &server.url).env("QWEN3_MODEL", "austen");
    pytest.env("PYTHONDONTWRITEBYTECODE", "1");
    let clients = process::run(&mut pytest, TEST_DEADLINE, Output::Shown)?;
    let mut schemathesis = Command::new(venv.join("bin/schemathesis"));
    schemathesis.arg("run").arg(format!("{}/openapi.json", server.url)).args([
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        // Draining would end the server.
        "--exclude-path",
        "/drain",
        "--max-examples",
        EXAMPLES,
        "--phases",
        "examples,coverage,fuzzing",
        "--generation-database",
        "none",
        "--max-failures",
        "5",
        "--seed",
        "1",
    ]);
    // Its folder for reports, if it makes one, is no part of the repository.
    schemathesis.current_dir(&venv);
    let fuzz = process::run(&mut schemathesis, TEST_DEADLINE, Output::Shown)?;
    let ended = end(&mut server)?;
    let words = |finished: &process::Finished| match finished.ok() {
        true => "passed".to_owned(),
        false => format!("FAILED ({})", finished.reason()),
    };
    let line = format!(
        "openai, anthropic and langchain {}, schemathesis {}, server {} ({:.0} s)",
        words(&clients),
        words(&fuzz),
        if ended { "ended well" } else { "FAILED to end" },
        started.elapsed().as_secs_f64()
    );
    Ok(Outcome::Ran { passed: clients.ok() && fuzz.ok() && ended, line })
}

/// A virtual environment with the clients, in `target`; it is kept while the list stays the same.
fn install(folder: &Path) -> Result<PathBuf> {
    let list = folder.join("requirements.txt");
    let wanted = std::fs::read(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let venv = workspace::root().join("target/clients");
    let stamp = venv.join("installed.txt");
    if std::fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(venv);
    }
    let step = |command: &mut Command, name: &str| -> Result<()> {
        let finished = process::run(command, INSTALL_DEADLINE, Output::Silent)
            .with_context(|| format!("{name} cannot be started"))?;
        if !finished.ok() {
            bail!("{name}: {}", finished.reason());
        }
        Ok(())
    };
    eprintln!("client-test: installing {} into {}", list.display(), venv.display());
    step(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv), "python3 -m venv")?;
    let mut pip = Command::new(venv.join("bin/pip"));
    step(pip.args(["install", "--quiet", "--requirement"]).arg(&list), "pip install")?;
    std::fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(venv)
}

/// The bundled model on two ranks of one process.
fn start(program: &Path) -> Result<Server> {
    let mut command = Command::new(program);
    command.args(["serve", "--model"]).arg(workspace::root().join("models/austen"));
    command.args(["--port", "0", "--ranks", "2", "--threads", "1"]);
    command.args(["--max-sequences", "16", "--kv-memory", "64M"]);
    Server::start(&mut command)
}

/// Ends the server as a service manager does; returns whether it ended with status 0.
fn end(server: &mut Server) -> Result<bool> {
    let id = Pid::from_raw(i32::try_from(server.id())?).context("the server has no id")?;
    kill_process(id, Signal::TERM).context("cannot signal the server")?;
    Ok(server.wait(END_DEADLINE)?.is_some_and(|status| status.success()))
}
