//! The control interface of a process without a VM: method, path and body, as they come out of the HTTP library.
//!
//! Asserted: no answer says that the VMM is at fault; what is refused is so by a problem document.

use std::cell::OnceCell;
use std::sync::{Arc, LazyLock};

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, header};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;
use vmm::api::router;
use vmm::api::routes;
use vmm::control::Control;
use vmm::stats::Stats;

use crate::Target;
use crate::input::Input;

/// See the module: a byte for the kind of process, one for the method, one for the path, then what varies in it, a newline, the
/// body.
pub const TARGET: Target = Target { name: "api", run, seeds, memory: 8 << 20, rounds: 3000 };

/// Largest answer that is read.
const ANSWER_MAX: usize = 1 << 20;

/// Of all routes, made once.
static PATHS: LazyLock<Vec<&'static str>> = LazyLock::new(|| routes::all().iter().map(|r| r.path).collect());

thread_local! {
    static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
}

fn methods() -> [Method; 6] {
    [Method::GET, Method::PUT, Method::PATCH, Method::POST, Method::DELETE, Method::OPTIONS]
}

fn run(input: &[u8]) {
    RUNTIME.with(|runtime| {
        runtime
            .get_or_init(|| Builder::new_current_thread().enable_all().build().unwrap_or_else(|e| panic!("{e}")))
            .block_on(request(Input::new(input)));
    });
}

async fn request(mut input: Input<'_>) {
    let control = Control::new(Arc::new(Stats::default()));
    let configurable = input.below(2) == 0;
    if configurable {
        control.await_configuration();
    }
    let method = input.one_of(&methods().each_ref()).clone();
    let route = usize::from(input.u8());
    let rest = input.rest();
    let at = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
    let (varies, body) = (&rest[..at], rest.get(at + 1..).unwrap_or_default());
    let varies = String::from_utf8_lossy(varies);
    let path = match PATHS.get(route) {
        Some(path) => path.replace("{id}", &varies),
        None => varies.into_owned(),
    };
    // Made once for all requests of an input, as a process makes it once.
    let router = router(control);
    let mut bodies = vec![(method, path, body)];
    if configurable {
        // What was configured is shown, and can be changed.
        bodies.push((Method::GET, "/v1/vm".into(), b""));
        bodies.push((Method::PATCH, "/v1/vm/config".into(), body));
    }
    for (method, path, body) in bodies {
        // What would start a VM on this host is not tried.
        if configurable && path.contains("boot") {
            continue;
        }
        let Ok(request) = Request::builder().method(method).uri(path.as_str()).body(Body::from(body.to_vec())) else {
            continue;
        };
        let Ok(answer) = router.clone().oneshot(request).await;
        let status = answer.status();
        assert!(!status.is_server_error(), "{status} on {path}");
        let kind = answer.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (problem, json) = (kind == "application/problem+json", kind.ends_with("json"));
        assert!(problem || status.is_success(), "{status} on {path} with {kind:?}");
        if json {
            let bytes = to_bytes(answer.into_body(), ANSWER_MAX).await.unwrap_or_else(|e| panic!("{path}: {e}"));
            serde_json::from_slice::<serde_json::Value>(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let bodies = [
        "",
        r#"{"image":"x","memory":"32M","nets":[{"tap":"t0"}],"disks":[{"path":"d"}]}"#,
        r#"{"memory":"64M","cpus":null}"#,
        r#"{"target":"16M"}"#,
        r#"{"limits":{"ops":{"rate":5}},"rx_limits":{"bytes":{"rate":5,"burst":6}}}"#,
        r#"{"to":"127.0.0.1:7000","blackout_ms":20,"verify":true}"#,
        r#"{"here":true}"#,
        "[1]",
    ];
    let routes = routes::all();
    let mut seeds = Vec::new();
    for (n, route) in routes.iter().enumerate() {
        let method = methods().iter().position(|m| m.as_str().eq_ignore_ascii_case(route.method.key())).unwrap_or(0);
        for (kind, body) in bodies.iter().enumerate().filter(|(_, b)| b.is_empty() || route.request.is_some()) {
            let id = if route.path.contains("{id}") { "net0" } else { "" };
            let head = [kind as u8, method as u8, n as u8];
            seeds.push([&head, id.as_bytes(), b"\n", body.as_bytes()].concat());
        }
    }
    seeds.push(b"\0\0\xff/v1/../v1/vm%2fconfig?x=y\n".to_vec());
    seeds
}
