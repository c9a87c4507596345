//! Ports simulated from seeds: the real state machines of both sides, the real sessions of the D-module as the arbiter, a guest that
//! sends requests all the while; virtual time. The connection of the port is TCP's: in order, late, cut at any time, its end heard of late or
//! by a timeout. Questions to the arbiter and requests of the guest get lost, late, twice and in any order. Either side, or the D-module, crashes.
//!
//! Checked at each step: never two running; no request executed under an epoch older than one that was given away; each executed once.
//! Checked at the end, long after the last fault: it is decided, and the guest that is left has gone on.
//! `SEEDS=N` tries more than usual, `SEED=N` one alone.
#![allow(clippy::unwrap_used)]

mod arbiter;
mod world;

use migration::message::Ownership;
use world::{End, World};

/// Tried unless told otherwise.
const SEEDS: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

fn simulate(ownership: Ownership) {
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..number("SEEDS").unwrap_or(SEEDS) + 1,
    };
    let mut ends = std::collections::BTreeMap::<End, u64>::new();
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let end = std::panic::catch_unwind(|| World::new(ownership, seed).run());
        let end = end.unwrap_or_else(|_| panic!("SEED={seed} fails with {ownership:?}"));
        *ends.entry(end).or_default() += 1;
    }
    println!("{ownership:?}, {count} seeds: {ends:?}");
    if count >= SEEDS {
        // Else it has tried nothing.
        assert!(ends[&End::Ported] > count / 20 && ends[&End::Resumed] > count / 20);
        assert_eq!(ends.contains_key(&End::Unknown), ownership == Ownership::Stream);
    }
}

#[test]
fn with_an_arbiter() {
    simulate(Ownership::Arbiter);
}

#[test]
fn without_an_arbiter() {
    simulate(Ownership::Stream);
}
