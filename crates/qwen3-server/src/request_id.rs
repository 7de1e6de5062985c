//! Names of requests and answers.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// The header that names a request, in the request and in the response.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest name that a client may give.
const LONGEST: usize = 64;

/// A new name: the prefix and 24 random hexadecimal digits.
pub fn new(prefix: &str) -> String {
    let random: u128 = rand::random();
    format!("{prefix}{:024x}", random >> 32)
}

/// The client's name for a request without other characters than letters, digits and `-_.`, and cut
/// at 64; a new name if nothing is left.
pub fn of(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).map_or(&b""[..], HeaderValue::as_bytes);
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    let clean: String = given.iter().copied().filter(fits).take(LONGEST).map(char::from).collect();
    if clean.is_empty() { new("req-") } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_clients_are_cleaned_and_cut() {
        let of = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).unwrap();
            of(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(of(b"job-7.a_b"), "job-7.a_b");
        assert_eq!(of(b"a\xffb \t<script>"), "abscript");
        assert_eq!(of(&[b'x'; 500]), "x".repeat(64));
        assert!(of(b"  ").starts_with("req-"));
        assert_ne!(new("req-"), new("req-"));
        assert_eq!(new("").len(), 24);
    }
}
