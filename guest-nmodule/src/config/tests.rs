use super::*;

#[test]
fn a_whole_line() {
    let config = Config::parse(
        "ip=10.77.0.10/24 gw=10.77.0.1 dmodule=10.77.0.20:7100 volume=a export=/x export=/y:b insecure no_root_squash \
         virtio_mmio.device=4K@0xd0000000:5",
    );
    assert_eq!(
        config,
        Ok(Config {
            address: Ipv4Addr::new(10, 77, 0, 10),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 77, 0, 1)),
            dmodule: SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 20), 7100),
            exports: vec![
                Export { path: "/x".into(), volume: "a".into() },
                Export { path: "/y".into(), volume: "b".into() }
            ],
            access: Access { root_squash: false, insecure_ports: true },
        })
    );
}

#[test]
fn defaults_are_safe() {
    let config = Config::parse("ip=10.0.0.1/8 dmodule=10.0.0.2:7100").unwrap();
    assert_eq!(config.access, Access { root_squash: true, insecure_ports: false });
    assert_eq!(config.exports, [Export { path: "/vol0".into(), volume: "vol0".into() }]);
    assert_eq!(config.gateway, None);
    let config = Config::parse("ip=10.0.0.1/8,10.0.0.9 dmodule=10.0.0.2:7100").unwrap();
    assert_eq!((config.prefix, config.gateway), (8, Some(Ipv4Addr::new(10, 0, 0, 9))));
}

#[test]
fn errors_name_the_word() {
    let error = |text| Config::parse(text).unwrap_err().to_string();
    assert_eq!(error("dmodule=10.0.0.2:7100"), "command line: ip= is missing");
    assert_eq!(error("ip=10.0.0.1/8"), "command line: dmodule= is missing");
    assert!(error("ip=10.0.0.1 dmodule=10.0.0.2:7100").contains("ip=10.0.0.1: the length of the prefix"));
    assert!(error("ip=10.0.0.1/33 dmodule=10.0.0.2:7100").contains("1 to 32"));
    assert!(error("ip=10.0.0/8 dmodule=10.0.0.2:7100").contains("ip=10.0.0"));
    assert!(error("ip=10.0.0.1/8 dmodule=10.0.0.2").contains("dmodule=10.0.0.2"));
    assert!(error("ip=10.0.0.1/8 dmodule=1.2.3.4:5 export=x").contains("not an absolute path"));
    assert!(error("ip=10.0.0.1/8 dmodule=1.2.3.4:5 export=/x:").contains("volume is missing"));
}
