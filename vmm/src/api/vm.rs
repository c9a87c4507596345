//! Handlers of `/v1/vm` and `/v1/metrics`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::report::{self, VmReport};
use super::{Answer, Shared, body};
use crate::checkpoint::{CheckpointRequest, Taken};
use crate::config::{Config, ConfigPatch};
use crate::spawn::SpawnRequest;
use crate::vcpu::End;

pub(super) async fn show(State(control): Shared) -> Json<VmReport> {
    Json(report::vm(&control))
}

pub(super) async fn config(State(control): Shared) -> Answer<Json<Config>> {
    Ok(Json(control.config()?))
}

pub(super) async fn put_config(State(control): Shared, bytes: Bytes) -> Answer<Json<Config>> {
    Ok(Json(control.configure(Config::from_json(&bytes)?)?))
}

pub(super) async fn patch_config(State(control): Shared, bytes: Bytes) -> Answer<Json<Config>> {
    let patch: ConfigPatch = body(&bytes)?;
    Ok(Json(control.configure_parts(patch.0)?))
}

pub(super) async fn boot(State(control): Shared) -> Answer<Json<VmReport>> {
    control.boot()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn spawn(State(control): Shared, bytes: Bytes) -> Answer<Json<VmReport>> {
    control.spawn(&body::<SpawnRequest>(&bytes)?)?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn checkpoint(State(control): Shared, bytes: Bytes) -> Answer<Json<Taken>> {
    Ok(Json(control.checkpoint(&body::<CheckpointRequest>(&bytes)?)?))
}

pub(super) async fn pause(State(control): Shared) -> Answer<Json<VmReport>> {
    control.pause()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn resume(State(control): Shared) -> Answer<Json<VmReport>> {
    control.resume()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn power_button(State(control): Shared) -> Answer<Json<VmReport>> {
    control.need_vm()?.power_button()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn shutdown(State(control): Shared) -> (StatusCode, Json<VmReport>) {
    let report = report::vm(&control);
    control.finish(End::Stopped);
    (StatusCode::ACCEPTED, Json(report))
}

pub(super) async fn kill(State(control): Shared) -> (StatusCode, Json<VmReport>) {
    let report = report::vm(&control);
    control.finish(End::Killed);
    (StatusCode::ACCEPTED, Json(report))
}

pub(super) async fn metrics(State(control): Shared) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], report::metrics(&control)).into_response()
}
