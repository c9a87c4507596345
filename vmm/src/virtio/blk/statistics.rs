//! What a disk counts.
//!
//! Always true: a request counts once, when it is done, as done or as failed.

use super::request::{Operation, Request};
use crate::metrics::Exposition;
use crate::stats::{Counter, Histogram};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct BlkStats {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    discards: Counter,
    zeroed: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
    pub errors: Counter,
    pub bounced: Counter,
    read_time: Histogram,
    write_time: Histogram,
    flush_time: Histogram,
}

impl BlkStats {
    /// A request that was done without an error.
    pub fn count(&self, request: &Request) {
        let (bytes, time) = (u64::from(request.len), request.since.elapsed());
        match request.operation {
            Operation::Read => {
                self.reads.inc();
                self.read_bytes.add(bytes);
                self.read_time.record(time);
            }
            Operation::Write => {
                self.writes.inc();
                self.written_bytes.add(bytes);
                self.write_time.record(time);
            }
            Operation::Flush => {
                self.flushes.inc();
                self.flush_time.record(time);
            }
            Operation::Discard => self.discards.inc(),
            Operation::WriteZeroes { .. } => self.zeroed.inc(),
        }
    }

    /// As metrics.
    pub fn write(&self, out: &mut Exposition, labels: &[(&str, &str)]) {
        for (name, help, counter) in [
            ("vmm_blk_reads_total", "Reads completed.", &self.reads),
            ("vmm_blk_read_bytes_total", "Bytes read.", &self.read_bytes),
            ("vmm_blk_writes_total", "Writes completed.", &self.writes),
            ("vmm_blk_written_bytes_total", "Bytes written.", &self.written_bytes),
            ("vmm_blk_flushes_total", "Flushes completed.", &self.flushes),
            ("vmm_blk_discards_total", "Discards completed.", &self.discards),
            ("vmm_blk_write_zeroes_total", "Ranges filled with zeroes.", &self.zeroed),
            ("vmm_blk_errors_total", "Requests answered with an error.", &self.errors),
            ("vmm_blk_bounced_total", "Requests that were copied, as the image needs other alignment.", &self.bounced),
        ] {
            out.counter(name, help, labels, counter);
        }
        out.histogram("vmm_blk_read_seconds", "Time reads took on the host.", labels, &self.read_time);
        out.histogram("vmm_blk_write_seconds", "Time writes took on the host.", labels, &self.write_time);
        out.histogram("vmm_blk_flush_seconds", "Time flushes took on the host.", labels, &self.flush_time);
    }
}
