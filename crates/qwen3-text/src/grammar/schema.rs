//! JSON schemas as `llguidance` reads them.

use serde_json::{Map, Value, json};

use super::GrammarError;

/// Separators with at most one space. Between other tokens there is no white space, so that a
/// model cannot fill an answer with it.
const SEPARATORS: [(&str, &str); 2] = [("item_separator", ", ?"), ("key_separator", ": ?")];

/// Deepest nesting of lists and objects in a schema.
const MAX_SCHEMA_DEPTH: usize = 128;

/// The rule of JSON that follows `schema`, as a part of a Lark grammar.
///
/// Every text of the rule is valid under the schema. Objects whose schema lists properties and
/// does not say whether others are allowed get no others: a model would go on adding some.
pub(super) fn node(schema: &Value) -> Result<String, GrammarError> {
    check(schema, MAX_SCHEMA_DEPTH)?;
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        other => {
            let problem = format!("found {other}, expected a schema, which is an object");
            return Err(GrammarError::Compile { problem });
        }
    };
    if !mentions(&schema, &["allOf", "unevaluatedProperties", "$dynamicRef"]) {
        close(&mut schema);
    }
    normalize(&mut schema);
    let mut options = json!({"whitespace_flexible": false});
    for (name, separator) in SEPARATORS {
        options[name] = separator.into();
    }
    schema["x-guidance"] = options;
    Ok(format!("%json {schema}"))
}

/// Refuses references that leave the document, and a document that nests deeper than `levels`.
fn check(value: &Value, levels: usize) -> Result<(), GrammarError> {
    let Some(levels) = levels.checked_sub(1) else {
        return Err(GrammarError::Depth { limit: MAX_SCHEMA_DEPTH });
    };
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| check(item, levels)),
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| match value {
            Value::String(reference) if name == "$ref" && !reference.starts_with('#') => {
                Err(GrammarError::Reference { reference: reference.clone() })
            }
            value => check(value, levels),
        }),
        _ => Ok(()),
    }
}

/// Limits that the compiler expects as integers.
const COUNTS: [&str; 6] =
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];

/// Writes counts such as `2.0` as integers and removes `uniqueItems: false`, which says nothing.
fn normalize(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(normalize),
        Value::Object(fields) => {
            if fields.get("uniqueItems") == Some(&Value::Bool(false)) {
                fields.shift_remove("uniqueItems");
            }
            for (name, value) in fields.iter_mut() {
                match value.as_f64() {
                    // These hold values, not schemas.
                    _ if matches!(&**name, "const" | "enum" | "default" | "examples") => {}
                    Some(count)
                        if COUNTS.contains(&&**name)
                            && count.fract() == 0.0
                            && (0.0..1e15).contains(&count) =>
                    {
                        *value = (count as u64).into();
                    }
                    _ => normalize(value),
                }
            }
        }
        _ => {}
    }
}

/// Whether any object in the document has one of these keys.
fn mentions(value: &Value, keys: &[&str]) -> bool {
    match value {
        Value::Array(items) => items.iter().any(|item| mentions(item, keys)),
        Value::Object(fields) => {
            fields.iter().any(|(name, item)| keys.contains(&&**name) || mentions(item, keys))
        }
        _ => false,
    }
}

/// Keywords whose value is one schema, or a list of schemas.
const SCHEMAS: [&str; 6] =
    ["items", "prefixItems", "anyOf", "oneOf", "additionalProperties", "additionalItems"];
/// Keywords whose value maps names to schemas.
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords beside which a schema's own properties are not all that an object may have.
const WIDENING: [&str; 7] =
    ["additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref", "if", "propertyNames"];

/// Allows no further properties where a schema lists properties and leaves the question open.
fn close(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    if is_open(fields) {
        fields.insert("additionalProperties".to_owned(), false.into());
    }
    // A schema beside `anyOf` and the like holds for the same object as its branches do.
    let shared = fields.contains_key("properties");
    for (name, value) in fields.iter_mut() {
        match value {
            Value::Object(named) if MAPS.contains(&&**name) => named.values_mut().for_each(close),
            _ if shared && matches!(&**name, "anyOf" | "oneOf") => {}
            Value::Array(items) if SCHEMAS.contains(&&**name) => items.iter_mut().for_each(close),
            value if SCHEMAS.contains(&&**name) => close(value),
            _ => {}
        }
    }
}

fn is_open(fields: &Map<String, Value>) -> bool {
    let Some(Value::Object(properties)) = fields.get("properties") else { return false };
    let required = fields.get("required").and_then(Value::as_array);
    let listed = |name: &Value| name.as_str().is_some_and(|name| properties.contains_key(name));
    !properties.is_empty()
        && !WIDENING.iter().any(|name| fields.contains_key(*name))
        && !fields.contains_key("minProperties")
        && required.is_none_or(|required| required.iter().all(listed))
}
