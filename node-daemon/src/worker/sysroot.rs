//! Opens the sysroot and takes its lock.

use std::time::{Duration, Instant};

use osimage_crds::{Commit, nodeos::ProblemReason};
use ostree::{Deployment, Sysroot, gio};

use super::{
    Outcome,
    classify::{Doing, failure},
};
use crate::protocol::Failure;

/// How long to wait for another program to give the lock back.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_LOOK: Duration = Duration::from_millis(100);

pub const NEVER: Option<&gio::Cancellable> = None;

/// Opens and reads the sysroot of the host. Nothing is locked.
pub fn open() -> Outcome<Sysroot> {
    let sysroot = Sysroot::new_default();
    // Before load: libostree then makes /sysroot and /boot writable when it locks, in our mount namespace only.
    sysroot.set_mount_namespace_in_use();
    sysroot.load(NEVER).map_err(|e| failure(Doing::Look, &e))?;
    Ok(sysroot)
}

/// The lock that rpm-ostree, bootc and `ostree admin` take as well. Given back when dropped, or by death.
pub struct Locked(Sysroot);

impl Locked {
    /// Takes the lock, and reads anew what may have changed until then.
    pub fn take(sysroot: Sysroot) -> Outcome<Locked> {
        let give_up = Instant::now() + LOCK_WAIT;
        loop {
            let not_yet = match sysroot.try_lock() {
                Ok(true) => break,
                Ok(false) => Failure::transient(
                    ProblemReason::HostBusy,
                    "another program (rpm-ostree, bootc or ostree) is changing the system and holds its lock; \
                     waiting until it is done",
                ),
                // Locking makes /sysroot writable, which the kernel refuses for as long as somebody has the file system
                // frozen: a snapshot, or another libostree that syncs /boot.
                Err(error) if error.message().contains("resource busy") => failure(Doing::Lock, &error),
                Err(error) => return Err(failure(Doing::Lock, &error)),
            };
            if Instant::now() >= give_up {
                return Err(not_yet);
            }
            std::thread::sleep(LOCK_LOOK);
        }
        let locked = Locked(sysroot);
        locked.0.load_if_changed(NEVER).map_err(|e| failure(Doing::Look, &e))?;
        Ok(locked)
    }
}

impl std::ops::Deref for Locked {
    type Target = Sysroot;
    fn deref(&self) -> &Sysroot {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.0.unlock();
    }
}

/// The commit of a deployment.
pub fn commit_of(deployment: &Deployment) -> Outcome<Commit> {
    deployment
        .csum()
        .parse()
        .map_err(|e| Failure::permanent(ProblemReason::HostError, format!("a deployment has no commit: {e}")))
}

/// Same commit and serial: the only names of a deployment that last.
pub fn same(a: &Deployment, b: &Deployment) -> bool {
    a.csum() == b.csum() && a.deployserial() == b.deployserial() && a.osname() == b.osname()
}
