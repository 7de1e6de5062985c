//! Rank 0's side of a conversation: the messages, the user's commands, and the history that fits.

use engine::FinishReason;
use qwen3_model::Model;
use qwen3_text::{ChatTemplate, ControlTokens, Conversation, Json, Tokenizer};
use ranks::{print, printable};

use super::input::{Entry, HELP, Input};
use crate::answer::{Answer, Timing};
use crate::failure::CliError;

/// The form in which the model reads messages.
pub struct Form {
    /// The tokenizer.
    pub text: Tokenizer,
    /// The chat template.
    pub template: ChatTemplate,
    /// What typed control tokens become.
    pub control: ControlTokens,
    /// Passed to the template, if given.
    pub enable_thinking: Option<bool>,
}

/// A conversation with the model.
pub struct Dialogue {
    input: Input,
    form: Form,
    messages: Vec<Json>,
    /// Messages that are never forgotten: the system's.
    fixed: usize,
    /// Tokens of a prompt that leaves room for an answer.
    room: usize,
    /// What the prompt and the tokens of the last answer took.
    last: Option<(Timing, Timing)>,
}

impl Dialogue {
    /// A conversation that begins with `system` messages.
    ///
    /// # Errors
    /// If the system messages leave no room for an answer.
    pub fn new(system: Option<Json>, form: Form, model: &Model) -> Result<Self, CliError> {
        let context = model.config().context_length();
        let mut dialogue = Self {
            input: Input::open()?,
            form,
            messages: Vec::new(),
            fixed: 0,
            room: context - (context / 8).min(256),
            last: None,
        };
        // Otherwise every message would be too long.
        dialogue.set_system(system)?.map_err(|least| {
            let expected = format!("at most {}, which leaves room for an answer", dialogue.room);
            let found = format!("{least} tokens with an empty message");
            CliError::option("--system", found, expected)
        })?;
        Ok(dialogue)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.form.text
    }

    /// Prints who answers, if a person reads it.
    pub fn greet(&self, model: &str, ranks: usize) {
        if self.input.is_interactive() {
            let ranks = if ranks > 1 { format!(" on {ranks} ranks") } else { String::new() };
            let model = printable(model);
            eprintln!("{model}{ranks}. /help lists the commands, Ctrl-D leaves.");
        }
    }

    fn encode(&self, messages: Vec<Json>) -> Result<Vec<u32>, CliError> {
        let Form { text, template, control, enable_thinking } = &self.form;
        let chat = Conversation::new(messages, *enable_thinking);
        Ok(template.prompt(text, &chat, *control)?.tokens)
    }

    /// Begins a new conversation with this system message. Its tokens with an empty message, if
    /// they are too many; then nothing changes.
    fn set_system(&mut self, system: Option<Json>) -> Result<Result<(), usize>, CliError> {
        let messages = Vec::from_iter(system);
        let mut least = messages.clone();
        least.push(Json::message("user", ""));
        let least = self.encode(least)?.len();
        if least > self.room {
            return Ok(Err(least));
        }
        self.fixed = messages.len();
        self.messages = messages;
        Ok(Ok(()))
    }

    /// The tokens of the conversation with the user's next message that fits the model; `None` when
    /// the user leaves.
    pub fn next(&mut self) -> Result<Option<Vec<u32>>, CliError> {
        while let Some(entry) = self.input.read()? {
            let message = match entry {
                Entry::Message(text) => text,
                Entry::Exit => break,
                command => {
                    self.obey(command)?;
                    continue;
                }
            };
            self.messages.push(Json::message("user", &message));
            if let Some(tokens) = self.fitting()? {
                return Ok(Some(tokens));
            }
            self.messages.truncate(self.fixed);
            eprintln!(
                "(this message is longer than the model's context; it is dropped, with the history)"
            );
        }
        Ok(None)
    }

    /// Does what a command asks for.
    fn obey(&mut self, command: Entry) -> Result<(), CliError> {
        match command {
            Entry::Help => eprintln!("{HELP}"),
            Entry::Clear => {
                self.messages.truncate(self.fixed);
                eprintln!("(the conversation is forgotten)");
            }
            Entry::System(None) => match self.messages[..self.fixed].first() {
                Some(message) => eprintln!(
                    "{}",
                    printable(message.get("content").and_then(Json::as_str).unwrap_or_default())
                ),
                None => eprintln!("(there is no system message)"),
            },
            Entry::System(Some(text)) => {
                match self.set_system(Some(Json::message("system", &text)))? {
                    Ok(()) => eprintln!("(the system message is set, the conversation forgotten)"),
                    Err(least) => eprintln!(
                        "(the system message has {least} tokens, expected at most {}; it is not set)",
                        self.room
                    ),
                }
            }
            Entry::Speed => match &self.last {
                Some((prefill, decode)) => eprintln!(
                    "(prompt: {} tokens, {:.1} per second; answer: {} tokens, {:.1} per second)",
                    prefill.tokens,
                    prefill.tokens_per_s(),
                    decode.tokens,
                    decode.tokens_per_s()
                ),
                None => eprintln!("(there is no answer yet)"),
            },
            Entry::Unknown(word) => eprintln!("({word} is no command; /help lists them)"),
            Entry::Message(_) | Entry::Exit => {}
        }
        Ok(())
    }

    /// The conversation's tokens, without the oldest messages if there is no room for them; `None`
    /// if the last one alone is too long.
    fn fitting(&mut self) -> Result<Option<Vec<u32>>, CliError> {
        let mut forgotten = 0;
        loop {
            let tokens = self.encode(self.messages.clone())?;
            if tokens.is_empty() {
                let expected = "at least one token (chat_template.jinja, or chat_template in \
                                tokenizer_config.json)";
                let found = "it makes nothing of this conversation";
                return Err(CliError::option("chat template", found, expected));
            }
            if tokens.len() <= self.room {
                if forgotten > 0 {
                    eprintln!(
                        "(the history is longer than the model's context; its oldest {forgotten} \
                         messages are forgotten)"
                    );
                }
                return Ok(Some(tokens));
            }
            if self.messages.len() <= self.fixed + 1 {
                return Ok(None);
            }
            // A question goes together with its answer.
            let end = (self.fixed + 2).min(self.messages.len() - 1);
            forgotten += self.messages.drain(self.fixed..end).len();
        }
    }

    /// Keeps an answer. The template drops its thinking when the next question comes.
    pub fn keep(&mut self, answer: &Answer) -> Result<(), CliError> {
        // An answer that was cut is marked: it may look like a whole one.
        print(match answer.reason {
            Some(FinishReason::EndOfSequence | FinishReason::StopToken(_)) => "\n",
            Some(FinishReason::Length) => " (--max-new-tokens reached)\n",
            Some(FinishReason::Context) => " (the context is full)\n",
            None | Some(FinishReason::Constraint | FinishReason::Deadline) => " (stopped)\n",
        })?;
        if answer.reason.is_none() && answer.ids.is_empty() {
            // Stopped during the prefill: the conversation goes on as if the message had not been
            // sent.
            self.messages.pop();
            return Ok(());
        }
        self.messages.push(Json::message("assistant", &answer.text));
        self.last = Some((answer.prefill, answer.decode));
        Ok(())
    }
}
