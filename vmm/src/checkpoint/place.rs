//! What a restored VM has of this host: a function of the checkpoint's configuration and the request.

use super::RestoreRequest;
use crate::config::{Config, ID_MAX};
use crate::error::{Error, FieldError, Result};

/// Puts what was given in the place of what the checkpoint says. Reports every mistake at once, by the fields of the request; what the
/// checkpoint says and is not possible here, by the field it would have to be given in.
pub(super) fn place(mut config: Config, request: &RestoreRequest) -> Result<Config> {
    let mut errors = Vec::new();
    if let Some(name) = &request.name {
        config.name.clone_from(name);
    }
    if config.name.len() > ID_MAX {
        errors.push(FieldError::new("name", format!("longer than {ID_MAX} bytes")));
    }
    for (i, given) in request.nets.iter().enumerate() {
        let Some(net) = config.nets.iter_mut().find(|n| n.id == given.id) else {
            errors.push(unknown("nets", i, &given.id, config.nets.iter().map(|n| n.id.as_str())));
            continue;
        };
        net.tap.clone_from(&given.tap);
        net.fd = given.fd;
        net.vhost = given.vhost;
        net.vhost_user = None;
        if given.vhost_user.is_some() {
            errors.push(FieldError::new(format!("nets[{i}].vhost_user"), "a saved device needs a tap"));
        }
    }
    for (i, given) in request.disks.iter().enumerate() {
        let Some(disk) = config.disks.iter_mut().find(|d| d.id == given.id) else {
            errors.push(unknown("disks", i, &given.id, config.disks.iter().map(|d| d.id.as_str())));
            continue;
        };
        disk.path.clone_from(&given.path);
        disk.format = given.format;
        disk.direct = given.direct;
        if given.vhost_user.is_some() {
            errors.push(FieldError::new(format!("disks[{i}].vhost_user"), "a saved device needs an image"));
        }
    }
    match (&mut config.vsock, &request.vsock) {
        (Some(vsock), Some(path)) => vsock.path.clone_from(path),
        (None, Some(_)) => errors.push(FieldError::new("vsock", "the checkpoint has no such device")),
        (_, None) => {}
    }
    if let Some(serial) = &request.serial {
        config.serial.clone_from(serial);
    }
    config.arbiter = request.arbiter.or(config.arbiter);
    config.tls.clone_from(&request.tls);
    for (i, net) in config.nets.iter().enumerate() {
        // A descriptor is its process's alone.
        if net.fd.is_some() && !request.nets.iter().any(|n| n.id == net.id) {
            let why = format!("{} had an open tap of the process that was saved: give it one of this host", net.id);
            errors.push(FieldError::new(format!("nets[{i}].fd"), why));
        } else {
            errors.extend(net.mistakes(&format!("nets[{i}]")));
        }
    }
    for (i, disk) in config.disks.iter().enumerate() {
        errors.extend(disk.mistakes(&format!("disks[{i}]")));
    }
    if errors.is_empty() { Ok(config) } else { Err(Error::Config(errors)) }
}

fn unknown<'a>(list: &str, index: usize, id: &str, known: impl Iterator<Item = &'a str>) -> FieldError {
    let known: Vec<&str> = known.collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    FieldError::new(format!("{list}[{index}].id"), format!("{id:?}: the checkpoint has {known}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{DiskConfig, NetConfig};

    fn saved() -> Config {
        let mut config = Config::for_image("/gone".into());
        config.nets = vec![
            NetConfig { id: "a".into(), tap: Some("tap0".into()), ..NetConfig::default() },
            NetConfig { id: "b".into(), fd: Some(7), ..NetConfig::default() },
        ];
        config
    }

    #[test]
    fn what_is_given_counts_and_the_rest_stays() {
        let mut request = RestoreRequest::new("x".into());
        request.nets = vec![NetConfig { id: "b".into(), tap: Some("tap9".into()), ..NetConfig::default() }];
        request.arbiter = Some("127.0.0.1:1".parse().unwrap());
        let config = place(saved(), &request).unwrap();
        assert_eq!(config.nets[0], saved().nets[0]);
        assert_eq!((config.nets[1].tap.as_deref(), config.nets[1].fd), (Some("tap9"), None));
        assert_eq!(config.arbiter, request.arbiter);
    }

    #[test]
    fn every_mistake_has_its_field() {
        let mut request = RestoreRequest::new("x".into());
        request.nets = vec![NetConfig { id: "c".into(), tap: Some("tap9".into()), ..NetConfig::default() }];
        request.disks = vec![DiskConfig { id: "d".into(), path: "/y".into(), ..DiskConfig::default() }];
        request.vsock = Some("v".into());
        request.name = Some("n".repeat(ID_MAX + 1));
        let Err(Error::Config(errors)) = place(saved(), &request) else { panic!() };
        let fields: Vec<_> = errors.iter().map(|e| e.field.as_str()).collect();
        assert_eq!(fields, ["name", "nets[0].id", "disks[0].id", "vsock", "nets[1].fd"]);
        assert!(errors[1].message.contains("a, b"), "{errors:?}");
    }
}
