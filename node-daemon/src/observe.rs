//! Looks at the host. The only builder of [`HostState`]; nobody else reads the host to decide.
//!
//! The deployments cost a process to read, so they are read again only when one of the files that libostree touches
//! with every change has changed, or after a step of our own.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use osimage_crds::{Commit, nodeos::ProblemReason};
use osimage_planner::host::{HostDeployment, HostState, Record, Stage};

use crate::{
    checks::Checks,
    guard,
    host_files::HostFiles,
    protocol::{Answer, DeploymentFacts, Facts, Failure, Request},
    trouble::Trouble,
    worker_client::Workers,
};

/// The record of the last attempt.
pub const RECORD: &str = "/var/lib/osimage/record.json";
const STATUS_LIMIT: Duration = Duration::from_secs(60);
/// Touched by libostree with every change of deployments, or of refs of ours.
const TOUCHED: [&str; 4] = [
    "/sysroot/ostree/deploy",
    "/run/ostree/staged-deployment",
    "/sysroot/ostree/repo/refs/heads/osimage/hold",
    "/run/ostree-booted",
];

/// Looks at one host.
pub struct Observer {
    workers: Workers,
    host: HostFiles,
    known: Option<(Stamp, Facts)>,
}

type Stamp = Vec<Option<(i64, i64, u64)>>;

/// A host at one moment.
pub struct Observation {
    pub state: HostState,
    /// What the worker said, for the report.
    pub facts: Facts,
    /// PRETTY_NAME of the host's os-release.
    pub os: String,
    /// The host could not be read; what is told is what was read before, if anything.
    pub stale: Option<Failure>,
}

impl Observer {
    pub fn new(workers: Workers, host: HostFiles) -> Observer {
        Observer { workers, host, known: None }
    }

    /// Reads the deployments again at the next look.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// Looks at the host.
    pub async fn look(&mut self, checks: &Checks, trouble: &Trouble) -> Observation {
        let before = self.known.as_ref().map(|(_, facts)| facts.clone());
        let (facts, mut stale) = match self.facts().await {
            Ok(facts) => (facts, None),
            Err(failure) => (before.unwrap_or_default(), Some(failure)),
        };
        let read = self.files();
        let (files, unreadable) = match read {
            Ok(files) => (files, None),
            Err(error) => (Files::default(), Some(error.to_string())),
        };
        // Nothing is known: neither may anything be done. A host that cannot be read now, but was, is acted on as known.
        let blind = stale.as_ref().filter(|_| facts == Facts::default()).map(|failure| failure.message.clone());
        if let Some(failure) = stale.take_if(|f| f.reason == ProblemReason::UnsupportedHost) {
            return self.observation(
                Facts { unsupported: Some(failure.message), ..facts },
                files,
                checks,
                trouble,
                None,
            );
        }
        let mut seen = self.observation(facts, files, checks, trouble, stale);
        seen.state.unreadable = blind.or(unreadable);
        seen
    }

    fn observation(
        &self,
        facts: Facts,
        files: Files,
        checks: &Checks,
        trouble: &Trouble,
        stale: Option<Failure>,
    ) -> Observation {
        let Files { boot_id, record, guard, since_boot, os } = files;
        let armed = guard::armed(&self.host);
        let on_trial = record.as_ref().is_some_and(|r| on_trial(r, &facts, &boot_id));
        let state = HostState {
            unsupported: facts.unsupported.clone(),
            unreadable: None,
            armed,
            trial_boots: if on_trial { guard::count_trials(&self.host, &boot_id) } else { 0 },
            deployments: facts.deployments.iter().map(deployment).collect(),
            held: facts.held.clone(),
            record,
            guard,
            since_boot,
            checks: if on_trial { checks.results().to_vec() } else { vec![] },
            healthy_for: checks.healthy_for().filter(|_| on_trial),
            trouble: trouble.as_seen(Instant::now()),
            boot_id,
        };
        Observation { state, facts, os, stale }
    }

    async fn facts(&mut self) -> Result<Facts, Failure> {
        let stamp = self.stamp();
        if let Some((_, facts)) = self.known.as_ref().filter(|(known, _)| *known == stamp) {
            return Ok(facts.clone());
        }
        match self.workers.ask(&Request::Status, STATUS_LIMIT).await? {
            Answer::Facts(facts) => {
                self.known = Some((stamp, facts.clone()));
                Ok(facts)
            }
            Answer::Nothing => Err(Failure::transient(ProblemReason::HostError, "the worker on the host told nothing")),
        }
    }

    fn stamp(&self) -> Stamp {
        let look = |path: &&str| {
            let meta = fs::metadata(self.host.path(path)).ok()?;
            Some((meta.ctime(), meta.ctime_nsec(), meta.ino()))
        };
        TOUCHED.iter().map(look).collect()
    }

    fn files(&self) -> io::Result<Files> {
        let boot_id = self.host.read("/proc/sys/kernel/random/boot_id")?.unwrap_or_default().trim().to_owned();
        if boot_id.is_empty() {
            return Err(io::Error::other("the host has no boot ID: /proc/1/root is not the root of a host"));
        }
        let record = read_record(&self.host)?;
        // Nothing is written to a host on which nothing is under way.
        let open = record.as_ref().is_some_and(|r| !r.finished());
        Ok(Files {
            guard: guard::result(&self.host),
            since_boot: if open { guard::since_boot(&self.host, &boot_id)? } else { Duration::ZERO },
            record,
            os: self.host.read("/etc/os-release")?.as_deref().map(pretty_name).unwrap_or_default(),
            boot_id,
        })
    }
}

#[derive(Default)]
struct Files {
    boot_id: String,
    record: Option<Record>,
    guard: Option<osimage_planner::host::GuardResult>,
    since_boot: Duration,
    os: String,
}

/// The record whose health checks have to be run now, if any.
pub fn record_on_trial(state: &HostState) -> Option<&Record> {
    let running = state.booted().map(|d| &d.commit);
    state.record.as_ref().filter(|r| is_trial(r, running, &state.boot_id))
}

fn on_trial(record: &Record, facts: &Facts, boot_id: &str) -> bool {
    is_trial(record, facts.deployments.iter().find(|d| d.booted).map(|d| &d.commit), boot_id)
}

fn is_trial(record: &Record, running: Option<&Commit>, boot_id: &str) -> bool {
    record.stage == Stage::Underway && record.boot_id != boot_id && running == Some(&record.commit)
}

fn read_record(host: &HostFiles) -> io::Result<Option<Record>> {
    let Some(text) = host.read(RECORD)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        io::Error::other(format!(
            "{RECORD} on the host cannot be read ({error}); if no update is under way there, remove it"
        ))
    })
}

fn deployment(facts: &DeploymentFacts) -> HostDeployment {
    let DeploymentFacts { commit, serial, booted, staged, pinned, version: _ } = facts;
    HostDeployment { commit: commit.clone(), serial: *serial, booted: *booted, staged: *staged, pinned: *pinned }
}

fn pretty_name(os_release: &str) -> String {
    crate::host_files::value(os_release, "PRETTY_NAME")
        .map(|name| name.trim().trim_matches(['"', '\'']).to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_attempt_that_booted_its_commit_is_on_trial() {
        let commit = |letter: &str| letter.repeat(64).parse::<Commit>().unwrap();
        let record = |stage| Record {
            attempt: osimage_crds::AttemptId("a".into()),
            commit: commit("a"),
            previous: commit("b"),
            boot_id: "before".into(),
            health: osimage_crds::osimage::Health::default(),
            stage,
        };
        let going_back = Stage::RollingBack { boot_id: "after".into(), message: String::new() };
        for (stage, running, boot, expected) in [
            (Stage::Underway, Some(commit("a")), "after", true),
            (Stage::Underway, Some(commit("a")), "before", false),
            (Stage::Underway, Some(commit("b")), "after", false),
            (Stage::Underway, None, "after", false),
            (going_back, Some(commit("a")), "after", false),
        ] {
            assert_eq!(
                is_trial(&record(stage.clone()), running.as_ref(), boot),
                expected,
                "{stage:?} {running:?} {boot}"
            );
        }
    }

    #[test]
    fn the_name_of_the_os_is_unquoted() {
        for (text, name) in [
            ("NAME=x\nPRETTY_NAME=\"Fedora CoreOS 42\"\n", "Fedora CoreOS 42"),
            ("PRETTY_NAME='A B'\n", "A B"),
            ("PRETTY_NAME=plain", "plain"),
            ("", ""),
        ] {
            assert_eq!(pretty_name(text), name);
        }
    }
}
