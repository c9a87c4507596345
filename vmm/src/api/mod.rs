//! The REST control interface: HTTP/1.1 and JSON over a unix socket.
//!
//! Owns the routes and the shape of answers and errors. Every error is `{"title", "detail", "field"}` with a fitting
//! status code; `field` is null unless a field of the request is to blame. Handlers do not wait for anything slow: pausing
//! takes as long as the vCPU needs to leave the guest.

pub mod report;
pub mod socket;

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::control::{Control, MigrationId, MigrationRequest, Resolution};
use crate::error::Error;
use crate::vcpu::End;

/// Largest request body.
const BODY_MAX: usize = 64 << 10;

/// An error as the client sees it.
#[derive(Debug, Serialize)]
pub struct ApiError {
    #[serde(skip)]
    status: StatusCode,
    title: String,
    detail: String,
    field: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, detail: impl Into<String>) -> ApiError {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        ApiError { status, title, detail: detail.into(), field: None }
    }
}

impl From<Error> for ApiError {
    fn from(e: Error) -> Self {
        let status = match &e {
            Error::Config(_) => StatusCode::BAD_REQUEST,
            Error::Conflict(_) => StatusCode::CONFLICT,
            Error::State(_) | Error::Image { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Error::Host { .. } | Error::Kvm { .. } | Error::Memory(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut error = ApiError::new(status, e.to_string());
        if let Error::Config(fields) = e
            && let Some(first) = fields.into_iter().next()
        {
            error.field = Some(first.field);
        }
        error
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self)).into_response()
    }
}

type Answer<T> = std::result::Result<T, ApiError>;
type Shared = State<Arc<Control>>;

/// The routes.
pub fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/vm", get(vm))
        .route("/v1/vm/pause", put(pause))
        .route("/v1/vm/resume", put(resume))
        .route("/v1/vm/shutdown", put(shutdown))
        .route("/v1/migrations", post(migrate).get(migrations))
        .route("/v1/migrations/{id}", get(migration).delete(cancel))
        .route("/v1/migrations/{id}/resolve", put(resolve))
        .route("/v1/metrics", get(metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(control)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not possible on {}", uri.path()))
}

async fn vm(State(control): Shared) -> Json<Value> {
    Json(report::vm(&control))
}

async fn pause(State(control): Shared) -> Answer<Json<Value>> {
    control.need_idle_vm()?.pause()?;
    Ok(Json(report::vm(&control)))
}

async fn resume(State(control): Shared) -> Answer<Json<Value>> {
    control.need_idle_vm()?.resume()?;
    Ok(Json(report::vm(&control)))
}

async fn shutdown(State(control): Shared) -> (StatusCode, Json<Value>) {
    let report = report::vm(&control);
    control.finish(End::Stopped);
    (StatusCode::ACCEPTED, Json(report))
}

/// Parses a body; the error names the field.
fn body<T: DeserializeOwned>(bytes: &Bytes) -> Answer<T> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut de).map_err(|e| {
        let path = e.path().to_string();
        let mut error = ApiError::new(StatusCode::BAD_REQUEST, e.inner().to_string());
        error.field = (path != ".").then_some(path);
        error
    })?;
    de.end().map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    Ok(value)
}

fn id(text: &str) -> Answer<MigrationId> {
    let unknown = || ApiError::new(StatusCode::NOT_FOUND, format!("there is no migration {text}"));
    text.parse().map(MigrationId).map_err(|_| unknown())
}

fn known(control: &Control, id: MigrationId) -> Answer<Value> {
    let status = control.porting()?.status(id);
    status.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, format!("there is no migration {}", id.0)))
}

async fn migrate(State(control): Shared, bytes: Bytes) -> Answer<Response> {
    let request: MigrationRequest = body(&bytes)?;
    let vm = control.need_vm()?;
    let id = control.porting()?.start(&vm, &request)?;
    let location = [(header::LOCATION, format!("/v1/migrations/{}", id.0))];
    Ok((StatusCode::ACCEPTED, location, Json(known(&control, id)?)).into_response())
}

async fn migrations(State(control): Shared) -> Answer<Json<Value>> {
    let porting = control.porting()?;
    let all: Vec<Value> = porting.list().into_iter().filter_map(|id| porting.status(id)).collect();
    Ok(Json(json!({ "migrations": all })))
}

async fn migration(State(control): Shared, Path(text): Path<String>) -> Answer<Json<Value>> {
    known(&control, id(&text)?).map(Json)
}

async fn cancel(State(control): Shared, Path(text): Path<String>) -> Answer<(StatusCode, Json<Value>)> {
    let id = id(&text)?;
    known(&control, id)?;
    control.porting()?.cancel(id)?;
    Ok((StatusCode::ACCEPTED, Json(known(&control, id)?)))
}

async fn resolve(State(control): Shared, Path(text): Path<String>, bytes: Bytes) -> Answer<Json<Value>> {
    let id = id(&text)?;
    known(&control, id)?;
    let resolution: Resolution = body(&bytes)?;
    control.porting()?.resolve(id, resolution)?;
    known(&control, id).map(Json)
}

async fn metrics(State(control): Shared) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], report::metrics(&control)).into_response()
}
