//! A guest's network through a tap, seen from the host: request and response, and as much as goes through either way.
use super::guest::{Guest, MAC, Machine, Monitor};
use super::in_turn;
use crate::bench::{Better, Row};
use crate::lab::Host;
use crate::report::{Progress, median};
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

const HOST_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// Ports of the image.
const ECHO: u16 = 7;
const SINK: u16 = 9;
const SOURCE: u16 = 19;
const QUIT: u16 = 99;
/// Bytes of one call.
const CHUNK: usize = 256 << 10;
/// More than is asked for in the time.
const SOURCE_BYTES: u64 = 1 << 40;
const PATIENCE: Duration = Duration::from_secs(10);
/// Round trips before the clock runs.
const WARM_UP: usize = 20;

/// Adds the tap, with the host's address on it: no bridge takes part.
pub fn prepare(host: &Host, tap: &str) -> Result<()> {
    host.ip(&format!(
        "tuntap add dev {tap} mode tap vnet_hdr\n\
         addr add {HOST_IP}/24 dev {tap}\n\
         link set {tap} addrgenmode none up\n\
         neigh replace {GUEST_IP} lladdr {MAC} dev {tap} nud permanent\n"
    ))
}

/// What the image has to be told.
pub fn serve() -> String {
    format!("serve ip={GUEST_IP}/24")
}

fn connect(port: u16) -> Result<TcpStream> {
    let to = SocketAddrV4::new(GUEST_IP, port);
    let stream = TcpStream::connect_timeout(&to.into(), PATIENCE).with_context(|| format!("no connection to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Ends the guest that serves.
pub fn quit(host: &Host) -> Result<()> {
    host.enter(|| {
        let mut stream = connect(QUIT)?;
        stream.shutdown(Shutdown::Write)?;
        let _ = stream.read(&mut [0]);
        Ok(())
    })
}

/// Round trips of one byte a second.
fn round_trips(time: Duration) -> Result<f64> {
    let mut stream = connect(ECHO)?;
    let mut byte = [0];
    let mut trip = || -> Result<()> {
        stream.write_all(b"x")?;
        stream.read_exact(&mut byte).context("no echo")
    };
    for _ in 0..WARM_UP {
        trip()?;
    }
    let (begin, mut count) = (Instant::now(), 0u32);
    while begin.elapsed() < time {
        trip()?;
        count += 1;
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

/// Megabytes a second into the guest, to its answer that all has come.
fn into_guest(time: Duration) -> Result<f64> {
    let mut stream = connect(SINK)?;
    let chunk = vec![0x5a; CHUNK];
    let (begin, mut sent) = (Instant::now(), 0u64);
    while begin.elapsed() < time {
        stream.write_all(&chunk)?;
        sent += CHUNK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count).context("no count")?;
    if u64::from_le_bytes(count) != sent {
        bail!("{sent} bytes were sent, {} came", u64::from_le_bytes(count));
    }
    Ok(sent as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

/// Megabytes a second out of the guest.
fn out_of_guest(time: Duration) -> Result<f64> {
    let mut stream = connect(SOURCE)?;
    let mut chunk = vec![0; CHUNK];
    let (begin, mut got) = (Instant::now(), 0u64);
    stream.write_all(&SOURCE_BYTES.to_le_bytes())?;
    while begin.elapsed() < time {
        match stream.read(&mut chunk).context("nothing comes")? {
            0 => bail!("the guest has closed the connection"),
            n => got += n as u64,
        }
    }
    Ok(got as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

/// A measurement and what it is called.
type Measure = (&'static str, &'static str, fn(Duration) -> Result<f64>);
const MEASURES: [Measure; 3] = [
    ("TCP round trips of 1 byte, host to guest", "/s", round_trips),
    ("TCP throughput into the guest", "MB/s", into_guest),
    ("TCP throughput out of the guest", "MB/s", out_of_guest),
];

/// All of it `rounds` times on each side.
pub fn run(machine: &Machine, tap: &str, rounds: usize, time: Duration) -> Result<Vec<Row>> {
    let mut figures: [[Vec<f64>; 2]; 3] = Default::default();
    let mut progress = Progress::start("vmm: network");
    for round in 0..rounds {
        for monitor in in_turn(round) {
            let measured = with_guest(machine, monitor, tap, time)?;
            for (figures, figure) in figures.iter_mut().zip(measured) {
                figures[monitor as usize].push(figure);
            }
        }
        progress.update(&format!("{} of {rounds}", round + 1));
    }
    progress.done("");
    let row = |((name, unit, _), [ours, peer]): (Measure, &[Vec<f64>; 2])| Row {
        name: name.into(),
        unit,
        ours: median(ours),
        peer: Some(median(peer)),
        better: Better::More,
        samples: rounds,
    };
    Ok(MEASURES.into_iter().zip(&figures).map(row).collect())
}

fn with_guest(machine: &Machine, monitor: Monitor, tap: &str, time: Duration) -> Result<Vec<f64>> {
    let mut guest = Guest::start(machine, monitor, None, Some(tap), &serve())?;
    guest.line("serving")?;
    let measured = measure(machine, monitor, time)?;
    quit(machine.host)?;
    guest.end()?;
    Ok(measured)
}

/// Each figure once, of a guest that serves.
pub fn measure(machine: &Machine, monitor: Monitor, time: Duration) -> Result<Vec<f64>> {
    machine.host.enter(|| {
        MEASURES
            .iter()
            .map(|(name, _, measure)| measure(time).with_context(|| format!("{monitor:?}: {name}")))
            .collect()
    })
}
