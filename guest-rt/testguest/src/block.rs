//! A disk: sizes around every limit, many requests at once, errors.
use alloc::{format, string::String, vec, vec::Vec};
use guest_rt::virtio::blk::{BlockDevice, BlockError, MAX_TRANSFER};
use guest_rt::{Env, println, spawn};

/// Requests in flight at once: more than the ring holds.
const PARALLEL: u64 = 600;

/// What belongs at an offset of the disk.
fn content(offset: u64, length: usize) -> Vec<u8> {
    (0..length as u64 / 8).flat_map(|i| (offset + 8 * i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

async fn write(disk: &BlockDevice, offset: u64, pieces: &[usize]) -> Result<(), BlockError> {
    let mut at = offset;
    let mut buffers = Vec::new();
    for &length in pieces {
        buffers.push(content(at, length));
        at += length as u64;
    }
    disk.write(offset, buffers).await.1
}

async fn check(disk: &BlockDevice, offset: u64, pieces: &[usize]) -> Result<(), String> {
    let buffers: Vec<Vec<u8>> = pieces.iter().map(|&length| vec![0xa5; length]).collect();
    let (buffers, result) = disk.read(offset, buffers).await;
    result.map_err(|e| format!("read at {offset}: {e}"))?;
    let mut at = offset;
    for buffer in buffers {
        if buffer != content(at, buffer.len()) {
            return Err(format!("{} bytes at {at} are not what was written", buffer.len()));
        }
        at += buffer.len() as u64;
    }
    Ok(())
}

pub async fn run(env: &Env) -> Result<(), String> {
    let disk = env.disks.first().ok_or("no disk")?;
    let serial = disk.serial().await.map_err(|e| format!("serial: {e}"))?;
    println!("disk of {} bytes, serial \"{serial}\", read-only {}", disk.capacity(), disk.is_read_only());
    if disk.is_read_only() {
        return match disk.write(0, vec![vec![0u8; 512]]).await.1 {
            Err(BlockError::ReadOnly) => {
                println!("a write was refused");
                Ok(())
            }
            other => Err(format!("a write to a read-only disk: {other:?}")),
        };
    }
    let layouts: [&[usize]; 6] = [&[512], &[4096], &[512, 4096, 1024], &[1 << 20], &[4096; 256], &[512; 1024]];
    let mut offset = 0;
    for pieces in layouts {
        write(disk, offset, pieces).await.map_err(|e| format!("write at {offset}: {e}"))?;
        check(disk, offset, pieces).await?;
        // The same bytes, cut otherwise.
        let total: usize = pieces.iter().sum();
        check(disk, offset, &[total]).await?;
        offset += total as u64;
    }
    disk.flush().await.map_err(|e| format!("flush: {e}"))?;
    println!("transfers are right");

    let base = 4 << 20;
    let writers: Vec<_> = (0..PARALLEL)
        .map(|i| {
            let disk = disk.clone();
            spawn(async move { write(&disk, base + i * 8192, &[4096, 4096]).await })
        })
        .collect();
    for writer in writers {
        writer.await.map_err(|e| format!("parallel write: {e}"))?;
    }
    // Dropped while under way: the driver keeps the buffers until the device is done.
    for i in 0..PARALLEL {
        let read = disk.read(base + i * 8192, vec![vec![0u8; 8192]]);
        let _ = guest_rt::time::timeout(guest_rt::time::Duration::ZERO, read).await;
    }
    for i in 0..PARALLEL {
        check(disk, base + i * 8192, &[8192]).await?;
    }
    println!("{PARALLEL} requests at once are right");

    let end = disk.capacity();
    let outcomes = [
        disk.read(end, vec![vec![0u8; 512]]).await.1,
        disk.read(end - 512, vec![vec![0u8; 1024]]).await.1,
        disk.read(u64::MAX - 511, vec![vec![0u8; 512]]).await.1,
        disk.read(0, vec![vec![0u8; MAX_TRANSFER + 512]]).await.1,
    ];
    if outcomes.iter().any(|r| !matches!(r, Err(BlockError::Range { .. }))) {
        return Err(format!("out of range: {outcomes:?}"));
    }
    let outcomes = [disk.read(1, vec![vec![0u8; 512]]).await.1, disk.read(0, vec![vec![0u8; 100]]).await.1];
    if outcomes.iter().any(|r| !matches!(r, Err(BlockError::Alignment { .. }))) {
        return Err(format!("not aligned: {outcomes:?}"));
    }
    println!("errors are right");
    Ok(())
}

/// Reads until it fails.
pub async fn run_on(env: &Env) -> Result<(), String> {
    let disk = env.disks.first().ok_or("no disk")?;
    println!("reading");
    loop {
        disk.read(0, vec![vec![0u8; 4096]]).await.1.map_err(|e| format!("read: {e}"))?;
    }
}

/// What [`verify_for_ever`] works on: so many blocks of 4 KiB, so many of them at once.
const VERIFIED: u64 = 256;
const AT_ONCE: u64 = 32;

/// Writes and reads back without end, other bytes each time, some of them across several rounds; says how far it is. Whatever is
/// not as it was written ends the guest.
pub async fn verify_for_ever(disk: BlockDevice) {
    for round in 1u64.. {
        for first in (0..VERIFIED).step_by(AT_ONCE as usize) {
            let jobs: Vec<_> = (first..first + AT_ONCE)
                .map(|block| {
                    let disk = disk.clone();
                    spawn(async move { one_block(&disk, block, round).await })
                })
                .collect();
            for job in jobs {
                if let Err(e) = job.await {
                    panic!("round {round}: {e}");
                }
            }
        }
        if let Err(e) = disk.flush().await {
            panic!("round {round}: flush: {e}");
        }
        println!("disk: round {round}");
    }
}

/// Every fourth block is written only every fourth round, and has to be what it was since.
async fn one_block(disk: &BlockDevice, block: u64, round: u64) -> Result<(), String> {
    let offset = block * 4096;
    let stamp = |round: u64| content(offset ^ round << 32, 4096);
    let last = if block.is_multiple_of(4) { round - round % 4 } else { round };
    if last == round || round == 1 {
        disk.write(offset, vec![stamp(last)]).await.1.map_err(|e| format!("write at {offset}: {e}"))?;
    }
    let (buffers, result) = disk.read(offset, vec![vec![0u8; 4096]]).await;
    result.map_err(|e| format!("read at {offset}: {e}"))?;
    if buffers[0] != stamp(last) {
        return Err(format!("the block at {offset} is not what was written"));
    }
    Ok(())
}
