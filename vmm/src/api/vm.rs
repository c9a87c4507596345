//! Handlers of `/v1/vm` and `/v1/metrics`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::problem::Problem;
use super::report::{self, VmReport};
use super::{Answer, Shared, body};
use crate::checkpoint::{CheckpointReport, CheckpointRequest, RestoreRequest};
use crate::config::{Config, ConfigPatch};
use crate::error::host;
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

pub(super) async fn restore(State(control): Shared, bytes: Bytes) -> Answer<Json<VmReport>> {
    let request: RestoreRequest = body(&bytes)?;
    control.restore(&request)?;
    Ok(Json(report::vm(&control)))
}

/// Stack of the thread of a checkpoint.
const CHECKPOINT_STACK: usize = 256 << 10;

/// The control interface goes on answering while one is taken: it has a thread of its own, which is confined as this one is.
pub(super) async fn checkpoint(State(control): Shared, bytes: Bytes) -> Answer<Json<CheckpointReport>> {
    let request: CheckpointRequest = body(&bytes)?;
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("checkpoint".into())
        .stack_size(CHECKPOINT_STACK)
        // Whoever asked may have gone away; the checkpoint is taken all the same.
        .spawn(move || drop(tell.send(control.checkpoint(&request))))
        .map_err(host("thread checkpoint"))?;
    let lost = |_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the thread of the checkpoint had panicked");
    Ok(Json(told.await.map_err(lost)??))
}

pub(super) async fn spawn(State(control): Shared, bytes: Bytes) -> Answer<Json<VmReport>> {
    control.spawn(&body::<SpawnRequest>(&bytes)?)?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn pause(State(control): Shared) -> Answer<Json<VmReport>> {
    control.pause()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn resume(State(control): Shared) -> Answer<Json<VmReport>> {
    control.resume()?;
    Ok(Json(report::vm(&control)))
}

pub(super) async fn reset(State(control): Shared) -> Answer<Json<VmReport>> {
    control.reset()?;
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
