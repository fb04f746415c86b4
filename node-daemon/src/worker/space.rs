//! Whether a commit fits, before its content is downloaded. libostree checks as well, but only while it writes, and
//! then throws away what it has downloaded.

use osimage_crds::nodeos::ProblemReason;
use ostree::{Repo, Sysroot, glib};

use super::{
    Outcome,
    classify::{Doing, failure},
    kernel,
    status::library_has,
    sysroot::NEVER,
};
use crate::protocol::Failure;

/// What must be free, above libostree's own floor, for a commit that does not tell its sizes.
const UNKNOWN_NEED: u64 = 256 << 20;
/// A file takes whole blocks.
const BLOCK: u64 = 4096;

/// What is missing of a commit, where it tells (`ostree commit --generate-sizes`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Bytes to download.
    pub download: u64,
    /// Bytes that they take on disk.
    pub disk: u64,
}

/// What of this commit is not in the repository yet. `None` when the commit does not tell its sizes.
pub fn missing(repo: &Repo, commit: &glib::Variant) -> Outcome<Option<Missing>> {
    // The only error is that there are no sizes, or none that can be read.
    let Ok(sizes) = ostree::commit_get_object_sizes(commit) else { return Ok(None) };
    let mut missing = Missing::default();
    for entry in sizes {
        let there =
            repo.has_object(entry.objtype(), &entry.checksum(), NEVER).map_err(|e| failure(Doing::FetchContent, &e))?;
        if !there {
            missing.download = missing.download.saturating_add(entry.archived());
            missing.disk = missing.disk.saturating_add(entry.unpacked().div_ceil(BLOCK).saturating_mul(BLOCK));
        }
    }
    Ok(Some(missing))
}

/// Whether that fits on the file system of the repository, above libostree's floor.
pub fn check_repo(repo: &Repo, missing: Option<Missing>) -> Outcome<()> {
    let free = free(repo.dfd_borrow())?;
    let floor = repo.min_free_space_bytes().unwrap_or(0);
    let need = missing.map_or(UNKNOWN_NEED, |m| m.disk);
    let available = free.saturating_sub(floor);
    if need <= available {
        return Ok(());
    }
    let what = match missing {
        Some(_) => "the commit needs",
        None => "the commit does not tell its size (commit with --generate-sizes); it is only begun with",
    };
    Err(Failure::transient(
        ProblemReason::NoSpace,
        format!(
            "not enough space on /sysroot: {what} {}, but {} are free above the floor of {} that libostree keeps; \
             free some space, for example with `ostree admin undeploy`",
            human(need),
            human(available),
            human(floor),
        ),
    ))
}

/// Whether kernel and initramfs of a downloaded commit fit on /boot. Called under no lock: a guess that saves a
/// drain, libostree decides.
pub fn check_boot(sysroot: &Sysroot, repo: &Repo, commit: &str) -> Outcome<()> {
    let new = kernel::files(repo, commit)?;
    let same_kernel = sysroot.deployments().iter().any(|d| {
        kernel::files(repo, &d.csum()).is_ok_and(|old| !new.is_empty() && new.iter().all(|f| old.contains(f)))
    });
    if same_kernel {
        return Ok(());
    }
    let boot = std::fs::File::open("/boot")
        .map_err(|e| Failure::transient(ProblemReason::HostError, format!("cannot open /boot: {e}")))?;
    let need: u64 = new.iter().map(|f| f.size.div_ceil(BLOCK).saturating_mul(BLOCK)).sum();
    let free = free(&boot)?;
    // Newer versions remove the kernel of the rollback deployment first when the new one would not fit.
    let prunes_early = library_has(2023, 2);
    let reclaimable = if prunes_early { kernel::reclaimable(sysroot) } else { 0 };
    if need <= free.saturating_add(reclaimable) {
        return Ok(());
    }
    Err(Failure::transient(
        ProblemReason::NoSpace,
        format!(
            "not enough space on /boot: kernel and initramfs need {}, but {} are free; \
             remove old deployments with `ostree admin undeploy`, or unpin them",
            human(need),
            human(free),
        ),
    ))
}

fn free(at: impl std::os::fd::AsFd) -> Outcome<u64> {
    let stat = rustix::fs::fstatvfs(at)
        .map_err(|e| Failure::transient(ProblemReason::HostError, format!("cannot ask for free space: {e}")))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes as people read them.
fn human(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, size)| bytes >= *size) {
        Some((unit, size)) => format!("{}.{} {unit}", bytes / size, bytes % size * 10 / size),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn bytes_are_readable() {
        for (bytes, text) in [(0, "0 bytes"), (1536, "1.5 KiB"), (268_435_456, "256.0 MiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(human(bytes), text);
        }
    }
}
