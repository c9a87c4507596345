//! What cannot be, with the reason: checkpoints that cannot be taken, added to, or gone on with.

use super::*;

fn refused(vmm: &Vmm, body: &Value, status: u16, field: Option<&str>, text: &str) {
    let (got, problem) = ask(vmm, body);
    assert_eq!((got, problem["field"].as_str()), (status, field), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains(text), "{problem}");
}

#[test]
fn what_cannot_be_written_is_said_and_the_vm_runs_on() {
    let lab = Lab::new(1);
    let vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let path = lab.dir.path().join("one");
    fs::create_dir(&path).unwrap();
    refused(&vmm, &json!({ "path": path }), 400, Some("path"), "exists already");
    refused(&vmm, &json!({ "path": "" }), 400, Some("path"), "does not end in the name of a directory");
    refused(&vmm, &json!({ "path": lab.dir.path().join("no/one") }), 400, Some("path"), "No such file");
    refused(&vmm, &json!({ "path": "/proc/one" }), 400, Some("path"), "/proc/");
    fs::remove_dir(&path).unwrap();
    let parent = lab.dir.path().join("none");
    refused(&vmm, &json!({ "path": path, "parent": parent }), 400, Some("parent"), "has taken no checkpoint");
    echo.turn();

    // A file system with room for a part of it.
    let small = lab.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let _mount = Tmpfs::mount(&small, "256K");
    let vmm_inside = lab.respawn_inside(vmm);
    let mut echo = Echo::new(&lab);
    take(&vmm_inside, &json!({ "path": lab.dir.path().join("one") }));
    for stop in [false, true] {
        refused(&vmm_inside, &json!({ "path": small.join("one"), "stop": stop }), 400, Some("path"), "No space left");
        assert!(names(&small).is_empty(), "nothing of it is left");
        echo.turns(20);
    }
    assert_eq!(vmm_inside.state(), "running");
    // What was seen by the attempts that failed is not lost to the next.
    let two = lab.dir.path().join("two");
    take(&vmm_inside, &json!({ "path": two, "parent": lab.dir.path().join("one"), "stop": true }));
}

/// A small file system in a mount namespace of the calling thread.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, size: &str) -> Tmpfs {
        // SAFETY: no memory is involved; only this thread changes its namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
        for args in [
            vec!["--make-rprivate", "/"],
            vec!["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", at.to_str().unwrap()],
        ] {
            assert!(Command::new("mount").args(args).status().unwrap().success());
        }
        Tmpfs(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn only_the_last_checkpoint_of_an_unbroken_record_is_a_parent() {
    let lab = Lab::new(2);
    let vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let path = |name: &str| lab.dir.path().join(name);
    let (one, two) = (path("one"), path("two"));
    take(&vmm, &json!({ "path": one }));
    take(&vmm, &json!({ "path": two }));
    refused(&vmm, &json!({ "path": path("x"), "parent": one }), 400, Some("parent"), "is not the last one");
    refused(&vmm, &json!({ "path": path("x"), "parent": path("y") }), 400, Some("parent"), "no checkpoint there");
    // A port that does not take place uses the record.
    let failed = vmm.wait_port(vmm.port_to(4444));
    assert_eq!(failed["state"], "failed");
    refused(&vmm, &json!({ "path": path("x"), "parent": two }), 400, Some("parent"), "a port of the VM was tried");
    take(&vmm, &json!({ "path": path("three"), "track": false }));
    refused(&vmm, &json!({ "path": path("x"), "parent": path("three") }), 400, Some("parent"), "was not recorded");
    echo.turn();
}

#[test]
fn a_port_and_a_checkpoint_exclude_each_other() {
    let lab = Lab::new(2);
    let vmm = lab.boot("echo", &[]);
    let _echo = Echo::new(&lab);
    // Somebody who takes the connection and says nothing: the port waits.
    let silent = std::net::TcpListener::bind("127.0.0.1:4445").unwrap();
    let id = vmm.port_to(4445);
    let _connection = silent.accept().unwrap();
    refused(&vmm, &json!({ "path": lab.dir.path().join("one") }), 409, None, "port");
    vmm.api("DELETE", &format!("/v1/migrations/{id}"), None);
    assert_eq!(vmm.wait_port(id)["state"], "cancelled");
    eventually("the port lets go", || {
        (ask(&vmm, &json!({ "path": lab.dir.path().join("one") })).0 == 200).then_some(())
    });
}

#[test]
fn what_is_not_whole_is_refused_with_the_reason() {
    let lab = Lab::new(3);
    let mut vmm = lab.boot("echo", &[]);
    Echo::new(&lab).turn();
    let path = |name: &str| lab.dir.path().join(name);
    let one = path("one");
    take(&vmm, &json!({ "path": one }));
    let two = stop(&lab, &mut vmm, "two", Some(&one));
    let state = fs::read(one.join("state")).unwrap();
    let made = std::cell::Cell::new(0);
    let changed = |change: &dyn Fn(&Path)| {
        made.set(made.get() + 1);
        let dir = path(&format!("changed{}", made.get()));
        copy(&one, &dir);
        change(&dir);
        dir
    };
    let flip = |file: &Path, at: u64| {
        let file = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
    };
    let refuses = |dir: &Path, more: &[&str], text: &str| {
        let (status, said) = refusal(dir, more);
        assert_eq!(status, 1, "{said}");
        assert!(said.contains(text), "{text}: {said}");
    };
    let cut = |n: usize| changed(&|dir| fs::write(dir.join("state"), &state[..n]).unwrap());
    refuses(&cut(1000), &[], "ends too early");
    refuses(&cut(0), &[], "not a checkpoint");
    let damaged = changed(&|dir| flip(&dir.join("state"), 2000));
    refuses(&damaged, &[], "damaged");
    let foreign = changed(&|dir| fs::write(dir.join("state"), b"something else entirely, and long enough").unwrap());
    refuses(&foreign, &[], "not a checkpoint");
    let newer = changed(&|dir| {
        let mut state = state.clone();
        state[8] = 99;
        fs::write(dir.join("state"), state).unwrap();
    });
    refuses(&newer, &[], "checkpoint format 99, this build knows 1");
    let short =
        changed(&|dir| fs::File::options().write(true).open(dir.join("memory")).unwrap().set_len(1 << 20).unwrap());
    refuses(&short, &[], "its memory file was cut");
    let missing = changed(&|dir| fs::remove_file(dir.join("memory")).unwrap());
    refuses(&missing, &[], "No such file");
    // A page with content, and one without.
    let memory = fs::read(one.join("memory")).unwrap();
    let pages = || memory.chunks(4096).enumerate();
    let full = pages().filter(|(_, p)| p.iter().any(|b| *b != 0)).map(|(i, _)| i).nth(100).unwrap();
    let empty = pages().filter(|(_, p)| p.iter().all(|b| *b == 0)).map(|(i, _)| i).nth(3).unwrap();
    let bad = changed(&|dir| flip(&dir.join("memory"), full as u64 * 4096 + 7));
    for how in ["map", "read"] {
        refuses(&bad, &["--restore-memory", how], &format!("page {:#x} is damaged", full * 4096));
    }
    let not_zero = changed(&|dir| flip(&dir.join("memory"), empty as u64 * 4096));
    refuses(&not_zero, &[], "is not the zero it should be");
    // Parents.
    let orphan = path("elsewhere");
    fs::create_dir(&orphan).unwrap();
    copy(&two, &orphan.join("two"));
    refuses(&orphan.join("two"), &[], "its parent is missing");
    copy(&two, &orphan.join("one"));
    refuses(&orphan.join("two"), &[], "is not its parent");
    // Flags.
    let (status, said) = refusal(&path("nothing"), &[]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("--restore: "), "{said}");
    assert_eq!(refusal(&one, &["--image", "x"]).0, 2);
    let (status, said) = refusal(&one, &["--disk", "id=d,path=/dev/null"]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("disks[0].id: \"d\": the checkpoint has none"), "{said}");
    // After all that the checkpoint is what it was.
    let _vmm = restore(&lab, "restored", &two, &["--restore-unverified"]);
    Echo::new(&lab).turn();
}
