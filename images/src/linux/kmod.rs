//! What a kernel module needs loaded before it: the `depends=` line that every module carries.
use crate::Error;
use std::path::PathBuf;

/// Deepest chain of modules that is followed: a longer one is a circle.
const DEPTH_MAX: usize = 16;

/// `name` and all it needs with their files, in the order in which they can be loaded. `file` finds the file of a module.
pub fn order(
    name: &str,
    file: &mut impl FnMut(&str) -> Result<PathBuf, Error>,
) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut done = Vec::new();
    add(name, file, &mut done, 0)?;
    Ok(done)
}

fn add(
    name: &str,
    file: &mut impl FnMut(&str) -> Result<PathBuf, Error>,
    done: &mut Vec<(String, PathBuf)>,
    depth: usize,
) -> Result<(), Error> {
    let path = file(name)?;
    if done.iter().any(|(_, known)| *known == path) {
        return Ok(());
    }
    let bytes = std::fs::read(&path).map_err(|source| Error::File { path: path.clone(), source })?;
    if depth > DEPTH_MAX {
        return Err(Error::Image { path, message: "modules that need each other".into() });
    }
    for needed in depends(&bytes) {
        add(&needed, file, done, depth + 1)?;
    }
    done.push((name.to_owned(), path));
    Ok(())
}

/// The names in the module's `depends=` string.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let text = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &std::path::Path, name: &str, depends: &str) {
        std::fs::write(dir.join(name), format!("ELF\0license=GPL\0depends={depends}\0name={name}\0")).unwrap();
    }

    fn names(dir: &std::path::Path, name: &str) -> Result<Vec<String>, Error> {
        let order = order(name, &mut |n| Ok(dir.join(n)))?;
        Ok(order.into_iter().map(|(n, _)| n).collect())
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let dir = std::env::temp_dir().join(format!("kmod-test-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (name, depends) in [("net", "failover,ring"), ("failover", "ring"), ("ring", ""), ("a", "b"), ("b", "a")] {
            write(&dir, name, depends);
        }
        let good = names(&dir, "net");
        let (circle, missing) = (names(&dir, "a"), names(&dir, "none"));
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(good.unwrap(), ["ring", "failover", "net"]);
        assert!(circle.is_err() && missing.is_err());
    }

    #[test]
    fn a_module_without_the_line_needs_nothing() {
        assert_eq!(depends(b"ELF\0license=GPL\0"), Vec::<String>::new());
    }
}
