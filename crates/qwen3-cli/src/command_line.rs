//! The command line: which command runs, and what becomes of a line that is wrong.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::calibrate::CalibrateArgs;
use crate::chat::ChatArgs;
use crate::demo::DemoArgs;
use crate::failure::{CliError, one_line};
use crate::generate::GenerateArgs;
use crate::launch::{VERSION, launch, refuse};
use crate::logits::LogitsArgs;
use crate::options::LaunchOptions;
use crate::perplexity::PerplexityArgs;
use crate::plan::PlanArgs;
use crate::quantize::QuantizeArgs;
use crate::rank::Rank;
use crate::synth::SynthArgs;
use crate::tokenize::TokenizeArgs;
use crate::world::World;

/// Qwen3 models on the cores of ordinary machines: alone, on several ranks of one process, or on
/// MPI ranks.
///
/// Under mpirun or srun (built with the feature mpi) each process is a rank and finds the others
/// itself. Rank 0 reads the input and writes the answers. A failure is one line on standard error
/// and a non-zero status, on every rank.
#[derive(Parser, Debug)]
#[command(name = "qwen3", version = VERSION, max_term_width = 100)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Generate(GenerateArgs),
    Chat(ChatArgs),
    Logits(LogitsArgs),
    Bench(BenchArgs),
    Perplexity(PerplexityArgs),
    Plan(PlanArgs),
    Calibrate(CalibrateArgs),
    Synth(SynthArgs),
    Quantize(QuantizeArgs),
    Tokenize(TokenizeArgs),
    Demo(DemoArgs),
}

/// Runs what the command line asks for.
pub fn run() -> ExitCode {
    match CommandLine::try_parse() {
        Ok(line) => dispatch(&line.command),
        Err(error) => explain(&error),
    }
}

fn dispatch(command: &Command) -> ExitCode {
    match command {
        Command::Generate(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Chat(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Logits(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Bench(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Perplexity(args) => launch(&args.launch.exact(), |rank| args.run(rank)),
        Command::Plan(args) => alone(|rank| args.run(rank)),
        Command::Calibrate(args) => launch(&args.launch, |rank| args.run(rank)),
        Command::Synth(args) => alone(|rank| args.run(rank)),
        Command::Quantize(args) => alone(|rank| args.run(rank)),
        Command::Tokenize(args) => alone(|rank| args.run(rank)),
        Command::Demo(args) => launch(&args.launch, |rank| args.run(rank)),
    }
}

/// A command that only reads and writes files: rank 0 does it.
fn alone(work: impl Fn(&Rank) -> Result<(), CliError> + Send + Sync) -> ExitCode {
    launch(&LaunchOptions::alone(), |rank| rank.first(|| work(rank)).map(drop))
}

/// Prints the help where it was asked for; otherwise says in one line, once for all processes, what
/// is wrong.
fn explain(error: &clap::Error) -> ExitCode {
    let alone = World { launcher: "none", rank: 0, size: Some(1) };
    let world = World::detect().unwrap_or(alone);
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        if world.rank == 0
            && let Err(source) = error.print()
            // Nothing is lost when the reader of the help has gone away.
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return refuse(&world, &CliError::Output { source });
        }
        return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let text = error.to_string();
    let lines = text.lines().take_while(|line| {
        !line.starts_with("Usage:") && !line.starts_with("For more information")
    });
    let text = one_line(&lines.collect::<Vec<_>>().join("\n"));
    let mut problem = text.strip_prefix("error: ").unwrap_or(&text).to_owned();
    if error.kind() == ErrorKind::InvalidUtf8 {
        problem = format!("found {}; expected UTF-8", not_unicode(std::env::args_os()));
    }
    refuse(&world, &CliError::Launch { problem })
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
    use super::CommandLine;
    use clap::CommandFactory as _;

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
