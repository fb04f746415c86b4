//! Which node may be disrupted now, and what comes next for those that are.
//!
//! # The course of a slot
//! Derived again on every pass from the slot book, the Node and the NodeOS; each line is written down before
//! the next one is acted on, so that operators may die, or be two, anywhere.
//!
//! 1. the slot is written into the book (with the resourceVersion the OSImage was read at)
//! 2. cordon, then evict, round by round, until nothing is left that has to go
//! 3. `permitted` is written into the book, then the permit into the NodeOS (with its resourceVersion)
//! 4. the host goes down, comes back, reports; when it is healthy, the Node is Ready and the checks of the cluster hold,
//!    it is acknowledged; what keeps it from that is remembered in the slot
//! 5. the outcome is written into the book; a failure is counted, and may reject the commit
//! 6. uncordon what we cordoned; mark the attempt as released in the NodeOS
//! 7. the slot is removed from the book
//!
//! # Guarantees
//! * At most `maxUnavailable` selected nodes are in slots or down for any cause when a slot is taken.
//! * No permit before the drain is complete; none for an attempt that has been released.
//! * A commit that has spent the failure budget is not begun on any node.

mod book;
mod reserve;
mod slots;
mod upkeep;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::{
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
    jiff::{SignedDuration, Timestamp},
};
use osimage_crds::{
    AttemptId, Commit, NodeOS, NodeOSSpec, OSImageStatus,
    condition::bounded,
    names,
    nodeos::{Attempt, AttemptState, OSImageRef, Outcome, Permit},
    osimage::{
        Deferred, Failure, OnDrainTimeout, PastRollout, Rejected, RolloutResult, RolloutStatus, Slot, SlotOutcome,
        WaveStatus, whole_seconds,
    },
};

use crate::{
    checks, drain,
    fleet::{Fleet, NodeView, PodFacts},
    gate,
    plan::{Change, Hold, HoldReason, Plan, Step},
    status,
};

/// Candidates whose pods are looked at in one pass. Enough to find one that can be drained, and bounded.
const LOOK_AHEAD: usize = 10;
/// How long a node may be silent past reboot timeout and health deadline before it counts as lost.
const LOST_GRACE: Duration = Duration::from_secs(30);
/// How long a drain may be held by budgets before that is told as a blocker.
const DRAIN_BLOCKED_AFTER: Duration = Duration::from_secs(15);
/// How often the next candidates behind those that cannot be drained are looked at.
const LOOK_FURTHER: Duration = Duration::from_secs(60);
/// How soon to look again at candidates that cannot be drained. (Budgets are watched; pods are not.)
const BLOCKED_LOOK: Duration = Duration::from_secs(15);
/// Bytes of a message that is remembered.
const MAX_MESSAGE: usize = 1024;
/// How soon to look again at pods that stop: they are not watched.
const DRAIN_LOOK: Duration = Duration::from_secs(2);
/// Pause before a node that could not be emptied in time is tried again; doubles each time.
const DRAIN_AGAIN: Duration = Duration::from_secs(300);
const DRAIN_AGAIN_AT_MOST: Duration = Duration::from_secs(6 * 3600);
/// Earlier rollouts that are remembered.
const MAX_HISTORY: usize = 10;
/// Rejected commits that are remembered, the newest first.
const MAX_REJECTED: usize = 20;

/// How soon to look again at a node that a check of the cluster keeps from being acknowledged. (Pods are not watched.)
const PROOF_LOOK: Duration = Duration::from_secs(5);
/// Nodes on trial whose pods are looked at in one pass.
const MOST_PROOFS: usize = 50;
/// Bytes of what is remembered of a node that is not acknowledged.
const MAX_UNPROVEN: usize = 256;
/// How soon to ask a gate again that is not open.
const GATE_LOOK: Duration = Duration::from_secs(15);

/// The nodes whose pods have to be known for [`plan`]: those being drained, those on trial that a check of pods keeps
/// from being acknowledged, and the next candidates.
pub fn inspect(fleet: &Fleet, now: Timestamp) -> BTreeSet<String> {
    let status = fleet.status();
    let draining = status.slots.iter().filter(|s| s.permitted.is_none() && s.outcome.is_none()).map(|s| s.node.clone());
    let mut draft = Draft::new(fleet, now);
    draft.obey_retry();
    draft.keep_history();
    let order = draft.order();
    let busy = draining.chain(to_prove(fleet, now));
    let Ok(members) = gate::wave::membership(fleet, &order) else { return busy.collect() };
    draft.book.slots = status.slots.clone();
    draft.count_waves(&members);
    let waves = draft.book.rollout.iter().flat_map(|r| r.waves.clone()).collect::<Vec<_>>();
    let closed = gate::wave::closed(fleet, &waves, now).map_or(usize::MAX, |c| c.from);
    let candidates = draft.candidates(&order, &members, closed);
    // Where more wait than are looked at in a pass, every minute it is the next ones: the first may be blocked for good.
    let turn = usize::try_from(now.as_second().max(0)).unwrap_or(0) / LOOK_FURTHER.as_secs() as usize;
    let skip = (turn * LOOK_AHEAD).checked_rem(candidates.len()).filter(|_| candidates.len() > LOOK_AHEAD).unwrap_or(0);
    let next = candidates.iter().cycle().skip(skip).take(LOOK_AHEAD.min(candidates.len())).map(|n| n.name.clone());
    busy.chain(next).collect()
}

/// Nodes whose hosts are healthy and that wait to be acknowledged, where a check asks for their pods.
fn to_prove(fleet: &Fleet, now: Timestamp) -> Vec<String> {
    if !checks::ask_for_pods(&fleet.image.spec.health.checks) {
        return vec![];
    }
    let waits = |slot: &&Slot| {
        let node_os = fleet.nodes.get(&slot.node).and_then(|n| n.node_os.as_ref());
        let attempt = node_os.and_then(|n| n.status.as_ref()).and_then(|s| s.last_attempt.as_ref());
        let healthy = attempt.is_some_and(|a| a.attempt == slot.attempt && a.state == AttemptState::Healthy);
        let acknowledged = node_os.and_then(|n| n.spec.permit.as_ref()).is_some_and(|p| p.acknowledged);
        slot.permitted.is_some() && slot.outcome.is_none() && healthy && !acknowledged
    };
    let status = fleet.image.status.as_ref();
    let waiting: Vec<&Slot> = status.iter().flat_map(|s| &s.slots).filter(waits).collect();
    // Where more wait than are looked at in a pass, each has its turn: the first may be held until their deadline.
    let turn = usize::try_from(now.as_second().max(0)).unwrap_or(0) / PROOF_LOOK.as_secs() as usize;
    let skip = (turn * MOST_PROOFS).checked_rem(waiting.len()).filter(|_| waiting.len() > MOST_PROOFS).unwrap_or(0);
    let turn = waiting.iter().cycle().skip(skip).take(MOST_PROOFS.min(waiting.len()));
    turn.map(|slot| slot.node.clone()).collect()
}

/// Whether a node would be started if every gate of `rollout.gates` were open: only then is there something to ask them.
pub fn asks_gates(fleet: &Fleet, now: Timestamp) -> bool {
    if fleet.image.spec.rollout.gates.is_empty() || !fleet.has_finalizer() {
        return false;
    }
    let mut draft = Draft { gates: vec![], ..Draft::new(fleet, now) };
    let before = draft.book.attempts;
    draft.decide();
    draft.book.attempts > before
}

/// Decides one pass.
pub fn plan(fleet: &Fleet, now: Timestamp) -> Plan {
    let mut draft = Draft::new(fleet, now);
    if !fleet.has_finalizer() {
        let steps = if fleet.deleting() { vec![] } else { vec![Step::AddFinalizer] };
        return Plan { status: fleet.status(), steps, holds: vec![], wake: None };
    }
    draft.decide();
    draft.look_after_the_rest();
    draft.finish()
}

/// What a pass has decided so far.
struct Draft<'a> {
    fleet: &'a Fleet,
    now: Timestamp,
    /// Nodes in the slot book as it was read. Looked up for every node, so not searched for.
    taken: BTreeSet<&'a str>,
    /// The status being made; its slots are those that go on.
    book: OSImageStatus,
    steps: Vec<Step>,
    holds: Vec<Hold>,
    wake: Option<Duration>,
    /// Gates that are not open.
    gates: Vec<Hold>,
}

impl<'a> Draft<'a> {
    fn new(fleet: &'a Fleet, now: Timestamp) -> Self {
        let book = OSImageStatus { slots: vec![], ..fleet.status() };
        let gates = gate::health::check(&fleet.image.spec.rollout.gates, &fleet.gates);
        let slots = fleet.image.status.iter().flat_map(|s| &s.slots);
        let taken = slots.map(|s| s.node.as_str()).collect();
        Draft { fleet, now, taken, book, steps: vec![], holds: vec![], wake: None, gates }
    }

    /// What is remembered, the slots, and who takes the next ones.
    fn decide(&mut self) {
        self.obey_retry();
        self.keep_history();
        self.forget_other_commits();
        for slot in self.fleet.status().slots {
            self.advance(slot);
        }
        self.reserve();
    }

    fn hold(&mut self, node: &str, reason: HoldReason, message: impl Into<String>) {
        self.holds.push(Hold { node: Some(node.into()), reason, object: None, message: message.into() });
    }

    fn wake_in(&mut self, wait: Duration) {
        self.wake = Some(self.wake.map_or(wait, |w| w.min(wait)));
    }

    /// Wakes at a moment; says whether it has come.
    fn due(&mut self, at: Timestamp) -> bool {
        match Duration::try_from(at.duration_since(self.now)) {
            Ok(left) if !left.is_zero() => {
                self.wake_in(left);
                false
            }
            Ok(_) | Err(_) => true,
        }
    }

    fn finish(mut self) -> Plan {
        if self.holds.iter().any(|h| h.reason == HoldReason::DaemonSilent) {
            self.wake_in(status::DAEMON_ANSWERS_WITHIN);
        }
        let status = status::status(self.fleet, self.book, &self.holds, self.now);
        Plan { status, steps: self.steps, holds: self.holds, wake: self.wake }
    }
}

fn commit_of(spec: &NodeOSSpec) -> Option<&Commit> {
    spec.image.as_ref().map(|i| &i.ostree.commit)
}

fn after(start: Timestamp, span: Duration) -> Timestamp {
    SignedDuration::try_from(span).ok().and_then(|d| start.checked_add(d).ok()).unwrap_or(Timestamp::MAX)
}

/// A budget as a number of nodes: percentages round down, at least 1.
pub fn resolve(budget: &IntOrString, nodes: usize) -> usize {
    match budget {
        IntOrString::Int(n) => usize::try_from(*n).unwrap_or(0).max(1),
        IntOrString::String(text) => {
            let percent: usize = text.trim_end_matches('%').parse().unwrap_or(0);
            (nodes * percent.min(100) / 100).max(1)
        }
    }
}
