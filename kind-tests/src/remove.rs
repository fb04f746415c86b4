//! Removes big folders fast.
//!
//! A host's disk has thousands of folders. Where the file system gives each freed block back to the disk at once (the
//! mount option `discard`), removing them one after the other takes many seconds: nearly all of it is waiting, so it is
//! done side by side.
//!
//! Never follows a symbolic link, never leaves the file system that the folder is on.

use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::process::lock;

/// Disks take many orders at once.
const SIDE_BY_SIDE: usize = 8;
/// More than once: a process that was just killed may have been adding a file.
const ATTEMPTS: u32 = 5;

/// Removes a folder with everything in it, also when OSTree made deployments in it immutable. That it is not there is
/// no error.
pub fn remove_tree(path: &Path) -> Result<()> {
    let mut last = Ok(());
    for _ in 0..ATTEMPTS {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(meta) if !meta.is_dir() => return fs::remove_file(path),
            Ok(meta) => last = remove_once(path, meta.dev()),
        }
        if last.is_ok() {
            break;
        }
    }
    last
}

fn remove_once(path: &Path, device: u64) -> Result<()> {
    let mut levels = vec![vec![path.to_owned()]];
    while let Some(below) = levels.last().map(|level| side_by_side(level, |dir| empty(dir, device))).transpose()? {
        let below: Vec<PathBuf> = below.into_iter().flatten().collect();
        if below.is_empty() {
            break;
        }
        levels.push(below);
    }
    for level in levels.iter().rev() {
        side_by_side(level, |dir| gone(fs::remove_dir(dir)))?;
    }
    Ok(())
}

/// Removes all but the folders in a folder, and returns those.
fn empty(dir: &Path, device: u64) -> Result<Vec<PathBuf>> {
    let meta = match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    if meta.dev() != device {
        return Err(Error::other(format!("{} is a mount point", dir.display())));
    }
    make_mutable(dir)?;
    let mut folders = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        } else {
            gone(fs::remove_file(entry.path()))?;
        }
    }
    Ok(folders)
}

/// OSTree sets the flag on deployment roots.
fn make_mutable(dir: &Path) -> Result<()> {
    let file = File::open(dir)?;
    match ioctl_getflags(&file) {
        Ok(flags) if flags.contains(IFlags::IMMUTABLE) => Ok(ioctl_setflags(&file, flags - IFlags::IMMUTABLE)?),
        // Not every file system has flags.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Somebody else was faster.
fn gone(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Does something with every folder, and fails with the first error when all have had their turn.
fn side_by_side<T: Send>(folders: &[PathBuf], act: impl Fn(&Path) -> Result<T> + Sync) -> Result<Vec<T>> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(folder) = folders.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = act(folder);
            lock(&results).push(result);
        }
    };
    thread::scope(|scope| {
        for _ in 1..SIDE_BY_SIDE.min(folders.len()) {
            scope.spawn(work);
        }
        work();
    });
    results.into_inner().unwrap_or_default().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn everything_below_goes_and_nothing_that_is_linked_to() {
        let scratch = Scratch::new("remove").unwrap();
        let (tree, outside) = (scratch.path().join("tree"), scratch.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "kept").unwrap();
        for n in 0..40 {
            let deep = tree.join(format!("{}/{n}/a/b", n % 7));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("file"), "x").unwrap();
            symlink(&outside, deep.join("link")).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("file").exists());
        remove_tree(&tree).unwrap();

        symlink(&outside, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(fs::symlink_metadata(&tree).is_err());
        assert!(outside.join("file").exists());
    }
}
