//! TCP: an echo server that also knows how to sink and to source bytes, and a client of it.
use alloc::{format, string::String, vec};
use guest_rt::net::{Buffers, Config, ReadHalf, SocketAddrV4, Stack, TcpError, TcpStream, WriteHalf};
use guest_rt::time::{Instant, realtime_ns};
use guest_rt::virtio::net::RxBuffers;
use guest_rt::{BOOT_MARK_PREPARED, Env, TEMPLATE_WORD, boot_mark, identity, next_instance, println, rng, spawn};

const ECHO: u16 = 7;
const SINK: u16 = 9;
/// Sends as many bytes as the client asks for: eight bytes, little-endian.
const SOURCE: u16 = 19;
const WHO: u16 = 21;
/// Ends the image.
const QUIT: u16 = 99;

async fn stack(env: &mut Env) -> Result<Stack, String> {
    if env.nets.is_empty() {
        return Err("no network device".into());
    }
    let net = env.nets.remove(0);
    println!("mtu {}, {:?}", net.mtu(), net.offloads());
    let stack = Stack::prepare(net, RxBuffers::for_memory(env.memory_size));
    if env.cmdline.has(TEMPLATE_WORD) {
        // The same in all instances.
        println!("template, random {:016x}", rng::random_u64());
        boot_mark(BOOT_MARK_PREPARED);
        env.cmdline = next_instance().await.map_err(|e| format!("{e}"))?;
    }
    stack.begin(Config::from_cmdline(&env.cmdline, 0, env.memory_size).map_err(|e| format!("{e}"))?);
    Ok(stack)
}

/// Says who this is and what it draws.
async fn who_one(mut stream: TcpStream) -> Result<(), TcpError> {
    let identity = identity();
    let text = format!(
        "vm_id {} epoch {} random {:016x} mono_ns {} real_ns {}",
        identity.vm_id,
        identity.epoch,
        rng::random_u64(),
        Instant::now().as_nanos(),
        realtime_ns()
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown();
    stream.drained().await
}

/// The byte at an offset of the stream.
fn byte(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

async fn echo_one(mut stream: TcpStream) -> Result<(), TcpError> {
    let mut buffer = vec![0; 65536];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            stream.shutdown();
            return stream.drained().await;
        }
        stream.write_all(&buffer[..n]).await?;
    }
}

/// Counts until the end, then answers the count.
async fn sink_one(mut stream: TcpStream) -> Result<(), TcpError> {
    let (mut total, start) = (0u64, Instant::now());
    loop {
        let n = stream.read_with(|data| (data.len(), data.len())).await?;
        if n == 0 {
            break;
        }
        total += n as u64;
    }
    log::info!("sank {total} bytes in {:?}", start.elapsed());
    stream.write_all(&total.to_le_bytes()).await?;
    stream.shutdown();
    stream.drained().await
}

async fn source_one(stream: TcpStream) -> Result<(), TcpError> {
    let (mut read, mut write): (ReadHalf, WriteHalf) = stream.into_split();
    let mut count = [0; 8];
    read.read_exact(&mut count).await?;
    let (total, start) = (u64::from_le_bytes(count), Instant::now());
    let mut sent = 0;
    while sent < total {
        sent += write
            .write_with(|space| {
                let n = space.len().min(usize::try_from(total - sent).unwrap_or(usize::MAX));
                for (i, b) in space[..n].iter_mut().enumerate() {
                    *b = byte(sent + i as u64);
                }
                (n, n as u64)
            })
            .await?;
    }
    write.drained().await?;
    log::info!("sent {total} bytes in {:?}", start.elapsed());
    write.shutdown();
    Ok(())
}

/// Serves until someone connects to QUIT.
pub async fn echo(mut env: Env) -> Result<(), String> {
    let stack = stack(&mut env).await?;
    macro_rules! serve {
        ($port:expr, $one:path) => {{
            let listener = stack.listen($port, Buffers::default(), 8).map_err(|e| format!("{e}"))?;
            spawn(async move {
                loop {
                    let (stream, peer) = listener.accept().await;
                    spawn(async move {
                        if let Err(e) = $one(stream).await {
                            log::warn!("{peer}: {e}");
                        }
                    });
                }
            });
        }};
    }
    serve!(ECHO, echo_one);
    serve!(SINK, sink_one);
    serve!(SOURCE, source_one);
    serve!(WHO, who_one);
    let quit = stack.listen(QUIT, Buffers::default(), 1).map_err(|e| format!("{e}"))?;
    guest_rt::boot_mark(guest_rt::BOOT_MARK_SERVING);
    println!("serving");
    let (mut stream, peer) = quit.accept().await;
    println!(
        "{peer} asked to quit; {:?}; {} sockets; {:?}",
        stack.statistics(),
        stack.sockets(),
        guest_rt::exec::statistics()
    );
    stream.shutdown();
    // The goodbye still goes out.
    let _ = stream.read(&mut [0; 1]).await;
    Ok(())
}

/// Connects to the `peer=` of the command line, sends and checks the echo; then to a port where nobody listens.
pub async fn client(mut env: Env) -> Result<(), String> {
    let stack = stack(&mut env).await?;
    let peer: SocketAddrV4 =
        env.cmdline.get("peer").and_then(|p| p.parse().ok()).ok_or("peer=ADDRESS:PORT is missing")?;
    let mut stream = stack.connect(peer, Buffers::default()).await.map_err(|e| format!("connect: {e}"))?;
    let data: alloc::vec::Vec<u8> = (0..2_000_000).map(byte).collect();
    let (mut read, mut write) = {
        if stream.peer() != Some(peer) {
            return Err(format!("peer is {:?}", stream.peer()));
        }
        stream.write_all(b"hello").await.map_err(|e| format!("{e}"))?;
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).await.map_err(|e| format!("{e}"))?;
        stream.into_split()
    };
    let expected = data.clone();
    let writer = spawn(async move {
        let result = write.write_all(&data).await;
        write.shutdown();
        result
    });
    let mut got = vec![0; expected.len()];
    read.read_exact(&mut got).await.map_err(|e| format!("read: {e}"))?;
    writer.await.map_err(|e| format!("write: {e}"))?;
    if got != expected || read.read(&mut [0; 1]).await != Ok(0) {
        return Err("the echo is not what was sent".into());
    }
    println!("echo of {} bytes is right", got.len());
    let nobody = SocketAddrV4::new(*peer.ip(), 1);
    match stack.connect(nobody, Buffers::default()).await {
        Err(e) => println!("port 1: {e}"),
        Ok(_) => return Err("connected to port 1".into()),
    }
    if let Some(quit) = env.cmdline.get("quit").and_then(|p| p.parse().ok()) {
        let mut stream = stack.connect(quit, Buffers::default()).await.map_err(|e| format!("quit: {e}"))?;
        if stream.read(&mut [0; 1]).await != Ok(0) {
            return Err("no goodbye".into());
        }
    }
    Ok(())
}
