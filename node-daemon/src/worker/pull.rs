//! Downloads a commit: the signed commit object first, then, when it is trusted and fits, its content.
//!
//! ```text
//!  keys ─► commit object ─► signature, ref ─► space ─► content ─► /boot ─► complete? ─► hold
//! ```
//! Nothing on the host refers to what has been downloaded before the last step, so a failure leaves the host as it
//! was, but for objects that the next try finds and the next prune removes.

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use osimage_crds::{Commit, nodeos::ProblemReason};
use ostree::{AsyncProgress, Repo, RepoPullFlags, glib};

use super::{
    HOLD, Outcome,
    channel::Channel,
    classify::{Doing, failure, is_delta_error},
    space, status,
    status::{is_complete, library_has},
    sysroot::{self, Locked, NEVER},
    trust::{self, PRIVATE_REMOTE, Trusted},
};
use crate::protocol::{Failure, Line, Progress, Source};

/// How often a download is reported, at most.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// Downloads, verifies and holds a commit. Repeating it is cheap.
pub fn pull(source: &Source, channel: &Channel) -> Outcome<()> {
    // Taking the lock makes /sysroot writable for this process; a download does not need it for longer.
    drop(Locked::take(sysroot::open()?)?);
    let trusted = trust::open(source)?;
    let repo = &trusted.repo;
    let had_it = is_complete(repo, &source.commit);
    let download = Download { repo, commit: &source.commit, channel };

    download.fetch(RepoPullFlags::COMMIT_ONLY, Deltas::No, None).map_err(|e| failure(Doing::FetchCommit, &e))?;
    if let Err(failure) = trusted.check() {
        if !had_it {
            trust::forget(repo, &source.commit);
        }
        return Err(failure);
    }
    let (variant, _) = repo.load_commit(source.commit.as_str()).map_err(|e| failure(Doing::FetchCommit, &e))?;
    let missing = space::missing(repo, &variant)?;
    if !had_it {
        space::check_repo(repo, missing)?;
    }
    download.content(missing.map(|m| m.download))?;
    finish(&trusted)
}

/// The content is there: look whether it can be deployed, then hold it.
fn finish(trusted: &Trusted<'_>) -> Outcome<()> {
    let Trusted { repo, source, .. } = trusted;
    let commit = &source.commit;
    if !is_complete(repo, commit) {
        return Err(Failure::transient(
            ProblemReason::ObjectCorrupted,
            format!("commit {} is incomplete after its download; trying again", commit.short()),
        ));
    }
    space::check_boot(&sysroot::open()?, repo, commit.as_str())?;
    repo.set_ref_immediate(None, &format!("{HOLD}/{commit}"), Some(commit.as_str()), NEVER)
        .map_err(|e| failure(Doing::Hold, &e))
}

/// Drops every hold but those of `keep`, the staged deployments that went with them, and what nothing needs then.
pub fn release(keep: &[Commit]) -> Outcome<()> {
    let sysroot = Locked::take(sysroot::open()?)?;
    let repo = sysroot.repo();
    let refs = repo.list_refs(Some(HOLD), NEVER).map_err(|e| failure(Doing::Look, &e))?;
    // With a prefix, libostree leaves the prefix out of the names on some versions.
    let names = refs.keys().map(|name| name.rsplit('/').next().unwrap_or(name).to_owned());
    let drop_these: Vec<String> = names.filter(|name| !keep.iter().any(|k| k.as_str() == name)).collect();
    if let Some(staged) = sysroot.staged_deployment().filter(|d| drop_these.iter().any(|name| *name == d.csum())) {
        let rest = status::without(&sysroot, |d| sysroot::same(d, &staged));
        sysroot.write_deployments(&rest, NEVER).map_err(|e| failure(Doing::Clean, &e))?;
    }
    for name in &drop_these {
        repo.set_ref_immediate(None, &format!("{HOLD}/{name}"), None, NEVER).map_err(|e| failure(Doing::Clean, &e))?;
    }
    sysroot.cleanup(NEVER).map_err(|e| failure(Doing::Clean, &e))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Deltas {
    Yes,
    No,
}

struct Download<'a> {
    repo: &'a Repo,
    commit: &'a Commit,
    channel: &'a Channel,
}

impl Download<'_> {
    /// All objects; once more without static deltas when one of those was broken.
    fn content(&self, total: Option<u64>) -> Outcome<()> {
        // Before 2023.7 libostree fetches a delta and most of the loose objects as well.
        let deltas = if library_has(2023, 7) { Deltas::Yes } else { Deltas::No };
        let result = match self.fetch(RepoPullFlags::NONE, deltas, total) {
            Err(error) if deltas == Deltas::Yes && is_delta_error(&error) => {
                self.fetch(RepoPullFlags::NONE, Deltas::No, total)
            }
            other => other,
        };
        result.map_err(|e| failure(Doing::FetchContent, &e))
    }

    fn fetch(&self, flags: RepoPullFlags, deltas: Deltas, total: Option<u64>) -> Result<(), glib::Error> {
        let options = glib::VariantDict::new(None);
        options.insert("refs", [self.commit.as_str()].as_slice());
        options.insert("flags", i32::try_from(flags.bits()).unwrap_or(0));
        options.insert("disable-static-deltas", deltas == Deltas::No);
        options.insert("update-frequency", u32::try_from(REPORT_EVERY.as_millis()).unwrap_or(u32::MAX));
        // Known since 2023.7, without effect before: a server that stays silent is given up after 30 s.
        options.insert("low-speed-limit-bytes", 1_u32);
        options.insert("low-speed-time-seconds", 30_u32);
        options.insert("append-user-agent", "osimage-node-daemon");
        let options = options.end();
        // A context of its own: libostree runs the download on the thread's default one.
        glib::MainContext::new()
            .with_thread_default(|| {
                let progress = self.progress(total);
                let result = self.repo.pull_with_options(PRIVATE_REMOTE, &options, Some(&progress), NEVER);
                progress.finish();
                result
            })
            .map_err(|e| glib::Error::new(ostree::gio::IOErrorEnum::Failed, &e.message))?
    }

    fn progress(&self, total: Option<u64>) -> AsyncProgress {
        let progress = AsyncProgress::new();
        let channel = self.channel.clone();
        let last: Rc<Cell<Option<Instant>>> = Rc::default();
        progress.connect_changed(move |p| {
            if last.get().is_some_and(|at| at.elapsed() < REPORT_EVERY) {
                return;
            }
            last.set(Some(Instant::now()));
            channel.send(&Line::Progress(read(p, total)));
        });
        progress
    }
}

fn read(progress: &AsyncProgress, total_bytes: Option<u64>) -> Progress {
    let count = |key| u64::from(progress.uint(key));
    Progress {
        bytes: progress.uint64("bytes-transferred"),
        total_bytes,
        objects: count("fetched"),
        total_objects: count("requested"),
        outstanding: count("outstanding-fetches") + count("outstanding-metadata-fetches"),
    }
}
