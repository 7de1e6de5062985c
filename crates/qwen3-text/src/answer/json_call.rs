//! A tool call in JSON: `{"name": …, "arguments": {…}}`.

/// Reads a call character by character.
#[derive(Debug, Default)]
pub(super) struct JsonCall {
    at: At,
    /// Everything read so far.
    raw: String,
    /// Where the current key or value starts in `raw`.
    start: usize,
    key: String,
    name: Option<String>,
    /// Whether `name` was handed out.
    started: bool,
    /// Arguments that cannot be handed out yet.
    arguments: Option<String>,
    /// Whether arguments were handed out while they were read.
    streamed: bool,
    /// Closing brackets that the current value waits for.
    closers: Vec<char>,
    in_string: bool,
    escaped: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Object,
    Key,
    InKey,
    Colon,
    Value,
    InValue,
    Comma,
}

/// What a piece of a call completes.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Bytes of the piece that belong to the call.
    pub length: usize,
    /// The tool's name.
    pub name: Option<String>,
    /// A piece of the arguments.
    pub arguments: String,
    /// Set at the end of the call; `false` if it is not JSON.
    pub end: Option<bool>,
}

impl JsonCall {
    /// Whether the name was handed out.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// The text of the call.
    pub(super) fn raw(&self) -> &str {
        &self.raw
    }

    /// Reads a piece, at most to the end of the call.
    pub(super) fn push(&mut self, piece: &str) -> Taken {
        let mut taken = Taken::default();
        for (at, c) in piece.char_indices() {
            taken.length = at + c.len_utf8();
            // A scalar ends before the character that follows it.
            if self.at == At::InValue
                && self.closers.is_empty()
                && !self.in_string
                && (c.is_whitespace() || matches!(c, ',' | '}'))
            {
                self.end_of_value(&mut taken);
            }
            // No character of JSON outside of a string: the call ends here.
            if c == '<' && !self.in_string {
                taken.length = at;
                taken.end = Some(false);
                return taken;
            }
            self.raw.push(c);
            let space = c.is_whitespace();
            match self.at {
                At::Object if space => {}
                At::Object if c == '{' => self.at = At::Key,
                At::Key if space || c == ',' => {}
                At::Key if c == '"' => {
                    (self.at, self.start, self.in_string) = (At::InKey, self.raw.len() - 1, true);
                }
                At::Key | At::Comma if c == '}' => {
                    self.finish(&mut taken);
                    return taken;
                }
                At::InKey => {
                    if self.end_of_string(c) {
                        self.key = decoded(&self.raw[self.start..]).unwrap_or_default();
                        self.at = At::Colon;
                    }
                }
                At::Colon if space => {}
                At::Colon if c == ':' => self.at = At::Value,
                At::Value if space => {}
                At::Value if !matches!(c, ',' | '}' | ']' | ':') => {
                    (self.at, self.start) = (At::InValue, self.raw.len() - c.len_utf8());
                    self.in_value(c, &mut taken);
                }
                At::InValue => self.in_value(c, &mut taken),
                At::Comma if space => {}
                At::Comma if c == ',' => self.at = At::Key,
                _ => {
                    taken.end = Some(false);
                    return taken;
                }
            }
        }
        taken
    }

    /// Handles a character of a string; returns whether it ends the string.
    fn end_of_string(&mut self, c: char) -> bool {
        let ends = c == '"' && !self.escaped;
        self.escaped = c == '\\' && !self.escaped;
        self.in_string = !ends;
        ends
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn in_value(&mut self, c: char, taken: &mut Taken) {
        let first = self.raw.len() - c.len_utf8() == self.start;
        if first && c == '{' && self.is_arguments() && self.name.is_some() && !self.streamed {
            self.streamed = true;
            self.start_call(taken);
        }
        let streamed = self.streamed && self.arguments.is_none() && self.is_arguments();
        if streamed {
            taken.arguments.push(c);
        }
        let ends = if self.in_string {
            self.end_of_string(c) && self.closers.is_empty()
        } else {
            match c {
                '"' => {
                    self.in_string = true;
                    false
                }
                '{' | '[' => {
                    self.closers.push(if c == '{' { '}' } else { ']' });
                    false
                }
                '}' | ']' => {
                    self.closers.pop();
                    self.closers.is_empty()
                }
                _ => false,
            }
        };
        if ends {
            self.end_of_value(taken);
        }
    }

    fn start_call(&mut self, taken: &mut Taken) {
        if !self.started {
            taken.name.clone_from(&self.name);
            self.started = true;
        }
    }

    fn end_of_value(&mut self, taken: &mut Taken) {
        let value = self.raw[self.start..].to_owned();
        if self.key == "name" && self.name.is_none() {
            self.name = decoded(&value);
        } else if self.is_arguments() && self.arguments.is_none() {
            self.arguments = Some(value);
        }
        // Arguments before the name wait for it.
        if self.name.is_some() && self.arguments.is_some() && !self.streamed {
            self.start_call(taken);
            self.streamed = true;
            taken.arguments.push_str(&object(self.arguments.as_deref().unwrap_or("{}")));
        }
        self.at = At::Comma;
    }

    /// The end of the call's object.
    fn finish(&mut self, taken: &mut Taken) {
        if self.name.is_none() {
            taken.end = Some(false);
            return;
        }
        self.start_call(taken);
        if self.arguments.is_none() {
            taken.arguments.push_str("{}");
        }
        let arguments = object(self.arguments.as_deref().unwrap_or("{}"));
        taken.end = Some(serde_json::from_str::<serde::de::IgnoredAny>(&arguments).is_ok());
    }
}

/// The text of a JSON string.
fn decoded(json: &str) -> Option<String> {
    serde_json::from_str(json).ok()
}

/// Arguments as an object: models write them as a string that holds one, or as null.
fn object(value: &str) -> String {
    match decoded(value) {
        Some(text) if text.trim_start().starts_with('{') => text,
        _ if value == "null" => "{}".to_owned(),
        _ => value.to_owned(),
    }
}
