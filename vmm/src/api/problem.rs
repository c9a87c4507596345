//! Errors as RFC 9457 problem documents.
//!
//! Owns their shape and the mapping from [`Error`]. Always true: every answer of the control interface that is not a success
//! is such a document, those of the HTTP layer itself included ([`render`]); a mistake in what was sent names its field.

use axum::Json;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, FieldError};

/// Media type of a problem document.
pub const MEDIA_TYPE: &str = "application/problem+json";
/// Most mistakes listed in one document.
const ERRORS_MAX: usize = 64;

/// What kind of problem it is. Programs go by this, people by `detail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub enum Kind {
    /// Nothing more than the status says.
    #[serde(rename = "about:blank")]
    Plain,
    /// Fields of what was sent are wrong: see `errors`.
    #[serde(rename = "urn:outrigger:vmm:invalid")]
    Invalid,
    /// Not possible in the state the VM is in.
    #[serde(rename = "urn:outrigger:vmm:conflict")]
    Conflict,
    /// The image cannot be booted, or a saved state does not fit.
    #[serde(rename = "urn:outrigger:vmm:unusable")]
    Unusable,
    /// The host refused: a file, a device, memory, KVM.
    #[serde(rename = "urn:outrigger:vmm:host")]
    Host,
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Mistake {
    /// Path of the field, like `nets[0].mac`.
    pub field: String,
    /// What is wrong with it.
    pub detail: String,
}

/// A problem document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Problem {
    /// What kind of problem it is.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, and what to do.
    pub detail: String,
    /// Path of the request.
    pub instance: String,
    /// The first field that is wrong, where one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// All mistakes, where fields are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    pub errors: Vec<Mistake>,
}

impl Problem {
    /// One with nothing but a status and a sentence.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Problem {
        Problem {
            kind: Kind::Plain,
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            instance: String::new(),
            field: None,
            errors: Vec::new(),
        }
    }

    /// What is asked for is not there.
    pub fn not_found(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::NOT_FOUND, detail)
    }

    /// Mistakes in what was sent.
    pub fn invalid(mistakes: Vec<FieldError>) -> Problem {
        let detail = Error::Config(mistakes.clone()).to_string();
        let errors: Vec<Mistake> =
            mistakes.into_iter().take(ERRORS_MAX).map(|e| Mistake { field: e.field, detail: e.message }).collect();
        let field = errors.first().map(|e| e.field.clone());
        Problem { kind: Kind::Invalid, field, errors, ..Problem::new(StatusCode::BAD_REQUEST, detail) }
    }
}

impl From<Error> for Problem {
    fn from(e: Error) -> Self {
        let (kind, status) = match e {
            Error::Config(fields) => return Problem::invalid(fields),
            Error::Conflict(_) => (Kind::Conflict, StatusCode::CONFLICT),
            Error::State(_) | Error::Image { .. } => (Kind::Unusable, StatusCode::UNPROCESSABLE_ENTITY),
            Error::Host { .. } | Error::Kvm { .. } | Error::Memory(_) => {
                (Kind::Host, StatusCode::INTERNAL_SERVER_ERROR)
            }
        };
        Problem { kind, ..Problem::new(status, e.to_string()) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(&self)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        response.extensions_mut().insert(self);
        response
    }
}

/// Puts the request's path in problem documents, and makes one of every error that is none yet.
pub async fn render(request: Request, next: Next) -> Response {
    let instance = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let status = response.status();
    let mut problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if status.is_client_error() || status.is_server_error() => {
            let (parts, body) = response.into_parts();
            let text = text(body).await;
            response = Response::from_parts(parts, Body::empty());
            Problem::new(status, text)
        }
        None => return response,
    };
    problem.instance = instance;
    let allow = response.headers_mut().remove(header::ALLOW);
    response = problem.into_response();
    if let Some(allow) = allow {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response
}

/// What the HTTP layer said, which is a short sentence.
async fn text(body: Body) -> String {
    const TEXT_MAX: usize = 1024;
    match axum::body::to_bytes(body, TEXT_MAX).await {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}
