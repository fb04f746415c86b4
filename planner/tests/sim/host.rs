//! A simulated host with its daemon: deployments, a record on disk, a boot guard, boots that go wrong.

use std::time::Duration;

use osimage_crds::{
    Commit, NodeOSSpec, NodeOSStatus,
    nodeos::{CheckStatus, Deployment},
};
use osimage_planner::host::{GuardResult, HostDeployment, HostPlan, HostState, HostStep, Record, Stage, Wanted, plan};

use crate::mutant::Mutant;

/// What survives on the host, and what the running daemon remembers.
#[derive(Clone, Debug)]
pub struct Host {
    pub name: String,
    // -- on disk
    pub deployments: Vec<HostDeployment>,
    held: Vec<Commit>,
    pub record: Option<Record>,
    guard: Option<GuardResult>,
    guard_armed: bool,
    armed: Option<osimage_crds::AttemptId>,
    trial_boots: u32,
    /// Which machine this is, of those that ever had the name.
    machine: u64,
    // -- this boot
    pub boot: u64,
    pub up: bool,
    pub silent: bool,
    booted_at: u64,
    healthy_since: Option<u64>,
    // -- the daemon's memory
    spec: Memory,
    heard: u64,
    pub must_pull: u32,
}

#[derive(Clone, Debug)]
enum Memory {
    Unknown,
    Nothing,
    Spec(i64, Box<NodeOSSpec>),
}

/// How a boot goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Boot {
    Normal,
    /// The boot loader takes the second entry.
    FellBack,
    /// The shutdown did not complete the staged deployment.
    NotFinalized,
}

impl Host {
    pub fn new(name: &str, machine: u64, commit: &Commit) -> Self {
        let first = HostDeployment { commit: commit.clone(), serial: 0, booted: true, staged: false, pinned: false };
        Host {
            name: name.into(),
            deployments: vec![first],
            held: vec![],
            record: None,
            guard: None,
            guard_armed: false,
            armed: None,
            trial_boots: 0,
            machine,
            boot: 1,
            up: true,
            silent: false,
            booted_at: 0,
            healthy_since: None,
            spec: Memory::Unknown,
            heard: 0,
            must_pull: 2,
        }
    }

    pub fn boot_id(&self) -> String {
        format!("{}-{}-boot-{}", self.name, self.machine, self.boot)
    }

    pub fn booted(&self) -> &Commit {
        &self.deployments.iter().find(|d| d.booted).unwrap().commit
    }

    /// A reboot, asked for or not.
    pub fn go_down(&mut self) {
        self.up = false;
    }

    /// Completes what was staged, chooses an entry, starts.
    pub fn come_up(&mut self, how: Boot, now: u64) {
        if let Some(at) = self.deployments.iter().position(|d| d.staged) {
            if how == Boot::NotFinalized {
                self.deployments.remove(at);
            } else {
                // The staged one becomes the default; the booted one, and pinned ones, are kept.
                let mut staged = self.deployments.remove(at);
                staged.staged = false;
                self.deployments.retain(|d| d.booted || d.pinned);
                self.deployments.insert(0, staged);
            }
        }
        let chosen = if how == Boot::FellBack && self.deployments.len() > 1 { 1 } else { 0 };
        for (i, d) in self.deployments.iter_mut().enumerate() {
            d.booted = i == chosen;
        }
        self.boot += 1;
        self.up = true;
        self.booted_at = now;
        self.healthy_since = None;
        self.spec = Memory::Unknown;
        if self.record.as_ref().is_some_and(|r| !r.finished() && *self.booted() == r.commit) {
            self.trial_boots += 1;
        }
        self.guard_at_boot();
    }

    /// The guard at boot: not on the target, so disarm and say so.
    fn guard_at_boot(&mut self) {
        let Some(record) = self.record.clone().filter(|_| self.guard_armed) else { return };
        if *self.booted() != record.commit {
            self.guard_armed = false;
            self.armed = None;
            self.guard.get_or_insert(GuardResult {
                attempt: record.attempt,
                rolled_back: false,
                message: "fell back".into(),
            });
        }
    }

    /// The guard past its deadline, when no daemon did anything: at most one roll back.
    pub fn guard_tick(&mut self, now: u64) -> bool {
        let Some(record) = self.record.clone().filter(|r| self.guard_armed && self.up && !r.finished()) else {
            return false;
        };
        let deadline = record.health.deadline.get().as_secs() + 5;
        if *self.booted() != record.commit || now - self.booted_at < deadline || record.boot_id == self.boot_id() {
            return false;
        }
        self.guard_armed = false;
        self.armed = None;
        let Some(at) = self.deployments.iter().position(|d| d.commit == record.previous && !d.booted) else {
            return false;
        };
        self.guard = Some(GuardResult { attempt: record.attempt, rolled_back: true, message: "deadline".into() });
        let previous = self.deployments.remove(at);
        self.deployments.insert(0, previous);
        self.go_down();
        true
    }

    pub fn daemon_restarts(&mut self) {
        self.spec = Memory::Unknown;
        self.healthy_since = None;
    }

    /// Whether the daemon has just started: its first list is a quorum read, so it is never old.
    pub fn hears_first(&self) -> bool {
        matches!(self.spec, Memory::Unknown)
    }

    /// The daemon hears from the API server. What it hears may be old, but never older than what it has heard.
    pub fn hear(&mut self, node_os: Option<&osimage_crds::NodeOS>) {
        let version = |n: &osimage_crds::NodeOS| n.metadata.resource_version.as_deref().and_then(|v| v.parse().ok());
        let heard = node_os.and_then(version).unwrap_or(self.heard);
        if heard < self.heard {
            return;
        }
        self.heard = heard;
        self.spec = match node_os {
            None => Memory::Nothing,
            Some(n) => Memory::Spec(n.metadata.generation.unwrap(), Box::new(n.spec.clone())),
        };
    }

    fn observe(&mut self, now: u64, healthy: bool) -> HostState {
        let on_trial = self.record.as_ref().is_some_and(|r| !r.finished() && *self.booted() == r.commit);
        if !(on_trial && healthy) {
            self.healthy_since = None;
        } else {
            self.healthy_since.get_or_insert(now);
        }
        let checks = match on_trial {
            true => vec![CheckStatus { name: "check".into(), passing: healthy, message: String::new() }],
            false => vec![],
        };
        HostState {
            boot_id: self.boot_id(),
            unsupported: None,
            unreadable: None,
            armed: self.armed.clone(),
            trial_boots: if on_trial { self.trial_boots } else { 0 },
            deployments: self.deployments.clone(),
            held: self.held.clone(),
            record: self.record.clone(),
            guard: self.guard.clone(),
            since_boot: Duration::from_secs(now - self.booted_at),
            checks,
            healthy_for: self.healthy_since.map(|since| Duration::from_secs(now - since)),
            trouble: None,
        }
    }

    pub fn decide(&mut self, now: u64, healthy: bool, broken: Option<Mutant>) -> (HostState, HostPlan) {
        let state = self.observe(now, healthy);
        let wanted = match &self.spec {
            Memory::Unknown => Wanted::Unknown,
            Memory::Nothing => Wanted::Nothing,
            Memory::Spec(_, spec) => Wanted::Spec(spec),
        };
        let plan = match (broken, wanted) {
            (Some(mutant), Wanted::Spec(spec)) => {
                let mut spec = spec.clone();
                mutant.deceive(&mut spec, &state.boot_id);
                plan(&state, Wanted::Spec(&spec))
            }
            (_, wanted) => plan(&state, wanted),
        };
        (state, plan)
    }

    /// What the daemon would write into its status, if it knows its NodeOS.
    pub fn report(&self, state: &HostState, plan: &HostPlan) -> Option<NodeOSStatus> {
        let Memory::Spec(generation, _) = &self.spec else { return None };
        let deployment = |d: &HostDeployment| Deployment { commit: d.commit.clone(), version: None, pinned: d.pinned };
        Some(NodeOSStatus {
            observed_generation: Some(*generation),
            phase: Some(plan.report.phase),
            message: plan.report.message.clone(),
            boot_id: Some(state.boot_id.clone()),
            booted: state.booted().map(deployment),
            staged: state.staged().map(deployment),
            pulled: plan.report.pulled.clone(),
            problem: plan.report.problem.clone(),
            last_attempt: plan.report.attempt.clone(),
            ..NodeOSStatus::default()
        })
    }

    /// Carries out a step, or, when it crashes, only its first part.
    pub fn carry_out(&mut self, step: HostStep, crash: bool) {
        match step {
            HostStep::Pull(image) => {
                self.must_pull = self.must_pull.saturating_sub(1);
                if self.must_pull == 0 && !crash {
                    self.held.push(image.ostree.commit);
                }
            }
            HostStep::Release { keep } => self.held.retain(|c| keep.contains(c)),
            HostStep::Arm(record) => {
                self.guard_armed = true;
                self.armed = Some(record.attempt.clone());
                self.trial_boots = 0;
                self.guard = None;
                self.deployments.iter_mut().filter(|d| d.booted).for_each(|d| d.pinned = true);
                if !crash {
                    self.record = Some(*record);
                }
            }
            HostStep::Stage(image) if !crash => {
                self.deployments.retain(|d| !d.staged);
                let commit = image.ostree.commit;
                let staged = HostDeployment { commit, serial: 0, booted: false, staged: true, pinned: false };
                self.deployments.insert(0, staged);
            }
            HostStep::Stage(_) => {}
            HostStep::Reboot => self.go_down(),
            HostStep::Disarm => {
                self.guard_armed = false;
                self.armed = None;
                self.deployments.iter_mut().for_each(|d| d.pinned = false);
            }
            HostStep::Confirm(record) | HostStep::Close(record) => {
                self.guard_armed = false;
                self.armed = None;
                let kept =
                    matches!(record.stage, Stage::Finished { outcome: osimage_crds::nodeos::Outcome::Booted, .. });
                if !kept {
                    self.deployments.retain(|d| !(d.staged && d.commit == record.commit));
                    if let Some(at) = self.deployments.iter().position(|d| d.booted) {
                        let booted = self.deployments.remove(at);
                        self.deployments.insert(0, booted);
                    }
                }
                if !crash {
                    self.deployments.iter_mut().for_each(|d| d.pinned = false);
                    self.record = Some(*record);
                }
            }
            HostStep::RollBack(record) => {
                let previous = record.previous.clone();
                self.record = Some(*record);
                if !crash {
                    let at = self.deployments.iter().position(|d| d.commit == previous).unwrap();
                    let previous = self.deployments.remove(at);
                    self.deployments.insert(0, previous);
                }
            }
        }
    }
}
