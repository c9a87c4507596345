//! The end of the demo: the N-module is saved in a checkpoint and goes on from it in another process, with its client's connection, and a
//! second N-module is made from a template, on the other host, for the same volume.
use super::{Connection, MIB, ms, nfs_connection};
use crate::artifacts::Artifacts;
use crate::copy::{self, Copy};
use crate::instances::{self, Instance};
use crate::lab::Lab;
use crate::modules::{self, Module};
use crate::report::Progress;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The file that is copied in while the N-module is saved, and out through the instance.
const SIZE: u64 = 256 * MIB;
/// The checkpoint begins when this much of it is through.
const SAVE_AFTER: u64 = SIZE / 4;
/// The process of a VM that has been saved ends within this time.
const END_LIMIT: Duration = Duration::from_secs(10);
/// The instance.
const SECOND: Instance = Instance(1);

/// What was seen.
pub struct Saved {
    checkpoint_mib: u64,
    /// From the request for the checkpoint to the first reply of the process that went on from it.
    away: Duration,
    same_connection: bool,
    spawn: Duration,
    /// The file that went in through one N-module came out through the other.
    pub ok: bool,
}

impl Saved {
    /// As the results have it.
    pub fn json(&self) -> Value {
        json!({
            "checkpoint_mib": self.checkpoint_mib,
            "checkpoint_to_reply_ms": super::round(ms(self.away)),
            "same_connection": self.same_connection,
            "spawn_to_reply_ms": super::round(ms(self.spawn)),
            "sha256_ok": self.ok,
        })
    }
}

/// Saves `nmodule`, which runs on `node1`, in the middle of a copy, lets it go on, spawns an instance on `client1`.
pub fn run(lab: &Lab, artifacts: &Artifacts, mut nmodule: Module) -> Result<Saved> {
    let (file, back) = (lab.data_dir().join("third"), lab.data_dir().join("third-back"));
    copy::random_file(&file, SIZE)?;
    let log = lab.state_dir().join("nfs-cp.log");
    let client = &lab.client1;

    let progress = Progress::start("a copy, and the N-module saved meanwhile with its client's connection");
    let mut copy = Copy::start(client, &file.display().to_string(), &copy::url("third"), SIZE, &log)?;
    while copy.copied() < SAVE_AFTER && copy.runs()? {
        std::thread::sleep(Duration::from_millis(2));
    }
    let connection: Connection = nfs_connection(client, copy.pid())?;
    let saved = lab.data_dir().join("saved");
    let asked = Instant::now();
    let report = nmodule.api.post("/v1/vm/checkpoint", &json!({ "path": saved, "stop": true }))?;
    nmodule.daemon.wait(END_LIMIT).context("the vmm must end when its VM has been saved")?;
    let bytes = report["bytes"].as_u64().with_context(|| format!("a checkpoint without a size: {report}"))?;
    progress.done(&format!("{} MiB in {:.0} ms", bytes / MIB, ms(asked.elapsed())));

    let mut progress = Progress::start("going on from the checkpoint in another process");
    let (_nmodule, ready) = modules::restore_nmodule(lab, artifacts, &lab.node1, &saved, "map")?;
    let away = _nmodule.started + ready - asked;
    let same_connection = nfs_connection(client, copy.pid()).is_ok_and(|now| connection.is_same(&now));
    copy.finish(&mut progress)?;
    progress.done(&format!("answers NFS after {:.0} ms, {:.0} ms after the request", ms(ready), ms(away)));

    let progress = Progress::start("making a template, and an N-module of it on client1");
    let template = instances::template(lab, artifacts)?;
    SECOND.prepare(lab, client)?;
    let (_second, spawn) = SECOND.serve(lab, artifacts, client, &template)?;
    progress.done(&format!("answers NFS after {:.0} ms", ms(spawn)));

    let mut progress = Progress::start("reading the file through it");
    Copy::start(client, &SECOND.url("third"), &back.display().to_string(), SIZE, &log)?.finish(&mut progress)?;
    let ok = copy::sha256(&file)? == copy::sha256(&back)?;
    progress.done(if ok { "the same" } else { "DIFFERENT" });
    if !same_connection {
        bail!("the client had to make a new connection when the N-module went on from its checkpoint");
    }
    Ok(Saved { checkpoint_mib: bytes / MIB, away, same_connection, spawn, ok })
}
