//! The test's end of `--port-faults`: hears at which points a `vmm` is, and holds it at one of them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmm::port::faults::{FAIL, GO_ON};

use crate::port_support::PATIENCE;

/// What still happens when a port is over at one side happens within this time at the other.
const AFTERWARDS: Duration = Duration::from_millis(500);

#[derive(Default)]
struct State {
    /// Points passed, the one where it is held included.
    trace: Vec<String>,
    /// Where it is to be held: the first of these it comes to.
    hold: Vec<String>,
    fail: Option<String>,
    held: Option<String>,
    gone: bool,
}

/// See the module.
pub struct Points {
    shared: Arc<(Mutex<State>, Condvar)>,
    pub socket: PathBuf,
}

impl Points {
    /// Takes one process at this socket.
    pub fn listen(socket: &Path) -> Points {
        let listener = UnixListener::bind(socket).unwrap();
        let points = Points { shared: Arc::default(), socket: socket.into() };
        let shared = points.shared.clone();
        std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                serve(stream, &shared);
            }
        });
        points
    }

    /// Forgets what was; holds the process at this point when it comes there the next time, and lets that one fail.
    pub fn expect(&self, hold: Option<&str>, fail: Option<&str>) {
        let mut state = self.shared.0.lock().unwrap();
        state.trace.clear();
        (state.hold, state.fail) = (hold.into_iter().map(Into::into).collect(), fail.map(Into::into));
    }

    /// Holds the process at this point when it comes there the next time, unless it is held elsewhere before.
    pub fn hold(&self, point: &str) {
        self.shared.0.lock().unwrap().hold.push(point.into());
    }

    /// Where it is held.
    pub fn held(&self) -> Option<String> {
        self.shared.0.lock().unwrap().held.clone()
    }

    /// Waits until it is held; false if it has ended, or does not come there although the port is `over`.
    pub fn wait(&self, over: &dyn Fn() -> bool) -> bool {
        let (mutex, changed) = &*self.shared;
        let mut state = mutex.lock().unwrap();
        let start = Instant::now();
        let mut over_since = None;
        while state.held.is_none() {
            let lost = over_since.is_some_and(|t: Instant| t.elapsed() > AFTERWARDS);
            if state.gone || lost || start.elapsed() > PATIENCE {
                // It must not stop there later.
                state.hold.clear();
                return false;
            }
            state = changed.wait_timeout(state, Duration::from_millis(20)).unwrap().0;
            if state.held.is_none() && over_since.is_none() {
                drop(state);
                over_since = over().then(Instant::now);
                state = mutex.lock().unwrap();
            }
        }
        true
    }

    /// Lets it go on; `fail`: the step fails.
    pub fn release(&self, fail: bool) {
        let mut state = self.shared.0.lock().unwrap();
        if fail {
            state.fail = state.held.clone();
        }
        (state.hold, state.held) = (Vec::new(), None);
        self.shared.1.notify_all();
    }

    /// Lets it go on to another point.
    pub fn release_to(&self, point: &str) {
        let mut state = self.shared.0.lock().unwrap();
        (state.hold, state.held) = (vec![point.into()], None);
        self.shared.1.notify_all();
    }

    /// Whether it has been at this point.
    pub fn passed(&self, point: &str) -> bool {
        self.shared.0.lock().unwrap().trace.iter().any(|p| p == point)
    }

    /// All points it has been at.
    pub fn trace(&self) -> Vec<String> {
        self.shared.0.lock().unwrap().trace.clone()
    }
}

fn serve(stream: UnixStream, shared: &(Mutex<State>, Condvar)) {
    let mut answers = stream.try_clone().unwrap();
    let (mutex, changed) = shared;
    for line in BufReader::new(stream).lines() {
        let Ok(point) = line else { break };
        let mut state = mutex.lock().unwrap();
        state.trace.push(point.clone());
        if state.hold.contains(&point) {
            state.held = Some(point.clone());
            changed.notify_all();
            while state.held.is_some() {
                state = changed.wait(state).unwrap();
            }
        }
        let fails = state.fail.take_if(|p| *p == point).is_some();
        drop(state);
        if answers.write_all(&[if fails { FAIL } else { GO_ON }]).is_err() {
            break;
        }
    }
    mutex.lock().unwrap().gone = true;
    changed.notify_all();
}
