//! Grammars of tool calls, in the form that the chat template teaches.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{GrammarError, literal, schema};
use crate::answer::{CALL, CALL_END};
use crate::chat_template::CallForm;

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments, an object.
    pub parameters: Value,
}

/// Which calls an answer consists of.
#[derive(Clone, Debug, PartialEq)]
pub struct Calls {
    /// How they are written.
    pub form: CallForm,
    /// The tools; one call is of one of them.
    pub tools: Vec<Tool>,
    /// Whether there is exactly one call, not one or more.
    pub one: bool,
}

impl Calls {
    /// The rule `calls` and the rules it uses. `special` are the tokens outside of the vocabulary's
    /// text.
    pub(super) fn rules(&self, special: &[String]) -> Result<String, GrammarError> {
        let tag = |tag: &str| match special.iter().any(|token| token == tag) {
            true => tag.to_owned(),
            false => literal(tag),
        };
        let more = if self.one { "" } else { r#" ("\n" call)*"# };
        let tools = 0..self.tools.len();
        let tools: Vec<_> = tools.map(|index| format!("tool_{index}")).collect();
        let mut rules = format!(
            "calls: call{more}\ncall: {} \"\\n\" ({}) \"\\n\" {}\n",
            tag(CALL),
            tools.join(" | "),
            tag(CALL_END)
        );
        for (index, tool) in self.tools.iter().enumerate() {
            match self.form {
                CallForm::Json => rules.push_str(&json_rule(index, tool)?),
                CallForm::Tagged => rules.push_str(&tagged_rules(index, tool)?),
            }
        }
        Ok(rules)
    }
}

fn json_rule(index: usize, tool: &Tool) -> Result<String, GrammarError> {
    let begin = format!("{{\"name\": {}, \"arguments\": ", literal(&tool.name));
    let arguments = schema::node(&object(&tool.parameters))?;
    Ok(format!("tool_{index}: {} {arguments} \"}}\"\n", literal(&begin)))
}

/// The schema, for objects only: arguments are one.
fn object(parameters: &Value) -> Value {
    match parameters {
        Value::Object(fields) if !fields.is_empty() => {
            let mut fields = fields.clone();
            fields.entry("type").or_insert_with(|| "object".into());
            if fields.get("properties").and_then(Value::as_object).is_some_and(Map::is_empty) {
                fields.entry("additionalProperties").or_insert(false.into());
            }
            Value::Object(fields)
        }
        _ => json!({"type": "object", "properties": {}, "additionalProperties": false}),
    }
}

/// A call with its parameters in the order of the schema. Texts stand without quotes; other values
/// are JSON.
fn tagged_rules(index: usize, tool: &Tool) -> Result<String, GrammarError> {
    let empty = Map::new();
    let properties = tool.parameters.get("properties").and_then(Value::as_object);
    let properties = properties.unwrap_or(&empty);
    let required = tool.parameters.get("required").and_then(Value::as_array);
    let is_required =
        |name: &str| required.is_some_and(|names| names.iter().any(|found| found == name));
    if let Some(name) = required
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .find(|name| !properties.contains_key(*name))
    {
        let problem = format!("parameter {name:?} of {:?} is required, but not listed", tool.name);
        return Err(GrammarError::Compile { problem });
    }
    let mut body = format!("tool_{index}: {}", literal(&format!("<function={}>\n", tool.name)));
    let mut rules = String::new();
    for (at, (name, parameter)) in properties.iter().enumerate() {
        let rule = format!("tool_{index}_{at}");
        let _ = write!(body, " {rule}{}", if is_required(name) { "" } else { "?" });
        let begin = literal(&format!("<parameter={name}>\n"));
        let end = literal("\n</parameter>\n");
        let texts = parameter.get("enum").and_then(Value::as_array);
        let texts: Option<Vec<_>> =
            texts.and_then(|texts| texts.iter().map(|text| text.as_str().map(literal)).collect());
        let rest = match texts {
            Some(texts) => format!("({}) {end}", texts.join(" | ")),
            None if parameter.get("type").is_some_and(|kind| kind == "string") => {
                let _ = writeln!(rules, "{rule}_text[suffix={end}]: /(?s:.*)/");
                format!("{rule}_text")
            }
            None => {
                // References are resolved in the schema of all parameters.
                let mut parameter = parameter.clone();
                for name in ["$defs", "definitions"] {
                    if let (Some(found), Value::Object(fields)) =
                        (tool.parameters.get(name), &mut parameter)
                    {
                        fields.insert(name.to_owned(), found.clone());
                    }
                }
                format!("{} {end}", schema::node(&parameter)?)
            }
        };
        let _ = writeln!(rules, "{rule}: {begin} {rest}");
    }
    Ok(format!("{body} \"</function>\"\n{rules}"))
}
