use super::*;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

fn poll(gate: &Gate) {
    let mut p = libc::pollfd { fd: gate.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    assert!(unsafe { libc::poll(&mut p, 1, -1) } >= 0);
}

/// Every step of the sleeper against every step of a signaller, one after the other: never asleep with a signal pending
/// and no wake-up.
#[test]
fn no_interleaving_loses_a_signal() {
    for signal_at in 0..4 {
        for kick in [false, true] {
            let gate = Gate::new().unwrap();
            let send = |at| {
                if at == signal_at {
                    if kick { gate.kick() } else { gate.signal() }
                }
            };
            send(0);
            let sleeps = gate.may_sleep();
            send(1);
            if sleeps {
                let mut p = libc::pollfd { fd: gate.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one valid pollfd.
                let ready = unsafe { libc::poll(&mut p, 1, 0) } == 1;
                assert_eq!(ready, gate.is_open(), "signal at {signal_at}");
                gate.awake();
            }
            send(2);
            assert_eq!(gate.is_open(), signal_at <= 2);
        }
    }
}

/// A consumer that sleeps for ever unless woken, against producers: ends only if no signal is lost.
#[test]
fn stress() {
    const PER_PRODUCER: u64 = 20_000;
    let gate = Arc::new(Gate::new().unwrap());
    let work = Arc::new(AtomicU64::new(0));
    let producers: Vec<_> = (0..2)
        .map(|_| {
            let (gate, work) = (gate.clone(), work.clone());
            std::thread::spawn(move || {
                for i in 0..PER_PRODUCER {
                    work.fetch_add(1, Ordering::Release);
                    gate.signal();
                    if i % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut seen = 0;
    while seen < 2 * PER_PRODUCER {
        if gate.may_sleep() {
            poll(&gate);
            gate.awake();
            gate.drain();
        }
        gate.pass();
        seen = work.load(Ordering::Acquire);
    }
    for p in producers {
        p.join().unwrap();
    }
}
