//! What may be mounted, by whom, and as whom requests then run.
use crate::rpc::Auth;
use alloc::{string::String, vec::Vec};
use fabric::fs::Credential;

/// User and group a squashed or unauthenticated caller becomes.
pub const NOBODY: u32 = 65534;
/// First port that is not privileged.
const UNPRIVILEGED: u16 = 1024;

/// A volume, and the path clients mount it by; its directories can be mounted too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Absolute path.
    pub path: String,
    /// Name of the volume.
    pub volume: String,
}

/// Who is trusted with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Whether root on a client is nobody here.
    pub root_squash: bool,
    /// Whether callers need not use a privileged port (below 1024).
    pub insecure_ports: bool,
}

impl Default for Access {
    /// The safe choice.
    fn default() -> Self {
        Access { root_squash: true, insecure_ports: false }
    }
}

impl Access {
    /// Whether a call from this port may be served.
    pub fn allows_port(&self, port: u16) -> bool {
        self.insecure_ports || port < UNPRIVILEGED
    }

    /// As whom a call runs.
    pub fn credential(&self, auth: Auth) -> Credential {
        match auth {
            Auth::None => Credential { uid: NOBODY, gid: NOBODY, groups: Vec::new() },
            Auth::Sys(mut credential) => {
                if self.root_squash {
                    let ids = [&mut credential.uid, &mut credential.gid];
                    for id in ids.into_iter().chain(credential.groups.iter_mut()).filter(|id| **id == 0) {
                        *id = NOBODY;
                    }
                }
                credential
            }
        }
    }
}

/// Names of a path between its slashes, without `.`.
pub fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}

/// The export a path lies in (the longest one), by index, and the path's remaining names.
pub fn find<'a>(exports: &[Export], path: &'a [u8]) -> Option<(usize, Vec<&'a [u8]>)> {
    let mut best: Option<(usize, usize)> = None;
    for (index, export) in exports.iter().enumerate() {
        let mut names = components(path);
        let prefix = components(export.path.as_bytes());
        let length = prefix.clone().count();
        let inside = prefix.into_iter().all(|name| names.next() == Some(name));
        if inside && best.is_none_or(|(_, longest)| length > longest) {
            best = Some((index, length));
        }
    }
    best.map(|(index, length)| (index, components(path).skip(length).collect()))
}

#[cfg(test)]
mod tests;
