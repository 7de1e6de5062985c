//! Text of files and models that cannot send commands to the terminal that shows it.

/// `text` on one line: its lines are joined by blanks, and every other control character becomes
/// U+FFFD.
pub fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    printable(&lines.collect::<Vec<_>>().join(" ").replace('\t', " "))
}

/// `text` with U+FFFD in place of every control character except line feeds and tabs: an escape
/// sequence could otherwise write to the clipboard or rename the window.
pub fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{FFFD}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_without_control_characters() {
        let text = "\n  first\u{1b}]52;c;AAAA\u{7}\n\n second\tthird\u{9b}31m\r\n";
        assert_eq!(one_line(text), "first\u{FFFD}]52;c;AAAA\u{FFFD} second third\u{FFFD}31m");
    }

    #[test]
    fn lines_and_tabs_are_printable() {
        assert_eq!(printable("a\tb\r\n\u{1b}[2J ✓ é"), "a\tb\u{FFFD}\n\u{FFFD}[2J ✓ é");
    }
}
