//! What the user types in a conversation: on a terminal in a line editor with a history, elsewhere
//! lines of standard input.

use std::env;
use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::PathBuf;

use ranks::LaunchedProcess;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Behavior, Cmd, Config, Editor, Helper, KeyCode, KeyEvent, Modifiers};

use crate::failure::CliError;

const PROMPT: &str = "> ";

/// What `/help` prints.
pub const HELP: &str = "\
/help           this list
/clear          forget the conversation, except for the system message
/system [TEXT]  show the system message, or set it and forget the conversation
/speed          tokens per second of the last answer
/exit           leave, as Ctrl-D and /bye do

Alt-Enter, or \\ at the end of a line, begins a new line of the message. A pasted text is one
message. Ctrl-C stops an answer. Up and Down show earlier messages, Ctrl-R searches them.";

/// One entry of the user.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// A message for the model.
    Message(String),
    /// `/help`
    Help,
    /// `/clear`
    Clear,
    /// `/system`, with the new message.
    System(Option<String>),
    /// `/speed`
    Speed,
    /// `/exit`
    Exit,
    /// A word that looks like a command.
    Unknown(String),
}

impl Entry {
    /// Reads an entry that is not empty. A message may begin with a slash if it is not a single
    /// word: the models understand `/think` and `/no_think`.
    pub fn parse(text: &str) -> Self {
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let rest = rest.trim();
        match (word, rest) {
            ("/help" | "/?", "") => Self::Help,
            ("/clear", "") => Self::Clear,
            ("/system", _) => Self::System((!rest.is_empty()).then(|| rest.to_owned())),
            ("/speed", "") => Self::Speed,
            ("/exit" | "/bye" | "/quit", "") => Self::Exit,
            ("/think" | "/no_think", _) => Self::Message(text.to_owned()),
            (_, "")
                if word.strip_prefix('/').is_some_and(|name| {
                    !name.is_empty() && name.chars().all(|c| c.is_alphabetic() || c == '_')
                }) =>
            {
                Self::Unknown(word.to_owned())
            }
            _ => Self::Message(text.to_owned()),
        }
    }
}

/// The source of the user's entries.
pub enum Input {
    /// A terminal.
    Editor {
        /// The line editor.
        editor: Box<Editor<MultiLine, FileHistory>>,
        /// The file of the history.
        history: Option<PathBuf>,
    },
    /// Standard input is a pipe or a file.
    Lines {
        /// Whether to print a prompt: a launcher passes a terminal on as a pipe.
        prompts: bool,
    },
}

impl Input {
    /// Opens standard input.
    pub fn open() -> Result<Self, CliError> {
        if !io::stdin().is_terminal() {
            let prompts = LaunchedProcess::detect().is_some_and(|process| process.has_peers());
            return Ok(Self::Lines { prompts });
        }
        let behavior =
            if io::stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
        let config = Config::builder().behavior(behavior).build();
        let mut editor = Editor::with_config(config).map_err(input_error)?;
        editor.set_helper(Some(MultiLine));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        let history = history_file();
        if let Some(history) = &history {
            // The first conversation has no history, and one that cannot be read is not needed.
            let _ = history.parent().map_or(Ok(()), fs::create_dir_all);
            let _ = editor.load_history(history);
        }
        Ok(Self::Editor { editor: Box::new(editor), history })
    }

    /// True if a person types.
    pub fn is_interactive(&self) -> bool {
        !matches!(self, Self::Lines { prompts: false })
    }

    /// The next entry that is not empty; `None` at the end of the input. A byte that is no
    /// character becomes U+FFFD.
    pub fn read(&mut self) -> Result<Option<Entry>, CliError> {
        loop {
            let Some(text) = self.read_text()? else { return Ok(None) };
            let text = text.trim();
            if !text.is_empty() {
                return Ok(Some(Entry::parse(text)));
            }
        }
    }

    fn read_text(&mut self) -> Result<Option<String>, CliError> {
        match self {
            Self::Lines { prompts } => {
                if *prompts {
                    eprint!("{PROMPT}");
                }
                let mut line = Vec::new();
                let read = io::stdin().lock().read_until(b'\n', &mut line);
                if read.map_err(|source| CliError::Input { source })? > 0 {
                    return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
                }
                if *prompts {
                    eprintln!();
                }
                Ok(None)
            }
            Self::Editor { editor, history } => loop {
                match editor.readline(PROMPT) {
                    Ok(text) => {
                        if editor.add_history_entry(&text).unwrap_or(false)
                            && let Some(history) = history
                        {
                            // On a disk that is full the conversation goes on.
                            let _ = editor.append_history(history);
                        }
                        return Ok(Some(text.replace("\\\n", "\n")));
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /exit leaves)"),
                    Err(ReadlineError::Signal(_)) => {}
                    Err(error) => return Err(input_error(error)),
                }
            },
        }
    }
}

fn input_error(error: ReadlineError) -> CliError {
    let source = match error {
        ReadlineError::Io(source) => source,
        other => io::Error::other(other),
    };
    CliError::Input { source }
}

/// `qwen3/chat_history` in `$XDG_STATE_HOME` or `~/.local/state`.
fn history_file() -> Option<PathBuf> {
    let folder =
        |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = folder("XDG_STATE_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".local").join("state")))?;
    Some(state.join("qwen3").join("chat_history"))
}

/// A `\` at the end of a line continues the message on the next line.
pub struct MultiLine;

impl Validator for MultiLine {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if context.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for MultiLine {
    type Candidate = String;
}

impl Hinter for MultiLine {
    type Hint = String;
}

impl Highlighter for MultiLine {}

impl Helper for MultiLine {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_single_words_and_the_rest_is_for_the_model() {
        let message = |text: &str| Entry::Message(text.to_owned());
        for (text, expected) in [
            ("/help", Entry::Help),
            ("/clear", Entry::Clear),
            ("/bye", Entry::Exit),
            ("/exit", Entry::Exit),
            ("/speed", Entry::Speed),
            ("/system", Entry::System(None)),
            ("/system  Be brief.\nAlways.", Entry::System(Some("Be brief.\nAlways.".into()))),
            ("/halp", Entry::Unknown("/halp".into())),
            ("/help me with this", message("/help me with this")),
            ("/no_think", message("/no_think")),
            ("/no_think What is 2 + 2?", message("/no_think What is 2 + 2?")),
            ("/etc/passwd", message("/etc/passwd")),
            ("/", message("/")),
            ("1/2", message("1/2")),
        ] {
            assert_eq!(Entry::parse(text), expected, "{text}");
        }
    }
}
