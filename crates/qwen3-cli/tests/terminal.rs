//! Conversations on a pseudo-terminal: the line editor, its history, commands, and Ctrl-C.

mod program;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use program::{AUSTEN, Copy, program};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// No wait of these tests takes a tenth of this; a program that hangs does.
const DEADLINE: Duration = Duration::from_secs(20);

/// The program on a terminal of its own.
struct Terminal {
    child: Child,
    keys: File,
    screen: Receiver<Vec<u8>>,
    /// What was written and not yet expected.
    text: String,
    _state: tempfile::TempDir,
}

impl Terminal {
    fn start(mut command: Command) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).unwrap();
        let side = || -> OwnedFd { ioctl_tiocgptpeer(&master, flags).unwrap() };
        let state = tempfile::tempdir().unwrap();
        command.stdin(side()).stdout(side()).stderr(side());
        command.env("TERM", "xterm").env("XDG_STATE_HOME", state.path());
        let child = command.spawn().unwrap();
        // The other sides that this process has are closed with the command.
        drop(command);
        let keys = File::from(master);
        let mut from = keys.try_clone().unwrap();
        let (send, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Linux reports the end of a terminal as an error.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if send.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys, screen, text: String::new(), _state: state }
    }

    fn chat(model: &str, ranks: &str, more: &[&str]) -> Self {
        let args = ["--no-thinking", "--temperature", "0", "--kv", "f32", "--threads", "1"];
        let mut command = program(&["chat", "--model", model, "--ranks", ranks]);
        command.args(args).args(more);
        Self::start(command)
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the line editor reads keys, and presses these. Before that, the terminal would
    /// take them as it does without an editor.
    fn enter(&mut self, keys: &str) {
        self.expect("\x1b[?2004h");
        self.press(keys);
    }

    /// Pastes `text` as terminals do, and presses Enter.
    fn paste(&mut self, text: &str) {
        // A terminal sends the line ends of a pasted text as Enter.
        self.enter(&format!("\x1b[200~{}\x1b[201~\r", text.replace('\n', "\r")));
    }

    /// Waits until the program has written `words`; returns what came before.
    fn expect(&mut self, words: &str) -> String {
        let start = Instant::now();
        loop {
            if let Some(at) = self.text.find(words) {
                let before = self.text[..at].to_owned();
                self.text.drain(..at + words.len());
                return before;
            }
            let left = DEADLINE.saturating_sub(start.elapsed());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.text += &String::from_utf8_lossy(&bytes),
                Err(error) => panic!("{error}; no {words:?} in {:?}", self.text),
            }
        }
    }

    /// Waits for the end of the program, which has to succeed.
    fn end(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {:?}", self.text);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[test]
fn the_model_greets_and_earlier_messages_come_back() {
    let args = ["chat", "--model", AUSTEN, "--no-thinking", "--temperature", "0", "--threads", "1"];
    let mut terminal = Terminal::start(program(&args));
    terminal.expect("austen. /help lists the commands");
    terminal.enter("What is 17 + 15?\r");
    terminal.expect("\n17 + 15 = 32\r\n");
    terminal.enter("What is 20 - 13?\r");
    terminal.expect("\n20 - 13 = 7\r\n");
    // Up, up, Enter.
    terminal.enter("\x1b[A\x1b[A\r");
    terminal.expect("\n17 + 15 = 32\r\n");
    terminal.enter("/bye\r");
    terminal.end();
}

#[test]
fn commands_are_not_for_the_model() {
    for ranks in ["1", "2"] {
        let mut terminal = Terminal::chat(AUSTEN, ranks, &[]);
        terminal.enter("/speed\r");
        terminal.expect("(there is no answer yet)");
        terminal.enter("/help\r");
        terminal.expect("/system [TEXT]");
        terminal.enter("What is 17 + 15?\r");
        terminal.expect("\n17 + 15 = 32\r\n");
        terminal.enter("/speed\r");
        let before = terminal.expect(" per second)");
        assert!(before.contains("(prompt: ") && before.contains("answer: "), "{before}");
        terminal.enter("/clear\r");
        terminal.expect("(the conversation is forgotten)");
        terminal.enter("/halp\r");
        terminal.expect("(/halp is no command");
        terminal.enter("/exit\r");
        terminal.end();
    }
}

#[test]
fn a_pasted_text_and_a_long_line_are_one_message() {
    let mut terminal = Terminal::chat(AUSTEN, "1", &["--max-new-tokens", "8"]);
    // The system message comes back as it was read.
    terminal.paste("/system one\ntwo\nthree");
    terminal.expect("(the system message is set");
    terminal.enter("/system\r");
    terminal.expect("one\r\ntwo\r\nthree\r\n");
    terminal.enter("/system four\\\rfive\r");
    terminal.expect("(the system message is set");
    terminal.enter("/system\r");
    terminal.expect("four\r\nfive\r\n");
    // A terminal without an editor keeps 4095 bytes of a line.
    let long = format!("{}end", "sister ".repeat(800));
    terminal.paste(&format!("/system {long}"));
    terminal.expect("(the system message is set");
    terminal.enter("/system\r");
    terminal.expect(&long);
    // A paste of three questions has one answer, and then a prompt.
    terminal.enter("/clear\r");
    terminal.expect("(the conversation is forgotten)");
    terminal.paste("What is 17 + 15?\nWhat is 17 + 15?\nWhat is 17 + 15?");
    terminal.expect("(--max-new-tokens reached)");
    terminal.enter("/speed\r");
    let before = terminal.expect("(prompt: ");
    assert!(!before.contains("reached"), "{before:?}");
    terminal.enter("\x04");
    terminal.end();
}

#[test]
fn ctrl_c_clears_a_line_and_stops_an_answer() {
    // Without a token that ends a text, an answer goes on for thousands of tokens.
    let copy = Copy::new();
    copy.config(|config| drop(config.remove("eos_token_id")));
    fs::remove_file(copy.file("generation_config.json")).unwrap();
    let mut terminal = Terminal::chat(copy.path(), "2", &[]);
    terminal.enter("half a message\x03");
    terminal.expect("(Ctrl-D or /exit leaves)");
    terminal.enter("Tell me about music.\r");
    terminal.expect("music.");
    // The first words of the answer.
    terminal.expect(" ");
    // This terminal belongs to no session, so the key is sent as the signal that it causes.
    let child = Pid::from_child(&terminal.child);
    kill_process(child, Signal::INT).unwrap();
    terminal.expect(" (stopped)\r\n");
    terminal.enter("\x04");
    terminal.end();
}
