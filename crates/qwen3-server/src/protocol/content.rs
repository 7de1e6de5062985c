//! The content of a message: text, or a list of text parts.

use std::borrow::Cow;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Text of a message. A list of text parts becomes one text, a line per part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text(pub String);

/// The types of a part that hold text, and of parts that the model does not read.
const TEXT_PARTS: [&str; 3] = ["text", "input_text", "output_text"];

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(Self(text)),
            Value::Array(parts) => {
                let parts: Result<Vec<String>, D::Error> = parts.iter().map(part).collect();
                Ok(Self(parts?.join("\n")))
            }
            other => Err(D::Error::custom(format!(
                "found {}, expected a text or a list of text parts",
                kind(&other)
            ))),
        }
    }
}

fn part<E: Error>(part: &Value) -> Result<String, E> {
    let wanted = "expected a part of type text; this server reads no images, audio or files";
    match (part.get("type").and_then(Value::as_str), part) {
        (_, Value::String(text)) => Ok(text.clone()),
        (Some(kind), _) if TEXT_PARTS.contains(&kind) => {
            let text = part.get("text").and_then(Value::as_str).map(str::to_owned);
            text.ok_or_else(|| E::custom(format!("a part of type {kind} has no field text")))
        }
        (Some(kind), _) => Err(E::custom(format!("found a part of type {kind:?}, {wanted}"))),
        (None, _) => Err(E::custom(format!("found a part without type, {wanted}"))),
    }
}

/// The kind of a JSON value, for messages.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl PartialSchema for Text {
    fn schema() -> RefOr<Schema> {
        let string = || ObjectBuilder::new().schema_type(Type::String);
        let part = ObjectBuilder::new()
            .schema_type(Type::Object)
            .property(
                "type",
                ObjectBuilder::new().schema_type(Type::String).enum_values(Some(TEXT_PARTS)),
            )
            .property("text", string())
            .required("type")
            .required("text");
        let one_of = OneOfBuilder::new()
            .item(string())
            .item(ArrayBuilder::new().items(part))
            .description(Some("A text, or a list of text parts."));
        RefOr::T(Schema::OneOf(one_of.build()))
    }
}

impl ToSchema for Text {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Text")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(value: Value) -> Result<String, String> {
        serde_json::from_value::<Text>(value).map(|text| text.0).map_err(|error| error.to_string())
    }

    #[test]
    fn a_text_and_text_parts_are_read_and_images_are_not() {
        assert_eq!(text(json!("a")).unwrap(), "a");
        let parts = json!([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]);
        assert_eq!(text(parts).unwrap(), "a\nb");
        assert_eq!(text(json!([])).unwrap(), "");
        let image = json!([{"type": "image_url", "image_url": {"url": "http://x/"}}]);
        assert!(text(image).unwrap_err().contains("reads no images"));
        assert!(text(json!(3)).unwrap_err().contains("found a number"));
        assert!(text(json!([{"type": "text"}])).unwrap_err().contains("no field text"));
    }
}
