//! What the host is. Reads, never writes, needs no lock.

use std::path::Path;

use osimage_crds::Commit;
use ostree::{Deployment, DeploymentUnlockedState, Repo, RepoCommitState, Sysroot, glib};

use super::{
    HOLD, Outcome,
    classify::{Doing, failure},
    sysroot::{self, NEVER, commit_of, same},
};
use crate::protocol::{DeploymentFacts, Facts};

/// Looks at the host.
pub fn look() -> Outcome<Facts> {
    let ostree_version = library_version();
    let unsupported = |why: &str| {
        Ok(Facts { unsupported: Some(why.into()), ostree_version: ostree_version.clone(), ..Facts::default() })
    };
    if !Path::new("/run/ostree-booted").exists() {
        return unsupported(
            "the host is not booted from an OSTree deployment (there is no /run/ostree-booted); \
             install an OSTree-based OS, or exclude the node with spec.nodeSelector",
        );
    }
    let sysroot = sysroot::open()?;
    let Some(booted) = sysroot.booted_deployment() else {
        return unsupported("the root file system is none of the OSTree deployments in /ostree/deploy");
    };
    let repo = sysroot.repo();
    let deployments = sysroot.deployments().iter().map(|d| describe(&repo, d, &booted)).collect::<Outcome<Vec<_>>>()?;
    Ok(Facts {
        unsupported: reason_not_to_touch(&booted),
        deployments,
        held: held(&repo)?.into_iter().map(|(_, commit)| commit).collect(),
        ostree_version,
    })
}

/// The refs of ours, and the complete commits that they hold.
pub fn held(repo: &Repo) -> Outcome<Vec<(String, Commit)>> {
    let refs = repo.list_refs(None, NEVER).map_err(|e| failure(Doing::Look, &e))?;
    let mut held: Vec<(String, Commit)> = refs
        .into_iter()
        .filter(|(name, _)| name.strip_prefix(HOLD).is_some_and(|rest| rest.starts_with('/')))
        .filter_map(|(name, sum)| Some((name, sum.parse::<Commit>().ok()?)))
        .filter(|(_, commit)| is_complete(repo, commit))
        .collect();
    held.sort();
    Ok(held)
}

/// Whether all objects of a commit have been written.
pub fn is_complete(repo: &Repo, commit: &Commit) -> bool {
    repo.load_commit(commit.as_str()).is_ok_and(|(_, state)| !state.contains(RepoCommitState::PARTIAL))
}

fn describe(repo: &Repo, deployment: &Deployment, booted: &Deployment) -> Outcome<DeploymentFacts> {
    let commit = commit_of(deployment)?;
    Ok(DeploymentFacts {
        version: version(repo, &commit),
        serial: deployment.deployserial(),
        booted: same(deployment, booted),
        staged: deployment.is_staged(),
        pinned: deployment.is_pinned(),
        commit,
    })
}

fn version(repo: &Repo, commit: &Commit) -> Option<String> {
    let (variant, _) = repo.load_commit(commit.as_str()).ok()?;
    let metadata = glib::VariantDict::new(variant.try_child_value(0).as_ref());
    metadata.lookup::<String>("version").ok().flatten()
}

/// Systems that a plain OSTree deployment would damage.
fn reason_not_to_touch(booted: &Deployment) -> Option<String> {
    if booted.unlocked() != DeploymentUnlockedState::None {
        return Some(
            "the running deployment is unlocked (ostree admin unlock, rpm-ostree usroverlay): reboot to drop \
             the changes before it is updated"
                .into(),
        );
    }
    if has_transient_etc() {
        return Some(
            "/etc of the host is transient (prepare-root.conf): the boot guard would not be carried into the new \
             system; make /etc persistent"
                .into(),
        );
    }
    let origin = booted.origin()?;
    let set = |group: &str, key: &str| origin.string(group, key).is_ok_and(|value| !value.is_empty());
    if set("origin", "container-image-reference") {
        return Some(
            "the host boots a container image (bootc or rpm-ostree rebase to a container): an OSTree commit \
                     would replace that; rebase the host to an OSTree ref first"
                .into(),
        );
    }
    const LAYERS: [&str; 4] = ["packages", "overrides", "modules", "rpmostree"];
    let layered = LAYERS
        .iter()
        .find(|group| origin.keys(group).is_ok_and(|keys| keys.iter().any(|key| set(group, key.as_str()))))?;
    Some(format!(
        "rpm-ostree has changed the running system ([{layered}] in its origin), which an OSTree commit would drop: \
         run `rpm-ostree reset` first, or build the packages into the commit"
    ))
}

/// Whether /etc is thrown away at each boot.
fn has_transient_etc() -> bool {
    const FILES: [&str; 3] =
        ["/usr/lib/ostree/prepare-root.conf", "/etc/ostree/prepare-root.conf", "/run/ostree/prepare-root.conf"];
    let transient = |file: &&str| {
        let config = glib::KeyFile::new();
        config.load_from_file(file, glib::KeyFileFlags::NONE).is_ok()
            && config.boolean("etc", "transient").unwrap_or(false)
    };
    FILES.iter().any(transient)
}

/// The newest version that the library says it is.
fn library_version() -> String {
    const YEARS: std::ops::Range<u32> = 2017..2100;
    const RELEASES: std::ops::Range<u32> = 1..40;
    let year = YEARS.rev().find(|year| ostree::check_version(*year, 1)).unwrap_or(YEARS.start);
    let release = RELEASES.rev().find(|release| ostree::check_version(year, *release)).unwrap_or(RELEASES.start);
    format!("{year}.{release}")
}

/// Whether the library is at least this version.
pub fn library_has(year: u32, release: u32) -> bool {
    ostree::check_version(year, release)
}

/// The deployments, in order, but those that `drop_it` names.
pub fn without(sysroot: &Sysroot, drop_it: impl Fn(&Deployment) -> bool) -> Vec<Deployment> {
    sysroot.deployments().into_iter().filter(|d| !drop_it(d)).collect()
}
