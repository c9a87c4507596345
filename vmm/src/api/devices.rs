//! Handlers of `/v1/devices`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use super::{Answer, Shared, body};
use crate::config::MemorySize;
use crate::devices::Devices;
use crate::limit::Limits;
use crate::virtio::Progress;
use crate::virtio::balloon::BalloonInfo;
use crate::virtio::mmio::report::TransportReport;

/// A device.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DeviceReport {
    #[serde(flatten)]
    transport: TransportReport,
    /// Of a balloon: what it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<BalloonInfo>,
    /// Of a network device: limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_limits: Option<Limits>,
    /// Of a network device: limits of what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_limits: Option<Limits>,
}

/// All devices of the VM.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DeviceList {
    /// In the order of their places.
    devices: Vec<DeviceReport>,
}

/// Body of `PUT /v1/devices/{id}/target`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// How much memory the guest is to give back.
    target: MemorySize,
}

/// Body of `PUT /v1/devices/{id}/limits`. What is not given stays as it is; `{}` is no limit.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsChange {
    /// Of a network device: limits of what the guest receives.
    #[serde(default)]
    rx_limits: Option<Limits>,
    /// Of a network device: limits of what the guest sends.
    #[serde(default)]
    tx_limits: Option<Limits>,
}

impl LimitsChange {
    fn check(&self) -> Answer<()> {
        let mut mistakes = Vec::new();
        for (field, limits) in [("rx_limits", self.rx_limits), ("tx_limits", self.tx_limits)] {
            mistakes.extend(limits.iter().flat_map(|l| l.mistakes(field)));
        }
        if mistakes.is_empty() { Ok(()) } else { Err(Problem::invalid(mistakes)) }
    }
}

fn report(devices: &mut Devices, transport: TransportReport) -> DeviceReport {
    let balloon = (transport.kind == "balloon").then(|| devices.balloon_info().ok()).flatten();
    let limits = devices.net(&transport.id).ok().map(|net| net.limits());
    DeviceReport { transport, balloon, rx_limits: limits.map(|l| l.0), tx_limits: limits.map(|l| l.1) }
}

fn find(devices: &mut Devices, id: &str) -> Answer<DeviceReport> {
    let found = devices.virtio().iter().find(|t| t.device().id() == id).map(|t| t.report());
    let transport = found.ok_or_else(|| Problem::not_found(format!("there is no device {id}")))?;
    Ok(report(devices, transport))
}

/// For orders that only devices of one kind take.
fn need(devices: &mut Devices, id: &str, kind: &str) -> Answer<()> {
    match find(devices, id)?.transport.kind {
        is if is == kind => Ok(()),
        is => Err(crate::Error::Conflict(format!("{id} is a {is} device, not a {kind} device")).into()),
    }
}

pub(super) async fn list(State(control): Shared) -> Answer<Json<DeviceList>> {
    let vm = control.need_vm()?;
    let mut devices = vm.devices();
    let all: Vec<TransportReport> = devices.virtio().iter().map(|t| t.report()).collect();
    Ok(Json(DeviceList { devices: all.into_iter().map(|t| report(&mut devices, t)).collect() }))
}

pub(super) async fn show(State(control): Shared, Path(id): Path<String>) -> Answer<Json<DeviceReport>> {
    find(&mut control.need_vm()?.devices(), &id).map(Json)
}

pub(super) async fn target(State(control): Shared, Path(id): Path<String>, bytes: Bytes) -> Answer<Json<DeviceReport>> {
    let order: Target = body(&bytes)?;
    let vm = control.need_vm()?;
    let mut devices = vm.devices();
    need(&mut devices, &id, "balloon")?;
    devices.set_balloon(order.target.bytes())?;
    find(&mut devices, &id).map(Json)
}

pub(super) async fn limits(State(control): Shared, Path(id): Path<String>, bytes: Bytes) -> Answer<Json<DeviceReport>> {
    let change: LimitsChange = body(&bytes)?;
    change.check()?;
    let vm = control.need_vm()?;
    let mut devices = vm.devices();
    need(&mut devices, &id, "network")?;
    devices.net(&id)?.set_limits(change.rx_limits, change.tx_limits);
    // What was held back may go on now.
    while devices.process_all() == Progress::More {}
    find(&mut devices, &id).map(Json)
}
