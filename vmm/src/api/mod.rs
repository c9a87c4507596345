//! The REST control interface: HTTP/1.1 and JSON over a unix socket.
//!
//! Owns the routes ([`routes`]), the shape of answers ([`report`]) and errors ([`problem`]), and the document that describes
//! them ([`openapi`]). Handlers do not wait for anything slow: pausing takes as long as the vCPUs need to leave the guest,
//! booting as long as the host needs to give memory and devices.

mod devices;
mod events;
mod migrations;
pub mod openapi;
pub mod problem;
pub mod report;
pub mod routes;
mod vm;

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::parts::{misplaced_list, mistake};
use crate::control::Control;
use problem::Problem;
pub use routes::router;

/// Largest request body.
pub const BODY_MAX: usize = 64 << 10;

type Answer<T> = std::result::Result<T, Problem>;
type Shared = State<Arc<Control>>;

async fn not_found(uri: Uri) -> Problem {
    Problem::not_found(format!("there is no {}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Problem {
    let detail = format!("{method} is not possible on {}", uri.path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

/// Parses a body; the error names the field.
fn body<T: DeserializeOwned + Serialize>(bytes: &Bytes) -> Answer<T> {
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "the body must be a JSON object"));
    }
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value: T = serde_path_to_error::deserialize(&mut de).map_err(|e| {
        let path = e.path().to_string();
        match path.as_str() {
            "." => Problem::new(StatusCode::BAD_REQUEST, e.inner().to_string()),
            _ => Problem::invalid(vec![mistake(&path, e.inner())]),
        }
    })?;
    de.end().map_err(|e| Problem::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    let given = serde_json::from_slice(bytes).unwrap_or_default();
    match misplaced_list(&given, &value) {
        Some(e) => Err(Problem::invalid(vec![e])),
        None => Ok(value),
    }
}

#[cfg(test)]
mod tests;
