//! The engine on real TCP: what the N-module does with its own TCP/IP, done with tokio's.
use nfs::engine::{Engine, Peer};
use nfs::nfs3::arguments::write_split;
use nfs::record::{Event, RecordReader, Reply};
use nfs::service::FileService;
use std::{io, rc::Rc, sync::Arc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};

/// Most calls of one connection being executed.
const CALLS: usize = 16;

/// Accepts connections for ever. To be run inside a `LocalSet`.
pub async fn serve<S: FileService + 'static>(engine: Rc<Engine<S>>, listener: TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let engine = engine.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = connection(engine, stream).await {
                log::info!("connection ended: {error}");
            }
        });
    }
}

async fn connection<S: FileService + 'static>(engine: Rc<Engine<S>>, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = Peer { client: stream.peer_addr()?, local: stream.local_addr()?.ip() };
    let (mut input, mut output) = stream.into_split();
    let (replies, mut queue) = mpsc::channel::<Reply>(CALLS);
    tokio::task::spawn_local(async move {
        while let Some(reply) = queue.recv().await {
            for slice in reply.slices() {
                if output.write_all(slice).await.is_err() {
                    return;
                }
            }
        }
    });
    let room = Arc::new(Semaphore::new(CALLS));
    let mut records = RecordReader::new(write_split);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = input.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..read];
        loop {
            let (used, event) = records.feed(rest).map_err(io::Error::other)?;
            rest = &rest[used..];
            match event {
                Event::Starved => break,
                Event::Fragment { .. } => {}
                Event::Record(record) => {
                    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
                    let (engine, replies) = (engine.clone(), replies.clone());
                    tokio::task::spawn_local(async move {
                        if let Some(reply) = engine.handle(peer, record).await {
                            // The connection may be gone.
                            let _ = replies.send(reply).await;
                        }
                        drop(permit);
                    });
                }
            }
        }
    }
}
