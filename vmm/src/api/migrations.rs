//! Handlers of `/v1/migrations`: a port is a job; and of `/v1/tls`: how it is protected.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use super::problem::Problem;
use super::{Answer, Shared, body};
use crate::config::TlsConfig;
use crate::control::{Control, MigrationId, MigrationRequest, Resolution, TlsOrder};
use crate::port::job::JobStatus;

/// All ports of a process.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Migrations {
    /// Oldest first.
    pub migrations: Vec<JobStatus>,
}

/// How ports are protected.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TlsReport {
    /// As it was given; null: not at all yet, and no port can begin.
    pub tls: Option<TlsConfig>,
}

fn id(text: &str) -> Answer<MigrationId> {
    text.parse().map(MigrationId).map_err(|_| Problem::not_found(format!("there is no migration {text}")))
}

fn known(control: &Control, id: MigrationId) -> Answer<JobStatus> {
    let status = control.porting()?.status(id);
    status.ok_or_else(|| Problem::not_found(format!("there is no migration {}", id.0)))
}

pub(super) async fn start(State(control): Shared, bytes: Bytes) -> Answer<Response> {
    let request: MigrationRequest = body(&bytes)?;
    let vm = control.need_vm()?;
    let id = control.porting()?.start(&vm, &request)?;
    let location = [(header::LOCATION, format!("/v1/migrations/{}", id.0))];
    Ok((StatusCode::ACCEPTED, location, Json(known(&control, id)?)).into_response())
}

pub(super) async fn list(State(control): Shared) -> Answer<Json<Migrations>> {
    let porting = control.porting()?;
    Ok(Json(Migrations { migrations: porting.list().into_iter().filter_map(|id| porting.status(id)).collect() }))
}

pub(super) async fn show(State(control): Shared, Path(text): Path<String>) -> Answer<Json<JobStatus>> {
    known(&control, id(&text)?).map(Json)
}

pub(super) async fn cancel(State(control): Shared, Path(text): Path<String>) -> Answer<(StatusCode, Json<JobStatus>)> {
    let id = id(&text)?;
    known(&control, id)?;
    control.porting()?.cancel(id)?;
    Ok((StatusCode::ACCEPTED, Json(known(&control, id)?)))
}

pub(super) async fn resolve(State(control): Shared, Path(text): Path<String>, bytes: Bytes) -> Answer<Json<JobStatus>> {
    let id = id(&text)?;
    known(&control, id)?;
    let resolution: Resolution = body(&bytes)?;
    control.porting()?.resolve(id, resolution)?;
    known(&control, id).map(Json)
}

pub(super) async fn protection(State(control): Shared) -> Answer<Json<TlsReport>> {
    Ok(Json(TlsReport { tls: control.porting()?.protection() }))
}

pub(super) async fn protect(State(control): Shared, bytes: Bytes) -> Answer<Json<TlsReport>> {
    let order: TlsOrder = body(&bytes)?;
    let mistakes = order.tls.mistakes("tls");
    if !mistakes.is_empty() {
        return Err(Problem::invalid(mistakes));
    }
    control.porting()?.protect(&order.tls, "tls")?;
    Ok(Json(TlsReport { tls: control.porting()?.protection() }))
}
