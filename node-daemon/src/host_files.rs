//! Files on the host: where they are, and the one way to write them so that a power cut leaves the old or the new.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// The files of a host, through its root.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
}

impl HostFiles {
    pub fn new(root: &Path) -> HostFiles {
        HostFiles { root: root.to_owned() }
    }

    /// A path of the host (`/var/lib/osimage/x`), as this process sees it.
    pub fn path(&self, host_path: &str) -> PathBuf {
        self.root.join(host_path.trim_start_matches('/'))
    }

    /// The text of a file; `None` when there is none.
    pub fn read(&self, host_path: &str) -> io::Result<Option<String>> {
        match fs::read_to_string(self.path(host_path)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(name(error, "read", Path::new(host_path))),
        }
    }

    pub fn write(&self, host_path: &str, content: &[u8], mode: u32) -> io::Result<()> {
        write(&self.path(host_path), content, mode).map_err(|e| name(e, "write", Path::new(host_path)))
    }

    /// A copy of an open file, written when it is another one.
    pub fn copy(&self, from: &mut File, host_path: &str, mode: u32) -> io::Result<()> {
        let path = self.path(host_path);
        let mut copied = || {
            if File::open(&path).is_ok_and(|mut old| same_content(from, &mut old).unwrap_or(false)) {
                return Ok(());
            }
            from.rewind()?;
            replace(&path, mode, |new| io::copy(from, new).map(|_| ()))
        };
        copied().map_err(|e| name(e, "write", Path::new(host_path)))
    }

    /// Removes a file; it may be gone already.
    pub fn remove(&self, host_path: &str) -> io::Result<()> {
        let path = self.path(host_path);
        match fs::remove_file(&path) {
            Ok(()) => sync_parent(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(name(error, "remove", Path::new(host_path))),
        }
    }

    /// A symbolic link, replaced when it leads elsewhere.
    pub fn link(&self, target: &str, host_path: &str) -> io::Result<()> {
        let path = self.path(host_path);
        if fs::read_link(&path).is_ok_and(|to| to == Path::new(target)) {
            return Ok(());
        }
        let linked = make_parent(&path).and_then(|()| {
            let new = beside(&path);
            let _stale = fs::remove_file(&new);
            std::os::unix::fs::symlink(target, &new)?;
            fs::rename(&new, &path)?;
            sync_parent(&path)
        });
        linked.map_err(|e| name(e, "link", Path::new(host_path)))
    }
}

/// Writes a file that is there completely, on the disk, or not at all. Nothing is written when it is the same.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let same_mode = || fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o7777 == mode);
    if fs::read(path).is_ok_and(|old| old == content) && same_mode() {
        return Ok(());
    }
    replace(path, mode, |new| new.write_all(content))
}

fn replace(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    make_parent(path)?;
    let new = beside(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
    fill(&mut file)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_parent(path)
}

fn same_content(a: &mut File, b: &mut File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    a.rewind()?;
    let (mut a, mut b) = (BufReader::new(a), BufReader::new(b));
    loop {
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let common = left.len().min(right.len());
        if left.get(..common) != right.get(..common) {
            return Ok(false);
        }
        if common == 0 {
            return Ok(left.is_empty() && right.is_empty());
        }
        a.consume(common);
        b.consume(common);
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::DirBuilder::new().recursive(true).mode(0o755).create(parent),
        None => Ok(()),
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    path.with_file_name(name)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn name(error: io::Error, doing: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {doing} {} on the host: {error}", path.display()))
}

/// The first value of a key in `key=value` lines.
pub fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_left_alone_when_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostFiles::new(folder.path());
        host.write("/var/lib/x/file", b"one", 0o600).unwrap();
        let first = fs::metadata(host.path("/var/lib/x/file")).unwrap().modified().unwrap();
        host.write("/var/lib/x/file", b"one", 0o600).unwrap();
        assert_eq!(fs::metadata(host.path("/var/lib/x/file")).unwrap().modified().unwrap(), first);
        host.write("/var/lib/x/file", b"two", 0o755).unwrap();
        assert_eq!(host.read("/var/lib/x/file").unwrap().as_deref(), Some("two"));
        host.remove("/var/lib/x/file").unwrap();
        host.remove("/var/lib/x/file").unwrap();
        assert_eq!(host.read("/var/lib/x/file").unwrap(), None);
    }

    #[test]
    fn a_copy_follows_its_source() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostFiles::new(folder.path());
        let source = folder.path().join("source");
        for content in [vec![1; 20_000], vec![1; 20_000], vec![2; 20_000], vec![2; 7], vec![]] {
            fs::write(&source, &content).unwrap();
            host.copy(&mut File::open(&source).unwrap(), "/bin/copy", 0o755).unwrap();
            assert_eq!(fs::read(host.path("/bin/copy")).unwrap(), content);
        }
        assert_eq!(fs::metadata(host.path("/bin/copy")).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn links_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let host = HostFiles::new(folder.path());
        for target in ["/a", "/a", "/b"] {
            host.link(target, "/etc/wants/unit").unwrap();
            assert_eq!(fs::read_link(host.path("/etc/wants/unit")).unwrap(), Path::new(target));
        }
    }

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "attempt=a-1\nreason=x=y\nattempts=2\nempty=\n";
        for (key, found) in
            [("attempt", Some("a-1")), ("reason", Some("x=y")), ("empty", Some("")), ("attem", None), ("no", None)]
        {
            assert_eq!(value(text, key), found, "{key}");
        }
    }
}
