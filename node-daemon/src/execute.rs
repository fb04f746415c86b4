//! Carries out one step of the plan. Decides nothing; each step may be repeated after a crash at any point.
//!
//! | step | order, so that a crash anywhere leaves a way back |
//! |---|---|
//! | Arm | guard, pin, then the record |
//! | Stage | the deployment, then the service that completes it |
//! | Confirm | guard confirmed and disarmed, unpinned, then the record |
//! | Close | nothing staged any more, the default put right, unpinned, then the guard disarmed, then the record |
//! | Disarm | unpinned, then the guard disarmed |
//! | RollBack | the record (it says why), then the default; that also when /var is full |
//!
//! A download runs beside the loop: see `pull`.

use std::{
    io,
    time::{Duration, Instant},
};

use osimage_crds::nodeos::ProblemReason;
use osimage_planner::host::{HostState, HostStep, Record};

use crate::{
    guard, host_commands,
    host_files::HostFiles,
    observe::RECORD,
    protocol::{Failure, Request, Source},
    worker_client::Workers,
};

/// Changes of deployments take seconds; slow disks, minutes.
const CHANGE_LIMIT: Duration = Duration::from_secs(300);
/// A host that was told to go down is not told again sooner.
const REBOOT_PAUSE: Duration = Duration::from_secs(30);

/// Carries out steps on one host.
pub struct Executor {
    workers: Workers,
    host: HostFiles,
    last_reboot: Option<Instant>,
}

impl Executor {
    pub fn new(workers: Workers, host: HostFiles) -> Executor {
        Executor { workers, host, last_reboot: None }
    }

    /// Whether the host may be told to go down now, and if not, when.
    pub fn reboot_pause(&self) -> Option<Duration> {
        let since = self.last_reboot?.elapsed();
        REBOOT_PAUSE.checked_sub(since).filter(|left| !left.is_zero())
    }

    /// Carries out one step. `os_image` names the OSImage of the spec.
    pub async fn run(&mut self, step: &HostStep, state: &HostState, os_image: &str) -> Result<(), Failure> {
        match step {
            HostStep::Pull(_) => Ok(()),
            HostStep::Release { keep } => self.change(Request::Release { keep: keep.clone() }).await,
            HostStep::Arm(record) => self.arm(record).await,
            HostStep::Stage(image) => {
                self.change(Request::Stage { source: Source::new(image, os_image) }).await?;
                self.start_finalizer().await
            }
            HostStep::Reboot => self.reboot(state).await,
            HostStep::Confirm(record) => {
                guard::confirm(&self.host, &record.attempt, &state.boot_id).map_err(on_host)?;
                self.change(Request::Unpin).await?;
                self.save(record)
            }
            HostStep::Close(record) => self.close(record, state).await,
            HostStep::Disarm => {
                self.change(Request::Unpin).await?;
                guard::disarm(&self.host).map_err(on_host)
            }
            HostStep::RollBack(record) => {
                // A bad system may have filled the disk: the way back must not need space.
                if let Err(failure) = self.save(record) {
                    tracing::error!(%failure, "cannot write down why the host goes back; it goes back all the same");
                }
                self.change(Request::SetDefault { commit: record.previous.clone() }).await
            }
        }
    }

    async fn arm(&self, record: &Record) -> Result<(), Failure> {
        guard::arm(&self.host, record).map_err(on_host)?;
        self.change(Request::Pin).await?;
        self.save(record)
    }

    async fn close(&self, record: &Record, state: &HostState) -> Result<(), Failure> {
        self.change(Request::Unstage { commit: record.commit.clone() }).await?;
        // A boot loader that fell back may try the failed deployment again next time, unless it is told not to.
        let first = state.deployments.iter().find(|d| !d.staged);
        let fell_back = first.is_some_and(|d| !d.booted && d.commit == record.commit);
        if let Some(booted) = state.booted().filter(|_| fell_back) {
            self.change(Request::SetDefault { commit: booted.commit.clone() }).await?;
        }
        self.change(Request::Unpin).await?;
        // Not before: as long as the new system could still be booted, the guard watches.
        guard::disarm(&self.host).map_err(on_host)?;
        self.save(record)
    }

    async fn reboot(&mut self, state: &HostState) -> Result<(), Failure> {
        if state.staged().is_some() {
            self.start_finalizer().await?;
        }
        self.last_reboot = Some(Instant::now());
        host_commands::reboot(&self.workers).await.map_err(|error| {
            Failure::transient(
                ProblemReason::RebootFailed,
                format!("the host did not accept to reboot ({error}); see `systemd-inhibit --list` on the host"),
            )
        })
    }

    async fn start_finalizer(&self) -> Result<(), Failure> {
        host_commands::start_finalizer(&self.workers).await.map_err(|error| {
            Failure::transient(
                ProblemReason::StageFailed,
                format!("the shutdown would not complete the new deployment: {error}"),
            )
        })
    }

    async fn change(&self, request: Request) -> Result<(), Failure> {
        self.workers.ask(&request, CHANGE_LIMIT).await.map(|_| ())
    }

    fn save(&self, record: &Record) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(record).map_err(|e| on_host(e.into()))?;
        self.host.write(RECORD, &text, 0o644).map_err(on_host)
    }
}

/// Name of a step, for logs and metrics.
pub fn step_name(step: &HostStep) -> &'static str {
    match step {
        HostStep::Pull(_) => "Pull",
        HostStep::Release { .. } => "Release",
        HostStep::Arm(_) => "Arm",
        HostStep::Stage(_) => "Stage",
        HostStep::Reboot => "Reboot",
        HostStep::Confirm(_) => "Confirm",
        HostStep::Close(_) => "Close",
        HostStep::RollBack(_) => "RollBack",
        HostStep::Disarm => "Disarm",
    }
}

fn on_host(error: io::Error) -> Failure {
    Failure::transient(ProblemReason::HostError, error.to_string())
}
