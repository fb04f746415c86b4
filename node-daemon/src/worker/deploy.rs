//! Changes to the list of deployments. Each takes the lock, looks anew, and may be repeated.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use osimage_crds::{Commit, nodeos::ProblemReason};
use ostree::{Deployment, KernelArgs, Sysroot, SysrootDeployTreeOpts, glib};

use super::{
    Outcome, STATE,
    classify::{Doing, failure},
    host_error, repair,
    status::{is_complete, without},
    sysroot::{self, Locked, NEVER, commit_of, same},
    trust,
};
use crate::protocol::{Failure, Source};

/// Verifies the commit once more, and writes the deployment that the next shutdown completes.
pub fn stage(source: &Source) -> Outcome<()> {
    let sysroot = Locked::take(sysroot::open()?)?;
    if sysroot.staged_deployment().is_some_and(|d| d.csum() == source.commit.as_str()) {
        return Ok(());
    }
    {
        let trusted = trust::open(source)?;
        if !is_complete(&trusted.repo, &source.commit) {
            return Err(Failure::transient(
                ProblemReason::StageFailed,
                format!("commit {} is not on the disk completely any more", source.commit.short()),
            ));
        }
        trusted.check()?;
    }
    let booted = sysroot.require_booted_deployment().map_err(|e| failure(Doing::Stage, &e))?;
    let osname = booted.osname();
    let merge = sysroot.merge_deployment(Some(&osname)).unwrap_or(booted);
    let arguments = kernel_arguments(&merge)?;
    let origin = origin(&sysroot, source)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let options = SysrootDeployTreeOpts { override_kernel_argv: Some(&arguments), ..Default::default() };
    let staged = sysroot
        .stage_tree_with_options(Some(&osname), source.commit.as_str(), Some(&origin), Some(&merge), &options, NEVER)
        .map_err(|e| why_not_staged(&sysroot, &source.commit, &e))?;
    let lost = lost_arguments(&arguments, &staged);
    if lost.is_empty() {
        return Ok(());
    }
    let rest = without(&sysroot, |d| d.is_staged());
    sysroot.write_deployments(&rest, NEVER).map_err(|e| failure(Doing::Stage, &e))?;
    Err(Failure::permanent(
        ProblemReason::StageFailed,
        format!("the new deployment lost the kernel arguments {}; it was dropped again", lost.join(" ")),
    ))
}

/// A deployment that cannot be written may have a broken object to blame: then it is said, and mended.
fn why_not_staged(sysroot: &Sysroot, commit: &Commit, error: &glib::Error) -> Failure {
    let failure = failure(Doing::Stage, error);
    if failure.reason == ProblemReason::NoSpace {
        return failure;
    }
    match repair::remove_rotten(&sysroot.repo(), commit) {
        Ok(0) | Err(_) => failure,
        Ok(count) => Failure::transient(
            ProblemReason::ObjectCorrupted,
            format!(
                "{count} objects of commit {} had been damaged on the disk of the host, and were removed; the commit \
                 will be downloaded again. If it happens again, check the disk",
                commit.short()
            ),
        ),
    }
}

/// The arguments of the deployment that is merged from: libostree does not inherit them, and a deployment without
/// `root=` does not boot.
fn kernel_arguments(merge: &Deployment) -> Outcome<Vec<String>> {
    let options = merge.bootconfig().and_then(|config| config.get("options")).unwrap_or_default();
    let arguments: Vec<String> =
        KernelArgs::from_string(&options).to_strv().into_iter().map(String::from).filter(|a| !is_own(a)).collect();
    if arguments.is_empty() {
        return Err(Failure::permanent(
            ProblemReason::StageFailed,
            "the running deployment has no kernel arguments in its boot entry, not even root=: refusing to write a \
             deployment that might not boot; look at /boot/loader/entries",
        ));
    }
    Ok(arguments)
}

/// `ostree=` names the deployment itself; libostree writes it anew.
fn is_own(argument: &str) -> bool {
    argument.starts_with("ostree=")
}

fn lost_arguments(wanted: &[&str], staged: &Deployment) -> Vec<String> {
    let options = staged.bootconfig().and_then(|config| config.get("options")).unwrap_or_default();
    let has: Vec<String> = KernelArgs::from_string(&options).to_strv().into_iter().map(String::from).collect();
    wanted.iter().filter(|a| !has.iter().any(|h| h == *a)).map(|a| (*a).to_owned()).collect()
}

/// Where a deployment says it came from: remote and ref where a ref is given, else the commit.
fn origin(sysroot: &Sysroot, source: &Source) -> Outcome<glib::KeyFile> {
    let Some(name) = &source.ref_ else {
        return Ok(sysroot.origin_new_from_refspec(source.commit.as_str()));
    };
    trust::publish_remote(&sysroot.repo(), source)?;
    Ok(sysroot.origin_new_from_refspec(&format!("{}:{name}", source.remote)))
}

/// Drops the staged deployment, if it is of this commit.
pub fn unstage(commit: &Commit) -> Outcome<()> {
    let sysroot = Locked::take(sysroot::open()?)?;
    if sysroot.staged_deployment().is_none_or(|d| d.csum() != commit.as_str()) {
        return Ok(());
    }
    let rest = without(&sysroot, |d| d.is_staged());
    sysroot.write_deployments(&rest, NEVER).map_err(|e| failure(Doing::Clean, &e))
}

/// Makes the deployment of a commit the one that is booted next. The running one is preferred where a commit is
/// deployed twice, then a pinned one. A staged deployment is dropped: the shutdown would put it first again.
pub fn set_default(commit: &Commit) -> Outcome<()> {
    let sysroot = Locked::take(sysroot::open()?)?;
    let booted = sysroot.booted_deployment();
    let is_booted = |d: &Deployment| booted.as_ref().is_some_and(|b| same(b, d));
    let rank = |d: &Deployment| (!is_booted(d), !d.is_pinned());
    let mut list = without(&sysroot, |d| d.is_staged());
    let chosen = list.iter().enumerate().filter(|(_, d)| d.csum() == commit.as_str()).min_by_key(|(_, d)| rank(d));
    let Some(at) = chosen.map(|(at, _)| at) else {
        return Err(Failure::permanent(
            ProblemReason::RollbackFailed,
            format!("there is no deployment of {} to go back to; see `ostree admin status`", commit.short()),
        ));
    };
    let nothing_staged = sysroot.staged_deployment().is_none();
    if at == 0 && nothing_staged {
        return Ok(());
    }
    let chosen = list.remove(at);
    list.insert(0, chosen);
    sysroot.write_deployments(&list, NEVER).map_err(|e| failure(Doing::SetDefault, &e))
}

/// Pins the running deployment. That it was us is written down first, so that [`unpin`] undoes no one else's pin.
pub fn pin() -> Outcome<()> {
    let sysroot = Locked::take(sysroot::open()?)?;
    let booted = sysroot.require_booted_deployment().map_err(|e| failure(Doing::Pin, &e))?;
    if booted.is_pinned() {
        return Ok(());
    }
    let file = pin_file();
    write(&file, &format!("{}.{}\n", commit_of(&booted)?, booted.deployserial()))?;
    sysroot.deployment_set_pinned(&booted, true).map_err(|e| failure(Doing::Pin, &e))
}

/// Unpins what [`pin`] pinned.
pub fn unpin() -> Outcome<()> {
    let file = pin_file();
    let name = match fs::read_to_string(&file) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(host_error("read", &file, error)),
    };
    let sysroot = Locked::take(sysroot::open()?)?;
    let ours = |d: &Deployment| format!("{}.{}", d.csum(), d.deployserial()) == name;
    if let Some(pinned) = sysroot.deployments().iter().find(|d| ours(d) && d.is_pinned()) {
        sysroot.deployment_set_pinned(pinned, false).map_err(|e| failure(Doing::Pin, &e))?;
    }
    fs::remove_file(&file).map_err(|e| host_error("remove", &file, e))
}

fn pin_file() -> PathBuf {
    Path::new(STATE).join("pinned")
}

fn write(file: &Path, text: &str) -> Outcome<()> {
    crate::host_files::write(file, text.as_bytes(), 0o644).map_err(|e| host_error("write", file, e))
}
