//! The host's half of the protocol: from what a host is, and what its NodeOS asks, to at most one step.
//!
//! Called by the node daemon after every observation. Nothing in memory is an input: a daemon that is killed
//! anywhere and started again decides the same. What must survive a reboot is in the [`Record`] on the host.

use std::time::Duration;

use osimage_crds::{
    AttemptId, Commit, NodeOSSpec,
    nodeos::{Attempt, AttemptState, CheckStatus, NodePhase, Outcome, Permit, Problem, ProblemReason},
    osimage::{Health, Image},
};
use serde::{Deserialize, Serialize};

/// What the daemon knows of its NodeOS.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// The API server has not answered since the daemon started: neither take nor drop anything.
    Unknown,
    /// There is no NodeOS for this node: nothing is wanted.
    Nothing,
    /// The spec as it is now.
    Spec(&'a NodeOSSpec),
}

/// A host as observed at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HostState {
    /// The running boot, as the kernel names it.
    pub boot_id: String,
    /// Why this host must not be touched, if so.
    pub unsupported: Option<String>,
    /// The deployments, default first, as `ostree admin status` lists them.
    pub deployments: Vec<HostDeployment>,
    /// Commits that are on disk completely, verified, and held by a ref of ours.
    pub held: Vec<Commit>,
    /// The record of the last attempt.
    pub record: Option<Record>,
    /// What the boot guard did, for the attempt it names.
    pub guard: Option<GuardResult>,
    /// Time since this boot was first seen.
    pub since_boot: Duration,
    /// The checks of the record, as last run on this boot. Empty when they have not been run.
    pub checks: Vec<CheckStatus>,
    /// How long all checks have held without a break, on this boot. `None` when one does not, or none has run.
    pub healthy_for: Option<Duration>,
    /// The last thing that went wrong when a step was carried out, with the commit it concerned.
    pub trouble: Option<Trouble>,
}

/// One deployment on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDeployment {
    /// Its commit.
    pub commit: Commit,
    /// Told apart by this when a commit is deployed twice.
    pub serial: i32,
    /// It runs now.
    pub booted: bool,
    /// The next shutdown will complete it.
    pub staged: bool,
    /// Kept until unpinned.
    pub pinned: bool,
}

/// What the host writes down of an attempt, before the first change and after each turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Name of the attempt.
    pub attempt: AttemptId,
    /// The commit to boot.
    pub commit: Commit,
    /// The commit to go back to.
    pub previous: Commit,
    /// The boot that the permit was for.
    pub boot_id: String,
    /// What healthy means, as the permit found it.
    pub health: Health,
    /// How far it is.
    pub stage: Stage,
}

/// How far an attempt is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "is")]
pub enum Stage {
    /// Under way: before the reboot, or on trial after it, as the boot ID tells.
    Underway,
    /// The host has been told to go back, during this boot.
    #[serde(rename_all = "camelCase")]
    RollingBack {
        /// The boot during which it was told.
        boot_id: String,
        /// Why.
        message: String,
    },
    /// Over.
    #[serde(rename_all = "camelCase")]
    Finished {
        /// How it ended.
        outcome: Outcome,
        /// Why.
        message: String,
    },
}

/// What the boot guard did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardResult {
    /// The attempt that it guarded.
    pub attempt: AttemptId,
    /// It sent the host back (else it found the host back already, or could not).
    pub rolled_back: bool,
    /// What it wrote down.
    pub message: String,
}

/// What went wrong when a step was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The commit that it was about.
    pub commit: Commit,
    /// What happened and what to do.
    pub problem: Problem,
    /// When to try again, from now; `None` when trying again would not help.
    pub retry_in: Option<Duration>,
}

/// The one next step of a host.
#[derive(Clone, Debug, PartialEq)]
pub enum HostStep {
    /// Download the commit, verify it, hold it by a ref.
    Pull(Box<Image>),
    /// Drop every hold but those named, and a staged deployment that no record speaks for.
    Release {
        /// Commits to keep.
        keep: Vec<Commit>,
    },
    /// Write the record, install and arm the boot guard, pin the running deployment.
    Arm(Box<Record>),
    /// Write the new deployment, so that the next shutdown completes it.
    Stage(Box<Image>),
    /// Go down, in order.
    Reboot,
    /// The new deployment is accepted: disarm the guard, unpin, close the record with [`Outcome::Booted`].
    Confirm(Box<Record>),
    /// Close the record with its outcome: disarm the guard, drop a staged deployment of it, unpin.
    Close(Box<Record>),
    /// Write the record (it says why), make the previous deployment the default.
    RollBack(Box<Record>),
}

/// The decision: one step, what to report meanwhile, when to look again.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct HostPlan {
    /// What to do.
    pub step: Option<HostStep>,
    /// What to say in the status.
    pub report: Report,
    /// When to look again, at the latest. `None`: on the next change.
    pub wake: Option<Duration>,
}

/// The decision's part of NodeOS.status; the rest is plain observation.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// One word.
    pub phase: NodePhase,
    /// One line.
    pub message: String,
    /// Why the node cannot do what is asked.
    pub problem: Option<Problem>,
    /// The commit that is held and wanted.
    pub pulled: Option<Commit>,
    /// The attempt under way, or the last one.
    pub attempt: Option<Attempt>,
}
