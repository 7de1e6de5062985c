//! What every request passes before its route: its name, the checks of `Host`, `Origin` and key,
//! and the line in the log after it.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, Response};
use axum::middleware::Next;

use crate::access::Permit;
use crate::error::{ApiError, Dialect};
use crate::listen::Guarded;
use crate::metrics::ResponseLabels;
use crate::record::Record;
use crate::request_id::{self, REQUEST_ID};
use crate::service::Service;

/// Who sends a request, for its route.
#[derive(Clone)]
pub struct Caller {
    /// What is logged about the request.
    pub record: Arc<Record>,
    /// The key's permit, if the server has keys.
    pub permit: Option<Arc<Permit>>,
}

/// Routes that need no key: they tell nothing about the model or its users.
fn is_open(method: &Method, path: &str) -> bool {
    (method == Method::GET || method == Method::HEAD) && matches!(path, "/" | "/health")
}

/// Names, checks and logs a request.
pub async fn gate(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("unknown", MatchedPath::as_str).to_owned();
    let id = request_id::of(request.headers());
    let record = Arc::new(Record::new(id.clone(), request.method().to_string(), route.clone()));
    let mut caller = Caller { record: Arc::clone(&record), permit: None };
    let mut response = match admit(&service, &request, &path, &mut caller) {
        Ok(()) => {
            request.extensions_mut().insert(caller.clone());
            next.run(request).await
        }
        Err(error) => error.response(Dialect::of_path(&path)),
    };
    record.set_status(response.status().as_u16());
    let labels = ResponseLabels { path: route, status: response.status().as_u16() };
    service.metrics.responses.get_or_create(&labels).inc();
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    // The record is written and the permit returned when the last byte is sent.
    response.map(|body| Body::new(Guarded::new(body, caller)))
}

fn admit(
    service: &Service,
    request: &Request,
    path: &str,
    caller: &mut Caller,
) -> Result<(), ApiError> {
    service.sites.check(request.uri(), request.headers())?;
    // A browser asks without a key whether it may send one.
    if is_open(request.method(), path) || request.method() == Method::OPTIONS {
        return Ok(());
    }
    let permit = service.keys.admit(request.headers(), Instant::now())?;
    if let Some(permit) = &permit {
        caller.record.set_key(&permit.key().name);
    }
    caller.permit = permit.map(Arc::new);
    Ok(())
}
