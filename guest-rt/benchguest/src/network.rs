//! A TCP server that is measured from outside: what it receives it sends back, drops, or it sends as much as it is asked for.
use alloc::{format, string::String, vec};
use guest_rt::net::{Buffers, Config, Stack, TcpError, TcpStream};
use guest_rt::{Env, println, spawn};

/// Sends back what comes.
const ECHO: u16 = 7;
/// Counts until the end, then answers the count: eight bytes, little-endian.
const SINK: u16 = 9;
/// Sends as many bytes as the client asks for: eight bytes, little-endian.
const SOURCE: u16 = 19;
/// Ends the image.
const QUIT: u16 = 99;
/// Socket buffers: more than a frame with segmentation offload, several times.
const BUFFERS: Buffers = Buffers { rx: 1 << 20, tx: 1 << 20 };

async fn echo(mut stream: TcpStream) -> Result<(), TcpError> {
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

async fn sink(mut stream: TcpStream) -> Result<(), TcpError> {
    let mut total = 0u64;
    loop {
        let n = stream.read_with(|data| (data.len(), data.len())).await?;
        if n == 0 {
            break;
        }
        total += n as u64;
    }
    stream.write_all(&total.to_le_bytes()).await?;
    stream.shutdown();
    stream.drained().await
}

async fn source(stream: TcpStream) -> Result<(), TcpError> {
    let (mut read, mut write) = stream.into_split();
    let mut count = [0; 8];
    read.read_exact(&mut count).await?;
    let mut left = u64::from_le_bytes(count);
    while left > 0 {
        // What the bytes are is of no interest: those that lie there.
        left -= write
            .write_with(|space| {
                let n = space.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                (n, n as u64)
            })
            .await?;
    }
    write.drained().await?;
    write.shutdown();
    Ok(())
}

/// Serves until someone connects to QUIT.
pub async fn serve(mut env: Env) -> Result<(), String> {
    let config = Config::from_cmdline(&env.cmdline, 0, env.memory_size).map_err(|e| format!("{e}"))?;
    if env.nets.is_empty() {
        return Err("no network device".into());
    }
    let net = env.nets.remove(0);
    println!("mtu {}, {:?}", net.mtu(), net.offloads());
    let stack = Stack::new(net, config);
    macro_rules! serve {
        ($port:expr, $one:path) => {{
            let listener = stack.listen($port, BUFFERS, 1).map_err(|e| format!("{e}"))?;
            spawn(async move {
                loop {
                    let (stream, peer) = listener.accept().await;
                    if let Err(e) = $one(stream).await {
                        log::warn!("{peer}: {e}");
                    }
                }
            });
        }};
    }
    serve!(ECHO, echo);
    serve!(SINK, sink);
    serve!(SOURCE, source);
    let quit = stack.listen(QUIT, Buffers::default(), 1).map_err(|e| format!("{e}"))?;
    guest_rt::boot_mark(guest_rt::BOOT_MARK_SERVING);
    println!("serving");
    let (mut stream, _) = quit.accept().await;
    stream.shutdown();
    // The goodbye still goes out.
    let _ = stream.read(&mut [0; 1]).await;
    Ok(())
}
