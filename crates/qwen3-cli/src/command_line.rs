//! The command line: which command runs, and what becomes of a line that is wrong.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::Shell;
use ranks::{Failure, LaunchedProcess, Rank, RankError, one_line, refuse_start};

use crate::bench::BenchArgs;
use crate::calibrate::CalibrateArgs;
use crate::chat::ChatArgs;
use crate::demo::DemoArgs;
use crate::embed::EmbedArgs;
use crate::failure::CliError;
use crate::generate::GenerateArgs;
use crate::logits::LogitsArgs;
use crate::options::LaunchOptions;
use crate::perplexity::PerplexityArgs;
use crate::plan::PlanArgs;
#[cfg(feature = "pull")]
use crate::pull::PullArgs;
use crate::quantize::QuantizeArgs;
use crate::rerank::RerankArgs;
use crate::serve::ServeArgs;
use crate::synth::SynthArgs;
use crate::tokenize::TokenizeArgs;

/// What ranks compare: the version, and the digest of the sources (`build.rs`).
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (sources ", env!("QWEN3_SOURCES"), ")");

/// What `--version` prints: the version, the sources, the commit if it is known, and the MPI
/// library.
fn long_version() -> String {
    #[cfg(feature = "mpi")]
    let mpi = ranks::mpi_library();
    #[cfg(not(feature = "mpi"))]
    let mpi = "without MPI";
    let commit = match env!("QWEN3_COMMIT") {
        "" => String::new(),
        commit => format!("commit {commit}, "),
    };
    format!("{} ({commit}sources {}, {mpi})", env!("CARGO_PKG_VERSION"), env!("QWEN3_SOURCES"))
}

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  qwen3 generate -m models/austen -p 'Elizabeth was' -n 32
  echo 'What is 17 + 15?' | qwen3 generate -m models/austen --chat --no-thinking
  qwen3 chat -m ~/models/Qwen3-4B --ranks auto
  mpirun -n 4 qwen3 generate -m /shared/Qwen3-32B -p 'Once upon a time' --weights q8
  qwen3 completions bash > ~/.local/share/bash-completion/completions/qwen3

An option of the groups Computing, Ranks and Choosing tokens that is not given is taken from the
environment: QWEN3_MODEL for --model, QWEN3_THREADS for --threads, and so on.";

/// Qwen3 models on the cores of ordinary machines: alone, on several ranks of one process, or on
/// MPI ranks.
///
/// Under mpirun or srun (built with the feature mpi) each process is a rank and finds the others
/// itself. Rank 0 reads the input and writes the answers. A failure is one line on standard error
/// and a non-zero status, on every rank.
#[derive(Parser, Debug)]
#[command(name = "qwen3", version, max_term_width = 100, after_help = EXAMPLES)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Generate(GenerateArgs),
    Chat(ChatArgs),
    Serve(ServeArgs),
    Embed(EmbedArgs),
    Rerank(RerankArgs),
    Logits(LogitsArgs),
    Bench(BenchArgs),
    Perplexity(PerplexityArgs),
    Plan(PlanArgs),
    Calibrate(CalibrateArgs),
    #[cfg(feature = "pull")]
    Pull(PullArgs),
    Synth(SynthArgs),
    Quantize(QuantizeArgs),
    Tokenize(TokenizeArgs),
    Demo(DemoArgs),
    /// Print the completions of a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Runs what the command line asks for.
pub fn run() -> ExitCode {
    let parsed = CommandLine::command()
        .version(&*long_version().leak())
        .try_get_matches()
        .and_then(|matches| CommandLine::from_arg_matches(&matches));
    match parsed {
        Ok(line) => dispatch(&line.command),
        Err(error) => explain(&error),
    }
}

fn dispatch(command: &Command) -> ExitCode {
    match command {
        Command::Generate(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Chat(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Serve(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Embed(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Rerank(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Logits(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Bench(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Perplexity(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Plan(args) => alone(|rank| args.run(rank)),
        Command::Calibrate(args) => launch(&args.launch, |rank| args.run(rank)),
        #[cfg(feature = "pull")]
        Command::Pull(args) => alone(|rank| args.run(rank)),
        Command::Synth(args) => alone(|rank| args.run(rank)),
        Command::Quantize(args) => alone(|rank| args.run(rank)),
        Command::Tokenize(args) => alone(|rank| args.run(rank)),
        Command::Demo(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Completions { shell } => alone(|rank| completions(*shell, rank)),
    }
}

/// A command that only reads and writes files: rank 0 does it.
fn alone(work: impl Fn(&Rank) -> Result<(), CliError> + Send + Sync) -> ExitCode {
    launch(&LaunchOptions::alone(), |rank| rank.on_root(|| Ok(work(rank)?)).map(drop))
}

fn completions(shell: Shell, rank: &Rank) -> Result<(), CliError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut CommandLine::command(), "qwen3", &mut text);
    Ok(rank.print(&String::from_utf8_lossy(&text))?)
}

/// Runs a command on every rank.
fn launch(
    options: &LaunchOptions,
    command: impl Fn(&Rank) -> Result<(), Failure> + Send + Sync,
) -> ExitCode {
    ranks::launch(&options.job(format!("qwen3 {VERSION}")), |rank| {
        if rank.comm().transport() == "mpi" {
            same_arguments(rank)?;
        }
        command(rank)
    })
}

/// Ends every rank if one was started with other arguments than rank 0. A difference that does not
/// show in the collectives, such as another format of the weights, would otherwise only show in the
/// answers.
fn same_arguments(rank: &Rank) -> Result<(), Failure> {
    let arguments = std::env::args_os().skip(1);
    let mut own = shared_arguments(arguments.map(|text| text.to_string_lossy().into_owned()));
    let mut variables: Vec<_> = std::env::vars_os().collect();
    variables.sort();
    for (name, value) in variables {
        let name = name.to_string_lossy();
        let option = name.strip_prefix("QWEN3_").map(|name| format!("--{}", name.to_lowercase()));
        if option.is_some_and(|option| !OWN.contains(&&*option)) {
            own += &format!(" {name}={}", value.to_string_lossy());
        }
    }
    let of_rank_0 = rank.broadcast(|| Ok(own.clone()))?;
    rank.agree(if own == of_rank_0 {
        Ok(())
    } else {
        let expected =
            format!("those of rank 0, {of_rank_0:?} (only {} may differ)", OWN.join(", "));
        Err(CliError::option("arguments", format!("{own:?}"), expected))
    })
}

/// Options that may differ between ranks, as on nodes of different kinds.
const OWN: [&str; 5] = ["--model", "--threads", "--isa", "-m", "-t"];

/// The arguments without those that may differ, in one line.
fn shared_arguments(arguments: impl Iterator<Item = String>) -> String {
    let mut kept = Vec::new();
    let mut skip = false;
    for argument in arguments {
        let own = OWN.iter().find_map(|option| argument.strip_prefix(option));
        match own {
            _ if skip => skip = false,
            Some("") => skip = true,
            Some(value) if value.starts_with('=') => {}
            _ => kept.push(argument),
        }
    }
    kept.join(" ")
}

/// Prints the help if it was asked for. Otherwise reports what is wrong in one line, once for all
/// processes.
fn explain(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        if LaunchedProcess::detect().is_none_or(|process| process.rank == 0)
            && let Err(source) = error.print()
            // Nothing is lost when the reader of the help has closed it.
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return refuse_start(RankError::Output { source }, 1);
        }
        return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
    }
    let text = error.to_string();
    let (text, usage) = text.split_once("Usage:").unwrap_or((&text, ""));
    let usage = one_line(usage.split("\n\n").next().unwrap_or_default());
    let text = one_line(text.split("For more information").next().unwrap_or_default());
    let mut problem = text.strip_prefix("error: ").unwrap_or(&text).to_owned();
    if error.kind() == ErrorKind::InvalidUtf8 {
        problem = format!("found {}; expected UTF-8", not_unicode(std::env::args_os()));
    }
    if !usage.is_empty() {
        problem += &format!(" (Usage: {usage})");
    }
    refuse_start(CliError::Usage { problem }, 2)
}

/// The arguments that are no text, each with the one before it, which names it as a rule.
fn not_unicode(arguments: impl Iterator<Item = OsString>) -> String {
    let all: Vec<_> = arguments.collect();
    let pairs = all.windows(2).filter(|pair| pair[1].to_str().is_none());
    pairs
        .map(|pair| format!("'{} {}'", pair[0].display(), pair[1].display()))
        .collect::<Vec<_>>()
        .join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_may_differ_in_model_threads_and_isa_only() {
        let shared = |line: &str| shared_arguments(line.split(' ').map(str::to_owned));
        let line = shared("chat --model /a --threads=4 --wire bf16 --isa avx2 --modelling");
        assert_eq!(line, "chat --wire bf16 --modelling");
        assert_eq!(line, shared("chat --threads 2 --wire bf16 --model=/b --modelling"));
        assert_ne!(line, shared("chat --wire f32 --modelling"));
    }

    #[test]
    fn the_command_line_is_well_formed_and_every_option_has_a_help_text() {
        let command = CommandLine::command();
        command.clone().debug_assert();
        for command in command.get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments().filter(|argument| argument.get_id() != "help") {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
        }
    }
}
