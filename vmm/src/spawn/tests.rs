use super::*;

#[test]
fn words_of_the_instance_take_the_place_of_the_template_s() {
    let line = |template, own| instance_cmdline(template, own);
    assert_eq!(line("template volume=v log=warn", "ip=10.0.0.1/24"), "volume=v log=warn ip=10.0.0.1/24");
    assert_eq!(line("export=/a export=/b template insecure", "export=/c"), "insecure export=/c");
    assert_eq!(line("template", ""), "");
    assert_eq!(line("ip=1 templates=2 template", "ip=3 ip=4"), "templates=2 ip=3 ip=4");
}

fn template() -> Config {
    let mut config = Config::for_image("image".into());
    config.cmdline = "template volume=v".into();
    config.nets = vec![NetConfig { id: "lan".into(), tap: Some("tap0".into()), ..NetConfig::default() }];
    config
}

fn request() -> SpawnRequest {
    SpawnRequest {
        template: "t".into(),
        vm_id: 7,
        name: None,
        cmdline: "ip=10.0.0.1/24".into(),
        // The one interface there is everywhere.
        nets: vec![NetConfig { id: "lan".into(), tap: Some("lo".into()), ..NetConfig::default() }],
        arbiter: None,
        serial: None,
        tls: None,
        replace: false,
    }
}

#[test]
fn an_instance_has_addresses_of_its_own() {
    let mac = || instance_config(&template(), &request()).unwrap().nets[0].mac.unwrap();
    assert_ne!(mac(), mac(), "random where none is given");
    let config = instance_config(&template(), &request()).unwrap();
    assert_eq!((config.vm_id, config.cmdline.as_str()), (7, "volume=v ip=10.0.0.1/24"));
    assert_eq!(config.nets[0].tap.as_deref(), Some("lo"));
}

#[test]
fn every_mistake_is_named() {
    let fields = |change: fn(&mut SpawnRequest)| {
        let mut request = request();
        change(&mut request);
        match instance_config(&template(), &request) {
            Err(Error::Config(errors)) => errors.into_iter().map(|e| e.field).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(fields(|r| r.vm_id = 0), ["vm_id"]);
    assert_eq!(fields(|r| r.nets.clear()), ["nets[0]"]);
    assert_eq!(fields(|r| r.nets[0].tap = Some("no-such-tap".into())), ["nets[0].tap"]);
    assert_eq!(fields(|r| r.nets[0].tap = None), ["nets[0]"]);
    assert_eq!(fields(|r| r.nets[0].id = "wan".into()), ["nets[0]", "nets[0].id"]);
    assert_eq!(fields(|r| r.cmdline += " template"), ["cmdline"]);
}

#[test]
fn a_vm_id_without_a_known_owner_is_refused() {
    let mut config = template();
    // Nobody listens at port 1.
    config.arbiter = Some("127.0.0.1:1".parse().unwrap());
    let owner = OwnerId([1, 2]);
    assert!(matches!(claimable(&config, false, owner), Err(Error::Conflict(_))));
    assert!(claimable(&config, true, owner).is_ok());
    config.arbiter = None;
    assert!(claimable(&config, false, owner).is_ok());
}
