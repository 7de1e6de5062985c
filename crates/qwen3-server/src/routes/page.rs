//! The web page.

use axum::body::Body;
use axum::http::{Response, header};
use axum::response::IntoResponse;

use crate::request_id;

/// The page, with `NONCE` in place of the number that allows its script and style.
const PAGE: &str = include_str!("page.html");

/// The page. It loads nothing from elsewhere, and only its own script and style run: each response
/// has a number of its own that names them, so that text which gets into the page cannot be one.
pub async fn page() -> Response<Body> {
    let nonce = request_id::new("");
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, &policy),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, PAGE.replace("NONCE", &nonce)).into_response()
}
