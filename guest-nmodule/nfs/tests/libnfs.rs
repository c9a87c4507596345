//! Debian's libnfs tools (libnfs-utils) against the engine over TCP on loopback: copy in, list, copy out, compare.
#![allow(clippy::unwrap_used)] // these are tests
use nfs::engine::{Config, Engine, mappings};
use std::path::Path;
use std::process::Stdio;
use std::rc::Rc;
use support::{config, serve::serve, service};
use tokio::net::TcpListener;
use tokio::process::Command;

mod support;

/// Runs a tool to its end; what it printed.
async fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.unwrap_or_else(|error| panic!("{program} (Debian package libnfs-utils): {error}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn files_go_in_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let (source, copy) = (directory.path().join("in"), directory.path().join("out"));
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let data: Vec<u8> = (0..(20 << 20) + 4321).map(|_| random()).collect();
    std::fs::write(&source, &data).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = Config { mappings: mappings(port, false, port, port), ..config() };
        tokio::task::spawn_local(serve(Rc::new(Engine::new(service(), config)), listener));
        let url = |name: &str| format!("nfs://127.0.0.1/vol0{name}?nfsport={port}&mountport={port}");

        run("nfs-cp", &[path(&source), &url("/file")]).await;
        let listing = run("nfs-ls", &[&url("")]).await;
        assert!(listing.contains(&data.len().to_string()) && listing.contains("file"), "{listing}");
        run("nfs-cp", &[&url("/file"), path(&copy)]).await;
    });
    assert!(std::fs::read(&copy).unwrap() == data);
}
