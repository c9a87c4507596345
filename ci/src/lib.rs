//! `cargo xtask`: set-up, lab, demo, tests, benchmarks.
//!
//! The parts from below: [`cleanup`] and [`process`] keep hold of what is started; [`lab`] is the network; [`setup`] and
//! [`artifacts`] make sure that all is there; the commands stand on these.
#![forbid(unsafe_code)]

pub mod api;
pub mod artifacts;
pub mod bench;
pub mod check;
pub mod cleanup;
pub mod copy;
pub mod demo;
pub mod ganesha;
pub mod instances;
pub mod lab;
pub mod licences;
pub mod load;
pub mod modules;
pub mod nested;
pub mod probe;
pub mod process;
pub mod qmp;
pub mod report;
pub mod setup;
pub mod steal;
pub mod tcp;
pub mod throughput;
