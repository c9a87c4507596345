//! The table of routes: what is served and what the OpenAPI document says are made of the same rows.
//!
//! Always true: a row's types are those its handler takes and gives; a row that is announced is served.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::handler::Handler;
use axum::routing::{MethodFilter, MethodRouter, on};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{BODY_MAX, devices, events, migrations, problem, vm};
use crate::api::report::VmReport;
use crate::checkpoint::{CheckpointReport, CheckpointRequest, RestoreRequest};
use crate::config::{Config, ConfigPatch};
use crate::control::{Control, MigrationRequest, Resolution, TlsOrder};
use crate::port::job::JobStatus;
use crate::spawn::SpawnRequest;

/// Gives the schema of a type.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// A method of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Read.
    Get,
    /// Set, or order what may be ordered twice.
    Put,
    /// Change parts.
    Patch,
    /// Order something new.
    Post,
    /// Remove or cancel.
    Delete,
}

impl Method {
    /// As OpenAPI writes it.
    pub fn key(self) -> &'static str {
        match self {
            Method::Get => "get",
            Method::Put => "put",
            Method::Patch => "patch",
            Method::Post => "post",
            Method::Delete => "delete",
        }
    }

    fn filter(self) -> MethodFilter {
        match self {
            Method::Get => MethodFilter::GET,
            Method::Put => MethodFilter::PUT,
            Method::Patch => MethodFilter::PATCH,
            Method::Post => MethodFilter::POST,
            Method::Delete => MethodFilter::DELETE,
        }
    }
}

/// What comes back.
pub enum Content {
    /// JSON of this schema.
    Json(SchemaOf),
    /// Another media type.
    Text(&'static str),
}

/// One operation.
pub struct Route {
    /// Method.
    pub method: Method,
    /// Path, with `{name}` for what varies.
    pub path: &'static str,
    /// operationId.
    pub id: &'static str,
    /// Group.
    pub tag: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// Schema of the body that is needed.
    pub request: Option<SchemaOf>,
    /// Status of a success.
    pub status: u16,
    /// Its content.
    pub content: Content,
    /// Statuses of problem documents besides 400.
    pub problems: &'static [u16],
    handler: MethodRouter<Arc<Control>>,
}

impl Route {
    fn new<H, T>(method: Method, path: &'static str, id: &'static str, summary: &'static str, handler: H) -> Route
    where
        H: Handler<T, Arc<Control>>,
        T: 'static,
    {
        Route {
            method,
            path,
            id,
            tag: path.split('/').nth(2).unwrap_or_default(),
            summary,
            request: None,
            status: 200,
            content: Content::Json(schema::<VmReport>),
            problems: &[],
            handler: on(method.filter(), handler),
        }
    }

    fn takes<T: JsonSchema>(self) -> Route {
        Route { request: Some(schema::<T>), ..self }
    }

    fn gives<T: JsonSchema>(self) -> Route {
        Route { content: Content::Json(schema::<T>), ..self }
    }

    fn text(self, media_type: &'static str) -> Route {
        Route { content: Content::Text(media_type), ..self }
    }

    fn accepts(self) -> Route {
        Route { status: 202, ..self }
    }

    fn fails(self, problems: &'static [u16]) -> Route {
        Route { problems, ..self }
    }
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// All of them.
pub fn all() -> Vec<Route> {
    use Method::{Delete, Get, Patch, Post, Put};
    vec![
        Route::new(Get, "/v1/vm", "getVm", "State, configuration, boot times and memory of the VM.", vm::show),
        Route::new(Get, "/v1/vm/config", "getConfig", "The configuration.", vm::config).gives::<Config>().fails(&[409]),
        Route::new(
            Put,
            "/v1/vm/config",
            "putConfig",
            "Sets the whole configuration of a process that has no VM yet. Nothing is started.",
            vm::put_config,
        )
        .takes::<Config>()
        .gives::<Config>()
        .fails(&[409, 413]),
        Route::new(
            Patch,
            "/v1/vm/config",
            "patchConfig",
            "Sets some fields of the configuration (RFC 7396: null gives a field its default). Mistakes in other fields are \
             reported at boot.",
            vm::patch_config,
        )
        .takes::<ConfigPatch>()
        .gives::<Config>()
        .fails(&[409, 413]),
        Route::new(Put, "/v1/vm/boot", "boot", "Checks the configuration, builds the VM and starts it.", vm::boot)
            .fails(&[400, 409, 422, 500]),
        Route::new(
            Put,
            "/v1/vm/restore",
            "restore",
            "Makes the VM of a checkpoint and lets it go on, in a process that has no configuration.",
            vm::restore,
        )
        .takes::<RestoreRequest>()
        .fails(&[409, 413, 422, 500]),
        Route::new(
            Put,
            "/v1/vm/spawn",
            "spawn",
            "Makes the VM of a process that has none yet an instance of a template, and starts it.",
            vm::spawn,
        )
        .takes::<SpawnRequest>()
        .fails(&[409, 413, 422, 500]),
        Route::new(
            Post,
            "/v1/vm/checkpoint",
            "checkpoint",
            "Saves the VM in a directory while it goes on running; answers when that is on the disk.",
            vm::checkpoint,
        )
        .takes::<CheckpointRequest>()
        .gives::<CheckpointReport>()
        .fails(&[409, 413, 422, 500]),
        Route::new(Put, "/v1/vm/pause", "pause", "Stops all vCPUs; answers when they have stopped.", vm::pause)
            .fails(&[409]),
        Route::new(Put, "/v1/vm/resume", "resume", "Lets the vCPUs run again.", vm::resume).fails(&[409]),
        Route::new(
            Put,
            "/v1/vm/reset",
            "reset",
            "Begins the VM again, as if it had been switched off and on: devices, vCPUs and memory as at the first start. It runs \
             or stays paused as it was.",
            vm::reset,
        )
        .fails(&[409, 500]),
        Route::new(
            Put,
            "/v1/vm/power-button",
            "powerButton",
            "Presses the ACPI power button: a guest that heeds it powers off by itself.",
            vm::power_button,
        )
        .fails(&[409, 500]),
        Route::new(
            Put,
            "/v1/vm/shutdown",
            "shutdown",
            "Ends the VM and the process: what the devices have begun is completed; the guest is not asked.",
            vm::shutdown,
        )
        .accepts(),
        Route::new(
            Put,
            "/v1/vm/kill",
            "kill",
            "Ends the process at once, whatever it is doing. Its exit status is 137.",
            vm::kill,
        )
        .accepts(),
        Route::new(Get, "/v1/devices", "listDevices", "All virtio devices: state, queues, figures.", devices::list)
            .gives::<devices::DeviceList>()
            .fails(&[409]),
        Route::new(Get, "/v1/devices/{id}", "getDevice", "One device.", devices::show)
            .gives::<devices::DeviceReport>()
            .fails(&[404, 409]),
        Route::new(
            Put,
            "/v1/devices/{id}/target",
            "setBalloonTarget",
            "How much memory the guest is to give back by its balloon. It does so as it can.",
            devices::target,
        )
        .takes::<devices::Target>()
        .gives::<devices::DeviceReport>()
        .fails(&[404, 409, 413]),
        Route::new(
            Put,
            "/v1/devices/{id}/limits",
            "setLimits",
            "Changes the rate limits of a device while it runs.",
            devices::limits,
        )
        .takes::<devices::LimitsChange>()
        .gives::<devices::DeviceReport>()
        .fails(&[404, 409, 413]),
        Route::new(
            Put,
            "/v1/devices/{id}/size",
            "resizeDisk",
            "Makes a disk larger while it is used; the guest is told. It cannot be made smaller.",
            devices::size,
        )
        .takes::<devices::Size>()
        .gives::<devices::DeviceReport>()
        .fails(&[404, 409, 413, 500]),
        Route::new(Post, "/v1/migrations", "migrate", "Begins to port the VM to another VMM.", migrations::start)
            .takes::<MigrationRequest>()
            .gives::<JobStatus>()
            .accepts()
            .fails(&[409, 413]),
        Route::new(Get, "/v1/migrations", "listMigrations", "All ports of this process, oldest first.", migrations::list)
            .gives::<migrations::Migrations>(),
        Route::new(
            Get,
            "/v1/migrations/{id}",
            "getMigration",
            "A port: state, phase, rounds, bytes, blackout, error.",
            migrations::show,
        )
        .gives::<JobStatus>()
        .fails(&[404]),
        Route::new(
            Delete,
            "/v1/migrations/{id}",
            "cancelMigration",
            "Asks for a port to be cancelled. It may be too late: its state says what became of it.",
            migrations::cancel,
        )
        .gives::<JobStatus>()
        .accepts()
        .fails(&[404]),
        Route::new(
            Put,
            "/v1/migrations/{id}/resolve",
            "resolveMigration",
            "The operator's word on who runs a VM whose port broke at the hand-over.",
            migrations::resolve,
        )
        .takes::<Resolution>()
        .gives::<JobStatus>()
        .fails(&[404, 409, 413]),
        Route::new(Get, "/v1/tls", "getTls", "How ports that begin now are protected.", migrations::protection)
            .gives::<migrations::TlsReport>()
            .fails(&[409]),
        Route::new(
            Put,
            "/v1/tls",
            "putTls",
            "Reads keys and certificates anew, or switches encryption off, for ports that begin from now on.",
            migrations::protect,
        )
        .takes::<TlsOrder>()
        .gives::<migrations::TlsReport>()
        .fails(&[409, 413]),
        Route::new(
            Get,
            "/v1/events",
            "events",
            "What happens, as server-sent events: `state`, `migration`, `reset`, `checkpoint`, `device`, `lost`. With the header \
             Last-Event-ID              those since then that are remembered come first.",
            events::stream,
        )
        .text("text/event-stream")
        .fails(&[503]),
        Route::new(Get, "/v1/metrics", "metrics", "Metrics in Prometheus' text form.", vm::metrics)
            .text("text/plain; version=0.0.4"),
    ]
}

/// The routes, served.
pub fn router(control: Arc<Control>) -> Router {
    all()
        .into_iter()
        .fold(Router::new(), |router, route| router.route(route.path, route.handler))
        .fallback(super::not_found)
        .method_not_allowed_fallback(super::wrong_method)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(axum::middleware::from_fn(problem::render))
        .with_state(control)
}
