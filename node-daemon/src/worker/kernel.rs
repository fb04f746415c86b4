//! The files of a commit that go to /boot.

use std::{fs, path::Path};

use ostree::{Repo, RepoFile, Sysroot, gio, prelude::*};

use super::{
    Outcome,
    classify::{Doing, failure},
    sysroot::NEVER,
};

/// One file for /boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFile {
    pub checksum: String,
    pub size: u64,
}

/// Kernel and initramfs of a commit, from /usr/lib/modules.
pub fn files(repo: &Repo, commit: &str) -> Outcome<Vec<BootFile>> {
    const NAMES: [&str; 2] = ["vmlinuz", "initramfs.img"];
    const QUERY: &str = "standard::name,standard::size";
    let look = |e: &ostree::glib::Error| failure(Doing::Look, e);
    let (root, _) = repo.read_commit(commit, NEVER).map_err(|e| look(&e))?;
    let modules = root.resolve_relative_path("usr/lib/modules");
    if !modules.query_exists(NEVER) {
        return Ok(vec![]);
    }
    let children = modules
        .enumerate_children("standard::name", gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS, NEVER)
        .map_err(|e| look(&e))?;
    let mut found = vec![];
    while let Some(child) = children.next_file(NEVER).map_err(|e| look(&e))? {
        for name in NAMES {
            let file = modules.child(child.name()).child(name);
            if !file.query_exists(NEVER) {
                continue;
            }
            let info =
                file.query_info(QUERY, gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS, NEVER).map_err(|e| look(&e))?;
            let Some(file) = file.downcast_ref::<RepoFile>() else { continue };
            let size = u64::try_from(info.size()).unwrap_or(0);
            found.push(BootFile { checksum: file.checksum().into(), size });
        }
    }
    Ok(found)
}

/// Bytes on /boot that belong to no deployment that is booted or pinned.
pub fn reclaimable(sysroot: &Sysroot) -> u64 {
    let booted = sysroot.booted_deployment().map(|d| d.bootcsum());
    let deployments = sysroot.deployments();
    let keep: Vec<_> = deployments
        .iter()
        .filter(|d| d.is_pinned() || Some(d.bootcsum()) == booted)
        .map(|d| format!("{}-{}", d.osname(), d.bootcsum()))
        .collect();
    let folders = fs::read_dir("/boot/ostree").into_iter().flatten().flatten();
    folders.filter(|f| !keep.iter().any(|k| f.file_name() == k.as_str())).map(|f| bytes_in(&f.path())).sum()
}

fn bytes_in(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|f| f.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}
