//! The project's commands, run as `cargo xtask COMMAND`.
//!
//! Plain programs, no make and no shell: they work on any machine that can build the project.
//! Modules in reading order, lowest first.

mod process;
mod workspace;

mod mpi;
mod packages;
mod setup;
mod slurm;

mod launch;
mod server;
mod demo;
mod mpi_test;
// Networks are a section of the report, and are measured with its instruments.
mod client_test;
mod netbench;
mod report;
mod suite;

mod tidy;
mod ci;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find and install what MPI needs here: mpicc, mpirun, libclang, a C compiler
    ///
    /// Asks the system's package manager where this user may (root, or sudo without a password),
    /// and otherwise prints the command to run. Set XTASK_INSTALL=never to have nothing installed.
    ///
    /// Exit status: 0 MPI is ready; 3 something is missing and the command that installs it was
    /// printed; 4 the package manager failed; 5 everything is installed, but a two-rank program
    /// does not run.
    Setup {
        /// Only report; install nothing
        #[arg(long)]
        check: bool,
    },
    /// Build everything and serve the bundled model on 2 MPI ranks; on a terminal the server stays
    /// up
    Demo {
        /// The checkpoint folder [default: models/austen of this repository]
        #[arg(long, value_name = "DIR")]
        model: Option<PathBuf>,
        /// Number of ranks
        #[arg(short = 'n', long, default_value_t = 2, value_name = "N")]
        ranks: usize,
    },
    /// Run every test: unit, integration and doc tests, then the tests on MPI ranks where MPI is
    /// present
    Test,
    /// Run the conformance, ops and model tests as real MPI processes
    MpiTest {
        /// Rank counts, comma separated
        #[arg(
            short = 'n',
            long,
            value_delimiter = ',',
            default_value = "1,2,3,4",
            value_name = "N,.."
        )]
        ranks: Vec<usize>,
        /// Only this package
        #[arg(short, long, value_name = "CRATE")]
        package: Option<String>,
        /// Seconds after which a run counts as hung and is killed
        #[arg(long, default_value_t = mpi_test::DEADLINE_SECONDS, value_name = "SECONDS")]
        deadline: u64,
    },
    /// Run the program under a SLURM of two emulated nodes on this machine
    ///
    /// Exit status: 3 SLURM is missing and nothing was tested.
    SlurmTest,
    /// Run independent clients against a server with the bundled model: the Python packages
    /// openai, anthropic, langchain-openai and schemathesis, which are installed into target
    ClientTest,
    /// Build the program with MPI and launch it: cargo xtask mpirun -n 2 -- chat --model DIR
    Mpirun {
        /// Number of ranks
        #[arg(short = 'n', long, value_name = "N")]
        ranks: usize,
        /// Hosts to run on, in the MPI implementation's own format
        #[arg(long, value_name = "FILE")]
        hostfile: Option<PathBuf>,
        /// Whether MPI ties each rank to cores: not at all, or one core per rank
        #[arg(long, value_enum, default_value_t = mpi::Bind::None)]
        bind: mpi::Bind,
        /// Arguments of the program qwen3
        #[arg(last = true, required = true, value_name = "ARGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Measure this machine and write docs/performance.md with its charts
    ///
    /// Takes more than an hour on two cores and 9 GB under target/; nothing else should run
    /// meanwhile.
    Report {
        /// Few layers, short prompts, one repetition: to see that it works, on a page under
        /// target/report
        #[arg(long)]
        quick: bool,
        /// Measure only these sections and leave the rest of the page as it is
        #[arg(long, value_delimiter = ',', value_name = "SECTION,..", value_parser = clap::builder::PossibleValuesParser::new(report::names()))]
        only: Vec<String>,
        /// The page to write, docs/NAME.md, one for each machine: performance or
        /// performance-SOMETHING [default: performance]
        #[arg(long, value_name = "NAME", value_parser = report::page_name)]
        page: Option<String>,
    },
    /// Measure the model on emulated clusters: one rank in each of several network namespaces, TCP
    /// between them
    ///
    /// Needs Linux, ip and tc, and root or the right to make user namespaces; nothing outside of
    /// its own namespaces changes. Compares f32, bf16 and q8 on the wire and both strategies with
    /// the plan's predictions.
    ///
    /// Exit status: 3 something is missing and nothing was measured.
    Netbench(netbench::NetbenchArgs),
    /// Check what the compiler does not: layers, file heads, lengths and names, ignored tests, what
    /// the documents name
    Tidy,
    /// Format, clippy, tidy and documentation checks, then all tests
    Ci {
        /// Leave the tests out
        #[arg(long)]
        no_test: bool,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            error.downcast_ref().map_or(ExitCode::FAILURE, setup::Missing::exit_code)
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup { check } => Ok(setup::command(check)),
        Command::Demo { model, ranks } => demo::command(model, ranks),
        Command::Test => suite::command(),
        Command::MpiTest { ranks, package, deadline } => {
            mpi_test::command(&ranks, package.as_deref(), deadline)
        }
        Command::SlurmTest => slurm::command(),
        Command::ClientTest => client_test::command(),
        Command::Mpirun { ranks, hostfile, bind, args } => {
            launch::command(ranks, hostfile, bind, &args)
        }
        Command::Report { quick, only, page } => report::command(quick, &only, page.as_deref()),
        Command::Netbench(args) => netbench::command(&args),
        Command::Tidy => tidy::command(),
        Command::Ci { no_test } => ci::command(no_test),
    }
}

/// The names of all commands, so that `tidy` can tell whether the documents name one that does not
/// exist.
fn command_names() -> Vec<String> {
    use clap::CommandFactory;
    let mut names: Vec<String> =
        Cli::command().get_subcommands().map(|c| c.get_name().to_owned()).collect();
    names.push("help".to_owned());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_after_the_dashes_belong_to_the_program() {
        let cli = Cli::parse_from([
            "xtask",
            "mpirun",
            "-n",
            "2",
            "--",
            "bench",
            "--threads",
            "1",
            "--help",
        ]);
        let Command::Mpirun { ranks, args, bind, hostfile } = cli.command else {
            panic!("another command")
        };
        assert_eq!((ranks, bind, hostfile), (2, mpi::Bind::None, None));
        assert_eq!(args, ["bench", "--threads", "1", "--help"]);
        assert!(
            Cli::try_parse_from(["xtask", "mpirun", "-n", "2"]).is_err(),
            "no program arguments"
        );
        assert!(Cli::try_parse_from(["xtask", "mpirun", "--", "chat"]).is_err(), "no rank count");
    }

    #[test]
    fn rank_counts_are_a_list() {
        let cli = Cli::parse_from(["xtask", "mpi-test", "-n", "2,5", "-p", "comm"]);
        let Command::MpiTest { ranks, package, deadline } = cli.command else {
            panic!("another command")
        };
        assert_eq!(
            (ranks, package.as_deref(), deadline),
            (vec![2, 5], Some("comm"), mpi_test::DEADLINE_SECONDS)
        );
    }
}
