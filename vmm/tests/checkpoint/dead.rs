//! Pages without content: they are not in the file, nobody misses them, and what a parent has of them does not come back.
use super::*;

/// A guest whose heap changes all the time and who compares what it has: saved in a chain while it works, and restored both ways.
#[test]
fn free_pages_are_left_out() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("heap", &[]);
    let mut echo = Echo::new(&lab);
    let path = |i: usize| lab.dir.path().join(format!("one{i}"));
    let mut freed = 0;
    for i in 0..6 {
        echo.turns(100);
        let parent = (i > 0).then(|| path(i - 1));
        let report = take(&vmm, &json!({ "path": path(i), "parent": parent }));
        println!("{report}");
        let (all, raw) = (report["pages"].as_u64().unwrap(), report["raw_pages"].as_u64().unwrap());
        let blocks = fs::metadata(path(i).join("memory")).unwrap().blocks();
        assert!(blocks * 512 <= raw * 4096 + (1 << 20), "{raw} pages in {blocks} blocks");
        freed += all - raw;
    }
    // Written since the parent and free again, hundreds each time; pages of zeros the guest writes few. A look at the map that met an
    // allocation each time is possible.
    assert!(freed > 500, "{freed} pages");
    let last = stop(&lab, &mut vmm, "last", Some(&path(5)));
    for how in ["map", "read"] {
        let mut copy = restore(&lab, how, &last, &["--restore-memory", how]);
        let mut echo = Echo::new(&lab);
        echo.turns(200);
        assert_eq!(copy.state(), "running", "{}", lab.console(how));
        copy.signal(libc::SIGKILL);
        copy.wait();
    }
}
