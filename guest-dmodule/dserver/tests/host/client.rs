//! A CF client on a blocking socket, for tests.
use fabric::client::{ClientSession, Event, Rejected, Ticket};
use fabric::fs::{Credential, FileHandle};
use fabric::id::{BootId, Epoch, Owner, VmId};
use fabric::op::{Op, Outcome, Reply, Request};
use fabric::wire::{OwnerAnswer, OwnerAnswers};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Nothing here takes that long.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Client {
    pub session: ClientSession,
    pub epoch: Epoch,
    pub boot_id: BootId,
    pub restarted: bool,
    pub fenced: bool,
    stream: TcpStream,
    outcomes: HashMap<Ticket, Outcome>,
}

impl Client {
    pub fn new(address: SocketAddr, vm_id: u64, owner: u64) -> Client {
        Client::resume(address, vm_id, Epoch::UNCLAIMED, Owner([owner, owner]))
    }

    /// Of a VM that has an epoch already.
    pub fn resume(address: SocketAddr, vm_id: u64, epoch: Epoch, owner: Owner) -> Client {
        let mut client = Client {
            session: ClientSession::new(VmId(vm_id), epoch, owner),
            epoch: Epoch::UNCLAIMED,
            boot_id: BootId(0),
            restarted: false,
            fenced: false,
            stream: connect(address),
            outcomes: HashMap::new(),
        };
        client.session.connected();
        client.until(|c| c.session.is_open());
        client
    }

    pub fn reconnect(&mut self, address: SocketAddr) {
        self.session.disconnected();
        self.stream = connect(address);
        self.session.connected();
        self.until(|c| c.session.is_open() || c.fenced);
    }

    pub fn transmit(&mut self) {
        while let Some(chunk) = self.session.poll_transmit() {
            self.stream.write_all(chunk.as_ref()).unwrap();
        }
    }

    /// Waits for bytes and does not take them.
    pub fn wait_for_bytes(&self) {
        assert!(self.stream.peek(&mut [0; 8]).unwrap() > 0);
    }

    /// Carries bytes until something is so.
    pub fn until(&mut self, so: impl Fn(&Client) -> bool) {
        let mut buffer = vec![0; 256 << 10];
        loop {
            while let Some(event) = self.session.poll_event() {
                match event {
                    Event::Completed(ticket, outcome) => {
                        self.outcomes.insert(ticket, outcome);
                    }
                    Event::Opened { epoch, boot_id, restarted } => {
                        (self.epoch, self.boot_id, self.restarted) = (epoch, boot_id, restarted);
                    }
                    Event::Fenced { .. } => self.fenced = true,
                    Event::Pong(_) => {}
                }
            }
            self.transmit();
            if so(self) {
                return;
            }
            let n = self.stream.read(&mut buffer).unwrap();
            assert!(n > 0, "the D-module ended the connection");
            self.session.receive(&buffer[..n]).unwrap();
        }
    }

    pub fn submit(&mut self, op: Op) -> Ticket {
        let mut request = Request { credential: Credential::ROOT, op };
        loop {
            match self.session.submit(request) {
                Ok(ticket) => return ticket,
                Err(Rejected::Full(back)) => request = back,
                Err(Rejected::Invalid(e)) => panic!("{e}"),
            }
            let n = self.session.outstanding();
            self.until(|c| c.session.outstanding() < n);
        }
    }

    pub fn wait(&mut self, ticket: Ticket) -> Outcome {
        self.until(|c| c.outcomes.contains_key(&ticket));
        self.outcomes.remove(&ticket).unwrap()
    }

    pub fn call(&mut self, op: Op) -> Outcome {
        let ticket = self.submit(op);
        self.wait(ticket)
    }

    pub fn root(&mut self, volume: &str) -> FileHandle {
        match self.call(Op::OpenVolume { name: volume.into() }) {
            Ok(Reply::Node { attr, .. }) => attr.handle,
            other => panic!("{other:?}"),
        }
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Asks about ownership as a VMM does.
pub struct Asker {
    stream: TcpStream,
    answers: OwnerAnswers,
}

impl Asker {
    pub fn new(address: SocketAddr) -> Self {
        Asker { stream: connect(address), answers: OwnerAnswers::new() }
    }

    pub fn ask(&mut self, question: &[u8]) -> OwnerAnswer {
        self.stream.write_all(question).unwrap();
        let mut buffer = [0; 4096];
        loop {
            let n = self.stream.read(&mut buffer).unwrap();
            assert!(n > 0);
            if let Some(answer) = self.answers.push(&mut &buffer[..n]).unwrap() {
                return answer;
            }
        }
    }
}

/// Asks once.
pub fn ask_owner(address: SocketAddr, question: &[u8]) -> OwnerAnswer {
    Asker::new(address).ask(question)
}
