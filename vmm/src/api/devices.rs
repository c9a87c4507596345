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
use crate::error::{Error, FieldError};
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
    /// Of a disk: its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// Of a disk: limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
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
    /// Of a disk.
    #[serde(default)]
    limits: Option<Limits>,
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
        for (field, limits) in [("limits", self.limits), ("rx_limits", self.rx_limits), ("tx_limits", self.tx_limits)] {
            mistakes.extend(limits.iter().flat_map(|l| l.mistakes(field)));
        }
        if mistakes.is_empty() { Ok(()) } else { Err(Problem::invalid(mistakes)) }
    }

    fn apply(self, devices: &mut Devices, id: &str) -> Answer<()> {
        let kind = find(devices, id)?.transport.kind;
        let misplaced = |fields: &[(&str, bool)]| {
            let wrong = fields.iter().filter(|(_, given)| *given);
            let mistakes: Vec<FieldError> = wrong
                .map(|(field, _)| FieldError::new(*field, format!("{id} is a {kind} device: it has none")))
                .collect();
            if mistakes.is_empty() { Ok(()) } else { Err(Problem::invalid(mistakes)) }
        };
        let (limits, rx, tx) = (self.limits, self.rx_limits, self.tx_limits);
        match kind.as_str() {
            "block" => {
                misplaced(&[("rx_limits", rx.is_some()), ("tx_limits", tx.is_some())])?;
                let disk = devices.disk(id)?;
                limits.map_or(Ok(()), |limits| disk.set_limits(limits))?;
            }
            "network" => {
                misplaced(&[("limits", limits.is_some())])?;
                devices.net(id)?.set_limits(rx, tx);
            }
            kind => return Err(Error::Conflict(format!("{id} is a {kind} device: it has no limits")).into()),
        }
        // What was held back may go on now.
        while devices.process_all() == Progress::More {}
        Ok(())
    }
}

/// Body of `PUT /v1/devices/{id}/size`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// New size of the disk, in steps of 512 bytes; the image file is made as long. Not given: what its image has become.
    #[serde(default)]
    size: Option<MemorySize>,
}

fn report(devices: &mut Devices, transport: TransportReport) -> DeviceReport {
    let balloon = (transport.kind == "balloon").then(|| devices.balloon_info().ok()).flatten();
    let (rx_limits, tx_limits) = devices.net(&transport.id).ok().map(|net| net.limits()).unzip();
    let (bytes, limits) = devices.disk(&transport.id).ok().map(|disk| (disk.size(), disk.limits())).unzip();
    DeviceReport { transport, balloon, bytes, limits, rx_limits, tx_limits }
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
        is => Err(Error::Conflict(format!("{id} is a {is} device, not a {kind} device")).into()),
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
    change.apply(&mut devices, &id)?;
    find(&mut devices, &id).map(Json)
}

pub(super) async fn size(State(control): Shared, Path(id): Path<String>, bytes: Bytes) -> Answer<Json<DeviceReport>> {
    let order: Size = body(&bytes)?;
    let vm = control.need_vm()?;
    let mut devices = vm.devices();
    need(&mut devices, &id, "block")?;
    devices.disk(&id)?.resize(order.size.map(MemorySize::bytes))?;
    // The guest is told.
    while devices.process_all() == Progress::More {}
    find(&mut devices, &id).map(Json)
}
