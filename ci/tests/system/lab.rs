use crate::one_at_a_time;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;
use xtask::artifacts::data_dir;
use xtask::lab::{self, CLIENT1_IP, Lab, NODE1_IP};

#[test]
fn hosts_reach_each_other_until_the_cable_is_pulled() {
    let _one = one_at_a_time();
    let lab = Lab::create(&data_dir().unwrap()).unwrap();
    let server = lab.node1.enter(|| Ok(TcpListener::bind((NODE1_IP, 7))?)).unwrap();
    let echo = std::thread::spawn(move || {
        let (mut socket, peer) = server.accept().unwrap();
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        socket.write_all(&byte).unwrap();
        (server, peer)
    });
    let answer = lab.client1.enter(|| {
        let mut socket = TcpStream::connect((NODE1_IP, 7))?;
        socket.write_all(&[42])?;
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        Ok(byte[0])
    });
    assert_eq!(answer.unwrap(), 42);
    let (_server, peer) = echo.join().unwrap();
    assert_eq!(peer.ip(), CLIENT1_IP);

    let connect =
        || lab.client1.enter(|| Ok(TcpStream::connect_timeout(&(NODE1_IP, 7).into(), Duration::from_millis(300))?));
    lab.client1.cable(false).unwrap();
    assert!(connect().is_err());
    lab.client1.cable(true).unwrap();
    assert!((0..20).any(|_| connect().is_ok()));
}

#[test]
fn nothing_is_left_of_a_lab() {
    let _one = one_at_a_time();
    let lab = Lab::create(&data_dir().unwrap()).unwrap();
    lab.node1.add_tap("tap0").unwrap();
    let mut sleep = Command::new("sleep");
    let daemon = lab.node1.daemon("sleep", sleep.arg("1000"), &lab.state_dir().join("sleep.log")).unwrap();
    let pid = daemon.pid();
    // As if the run had forgotten it: the namespace must take it down.
    std::mem::forget(daemon);
    let names: Vec<String> = lab.namespaces().iter().map(|n| n.to_string()).collect();
    let (state, data) = (lab.state_dir().to_owned(), lab.data_dir().to_owned());
    let there = lab::namespace_names().unwrap();
    assert!(names.iter().all(|n| there.contains(n)) && state.is_dir() && data.is_dir());
    drop(lab);
    let there = lab::namespace_names().unwrap();
    assert!(names.iter().all(|n| !there.contains(n)), "left: {there:?}");
    assert!(!state.exists() && !data.exists());
    let state = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    assert!(state.is_empty() || state.contains("State:\tZ"), "the process still runs");
}

#[test]
fn clean_leaves_a_live_lab_alone() {
    let _one = one_at_a_time();
    let lab = Lab::create(&data_dir().unwrap()).unwrap();
    lab::clean().unwrap();
    assert!(lab.state_dir().is_dir());
    let there = lab::namespace_names().unwrap();
    assert!(lab.namespaces().iter().all(|n| there.contains(&n.to_string())));
}
