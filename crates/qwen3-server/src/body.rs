//! Request bodies: read within limits of size, time and depth, then parsed with errors that name
//! the field.

use std::fmt;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{self, DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Limits of one request body.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Largest size in bytes.
    pub bytes: usize,
    /// Longest time until the body is complete.
    pub time: Duration,
    /// Deepest nesting of arrays and objects.
    pub depth: usize,
}

impl Default for BodyLimits {
    fn default() -> Self {
        Self { bytes: 16 << 20, time: Duration::from_secs(30), depth: 64 }
    }
}

/// A request field that is dropped unless its value asks for something that is not implemented.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// The field.
    pub name: &'static str,
    /// Returns true if the answer is the same without the field.
    pub without_effect: fn(&Value) -> bool,
}

impl Accepted {
    /// A field that never changes the answer.
    pub const fn any(name: &'static str) -> Self {
        Self { name, without_effect: |_| true }
    }

    /// A field that changes the answer if it is true.
    pub const fn off(name: &'static str) -> Self {
        Self { name, without_effect: |value| value == &Value::Bool(false) }
    }
}

/// Reads the whole body. Compressed bodies are refused, because a small body could expand to any
/// size.
pub async fn read(request: Request<Body>, limits: &BodyLimits) -> Result<Vec<u8>, ApiError> {
    check_headers(request.headers())?;
    let body = Limited::new(request.into_body(), limits.bytes);
    match tokio::time::timeout(limits.time, body.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes().to_vec()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request body has more than {} bytes", limits.bytes),
        )),
        Ok(Err(error)) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the request body cannot be read: {error}"),
        )),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the request body is not complete after {} s", limits.time.as_secs()),
        )),
    }
}

fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported = |message| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        return unsupported("content-encoding: request bodies are not decompressed");
    }
    let json = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let json = json.and_then(|kind| kind.split(';').next()).map(str::trim);
    if json.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
        Ok(())
    } else {
        unsupported("content-type: expected application/json")
    }
}

/// Parses a JSON object. Null fields count as absent; fields of `accepted` are dropped; any other
/// unknown field is an error that names it.
pub fn parse<T: DeserializeOwned>(
    bytes: &[u8],
    limits: &BodyLimits,
    accepted: &[Accepted],
) -> Result<T, ApiError> {
    let invalid = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message);
    let depth = depth(bytes);
    if depth > limits.depth {
        return Err(invalid(format!(
            "the request body nests {depth} levels, expected at most {}",
            limits.depth
        )));
    }
    let Value::Object(mut fields) = value(bytes)? else {
        return Err(invalid("the request body is not a JSON object".to_owned()));
    };
    fields.retain(|_, value| !value.is_null());
    for field in accepted {
        if let Some(value) = fields.remove(field.name)
            && !(field.without_effect)(&value)
        {
            return Err(ApiError::unsupported(
                field.name,
                format!("{} is not supported by this server", field.name),
            ));
        }
    }
    from_fields(fields)
}

/// Parses JSON. An object with two fields of the same name is an error: programs differ in which
/// of the two they take.
fn value(bytes: &[u8]) -> Result<Value, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let parsed = Unique::deserialize(tracked);
    parsed.and_then(|Unique(value)| json.end().map(|()| value)).map_err(|error| {
        let path = track.path().to_string();
        let message = format!("the request body is not JSON: {error}");
        match error.to_string().strip_prefix(DUPLICATE).and_then(|rest| rest.split('`').next()) {
            Some(field) => {
                let field = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
                ApiError::param(&*field, format!("{field} occurs twice in its object"))
            }
            None if path == "." => ApiError::new(StatusCode::BAD_REQUEST, message),
            None => ApiError::param(path, message),
        }
    })
}

/// How the message of a field that occurs twice begins; the field's name and a quote follow.
const DUPLICATE: &str = "duplicate field `";

/// A JSON value in which no object has two fields of the same name.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Unique, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = access.next_element()? {
            values.push(value);
        }
        Ok(Unique(Value::Array(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = access.next_key::<String>()? {
            if fields.contains_key(&name) {
                return Err(de::Error::custom(format!("{DUPLICATE}{name}`")));
            }
            let Unique(value) = access.next_value()?;
            fields.insert(name, value);
        }
        Ok(Unique(Value::Object(fields)))
    }
}

fn from_fields<T: DeserializeOwned>(fields: Map<String, Value>) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(Value::Object(fields)).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        // A missing or unknown field is named in the message, and the path ends at its object.
        let quoted = message.split('`').nth(1);
        let names_field =
            message.starts_with("unknown field") || message.starts_with("missing field");
        match quoted {
            Some(field) if names_field => {
                // serde_path_to_error includes an unknown field in the path, a missing one not.
                let field = match path.as_str() {
                    "." => field.to_owned(),
                    path if path == field || path.ends_with(&format!(".{field}")) => {
                        path.to_owned()
                    }
                    path => format!("{path}.{field}"),
                };
                if message.starts_with("unknown field") {
                    ApiError::unsupported(&*field, format!("unknown parameter {field}"))
                } else {
                    ApiError::param(&*field, format!("{field} is missing"))
                }
            }
            _ => ApiError::param(&*path, format!("{path}: {message}")),
        }
    })
}

/// The deepest nesting of arrays and objects. The text need not be valid JSON.
fn depth(bytes: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    let (mut in_string, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Example {
        count: u32,
        inner: Option<Inner>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        name: String,
    }

    fn example(text: &str) -> Result<Example, ApiError> {
        let accepted = [Accepted::any("user"), Accepted::off("background")];
        parse(text.as_bytes(), &BodyLimits::default(), &accepted)
    }

    fn refused(text: &str) -> (Option<String>, String) {
        let error = example(text).expect_err(text);
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        (error.param, error.message)
    }

    #[test]
    fn fields_without_effect_are_dropped_and_null_means_absent() {
        let body = r#"{"count": 3, "inner": null, "user": "x", "background": false}"#;
        assert_eq!(example(body).unwrap(), Example { count: 3, inner: None });
    }

    #[test]
    fn each_error_names_its_field() {
        let named = |text| refused(text).0;
        assert_eq!(named(r#"{"count": 3, "zeal": 1}"#).as_deref(), Some("zeal"));
        assert_eq!(named(r#"{"count": 3, "background": true}"#).as_deref(), Some("background"));
        assert_eq!(named(r#"{"count": "x"}"#).as_deref(), Some("count"));
        assert_eq!(named(r#"{}"#).as_deref(), Some("count"));
        assert_eq!(named(r#"{"count": 1, "inner": {}}"#).as_deref(), Some("inner.name"));
        assert_eq!(
            named(r#"{"count": 1, "inner": {"name": "", "more": 1}}"#).as_deref(),
            Some("inner.more")
        );
    }

    #[test]
    fn a_field_that_occurs_twice_is_refused_by_name() {
        let named = |text| refused(text).0;
        assert_eq!(named(r#"{"count": 1, "count": 1}"#).as_deref(), Some("count"));
        let inner = r#"{"count": 1, "inner": {"name": "a", "na\u006de": "b"}}"#;
        assert_eq!(named(inner).as_deref(), Some("inner.name"));
        // Fields without effect are no exception, and neither are those of a list's objects.
        assert_eq!(named(r#"{"user": 1, "user": 2}"#).as_deref(), Some("user"));
        assert_eq!(named(r#"{"user": [1, {"a": 1, "a": 2}]}"#).as_deref(), Some("user[1].a"));
    }

    #[test]
    fn an_error_of_the_notation_names_the_field_where_it_is() {
        let (param, message) = refused(r#"{"count": 1, "inner": {"name": tru}}"#);
        assert_eq!(param.as_deref(), Some("inner.name"));
        assert!(message.contains("not JSON") && message.contains("line 1 column"), "{message}");
        assert_eq!(refused(r#"{"count": 1} {}"#).0, None);
    }

    #[test]
    fn numbers_and_texts_keep_their_values() {
        let text = r#"[0, -1, 18446744073709551615, 0.1, 1e300, "\ud83d\ude00\n", null, true, {}]"#;
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(value(text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn a_body_that_is_no_object_or_too_deep_is_refused() {
        assert!(refused("[1]").1.contains("not a JSON object"));
        assert!(refused("{").1.contains("not JSON"));
        let deep = format!("{{\"count\": {}{}}}", "[".repeat(64), "]".repeat(64));
        assert!(refused(&deep).1.contains("nests 65 levels"));
        // Brackets inside a string do not nest.
        assert_eq!(depth(br#"{"a": "[[[\"[[", "b": [1]}"#), 2);
    }

    #[tokio::test]
    async fn a_body_is_read_within_its_limits() {
        let limits = BodyLimits { bytes: 8, time: Duration::from_millis(50), depth: 4 };
        let request = |kind: &str, encoding: Option<&str>, body: Body| {
            let mut request = Request::post("/").header(header::CONTENT_TYPE, kind);
            if let Some(encoding) = encoding {
                request = request.header(header::CONTENT_ENCODING, encoding);
            }
            request.body(body).unwrap()
        };
        let json = "application/json; charset=utf-8";
        let read = |request| async { read(request, &limits).await.map_err(|error| error.status) };
        assert_eq!(read(request(json, None, Body::from("{}"))).await, Ok(b"{}".to_vec()));
        assert_eq!(
            read(request(json, None, Body::from("123456789"))).await,
            Err(StatusCode::PAYLOAD_TOO_LARGE)
        );
        let unsupported = Err(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert_eq!(read(request("text/plain", None, Body::from("{}"))).await, unsupported);
        assert_eq!(read(request(json, Some("gzip"), Body::from("{}"))).await, unsupported);
        let endless = Body::from_stream(tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(read(request(json, None, endless)).await, Err(StatusCode::REQUEST_TIMEOUT));
    }
}
