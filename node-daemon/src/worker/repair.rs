//! Finds what has rotted on the disk. libostree does not look: neither a download nor a deployment reads an object that
//! is there already, so a broken one shows as some other error, if at all. Looking costs reading the whole commit, so it
//! is done only when a deployment could not be written.

use osimage_crds::Commit;
use ostree::Repo;

use super::{
    Outcome,
    classify::{Doing, failure},
    sysroot::NEVER,
};

/// Removes the objects of a commit that are not what their checksum says, and lets the commit count as incomplete
/// then: the next download fetches what is missing. Deployed files are not touched. Returns how many there were.
pub fn remove_rotten(repo: &Repo, commit: &Commit) -> Outcome<usize> {
    const WITHOUT_PARENTS: i32 = 0;
    let look = |e| failure(Doing::Look, &e);
    let objects = repo.traverse_commit(commit.as_str(), WITHOUT_PARENTS, NEVER).map_err(look)?;
    let mut removed = 0;
    for object in objects {
        let (kind, checksum) = (object.object_type(), object.checksum());
        let there = repo.has_object(kind, checksum, NEVER).map_err(look)?;
        if there && repo.fsck_object(kind, checksum, NEVER).is_err() {
            repo.delete_object(kind, checksum, NEVER).map_err(look)?;
            removed += 1;
        }
    }
    if removed > 0 {
        repo.mark_commit_partial(commit.as_str(), true).map_err(look)?;
    }
    Ok(removed)
}
