use super::cli::{Args, Order};
use super::*;
use clap::Parser;

fn fields(r: Result<Order>) -> Vec<String> {
    match r {
        Err(Error::Config(e)) => e.into_iter().map(|e| e.field).collect(),
        other => panic!("{other:?}"),
    }
}

fn order(args: &[&str]) -> Result<Order> {
    Args::parse_from(std::iter::once("vmm").chain(args.iter().copied())).order()
}

#[test]
fn json_errors_name_the_field() {
    for (json, field) in [
        (r#"{"image":"x","nets":[{"tap":"t0"},{"tap":"t1","mac":"zz"}]}"#, "nets[1].mac"),
        (r#"{"image":"x","memory":"32Q"}"#, "memory"),
        (r#"{"image":"x","disks":[{"path":"d","readonli":true}]}"#, "disks[0].readonli"),
        (r#"{"image":"x","colour":1}"#, "colour"),
        (r#"{"image":"x","boot":"bios"}"#, "boot"),
        (r#"[]"#, "config"),
        (r#"{"image":"x"} trailing"#, "config"),
        (r#"{"image":"x","arbiter":"nowhere"}"#, "arbiter"),
    ] {
        match Config::from_json(json.as_bytes()) {
            Err(Error::Config(e)) => assert_eq!(e[0].field, field, "{json}: {}", e[0].message),
            other => panic!("{json}: {other:?}"),
        }
    }
}

#[test]
fn all_mistakes_of_form_are_reported_at_once() {
    let json = br#"{"colour":1,"memory":"32Q","disks":[{"path":"a"},{"path":"b","readonli":true},7],
        "nets":[{"tap":"t","mac":"zz"},{"tap":"t","mtu":"x"}],"boot":"bios"}"#;
    let Err(Error::Config(errors)) = Config::from_json(json) else { panic!() };
    let mut fields: Vec<_> = errors.iter().map(|e| e.field.as_str()).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["boot", "colour", "disks[1].readonli", "disks[2]", "memory", "nets[0].mac", "nets[1].mtu"]);
}

#[test]
fn a_list_is_no_object() {
    for (json, field) in [
        (r#"{"image":"x","disks":[{"path":"a"},["id","b"]]}"#, "disks[1]"),
        (r#"{"image":"x","balloon":[0,true,true,0]}"#, "balloon"),
        (r#"{"image":"x","nets":[{"tap":"t","rx_limits":[null,null]}]}"#, "nets[0].rx_limits"),
    ] {
        match Config::from_json(json.as_bytes()) {
            Err(Error::Config(e)) => assert_eq!(e[0].field, field, "{json}: {}", e[0].message),
            other => panic!("{json}: {other:?}"),
        }
    }
    assert!(Config::from_json(br#"{"image":"x","disks":[],"nets":[{"tap":"t","rx_limits":{}}]}"#).is_ok());
}

#[test]
fn parts_are_checked_for_themselves() {
    let parts = |json: &str| serde_json::from_str(json).unwrap();
    let empty = || Config::for_image(PathBuf::new());
    let config = empty().with_parts(parts(r#"{"memory":"32M","nets":[{"tap":"t0"}]}"#)).unwrap();
    assert_eq!((config.memory.bytes(), config.nets[0].id.as_str()), (32 << 20, "net0"));
    let config = config.with_parts(parts(r#"{"memory":null}"#)).unwrap();
    assert_eq!((config.memory, config.nets.len()), (MemorySize::default(), 1));
    for (json, field) in [
        (r#"{"memory":"3M"}"#, "memory"),
        (r#"{"image":"/nonexistent"}"#, "image"),
        (r#"{"disks":[{"path":"/nonexistent"}]}"#, "disks[0].path"),
        (r#"{"nets":[{"tap":"t0"},{"tap":"t0"}]}"#, "nets[1].tap"),
        (r#"{"nets":7}"#, "nets"),
        (r#"{"colour":1}"#, "colour"),
    ] {
        match empty().with_parts(parts(json)) {
            Err(Error::Config(e)) => assert_eq!(e[0].field, field, "{json}: {}", e[0].message),
            other => panic!("{json}: {other:?}"),
        }
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let mut config = Config::from_json(
        br#"{"image":"/nonexistent","memory":"3M","nets":[{"id":"a"},{"id":"a","tap":"much-too-long-a-name"},
            {"tap":"t","mac":"01:00:00:00:00:00","mtu":10}],"disks":[{"path":"/nonexistent"}]}"#,
    )
    .unwrap();
    let Err(Error::Config(errors)) = config.validate() else { panic!() };
    let mut fields: Vec<_> = errors.iter().map(|e| e.field.as_str()).collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        ["disks[0].path", "image", "memory", "nets[0]", "nets[1].id", "nets[1].tap", "nets[2].mac", "nets[2].mtu"]
    );
}

#[test]
fn flags_and_file_go_together() {
    let dir = tempfile::tempdir().unwrap();
    let (image, disk, json) = (dir.path().join("i"), dir.path().join("d"), dir.path().join("vm.json"));
    std::fs::write(&image, "").unwrap();
    std::fs::write(&disk, "").unwrap();
    std::fs::write(&json, format!(r#"{{"image":{image:?},"memory":"32M","nets":[{{"tap":"t0"}}]}}"#)).unwrap();
    let disk_flag = format!("path={},readonly=true", disk.display());
    let args =
        ["--config", json.to_str().unwrap(), "--memory", "64M", "--net", "tap=t1,mac=02:00:00:00:00:01,mtu=9000"];
    let Ok(Order::Boot(c)) = order(&[&args[..], &["--disk", &disk_flag, "--vm-id", "7"]].concat()) else { panic!() };
    assert_eq!(c.memory.bytes(), 64 << 20);
    assert_eq!(c.vm_id, 7);
    assert_eq!(c.nets[1].mac, Some(MacAddress([2, 0, 0, 0, 0, 1])));
    assert_eq!((c.nets[0].id.as_str(), c.nets[1].id.as_str(), c.disks[0].id.as_str()), ("net0", "net1", "disk0"));
    assert!(c.disks[0].readonly);
    // what is written can be read
    let again = Config::from_json(serde_json::to_string(&c).unwrap().as_bytes()).unwrap();
    assert_eq!(again, c);
}

#[test]
fn wrong_flags_are_named() {
    assert_eq!(
        fields(order(&["--memory", "x", "--net", "tap=t0,mut=1", "--disk", "readonly=true"])),
        ["--net[0].mut", "--disk[0].path", "--memory", "--image",]
    );
    assert_eq!(fields(order(&["--receive", "127.0.0.1:1", "--net", "tap=t0"])), ["--net[0]", "--tls"]);
    // of a disk that is received only where it is
    assert_eq!(fields(order(&["--receive", "127.0.0.1:1", "--tls", "off", "--disk", "path=d"])), ["--disk[0]"]);
    assert_eq!(
        fields(order(&["--receive", "127.0.0.1:1", "--tls", "off", "--disk", "id=a,path=d,format=qcow2"])),
        ["--disk[0]"]
    );
    assert_eq!(
        fields(order(&["--receive", "127.0.0.1:1", "--tls", "off", "--disk", "id=a,vhost_user=s"])),
        ["--disk[0]"]
    );
    match order(&["--receive", "127.0.0.1:1", "--tls", "off", "--disk", "id=a,path=d,direct=true"]) {
        Ok(Order::Receive(host)) => assert_eq!((host.disks[0].id.as_str(), host.disks[0].direct), ("a", Some(true))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn keys_are_given_whole_or_switched_off() {
    let receive = |tls: &str| fields(order(&["--receive", "127.0.0.1:1", "--tls", tls]));
    assert_eq!(receive("cert=a,key=b"), ["--tls.ca"]);
    assert_eq!(receive("cert=a,key=b,ca=c,colour=d"), ["--tls.colour"]);
    assert_eq!(receive("on"), ["--tls"]);
    assert_eq!(receive("cert=/nonexistent,key=/,ca=/dev/null"), ["--tls.cert", "--tls.key", "--tls.ca"]);
    match order(&["--receive", "127.0.0.1:1", "--tls", "off"]) {
        Ok(Order::Receive(config)) => assert_eq!(config.tls, TlsConfig::Off),
        other => panic!("{other:?}"),
    }
    for (json, field) in [
        (r#"{"image":"x","tls":"on"}"#, "tls"),
        (r#"{"image":"x","tls":7}"#, "tls"),
        (r#"{"image":"x","tls":["off"]}"#, "tls"),
        (r#"{"image":"x","tls":{"cert":"a","key":"b"}}"#, "tls"),
        (r#"{"image":"x","tls":{"cert":"a","key":"b","ca":7}}"#, "tls.ca"),
        (r#"{"image":"x","tls":{"cert":"a","key":"b","ca":"c","colour":1}}"#, "tls.colour"),
    ] {
        match Config::from_json(json.as_bytes()) {
            Err(Error::Config(e)) => assert_eq!(e[0].field, field, "{json}: {}", e[0].message),
            other => panic!("{json}: {other:?}"),
        }
    }
    for json in [r#"{"image":"x","tls":"off"}"#, r#"{"image":"x","tls":{"cert":"a","key":"b","ca":"c","issuer":"d"}}"#]
    {
        let config = Config::from_json(json.as_bytes()).unwrap();
        assert_eq!(Config::from_json(serde_json::to_string(&config).unwrap().as_bytes()).unwrap(), config);
    }
}

#[test]
fn sizes() {
    for (text, bytes) in [("4096", 4096), ("16K", 16 << 10), ("32M", 32 << 20), ("1G", 1 << 30), ("1GiB", 1 << 30)] {
        assert_eq!(text.parse::<MemorySize>().unwrap().bytes(), bytes);
    }
    for text in ["", "M", "-1", "1.5G", "99999999999999999999", "18446744073709551615K"] {
        assert!(text.parse::<MemorySize>().is_err(), "{text}");
    }
}

#[test]
fn a_file_without_an_end_is_refused() {
    match Config::read(Path::new("/dev/zero")) {
        Err(Error::Config(e)) => assert_eq!(e[0].field, "config"),
        other => panic!("{other:?}"),
    }
}
