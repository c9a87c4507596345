//! Instances of one template of the N-module serve one D-module at the same time.
use crate::{cluster, one_at_a_time};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use xtask::copy;
use xtask::instances::{Instance, all_read, template};
use xtask::probe;

#[test]
fn two_instances_of_a_template_serve_one_volume() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let lab = &cluster.lab;
    let template = template(lab, &cluster.artifacts).unwrap();
    let instances = [Instance(1), Instance(2)];
    let mut modules = Vec::new();
    for instance in instances {
        instance.prepare(lab, &lab.node1).unwrap();
        modules.push(instance.serve(lab, &cluster.artifacts, &lab.node1, &template).unwrap().0);
    }
    // What they have mapped is theirs.
    std::fs::remove_dir_all(&template).unwrap();
    let cp = |from: &str, to: &str| lab.client1.output(Command::new("nfs-cp").args([from, to])).unwrap();
    let files = instances.map(|i| {
        let file = lab.data_dir().join(format!("in{}", i.0));
        copy::random_file(&file, (16 << 20) + u64::from(i.0)).unwrap();
        (file.to_str().unwrap().to_owned(), i)
    });
    std::thread::scope(|scope| {
        for (file, instance) in &files {
            scope.spawn(|| cp(file, &instance.url(&format!("from{}", instance.0))));
        }
    });
    // Each finds what the other has written.
    let [one, two] = instances;
    for ((file, from), by) in files.iter().zip([two, one]) {
        let back = lab.data_dir().join(format!("out{}", from.0));
        cp(&by.url(&format!("from{}", from.0)), back.to_str().unwrap());
        assert_eq!(copy::sha256(file.as_ref()).unwrap(), copy::sha256(&back).unwrap());
    }
}

/// More than the 64 VMs that a D-module knew once: each has an ownership record and a session.
#[test]
fn a_hundred_instances_at_once_read_through_sessions_of_their_own() {
    const MANY: u8 = 100;
    let _one = one_at_a_time();
    let cluster = cluster();
    let lab = &cluster.lab;
    let template = template(lab, &cluster.artifacts).unwrap();
    for i in 0..MANY {
        Instance(i).prepare(lab, &lab.node1).unwrap();
    }
    let start = |i| Instance(i).start(lab, &cluster.artifacts, &lab.node1, &template).unwrap();
    let modules: Vec<_> = (0..MANY).map(start).collect();
    let never = AtomicBool::new(false);
    for (i, module) in modules.iter().enumerate() {
        let first = probe::first_reply(&lab.client1, Instance(i as u8).nfs(), Duration::from_secs(120), &never);
        assert!(first.is_ok(), "{first:?}: {}", module.quote());
    }
    all_read(lab, MANY, "first").unwrap();
    // They all have their sessions still.
    all_read(lab, MANY, "second").unwrap();
}
