//! Logs: one line per event, as text or JSON. No control character reaches the terminal or file
//! unescaped.

use std::io::{self, Write};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends the log of this process to standard error. A second call changes nothing.
pub fn start(format: LogFormat) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::INFO)
        .with_target(false)
        .with_ansi(false)
        .with_writer(|| Escaped(io::stderr()));
    // It fails if the process logs already.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// A writer that escapes control characters. The subscriber writes a whole line at a time.
struct Escaped<W>(W);

impl<W: Write> Write for Escaped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(escape_line(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<'a, W: Write + Clone + 'a> MakeWriter<'a> for Escaped<W> {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self(self.0.clone())
    }
}

/// The line with control characters as escapes, except a line feed at its end.
fn escape_line(line: &str) -> String {
    let (text, end) = line.strip_suffix('\n').map_or((line, ""), |text| (text, "\n"));
    escape(text) + end
}

/// Text with every control character as an escape such as `\u{1b}`. Characters that change the
/// direction of writing are escaped as well.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if hidden {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_character_is_written() {
        assert_eq!(escape("a\u{1b}[31m\r\nb\u{202e}é你"), "a\\u{1b}[31m\\r\\nb\\u{202e}é你");
        let mut written = Vec::new();
        Escaped(&mut written).write_all(b"one \x07 line\x9b\n").unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), "one \\u{7} line\u{fffd}\n");
    }
}
