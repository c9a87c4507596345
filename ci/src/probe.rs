//! Asks from outside: NFS NULL about every millisecond over one TCP connection, when a server first answers, and whether a
//! D-module answers.
//!
//! Always true: a question goes out on time whether or not the one before was answered, so that a silence is seen as
//! long as it is. Bounds: [`MAX_ASKED`] questions in a run of the prober, [`MAX_CONNECTS`] attempts at once.
use crate::lab::Host;
use crate::process;
use anyhow::{Context, Result, anyhow, bail};
use fabric::id::VmId;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between questions.
pub const PERIOD: Duration = Duration::from_millis(1);
/// Most questions of a prober: 20 minutes' worth.
const MAX_ASKED: usize = 1_200_000;
/// Most connection attempts outstanding while a server is awaited.
const MAX_CONNECTS: usize = 64;
/// Bytes of an accepted reply to NULL: record mark, then six words.
const REPLY_BYTES: usize = 28;
/// A reply that has not come by then, after the last question, is lost.
const LAST_REPLY: Duration = Duration::from_secs(3);

/// ONC RPC call of NFS version 3, procedure 0 (RFC 5531, RFC 1813), with its record mark: 44 bytes.
fn null_call(xid: u32) -> [u8; 44] {
    let words: [u32; 11] = [0x8000_0000 | 40, xid, 0, 2, 100_003, 3, 0, 0, 0, 0, 0];
    let mut bytes = [0; 44];
    for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// The xid of an accepted, successful reply to NULL.
fn null_reply(bytes: &[u8; REPLY_BYTES]) -> Result<u32> {
    let head = (word(bytes, 0), word(bytes, 8), word(bytes, 12), word(bytes, 24));
    if head != (0x8000_0000 | 24, 1, 0, 0) {
        bail!("an unexpected answer to NFS NULL: {bytes:02x?}");
    }
    Ok(word(bytes, 4))
}

/// Times of a question and of its reply.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// When it was sent.
    pub sent: Instant,
    /// When the reply came.
    pub replied: Option<Instant>,
}

/// A prober at work.
pub struct Prober {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    sender: JoinHandle<Result<()>>,
    receiver: JoinHandle<Result<()>>,
    local: SocketAddr,
}

impl Prober {
    /// Connects from `host` and begins.
    pub fn start(host: &Host, server: SocketAddr) -> Result<Self> {
        let stream = host.enter(|| {
            let stream = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        let stream = stream.with_context(|| format!("the prober cannot connect to {server}"))?;
        let local = stream.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let receiver = std::thread::spawn({
            let (stream, asked) = (stream.try_clone()?, asked.clone());
            move || receive(stream, &asked)
        });
        let sender = std::thread::spawn({
            let (stop, asked) = (stop.clone(), asked.clone());
            move || send(stream, &asked, &stop)
        });
        Ok(Prober { stop, asked, sender, receiver, local })
    }

    /// Its own end of the connection.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// How many questions are without a reply now.
    pub fn unanswered(&self) -> usize {
        lock(&self.asked).iter().rev().take(100_000).filter(|a| a.replied.is_none()).count()
    }

    /// Ends it; fails if the connection broke.
    pub fn finish(self) -> Result<Log> {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.sender.join().map_err(|_| anyhow!("the prober panicked"))?;
        outcome.context("the prober's connection broke")?;
        let outcome = self.receiver.join().map_err(|_| anyhow!("the prober panicked"))?;
        outcome.context("the prober's connection broke")?;
        Ok(Log { asked: std::mem::take(&mut lock(&self.asked)) })
    }
}

fn lock(asked: &Mutex<Vec<Asked>>) -> std::sync::MutexGuard<'_, Vec<Asked>> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks the scheduler to run the calling thread before ordinary ones, so that a busy machine is not mistaken for a silent server.
/// Without the right to do so it goes on as it is.
fn run_first() {
    if let Ok(link) = std::fs::read_link("/proc/thread-self")
        && let Some(tid) = link.file_name()
    {
        let _ = process::succeed(Command::new("chrt").args(["--fifo", "--pid", "10"]).arg(tid));
    }
}

fn send(mut stream: TcpStream, asked: &Mutex<Vec<Asked>>, stop: &AtomicBool) -> Result<()> {
    run_first();
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let xid = {
            let mut asked = lock(asked);
            if asked.len() == MAX_ASKED {
                bail!("the prober has run for too long");
            }
            asked.push(Asked { sent: Instant::now(), replied: None });
            asked.len() as u32 - 1
        };
        stream.write_all(&null_call(xid))?;
        next += PERIOD;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    // The receiver ends when all replies are there or none has come for a while.
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(())
}

fn receive(mut stream: TcpStream, asked: &Mutex<Vec<Asked>>) -> Result<()> {
    run_first();
    // Far longer than any blackout: the end of a silence must be seen.
    stream.set_read_timeout(Some(LAST_REPLY + Duration::from_secs(30)))?;
    loop {
        let mut reply = [0; REPLY_BYTES];
        match stream.read_exact(&mut reply) {
            Ok(()) => {}
            // The server closes after we have: all that it answered is here.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        let now = Instant::now();
        let xid = null_reply(&reply)?;
        let mut asked = lock(asked);
        let entry = asked.get_mut(xid as usize).context("a reply to a question that was not asked")?;
        if entry.replied.replace(now).is_some() {
            bail!("question {xid} was answered twice");
        }
    }
}

/// What a prober saw.
#[derive(Clone, Debug, Default)]
pub struct Log {
    asked: Vec<Asked>,
}

impl Log {
    /// Questions asked.
    pub fn questions(&self) -> usize {
        self.asked.len()
    }

    /// Questions that were never answered.
    pub fn unanswered(&self) -> usize {
        self.asked.iter().filter(|a| a.replied.is_none()).count()
    }

    /// The longest silence between two replies of which at least one came in the window: how long the server was away as
    /// seen from outside.
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Option<Duration> {
        let mut replies: Vec<Instant> = self.asked.iter().filter_map(|a| a.replied).collect();
        replies.sort_unstable();
        let touches = |pair: &[Instant]| pair[1] >= from && pair[0] <= to;
        replies.windows(2).filter(|p| touches(p)).map(|p| p[1] - p[0]).max()
    }

    /// The longest wait for a reply of a question asked in the window.
    pub fn longest_wait(&self, from: Instant, to: Instant) -> Option<Duration> {
        let inside = self.asked.iter().filter(|a| a.sent >= from && a.sent <= to);
        inside.filter_map(|a| Some(a.replied? - a.sent)).max()
    }
}

/// Waits for the first reply to NFS NULL of a server that may not be there yet. A new connection is tried every
/// millisecond, so that no retransmission timer of TCP is in the result. Ends when `give_up` is set.
pub fn first_reply(host: &Host, server: SocketAddrV4, limit: Duration, give_up: &AtomicBool) -> Result<Instant> {
    host.enter(|| {
        run_first();
        let begin = Instant::now();
        let mut attempts: Vec<Socket> = Vec::new();
        let mut next = begin;
        loop {
            if begin.elapsed() > limit || give_up.load(Ordering::Relaxed) {
                bail!("{server} has not answered NFS NULL in {:.1} s", begin.elapsed().as_secs_f64());
            }
            if Instant::now() >= next {
                next += PERIOD;
                if attempts.len() == MAX_CONNECTS {
                    attempts.remove(0);
                }
                attempts.push(connect_without_waiting(server)?);
            }
            // A refusal is an attempt that ended; a connection is asked at once.
            if let Some(i) = attempts.iter().position(|s| s.peer_addr().is_ok()) {
                let stream: TcpStream = attempts.swap_remove(i).into();
                match ask_once(stream, limit.saturating_sub(begin.elapsed())) {
                    Ok(()) => return Ok(Instant::now()),
                    // It was there for a moment only.
                    Err(_) => continue,
                }
            }
            attempts.retain(|s| matches!(s.take_error(), Ok(None)));
            std::thread::sleep(Duration::from_micros(200));
        }
    })
}

fn connect_without_waiting(server: SocketAddrV4) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    // In progress, or no route yet.
    let _ = socket.connect(&SockAddr::from(server));
    Ok(socket)
}

fn ask_once(mut stream: TcpStream, limit: Duration) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit.max(PERIOD)))?;
    stream.write_all(&null_call(1))?;
    let mut reply = [0; REPLY_BYTES];
    stream.read_exact(&mut reply)?;
    null_reply(&reply).map(drop)
}

/// Waits until a D-module answers on its fabric port: asks for an ownership record. Ends when `give_up` is set.
pub fn first_fabric_answer(
    host: &Host,
    server: SocketAddrV4,
    limit: Duration,
    give_up: &AtomicBool,
) -> Result<Instant> {
    host.enter(|| {
        run_first();
        let begin = Instant::now();
        loop {
            if begin.elapsed() > limit || give_up.load(Ordering::Relaxed) {
                bail!("{server} has not answered on the cluster fabric in {:.1} s", begin.elapsed().as_secs_f64());
            }
            match ask_for_owner(server, Duration::from_millis(20)) {
                Ok(()) => return Ok(Instant::now()),
                Err(_) => std::thread::sleep(PERIOD),
            }
        }
    })
}

fn ask_for_owner(server: SocketAddrV4, limit: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&server.into(), limit)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit * 10))?;
    stream.write_all(&fabric::wire::owner_get(VmId(u64::MAX))?)?;
    let mut answers = fabric::wire::OwnerAnswers::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            bail!("closed");
        }
        if answers.push(&mut &buffer[..n])?.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
#[path = "probe/tests.rs"]
mod tests;
