use super::*;

fn exports(paths: &[&str]) -> Vec<Export> {
    paths.iter().map(|path| Export { path: (*path).into(), volume: "v".into() }).collect()
}

#[test]
fn paths() {
    let list = exports(&["/vol0", "/vol0/deep", "/other"]);
    let found = |path: &'static str| find(&list, path.as_bytes());
    assert_eq!(found("/vol0"), Some((0, vec![])));
    assert_eq!(found("//vol0/./a//b/"), Some((0, vec![b"a".as_slice(), b"b"])));
    assert_eq!(found("/vol0/deep/x"), Some((1, vec![b"x".as_slice()])), "the longest export");
    assert_eq!(found("/vol01"), None);
    assert_eq!(found("/"), None);
    assert_eq!(found(""), None);
    assert_eq!(find(&exports(&["/"]), b"/a"), Some((0, vec![b"a".as_slice()])));
}

#[test]
fn squashing() {
    let root = Auth::Sys(Credential { uid: 0, gid: 0, groups: vec![0, 5] });
    let safe = Access::default();
    assert_eq!(safe.credential(root.clone()), Credential { uid: NOBODY, gid: NOBODY, groups: vec![NOBODY, 5] });
    let open = Access { root_squash: false, insecure_ports: true };
    assert_eq!(open.credential(root), Credential { uid: 0, gid: 0, groups: vec![0, 5] });
    assert_eq!(open.credential(Auth::None), Credential { uid: NOBODY, gid: NOBODY, groups: vec![] });
    assert!(!safe.allows_port(1024) && safe.allows_port(1023) && open.allows_port(1024));
}
