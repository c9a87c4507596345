//! Every procedure, asked by a client that was not written here (nfs3_client), over TCP on loopback.
#![allow(clippy::unwrap_used)] // these are tests
use nfs::engine::{Config, Engine, mappings};
use nfs3_client::nfs3_types::nfs3::*;
use nfs3_client::nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use nfs3_client::tokio::{TokioConnector, TokioIo};
use nfs3_client::{Nfs3Connection, Nfs3ConnectionBuilder};
use std::rc::Rc;
use support::{config, serve::serve, service};
use tokio::net::{TcpListener, TcpStream};

mod support;

type Connection = Nfs3Connection<TokioIo<TcpStream>>;

fn as_user(uid: u32) -> opaque_auth<'static> {
    let machinename = Opaque::owned(b"test".to_vec());
    opaque_auth::auth_unix(&auth_unix { stamp: 1, machinename, uid, gid: uid, gids: vec![] })
}

/// Serves a new file system on loopback while `test` runs, with a connection as root and one as user 1000.
fn with_server<F: Future<Output = ()>>(test: impl FnOnce(Connection, Connection) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = Config { mappings: mappings(port, false, port, port), ..config() };
        tokio::task::spawn_local(serve(Rc::new(Engine::new(service(), config)), listener));
        let connect = |uid| {
            Nfs3ConnectionBuilder::new(TokioConnector, "127.0.0.1", "/vol0")
                .connect_from_privileged_port(false)
                .portmapper_port(port)
                .credential(as_user(uid))
                .mount()
        };
        let (root, user) = (connect(0).await.unwrap(), connect(1000).await.unwrap());
        test(root, user).await;
    });
}

fn at<'a>(dir: &nfs_fh3, name: &'a str) -> diropargs3<'a> {
    diropargs3 { dir: dir.clone(), name: name.as_bytes().into() }
}

fn mode(mode: u32) -> sattr3 {
    sattr3 { mode: Nfs3Option::Some(mode), ..Default::default() }
}

fn status<T: std::fmt::Debug, E>(result: Nfs3Result<T, E>) -> nfsstat3 {
    match result {
        Nfs3Result::Ok(ok) => panic!("should have failed: {ok:?}"),
        Nfs3Result::Err((status, _)) => status,
    }
}

fn some<T: nfs3_client::nfs3_types::xdr_codec::Pack + nfs3_client::nfs3_types::xdr_codec::Unpack>(
    option: Nfs3Option<T>,
) -> T {
    match option {
        Nfs3Option::Some(value) => value,
        Nfs3Option::None => panic!("missing from the reply"),
    }
}

/// Both halves of wcc_data are there, and tell of a change.
fn changed(wcc: wcc_data) {
    let (before, after) = (some(wcc.before), some(wcc.after));
    assert!((before.ctime.seconds, before.ctime.nseconds) < (after.ctime.seconds, after.ctime.nseconds));
}

async fn create(client: &mut Connection, dir: &nfs_fh3, name: &str) -> nfs_fh3 {
    let how = createhow3::GUARDED(mode(0o644));
    let made = client.create(&CREATE3args { where_: at(dir, name), how }).await.unwrap().unwrap();
    changed(made.dir_wcc);
    assert_eq!(some(made.obj_attributes).mode, 0o644);
    some(made.obj)
}

async fn write(client: &mut Connection, file: &nfs_fh3, offset: u64, data: &[u8], stable: stable_how) -> WRITE3resok {
    let args =
        WRITE3args { file: file.clone(), offset, count: data.len() as u32, stable, data: Opaque::borrowed(data) };
    client.write(&args).await.unwrap().unwrap()
}

async fn read(client: &mut Connection, file: &nfs_fh3, offset: u64, count: u32) -> (Vec<u8>, bool) {
    let got = client.read(&READ3args { file: file.clone(), offset, count }).await.unwrap().unwrap();
    assert_eq!(got.count as usize, got.data.len());
    (got.data.to_vec(), got.eof)
}

async fn attributes(client: &mut Connection, object: &nfs_fh3) -> fattr3 {
    client.getattr(&GETATTR3args { object: object.clone() }).await.unwrap().unwrap().obj_attributes
}

#[test]
fn reading_and_writing() {
    with_server(async |mut root, _user| {
        let top = root.root_nfs_fh3();
        let file = create(&mut root, &top, "f").await;
        let data: Vec<u8> = (0..3 << 20).map(|i: u32| (i ^ i >> 8 ^ i >> 16) as u8).collect();
        let mut verifiers = Vec::new();
        for (index, chunk) in data.chunks(1 << 20).enumerate() {
            let done = write(&mut root, &file, (index as u64) << 20, chunk, stable_how::UNSTABLE).await;
            assert_eq!(done.count as usize, chunk.len());
            verifiers.push(done.verf);
        }
        let args = COMMIT3args { file: file.clone(), offset: 0, count: 0 };
        let committed = root.commit(&args).await.unwrap().unwrap();
        assert!(verifiers.iter().all(|verifier| *verifier == committed.verf), "nothing was lost");
        let done = write(&mut root, &file, 5, b"stable", stable_how::FILE_SYNC).await;
        assert_eq!((done.committed, done.verf), (stable_how::FILE_SYNC, committed.verf));
        changed(done.file_wcc);
        let mut expected = data.clone();
        expected[5..11].copy_from_slice(b"stable");
        for index in 0..3 {
            let (got, eof) = read(&mut root, &file, index << 20, 1 << 20).await;
            assert!(got == expected[(index as usize) << 20..][..1 << 20]);
            assert_eq!(eof, index == 2);
        }
        assert_eq!(read(&mut root, &file, (3 << 20) - 3, 100).await, (expected[(3 << 20) - 3..].to_vec(), true));
        assert_eq!(read(&mut root, &file, 4 << 20, 100).await, (vec![], true));
        assert_eq!(attributes(&mut root, &file).await.size, 3 << 20);
        let args = READ3args { file: top.clone(), offset: 0, count: 10 };
        assert_eq!(status(root.read(&args).await.unwrap()), nfsstat3::NFS3ERR_INVAL, "a directory");
    });
}

#[test]
fn setting_attributes() {
    with_server(async |mut root, mut user| {
        let top = root.root_nfs_fh3();
        let file = create(&mut root, &top, "f").await;
        write(&mut root, &file, 0, b"0123456789", stable_how::UNSTABLE).await;
        let before = attributes(&mut root, &file).await;
        let set = |size, guard| SETATTR3args {
            object: file.clone(),
            new_attributes: sattr3 {
                size: Nfs3Option::Some(size),
                mode: Nfs3Option::Some(0o600),
                mtime: set_mtime::SET_TO_CLIENT_TIME(nfstime3 { seconds: 77, nseconds: 88 }),
                ..Default::default()
            },
            guard,
        };
        let guard = nfstime3 { seconds: 1, nseconds: 1 };
        let refused = root.setattr(&set(3, Nfs3Option::Some(guard))).await.unwrap();
        assert_eq!(status(refused), nfsstat3::NFS3ERR_NOT_SYNC);
        let done = root.setattr(&set(3, Nfs3Option::Some(before.ctime))).await.unwrap().unwrap();
        changed(done.obj_wcc);
        let after = attributes(&mut root, &file).await;
        assert_eq!((after.size, after.mode), (3, 0o600));
        assert_eq!((after.mtime.seconds, after.mtime.nseconds), (77, 88));
        assert_eq!(read(&mut root, &file, 0, 100).await, (b"012".to_vec(), true));
        let refused = user.setattr(&set(0, Nfs3Option::None)).await.unwrap();
        assert!(matches!(status(refused), nfsstat3::NFS3ERR_PERM | nfsstat3::NFS3ERR_ACCES));
        let ask = ACCESS3args { object: file.clone(), access: 0x3f };
        assert_eq!(root.access(&ask).await.unwrap().unwrap().access & 0x0d, 0x0d);
        assert_eq!(user.access(&ask).await.unwrap().unwrap().access & 0x0d, 0);
        let args = READ3args { file: file.clone(), offset: 0, count: 10 };
        assert_eq!(status(user.read(&args).await.unwrap()), nfsstat3::NFS3ERR_ACCES);
    });
}

#[test]
fn creating() {
    with_server(async |mut root, _user| {
        let top = root.root_nfs_fh3();
        let file = create(&mut root, &top, "f").await;
        let create_as = |how| CREATE3args { where_: at(&top, "f"), how };
        let again = root.create(&create_as(createhow3::GUARDED(mode(0o644)))).await.unwrap();
        assert_eq!(status(again), nfsstat3::NFS3ERR_EXIST);
        write(&mut root, &file, 0, b"abc", stable_how::FILE_SYNC).await;
        let truncate = sattr3 { size: Nfs3Option::Some(0), ..Default::default() };
        let same = root.create(&create_as(createhow3::UNCHECKED(truncate))).await.unwrap().unwrap();
        assert_eq!(some(same.obj), file);
        assert_eq!(attributes(&mut root, &file).await.size, 0);

        let exclusive =
            |verifier| CREATE3args { where_: at(&top, "x"), how: createhow3::EXCLUSIVE(createverf3([verifier; 8])) };
        let first = root.create(&exclusive(7)).await.unwrap().unwrap();
        let repeated = root.create(&exclusive(7)).await.unwrap().unwrap();
        assert_eq!(some(first.obj), some(repeated.obj));
        assert_eq!(status(root.create(&exclusive(8)).await.unwrap()), nfsstat3::NFS3ERR_EXIST);

        let long = "n".repeat(256);
        let args = CREATE3args { where_: at(&top, &long), how: createhow3::GUARDED(mode(0o644)) };
        assert_eq!(status(root.create(&args).await.unwrap()), nfsstat3::NFS3ERR_NAMETOOLONG);
        let args = CREATE3args { where_: at(&file, "below"), how: createhow3::GUARDED(mode(0o644)) };
        assert_eq!(status(root.create(&args).await.unwrap()), nfsstat3::NFS3ERR_NOTDIR);
    });
}

#[test]
fn names_come_and_go() {
    with_server(async |mut root, _user| {
        let top = root.root_nfs_fh3();
        let args = MKDIR3args { where_: at(&top, "d"), attributes: mode(0o755) };
        let made = root.mkdir(&args).await.unwrap().unwrap();
        changed(made.dir_wcc);
        let dir = some(made.obj);
        let file = create(&mut root, &dir, "f").await;

        let found = root.lookup(&LOOKUP3args { what: at(&dir, "f") }).await.unwrap().unwrap();
        assert_eq!(found.object, file);
        assert_eq!(some(found.dir_attributes).fileid, some(made.obj_attributes).fileid);
        let up = root.lookup(&LOOKUP3args { what: at(&dir, "..") }).await.unwrap().unwrap();
        assert_eq!(up.object, top);
        match root.lookup(&LOOKUP3args { what: at(&dir, "none") }).await.unwrap() {
            Nfs3Result::Err((nfsstat3::NFS3ERR_NOENT, fail)) => assert!(fail.dir_attributes.is_some()),
            other => panic!("{other:?}"),
        }

        let symlink = symlinkdata3 { symlink_attributes: mode(0o777), symlink_data: b"some/where".as_slice().into() };
        let made = root.symlink(&SYMLINK3args { where_: at(&dir, "s"), symlink }).await.unwrap().unwrap();
        let link = some(made.obj);
        let target = root.readlink(&READLINK3args { symlink: link }).await.unwrap().unwrap();
        assert_eq!(target.data.as_ref(), b"some/where");
        let refused = root.readlink(&READLINK3args { symlink: file.clone() }).await.unwrap();
        assert_eq!(status(refused), nfsstat3::NFS3ERR_INVAL);

        let spec = specdata3 { specdata1: 8, specdata2: 1 };
        let what = mknoddata3::NF3BLK(devicedata3 { dev_attributes: mode(0o600), spec: spec.clone() });
        let made = root.mknod(&MKNOD3args { where_: at(&dir, "b"), what }).await.unwrap().unwrap();
        let device = some(made.obj_attributes);
        assert_eq!((device.type_, device.rdev), (ftype3::NF3BLK, spec));

        let args = LINK3args { file: file.clone(), link: at(&dir, "hard") };
        let linked = root.link(&args).await.unwrap().unwrap();
        changed(linked.linkdir_wcc);
        assert_eq!(some(linked.file_attributes).nlink, 2);

        let args = RENAME3args { from: at(&dir, "hard"), to: at(&top, "moved") };
        let renamed = root.rename(&args).await.unwrap().unwrap();
        changed(renamed.fromdir_wcc);
        changed(renamed.todir_wcc);
        let moved = root.lookup(&LOOKUP3args { what: at(&top, "moved") }).await.unwrap().unwrap();
        assert_eq!(moved.object, file);
        match root.rename(&args).await.unwrap() {
            Nfs3Result::Err((nfsstat3::NFS3ERR_NOENT, fail)) => {
                assert!(fail.fromdir_wcc.after.is_some() && fail.todir_wcc.after.is_some());
            }
            other => panic!("{other:?}"),
        }

        let remove = |name: &'static str, dir: &nfs_fh3| REMOVE3args { object: at(dir, name) };
        let rmdir = |name: &'static str| RMDIR3args { object: at(&top, name) };
        assert_eq!(status(root.rmdir(&rmdir("d")).await.unwrap()), nfsstat3::NFS3ERR_NOTEMPTY);
        assert_eq!(status(root.rmdir(&rmdir("moved")).await.unwrap()), nfsstat3::NFS3ERR_NOTDIR);
        for name in ["f", "s", "b"] {
            changed(root.remove(&remove(name, &dir)).await.unwrap().unwrap().dir_wcc);
        }
        changed(root.rmdir(&rmdir("d")).await.unwrap().unwrap().dir_wcc);
        changed(root.remove(&remove("moved", &top)).await.unwrap().unwrap().dir_wcc);
        assert_eq!(status(root.getattr(&GETATTR3args { object: file }).await.unwrap()), nfsstat3::NFS3ERR_STALE);
        assert_eq!(status(root.getattr(&GETATTR3args { object: dir }).await.unwrap()), nfsstat3::NFS3ERR_STALE);
    });
}

#[test]
fn listing() {
    with_server(async |mut root, _user| {
        let top = root.root_nfs_fh3();
        let mut expected = vec![".".to_string(), "..".to_string()];
        for index in 0..300 {
            let name = format!("file-{index:0width$}", width = 3 + index % 50);
            create(&mut root, &top, &name).await;
            expected.push(name);
        }
        expected.sort();
        let mut names = Vec::new();
        let (mut cookie, mut cookieverf) = (0, cookieverf3::default());
        loop {
            let args = READDIR3args { dir: top.clone(), cookie, cookieverf, count: 1000 };
            let part = root.readdir(&args).await.unwrap().unwrap();
            cookieverf = part.cookieverf;
            for entry in part.reply.entries.0 {
                cookie = entry.cookie;
                names.push(String::from_utf8(entry.name.0.to_vec()).unwrap());
            }
            if part.reply.eof {
                break;
            }
        }
        names.sort();
        assert_eq!(names, expected);
        let mut names = Vec::new();
        cookie = 0;
        loop {
            let args = READDIRPLUS3args { dir: top.clone(), cookie, cookieverf, dircount: 800, maxcount: 4000 };
            let part = root.readdirplus(&args).await.unwrap().unwrap();
            for entry in part.reply.entries.0 {
                cookie = entry.cookie;
                assert_eq!(some(entry.name_attributes).fileid, entry.fileid);
                let name = String::from_utf8(entry.name.0.to_vec()).unwrap();
                let found = root.lookup(&LOOKUP3args { what: at(&top, &name) }).await.unwrap().unwrap();
                assert_eq!(found.object, some(entry.name_handle));
                names.push(name);
            }
            if part.reply.eof {
                break;
            }
        }
        names.sort();
        assert_eq!(names, expected);
        let args = READDIR3args { dir: top.clone(), cookie: 0, cookieverf: cookieverf3::default(), count: 120 };
        assert_eq!(status(root.readdir(&args).await.unwrap()), nfsstat3::NFS3ERR_TOOSMALL);
        let args = READDIR3args { dir: top.clone(), cookie: 1, cookieverf: cookieverf3([9; 8]), count: 4096 };
        assert_eq!(status(root.readdir(&args).await.unwrap()), nfsstat3::NFS3ERR_BAD_COOKIE);
    });
}

#[test]
fn what_the_file_system_is() {
    with_server(async |mut root, _user| {
        let fsroot = root.root_nfs_fh3();
        let info = root.fsinfo(&FSINFO3args { fsroot: fsroot.clone() }).await.unwrap().unwrap();
        assert_eq!((info.rtmax, info.wtmax), (1 << 20, 1 << 20));
        assert!(info.obj_attributes.is_some() && info.maxfilesize >= 1 << 40);
        let conf = root.pathconf(&PATHCONF3args { object: fsroot.clone() }).await.unwrap().unwrap();
        assert_eq!((conf.name_max, conf.no_trunc, conf.case_insensitive), (255, true, false));
        let stat = root.fsstat(&FSSTAT3args { fsroot }).await.unwrap().unwrap();
        assert!(stat.fbytes <= stat.tbytes && stat.fbytes > 0 && stat.ffiles > 0);
        root.null().await.unwrap();
        root.unmount().await.unwrap();
    });
}
