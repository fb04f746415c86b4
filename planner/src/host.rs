//! The host's half of the protocol: from what a host is, and what its NodeOS asks, to at most one step.
//!
//! Called by the node daemon after every observation. Nothing in memory is an input: a daemon that is killed
//! anywhere and started again decides the same. What must survive a reboot is in the [`Record`] on the host.
//!
//! # Assumption
//! What the daemon hears of its NodeOS may be old, but never older than what it has heard before: its first list
//! after a start is a quorum read, and a watch goes on from there. The operator relies on it when it takes a
//! daemon's word that a withdrawn permit has been seen.

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
    /// Why nothing could be learnt of it now, if so.
    pub unreadable: Option<String>,
    /// The attempt that the boot guard is armed for.
    pub armed: Option<AttemptId>,
    /// How often the new system was booted without being confirmed, this boot included, while on trial.
    pub trial_boots: u32,
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
    /// Undo what was armed for an attempt that was never recorded: unpin, disarm the guard.
    Disarm,
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

/// How long to wait before the host is told again to go down.
const REBOOT_AGAIN: Duration = Duration::from_secs(60);
/// A new system is booted so often at most; one that falls over before its deadline would come up for ever. The boot guard
/// counts the same way.
const MOST_TRIALS: u32 = 3;
/// How often a host on trial is looked at.
const TRIAL_LOOK: Duration = Duration::from_secs(1);

/// Decides the one next step of a host.
pub fn plan(state: &HostState, wanted: Wanted<'_>) -> HostPlan {
    if let Some(message) = &state.unreadable {
        return untouchable(state, ProblemReason::HostError, message.clone(), true);
    }
    let Some(booted) = state.booted().filter(|_| state.unsupported.is_none()) else {
        let unbooted = "the host is not booted from an OSTree deployment";
        let message = state.unsupported.clone().unwrap_or_else(|| unbooted.into());
        return untouchable(state, ProblemReason::UnsupportedHost, message, false);
    };
    match &state.record {
        Some(record) if !record.finished() => underway(state, booted, record, wanted),
        Some(_) | None => at_rest(state, booted, wanted),
    }
}

impl HostState {
    /// The running deployment.
    pub fn booted(&self) -> Option<&HostDeployment> {
        self.deployments.iter().find(|d| d.booted)
    }

    /// The deployment that the next shutdown completes.
    pub fn staged(&self) -> Option<&HostDeployment> {
        self.deployments.iter().find(|d| d.staged)
    }
}

impl Record {
    /// Whether the attempt is over.
    pub fn finished(&self) -> bool {
        matches!(self.stage, Stage::Finished { .. })
    }

    fn close(&self, outcome: Outcome, message: impl Into<String>) -> Box<Record> {
        Box::new(Record { stage: Stage::Finished { outcome, message: message.into() }, ..self.clone() })
    }
}

/// A host that nothing may be done to, now or at all.
fn untouchable(state: &HostState, reason: ProblemReason, message: String, retrying: bool) -> HostPlan {
    HostPlan {
        step: None,
        report: Report {
            phase: NodePhase::Failed,
            message: message.clone(),
            problem: Some(Problem { reason, message, retrying }),
            pulled: None,
            attempt: state.record.as_ref().map(|r| attempt(r, AttemptState::Armed)),
        },
        wake: None,
    }
}

/// No attempt is under way: hold the image that is wanted, begin when there is a permit.
fn at_rest(state: &HostState, booted: &HostDeployment, wanted: Wanted<'_>) -> HostPlan {
    let last = state.record.as_ref().map(|r| attempt(r, AttemptState::Finished));
    let report = |phase, message: String, pulled: Option<&Commit>, problem: Option<Problem>| Report {
        phase,
        message,
        problem,
        pulled: pulled.cloned(),
        attempt: last.clone(),
    };
    let plan = |step, report, wake| HostPlan { step, report, wake };
    // A daemon that died while it armed the guard, or could not, left it armed for nothing.
    let arming = matches!(wanted, Wanted::Spec(spec) if spec.permit.as_ref().is_some_and(|p| Some(&p.attempt) == state.armed.as_ref() && state.is_news(p)));
    if state.armed.is_some() && !arming && !matches!(wanted, Wanted::Unknown) {
        let message = "disarms what an attempt left that was not begun".into();
        return plan(Some(HostStep::Disarm), report(NodePhase::Waiting, message, None, None), None);
    }
    let spec = match wanted {
        Wanted::Unknown => {
            return plan(None, report(NodePhase::Idle, "waits for the API server".into(), None, None), None);
        }
        Wanted::Nothing => None,
        Wanted::Spec(spec) => spec.image.as_ref().map(|image| (spec, image)),
    };
    let Some((spec, image)) = spec else {
        let step = state.litter(&[]).then_some(HostStep::Release { keep: vec![] });
        let (phase, message) = match state.record.as_ref().and_then(|r| state.failure_on(&r.commit)) {
            Some(message) => (NodePhase::Failed, message),
            None => (NodePhase::Idle, "nothing is asked of this node".into()),
        };
        return plan(step, report(phase, message, None, None), None);
    };
    let commit = &image.ostree.commit;
    if booted.commit == *commit {
        let step = state.litter(&[]).then_some(HostStep::Release { keep: vec![] });
        return plan(step, report(NodePhase::Idle, format!("runs {}", commit.short()), Some(commit), None), None);
    }
    if state.litter(std::slice::from_ref(commit)) {
        let step = HostStep::Release { keep: vec![commit.clone()] };
        return plan(
            Some(step),
            report(NodePhase::Waiting, "clears what an earlier image left".into(), None, None),
            None,
        );
    }
    if !state.held.contains(commit) {
        let pull = || HostStep::Pull(Box::new(image.clone()));
        let trouble = state.trouble_with(commit).map(|t| t.problem.clone());
        let message = |else_: &str| trouble.as_ref().map_or_else(|| else_.to_owned(), |p| p.message.clone());
        let download = format!("downloads {}", commit.short());
        return match state.pause(commit) {
            Pause::UntilTheSpecChanges => {
                plan(None, report(NodePhase::Failed, message(&download), None, trouble.clone()), None)
            }
            _ if !spec.may_pull => plan(
                None,
                report(NodePhase::Waiting, message("waits until it may download"), None, trouble.clone()),
                None,
            ),
            Pause::For(wait) => {
                plan(None, report(NodePhase::Pulling, message(&download), None, trouble.clone()), Some(wait))
            }
            Pause::No => plan(Some(pull()), report(NodePhase::Pulling, download, None, None), None),
        };
    }
    let pulled = |message: String, problem| report(NodePhase::Pulled, message, Some(commit), problem);
    match spec.permit.as_ref().filter(|p| state.is_news(p)) {
        None => match state.failure_on(commit) {
            Some(message) => plan(None, Report { phase: NodePhase::Failed, ..pulled(message, None) }, None),
            None => plan(None, pulled(format!("holds {} and waits for its turn", commit.short()), None), None),
        },
        Some(permit) => match refusal(permit, state, commit) {
            Some(message) => {
                let problem =
                    Problem { reason: ProblemReason::PermitRefused, message: message.clone(), retrying: false };
                plan(None, pulled(message, Some(problem)), None)
            }
            None => {
                let record = Record {
                    attempt: permit.attempt.clone(),
                    commit: commit.clone(),
                    previous: booted.commit.clone(),
                    boot_id: state.boot_id.clone(),
                    health: spec.health.clone(),
                    stage: Stage::Underway,
                };
                let problem = state.trouble_with(commit).map(|t| t.problem.clone());
                let report = Report { phase: NodePhase::Staging, ..pulled("prepares the way back".into(), problem) };
                match state.pause(commit) {
                    Pause::No => plan(Some(HostStep::Arm(Box::new(record))), report, None),
                    Pause::For(wait) => plan(None, report, Some(wait)),
                    Pause::UntilTheSpecChanges => plan(None, report, None),
                }
            }
        },
    }
}

/// Whether the last failure still forbids the next try.
#[derive(Clone, Copy, PartialEq)]
enum Pause {
    No,
    For(Duration),
    UntilTheSpecChanges,
}

impl HostState {
    fn trouble_with(&self, commit: &Commit) -> Option<&Trouble> {
        self.trouble.as_ref().filter(|t| t.commit == *commit)
    }

    fn pause(&self, commit: &Commit) -> Pause {
        match self.trouble_with(commit).map(|t| t.retry_in) {
            None => Pause::No,
            Some(Some(wait)) if wait.is_zero() => Pause::No,
            Some(Some(wait)) => Pause::For(wait),
            Some(None) => Pause::UntilTheSpecChanges,
        }
    }

    /// Whether commits are held that nothing speaks for.
    fn litter(&self, keep: &[Commit]) -> bool {
        self.held.iter().any(|held| !keep.contains(held))
    }

    /// How the last attempt failed, when it was for this commit and did.
    fn failure_on(&self, commit: &Commit) -> Option<String> {
        let record = self.record.as_ref().filter(|r| r.commit == *commit)?;
        match &record.stage {
            Stage::Finished { outcome: Outcome::Booted | Outcome::NeverRebooted, .. }
            | Stage::Underway
            | Stage::RollingBack { .. } => None,
            Stage::Finished { outcome, message } => Some(format!("{outcome} from {}: {message}", commit.short())),
        }
    }

    /// Whether a permit is for an attempt that this host has not seen through already.
    fn is_news(&self, permit: &Permit) -> bool {
        !permit.acknowledged && self.record.as_ref().is_none_or(|r| r.attempt != permit.attempt)
    }
}

/// Why a permit is not obeyed.
fn refusal(permit: &Permit, state: &HostState, commit: &Commit) -> Option<String> {
    if permit.boot_id != state.boot_id {
        return Some(format!("the permit is for boot {}, but this is boot {}", permit.boot_id, state.boot_id));
    }
    (permit.commit != *commit)
        .then(|| format!("the permit is for commit {}, but the image is {}", permit.commit.short(), commit.short()))
}

/// An attempt is under way: on the boot that it shall end, or on one after it.
fn underway(state: &HostState, booted: &HostDeployment, record: &Record, wanted: Wanted<'_>) -> HostPlan {
    let trial = Trial { state, record, wanted };
    match &record.stage {
        Stage::RollingBack { boot_id, message } => trial.rolling_back(booted, boot_id, message),
        Stage::Finished { .. } | Stage::Underway if record.boot_id == state.boot_id => trial.before_reboot(),
        Stage::Finished { .. } | Stage::Underway if booted.commit == record.commit => trial.verify(),
        Stage::Finished { .. } | Stage::Underway => trial.came_back(booted),
    }
}

struct Trial<'a> {
    state: &'a HostState,
    record: &'a Record,
    wanted: Wanted<'a>,
}

impl Trial<'_> {
    fn spec(&self) -> Option<&NodeOSSpec> {
        match self.wanted {
            Wanted::Spec(spec) => Some(spec),
            Wanted::Unknown | Wanted::Nothing => None,
        }
    }

    fn permit(&self) -> Option<&Permit> {
        self.spec()?.permit.as_ref().filter(|p| p.attempt == self.record.attempt)
    }

    /// A step that failed a moment ago is not tried again at once; writing the deployment, if it failed for
    /// good, not at all. The way back is always tried again.
    fn plan(
        &self,
        step: Option<HostStep>,
        phase: NodePhase,
        state: AttemptState,
        message: String,
        wake: Option<Duration>,
    ) -> HostPlan {
        const WAY_BACK_AGAIN: Duration = Duration::from_secs(5);
        let commit = &self.record.commit;
        let (step, wake) = match (self.state.pause(commit), step) {
            (Pause::For(wait), Some(_)) => (None, Some(wait)),
            (Pause::UntilTheSpecChanges, Some(HostStep::Stage(_) | HostStep::Pull(_))) => (None, None),
            (Pause::UntilTheSpecChanges, step) => (step, Some(WAY_BACK_AGAIN)),
            (Pause::No | Pause::For(_), step) => (step, wake),
        };
        let problem = self.state.trouble_with(commit).map(|t| t.problem.clone());
        let pulled = self.state.held.contains(commit).then(|| commit.clone());
        let attempt = Some(Attempt { message: message.clone(), ..attempt(self.record, state) });
        HostPlan { step, report: Report { phase, message, problem, pulled, attempt }, wake }
    }

    /// The permit is live: stage, go down. The permit is gone: undo.
    fn before_reboot(&self) -> HostPlan {
        let withdrawn = match self.wanted {
            Wanted::Unknown => false,
            Wanted::Nothing => true,
            Wanted::Spec(_) => self.permit().is_none(),
        };
        let armed = AttemptState::Armed;
        if withdrawn {
            let close = self.record.close(Outcome::NeverRebooted, "the permit was withdrawn before the host went down");
            return self.plan(
                Some(HostStep::Close(close)),
                NodePhase::Pulled,
                armed,
                "gives up the attempt".into(),
                None,
            );
        }
        let Some(spec) = self.spec() else {
            let message = "waits for the API server before it goes on".into();
            return self.plan(None, NodePhase::Staging, armed, message, None);
        };
        let commit = &self.record.commit;
        if self.state.staged().is_some_and(|d| d.commit == *commit) {
            let message = format!("reboots into {}", commit.short());
            return self.plan(Some(HostStep::Reboot), NodePhase::Rebooting, armed, message, Some(REBOOT_AGAIN));
        }
        match spec.image.as_ref().filter(|image| image.ostree.commit == *commit) {
            // What was held can be lost, to a disk that rots: then it is downloaded again.
            Some(image) if !self.state.held.contains(commit) => {
                let message = format!("downloads {} again", commit.short());
                let pull = Some(HostStep::Pull(Box::new(image.clone())));
                self.plan(pull, NodePhase::Pulling, armed, message, None)
            }
            Some(image) => {
                let message = format!("writes the deployment of {}", commit.short());
                self.plan(Some(HostStep::Stage(Box::new(image.clone()))), NodePhase::Staging, armed, message, None)
            }
            None => {
                let message = "the image changed under the attempt; waits for the permit to be withdrawn".into();
                self.plan(None, NodePhase::Staging, armed, message, None)
            }
        }
    }

    /// The new deployment runs: keep it when it is healthy and acknowledged, else go back at the deadline.
    fn verify(&self) -> HostPlan {
        let Record { health, commit, .. } = self.record;
        let acknowledged = self.permit().is_some_and(|p| p.acknowledged);
        let healthy = self.state.healthy_for.is_some_and(|t| t >= health.soak.get());
        if acknowledged {
            let done = self.record.close(Outcome::Booted, format!("verified on {}", commit.short()));
            return self.plan(
                Some(HostStep::Confirm(done)),
                NodePhase::Healthy,
                AttemptState::Healthy,
                "accepted".into(),
                None,
            );
        }
        if let Some(guard) = self.state.guard.as_ref().filter(|g| g.rolled_back && g.attempt == self.record.attempt) {
            return self.stuck(format!(
                "the boot guard sent the host back ({}), but it runs {}",
                guard.message,
                commit.short()
            ));
        }
        let failing: Vec<String> =
            self.state.checks.iter().filter(|c| !c.passing).map(|c| format!("{}: {}", c.name, c.message)).collect();
        if self.state.since_boot >= health.deadline.get() {
            let message = match (healthy, failing.is_empty()) {
                (true, _) => format!(
                    "healthy, but not acknowledged by the operator within {}: the API server could not be reached, the node was not Ready, or a check of the cluster did not hold",
                    health.deadline
                ),
                (false, true) => format!("checks had not held for {} within {}", health.soak, health.deadline),
                (false, false) => {
                    format!("health checks failed until the deadline of {}: {}", health.deadline, failing.join("; "))
                }
            };
            return self.roll_back(message);
        }
        if self.state.trial_boots >= MOST_TRIALS {
            let times = self.state.trial_boots;
            return self.roll_back(format!(
                "booted {times} times without becoming healthy: it falls over before its deadline"
            ));
        }
        let left = health.deadline.get().saturating_sub(self.state.since_boot);
        let wake = Some(TRIAL_LOOK.min(left));
        if healthy {
            let message = "all checks hold; waits for the operator to acknowledge".into();
            return self.plan(None, NodePhase::Healthy, AttemptState::Healthy, message, wake);
        }
        let message = match failing.is_empty() {
            true => "health checks hold or run; soaking".to_owned(),
            false => format!("waits for health checks: {}", failing.join("; ")),
        };
        self.plan(None, NodePhase::Verifying, AttemptState::Verifying, message, wake)
    }

    fn roll_back(&self, message: String) -> HostPlan {
        let Record { previous, .. } = self.record;
        if !self.state.deployments.iter().any(|d| !d.booted && !d.staged && d.commit == *previous) {
            let message =
                format!("{message}; the previous deployment {} is gone, so the host stays up", previous.short());
            return self.stuck(message);
        }
        // The record may be what could not be written; the default tells as well.
        if self.state.deployments.first().is_some_and(|d| d.commit == *previous && !d.booted) {
            let again = Some(REBOOT_AGAIN);
            return self.plan(
                Some(HostStep::Reboot),
                NodePhase::RollingBack,
                AttemptState::RollingBack,
                message,
                again,
            );
        }
        let stage = Stage::RollingBack { boot_id: self.state.boot_id.clone(), message: message.clone() };
        let record = Box::new(Record { stage, ..self.record.clone() });
        self.plan(Some(HostStep::RollBack(record)), NodePhase::RollingBack, AttemptState::RollingBack, message, None)
    }

    /// At most one roll back per attempt: a host that is still on the new deployment afterwards stays up.
    fn rolling_back(&self, booted: &HostDeployment, told_on: &str, message: &str) -> HostPlan {
        let Record { previous, .. } = self.record;
        let rolling =
            |step, wake| self.plan(step, NodePhase::RollingBack, AttemptState::RollingBack, message.to_owned(), wake);
        if booted.commit == *previous {
            return rolling(Some(HostStep::Close(self.record.close(Outcome::RolledBack, message))), None);
        }
        let default = self.state.deployments.first().is_some_and(|d| d.commit == *previous);
        if told_on != self.state.boot_id {
            // Told, but cut off before the default was changed: that was no way back yet.
            if !default {
                return self.roll_back(message.to_owned());
            }
            return self.stuck(format!(
                "{message}; the host was sent back to {} but booted {} again",
                previous.short(),
                booted.commit.short()
            ));
        }
        match default {
            true => rolling(Some(HostStep::Reboot), Some(REBOOT_AGAIN)),
            false => rolling(Some(HostStep::RollBack(Box::new(self.record.clone()))), None),
        }
    }

    fn stuck(&self, message: String) -> HostPlan {
        let Record { previous, .. } = self.record;
        let message = format!(
            "{message}; look at `ostree admin status` on the host, make {} the default and reboot",
            previous.short()
        );
        let mut plan = self.plan(None, NodePhase::Failed, AttemptState::RollingBack, message.clone(), None);
        plan.report.problem = Some(Problem { reason: ProblemReason::RollbackFailed, message, retrying: false });
        plan
    }

    /// The host rebooted, but does not run the new deployment.
    fn came_back(&self, booted: &HostDeployment) -> HostPlan {
        let Record { attempt, commit, .. } = self.record;
        let guard = self.state.guard.as_ref().filter(|g| g.attempt == *attempt);
        let written = self.state.deployments.iter().any(|d| d.commit == *commit);
        let (outcome, message) = match (guard, written) {
            (Some(guard), _) if guard.rolled_back => {
                (Outcome::RolledBack, format!("the boot guard went back: {}", guard.message))
            }
            (_, false) => {
                (Outcome::NotFinalized, format!("the shutdown did not complete the deployment of {}", commit.short()))
            }
            (_, true) => {
                (Outcome::FellBack, format!("the host booted {} instead of {}", booted.commit.short(), commit.short()))
            }
        };
        let close = self.record.close(outcome, message.clone());
        self.plan(Some(HostStep::Close(close)), NodePhase::Failed, AttemptState::RollingBack, message, None)
    }
}

/// The attempt as the status tells it.
fn attempt(record: &Record, under_way: AttemptState) -> Attempt {
    let Record { attempt, commit, previous, boot_id, health: _, stage } = record;
    let (state, outcome, message) = match stage {
        Stage::Underway => (under_way, None, String::new()),
        Stage::RollingBack { message, .. } => (AttemptState::RollingBack, None, message.clone()),
        Stage::Finished { outcome, message } => (AttemptState::Finished, Some(*outcome), message.clone()),
    };
    Attempt {
        attempt: attempt.clone(),
        commit: commit.clone(),
        previous: previous.clone(),
        boot_id: boot_id.clone(),
        state,
        outcome,
        message,
    }
}
