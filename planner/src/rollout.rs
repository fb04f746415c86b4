//! Which node may be disrupted now, and what comes next for those that are.
//!
//! # The course of a slot
//! Derived again on every pass from the slot book, the Node and the NodeOS; each line is written down before
//! the next one is acted on, so that operators may die, or be two, anywhere.
//!
//! 1. the slot is written into the book (with the resourceVersion the OSImage was read at)
//! 2. cordon, then evict, round by round, until nothing is left that has to go
//! 3. `permitted` is written into the book, then the permit into the NodeOS (with its resourceVersion)
//! 4. the host goes down, comes back, reports; when it is healthy and the Node is Ready, it is acknowledged
//! 5. the outcome is written into the book; a failure is counted, and may reject the commit
//! 6. uncordon what we cordoned; mark the attempt as released in the NodeOS
//! 7. the slot is removed from the book
//!
//! # Guarantees
//! * At most `maxUnavailable` selected nodes are in slots or down for any cause when a slot is taken.
//! * No permit before the drain is complete; none for an attempt that has been released.
//! * A commit that has spent the failure budget is not begun on any node.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::{
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
    jiff::{SignedDuration, Timestamp},
};
use osimage_crds::{
    AttemptId, Commit, NodeOS, NodeOSSpec, OSImageStatus, names,
    nodeos::{Attempt, AttemptState, OSImageRef, Outcome, Permit},
    osimage::{Failure, Rejected, Slot, SlotOutcome, whole_seconds},
};

use crate::{
    drain,
    fleet::{Fleet, NodeView},
    plan::{Change, Hold, HoldReason, Plan, Step},
    status,
};

/// Candidates whose pods are looked at in one pass. Enough to find one that can be drained, and bounded.
const LOOK_AHEAD: usize = 10;
/// How long a node may be silent past reboot timeout and health deadline before it counts as lost.
const LOST_GRACE: Duration = Duration::from_secs(30);
/// How soon to look again at pods that stop, or that a budget holds: neither is watched.
const DRAIN_LOOK: Duration = Duration::from_secs(2);
/// Rejected commits that are remembered, the newest first.
const MAX_REJECTED: usize = 20;

/// The nodes whose pods have to be known for [`plan`]: those being drained, and the next candidates.
pub fn inspect(fleet: &Fleet) -> BTreeSet<String> {
    let status = fleet.status();
    let draining = status.slots.iter().filter(|s| s.permitted.is_none() && s.outcome.is_none()).map(|s| s.node.clone());
    let mut draft = Draft::new(fleet, Timestamp::UNIX_EPOCH);
    draft.obey_retry();
    let next = draft.candidates().into_iter().take(LOOK_AHEAD).map(|n| n.name.clone());
    draining.chain(next).collect()
}

/// Decides one pass.
pub fn plan(fleet: &Fleet, now: Timestamp) -> Plan {
    let mut draft = Draft::new(fleet, now);
    if !fleet.has_finalizer() {
        let steps = if fleet.deleting() { vec![] } else { vec![Step::AddFinalizer] };
        return Plan { status: fleet.status(), steps, holds: vec![], wake: None };
    }
    draft.obey_retry();
    draft.forget_other_commits();
    for slot in fleet.status().slots {
        draft.advance(slot);
    }
    draft.reserve();
    draft.look_after_the_rest();
    draft.finish()
}

/// What a pass has decided so far.
struct Draft<'a> {
    fleet: &'a Fleet,
    now: Timestamp,
    /// The status being made; its slots are those that go on.
    book: OSImageStatus,
    steps: Vec<Step>,
    holds: Vec<Hold>,
    wake: Option<Duration>,
}

impl<'a> Draft<'a> {
    fn new(fleet: &'a Fleet, now: Timestamp) -> Self {
        let book = OSImageStatus { slots: vec![], ..fleet.status() };
        Draft { fleet, now, book, steps: vec![], holds: vec![], wake: None }
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

    // ---- the book -------------------------------------------------------------------------------------

    /// A new value of the annotation clears what is remembered of failures, in the same write that
    /// remembers the value.
    fn obey_retry(&mut self) {
        let wish = self.fleet.image.metadata.annotations.as_ref().and_then(|a| a.get(names::RETRY));
        if wish.is_some() && wish != self.book.retry_handled.as_ref() {
            self.book.retry_handled = wish.cloned();
            self.book.failures.clear();
            self.book.rejected.clear();
        }
    }

    fn forget_other_commits(&mut self) {
        let commit = self.fleet.commit();
        let in_flight: BTreeSet<AttemptId> = self.fleet.status().slots.into_iter().map(|s| s.attempt).collect();
        self.book.failures.retain(|f| f.commit == *commit || in_flight.contains(&f.attempt));
    }

    fn rejected(&self, commit: &Commit) -> Option<&Rejected> {
        self.book.rejected.iter().find(|r| r.commit == *commit)
    }

    fn failure(&self, node: &str) -> Option<&Failure> {
        self.book.failures.iter().find(|f| f.node == node && f.commit == *self.fleet.commit())
    }

    /// Counts a failure once per attempt; a later, better known outcome replaces an earlier one.
    fn count_failure(&mut self, slot: &Slot, outcome: Outcome, message: String) {
        let known = self.book.failures.iter().find(|f| f.attempt == slot.attempt);
        if known.is_some_and(|f| f.outcome == outcome) {
            return;
        }
        let time = known.map_or_else(|| whole_seconds(self.now), |f| f.time.clone());
        self.book.failures.retain(|f| f.node != slot.node || f.commit != slot.commit);
        self.book.failures.push(Failure {
            node: slot.node.clone(),
            attempt: slot.attempt.clone(),
            commit: slot.commit.clone(),
            outcome,
            message: message.clone(),
            time: time.clone(),
        });
        let failed = self.book.failures.iter().filter(|f| f.commit == slot.commit).count();
        let budget = resolve(&self.fleet.image.spec.rollout.failure_budget, self.selected());
        if failed >= budget && self.rejected(&slot.commit).is_none() {
            let message = format!("{} on node {}: {message}", outcome, slot.node);
            self.book.rejected.insert(0, Rejected { commit: slot.commit.clone(), message, time });
            self.book.rejected.truncate(MAX_REJECTED);
        }
    }

    fn selected(&self) -> usize {
        self.fleet.nodes.values().filter(|n| n.selected && n.exists).count()
    }

    // ---- slots ----------------------------------------------------------------------------------------

    /// One slot, one pass further.
    fn advance(&mut self, mut slot: Slot) {
        let Some(node) = self.fleet.nodes.get(&slot.node).filter(|n| n.exists) else {
            return self.node_is_gone(slot);
        };
        let Some(node_os) = &node.node_os else {
            return self.node_os_is_gone(slot, node);
        };
        if slot.outcome.is_some() {
            return self.give_back(slot, node, node_os);
        }
        let status = node_os.status.clone().unwrap_or_default();
        let attempt = status.last_attempt.filter(|a| a.attempt == slot.attempt);
        if let Some(outcome) = attempt.as_ref().and_then(|a| a.outcome) {
            let message = attempt.map(|a| a.message).unwrap_or_default();
            self.conclude(&mut slot, node, outcome, message);
        } else if node.daemon_boot_id().is_some_and(|id| id != slot.boot_id) {
            self.after_reboot(&mut slot, node, node_os, attempt);
        } else if slot.permitted.is_none() {
            self.before_permit(&mut slot, node, node_os);
        } else if slot.withdrawn.is_some() {
            self.withdraw(&mut slot, node, node_os, attempt);
        } else {
            self.await_reboot(&mut slot, node, node_os);
        }
        self.book.slots.push(slot);
    }

    /// The node was deleted from the cluster: nothing is left to give back.
    fn node_is_gone(&mut self, mut slot: Slot) {
        if slot.outcome.is_none() {
            slot.outcome = Some(SlotOutcome::Cancelled);
            self.book.slots.push(slot);
        }
    }

    /// Somebody deleted the NodeOS of a node in a slot. The host may be anywhere in its attempt, so it is asked
    /// again: a new NodeOS without a permit makes it give up, or tell how far it is.
    fn node_os_is_gone(&mut self, slot: Slot, node: &NodeView) {
        if slot.outcome.is_some() {
            return; // a cordon that is left is taken away by look_after_the_rest
        }
        let object = self.new_node_os(&node.name, &mut 1);
        self.steps.push(Step::CreateNodeOS(Box::new(object)));
        self.hold(&node.name, HoldReason::DaemonSilent, "its NodeOS was deleted and is made again");
        self.book.slots.push(slot);
    }

    /// Whether a slot that has not been permitted is not wanted any more.
    fn unwanted(&self, slot: &Slot, node: &NodeView) -> bool {
        let other_commit = slot.commit != *self.fleet.commit();
        self.fleet.deleting() || !node.selected || other_commit || self.rejected(&slot.commit).is_some()
    }

    fn before_permit(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS) {
        // The slot may have been taken by an old view: a node that does not hold the commit cannot go on.
        let pulled = node_os.status.as_ref().and_then(|s| s.pulled.as_ref()) == Some(&slot.commit);
        let assigned = commit_of(&node_os.spec) == Some(&slot.commit) && node_os.spec.os_image.uid == self.fleet.uid();
        let dropped = !assigned || (node.daemon_is_current() && !pulled);
        if dropped || self.unwanted(slot, node) {
            slot.outcome = Some(SlotOutcome::Cancelled);
            return;
        }
        if !node.unschedulable {
            self.steps.push(Step::Cordon {
                node: node.name.clone(),
                owner: self.fleet.owner(),
                resource_version: node.resource_version.clone(),
            });
            self.hold(&node.name, HoldReason::Draining, "is being cordoned");
            return;
        }
        self.wake_in(DRAIN_LOOK);
        let Some(pods) = &node.pods else {
            self.hold(&node.name, HoldReason::Draining, "its pods have not been listed yet");
            return;
        };
        let policy = &self.fleet.image.spec.drain;
        let verdict = drain::assess(&node.name, pods, policy, &self.fleet.refusals);
        if !verdict.evict.is_empty() {
            self.steps.push(Step::Evict {
                node: node.name.clone(),
                pods: verdict.evict.clone(),
                grace_period_seconds: policy.grace_period_seconds,
            });
        }
        if !verdict.done() {
            let waits = verdict.stopping.first().map(|pod| format!("waits for {pod} to stop"));
            let message = waits.unwrap_or_else(|| format!("evicts {} pods", verdict.evict.len() + verdict.later));
            self.hold(&node.name, HoldReason::Draining, message);
            self.holds.extend(verdict.blocked.into_iter().chain(verdict.refused));
            return;
        }
        if !pulled || !node.daemon_is_current() || !node.boots_agree() {
            self.hold(
                &node.name,
                HoldReason::DaemonSilent,
                "is drained; waits for its daemon to confirm that it holds the commit",
            );
            return;
        }
        slot.permitted = Some(whole_seconds(self.now));
    }

    /// When the permit runs out, and when the node counts as lost.
    fn deadlines(&self, slot: &Slot) -> (Timestamp, Timestamp) {
        let spec = &self.fleet.image.spec;
        let given = slot.permitted.as_ref().unwrap_or(&slot.since).0;
        let reboot = spec.reboot.timeout.get();
        (after(given, reboot), after(given, reboot + spec.health.deadline.get() + LOST_GRACE))
    }

    fn permit(&self, slot: &Slot, acknowledged: bool) -> Permit {
        Permit {
            attempt: slot.attempt.clone(),
            commit: slot.commit.clone(),
            boot_id: slot.boot_id.clone(),
            issued: slot.permitted.clone().unwrap_or_else(|| slot.since.clone()),
            expires: whole_seconds(self.deadlines(slot).0),
            acknowledged,
        }
    }

    fn await_reboot(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS) {
        let (expires, _) = self.deadlines(slot);
        let problem = node_os.status.as_ref().and_then(|s| s.problem.as_ref());
        // The kubelet of a node that is on its way may be heard before its daemon is.
        let rebooted = !node.boot_id.is_empty() && node.boot_id != slot.boot_id;
        if !rebooted && self.due(expires) {
            let why = problem.map_or_else(|| "its daemon did not say why".to_owned(), |p| p.message.clone());
            slot.withdrawn = Some(format!("did not reboot within {}: {why}", self.fleet.image.spec.reboot.timeout));
            return;
        }
        let permitted = node_os.spec.permit.as_ref().is_some_and(|p| p.attempt == slot.attempt);
        let released = node_os.spec.released.as_ref() == Some(&slot.attempt);
        if !permitted && !released {
            let permit = self.permit(slot, false);
            self.update(node_os, Change::Permit, |spec| spec.permit = Some(permit));
        }
        match problem {
            Some(problem) => self.hold(&node.name, HoldReason::NodeProblem(problem.reason), problem.message.clone()),
            None => self.hold(&node.name, HoldReason::Rebooting, "reboots"),
        }
        self.watch_for_silence(slot, node);
    }

    /// The permit is taken back; the slot is kept until the daemon has seen that, or the node has rebooted.
    fn withdraw(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS, attempt: Option<Attempt>) {
        if node_os.spec.permit.as_ref().is_some_and(|p| p.attempt == slot.attempt) {
            self.update(node_os, Change::Withdraw, |spec| spec.permit = None);
        } else if node.daemon_is_current() && attempt.is_none() {
            let why = slot.withdrawn.clone().unwrap_or_default();
            return self.conclude(slot, node, Outcome::NeverRebooted, why);
        }
        self.hold(&node.name, HoldReason::Rebooting, "its permit was withdrawn; waits for its daemon to agree");
        self.watch_for_silence(slot, node);
    }

    fn after_reboot(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS, attempt: Option<Attempt>) {
        let Some(attempt) = attempt else {
            // It rebooted without having begun the attempt: nobody's fault, and nothing was changed.
            slot.outcome = Some(SlotOutcome::Cancelled);
            return;
        };
        let acknowledged = node_os.spec.permit.as_ref().is_some_and(|p| p.attempt == slot.attempt && p.acknowledged);
        let proven = node.ready && node.boots_agree() && node.booted() == Some(&slot.commit);
        match attempt.state {
            AttemptState::Healthy if acknowledged => {
                self.hold(&node.name, HoldReason::Verifying, "is acknowledged; waits for the host to confirm");
            }
            AttemptState::Healthy if proven => {
                let permit = self.permit(slot, true);
                self.update(node_os, Change::Acknowledge, |spec| spec.permit = Some(permit));
                self.hold(&node.name, HoldReason::Verifying, "is healthy and is being acknowledged");
            }
            AttemptState::Healthy => {
                self.hold(&node.name, HoldReason::Verifying, "its host is healthy; waits for the node to be Ready");
            }
            AttemptState::Armed | AttemptState::Verifying | AttemptState::RollingBack | AttemptState::Finished => {
                self.hold(&node.name, HoldReason::Verifying, attempt.message);
            }
        }
        self.watch_for_silence(slot, node);
    }

    /// Past all deadlines the node counts as lost. Its slot is kept: it is down, whatever it is.
    fn watch_for_silence(&mut self, slot: &Slot, node: &NodeView) {
        let (_, lost) = self.deadlines(slot);
        if self.due(lost) {
            let message = format!(
                "has not reported an outcome within {} for its reboot and {} to become healthy: look at its console",
                self.fleet.image.spec.reboot.timeout, self.fleet.image.spec.health.deadline
            );
            self.count_failure(slot, Outcome::Lost, message.clone());
            self.hold(&node.name, HoldReason::NodeLost, message);
        }
    }

    fn conclude(&mut self, slot: &mut Slot, node: &NodeView, outcome: Outcome, message: String) {
        match outcome {
            Outcome::Booted => {
                self.book.failures.retain(|f| f.attempt != slot.attempt);
                slot.outcome = Some(SlotOutcome::Booted);
            }
            Outcome::NeverRebooted
            | Outcome::NotFinalized
            | Outcome::FellBack
            | Outcome::RolledBack
            | Outcome::Lost => {
                let message = slot.withdrawn.clone().filter(|_| outcome == Outcome::NeverRebooted).unwrap_or(message);
                self.count_failure(slot, outcome, message);
                slot.outcome = Some(SlotOutcome::Failed);
            }
        }
        self.hold(&node.name, HoldReason::Releasing, "is being given back");
    }

    /// The attempt is over: uncordon, mark it as released, and only then let the slot go.
    fn give_back(&mut self, slot: Slot, node: &NodeView, node_os: &NodeOS) {
        let cordoned = node.cordoned_by.as_deref() == Some(self.fleet.owner().as_str());
        let released = node_os.spec.permit.is_none() && node_os.spec.released.as_ref() == Some(&slot.attempt);
        if cordoned {
            self.uncordon(node);
        }
        if !released {
            self.update(node_os, Change::Release, |spec| {
                spec.permit = None;
                spec.released = Some(slot.attempt.clone());
            });
        }
        if cordoned || !released {
            self.hold(&node.name, HoldReason::Releasing, "is being given back");
            self.book.slots.push(slot);
        }
    }

    fn uncordon(&mut self, node: &NodeView) {
        let (node, resource_version) = (node.name.clone(), node.resource_version.clone());
        self.steps.push(Step::Uncordon { node, resource_version });
    }

    fn update(&mut self, node_os: &NodeOS, change: Change, edit: impl FnOnce(&mut NodeOSSpec)) {
        let mut object = NodeOS { status: None, ..node_os.clone() };
        edit(&mut object.spec);
        self.steps.push(Step::UpdateNodeOS { object: Box::new(object), change });
    }

    // ---- new slots ------------------------------------------------------------------------------------

    /// Nodes that hold the commit and wait for their turn, in order. Holds are for [`Draft::reserve`].
    fn candidates(&self) -> Vec<&'a NodeView> {
        let stopped = self.fleet.deleting()
            || self.fleet.image.spec.rollout.paused
            || self.rejected(self.fleet.commit()).is_some();
        let nodes = self.fleet.nodes.values().filter(|n| !stopped && self.eligible(n).is_ok());
        nodes.collect()
    }

    /// Whether a node could take a slot, budgets and pods aside; else why not.
    fn eligible(&self, node: &NodeView) -> Result<(), Option<Hold>> {
        let commit = self.fleet.commit();
        let hold = |reason, message: &str| {
            Err(Some(Hold { node: Some(node.name.clone()), reason, object: None, message: message.into() }))
        };
        if !node.exists || !node.selected || self.fleet.slot(&node.name).is_some() {
            return Err(None);
        }
        let Some(node_os) = node.node_os.as_ref() else { return Err(None) };
        if node_os.spec.os_image.uid != self.fleet.uid() {
            let other = &node_os.spec.os_image.name;
            return hold(
                HoldReason::OwnedByOther,
                &format!("belongs to OSImage {other}: let only one OSImage select it"),
            );
        }
        if node.booted() == Some(commit) {
            return Err(None);
        }
        if let Some(failure) = self.failure(&node.name) {
            let message = format!("{} on {}: {}", failure.outcome, failure.commit.short(), failure.message);
            return hold(HoldReason::NodeFailed, &message);
        }
        let Some(status) = node_os.status.as_ref().filter(|_| node.daemon_is_current()) else {
            return hold(
                HoldReason::DaemonSilent,
                "its node daemon has not answered yet: is the DaemonSet's pod running there?",
            );
        };
        if let Some(problem) = &status.problem {
            return hold(HoldReason::NodeProblem(problem.reason), &problem.message);
        }
        if status.pulled.as_ref() != Some(commit) {
            return match node_os.spec.may_pull {
                true => hold(HoldReason::Pulling, &status.message),
                false => hold(HoldReason::PullQueued, "waits until it may download (rollout.maxStaging)"),
            };
        }
        if !node.ready {
            return hold(HoldReason::NodeNotReady, "is not Ready, and is left alone until it is");
        }
        if !node.boots_agree() {
            return hold(
                HoldReason::DaemonSilent,
                "its kubelet and its node daemon speak of different boots; waits until they agree",
            );
        }
        Ok(())
    }

    fn reserve(&mut self) {
        let fleet = self.fleet;
        for node in fleet.nodes.values() {
            if let Err(Some(hold)) = self.eligible(node) {
                self.holds.push(hold);
            }
        }
        if fleet.deleting() {
            return;
        }
        let whole = |reason, message| Hold { node: None, reason, object: None, message };
        if let Some(rejected) = self.rejected(fleet.commit()) {
            let message = format!(
                "commit {} is rejected ({}); apply another commit, or set the annotation {} to a new value to try it again",
                rejected.commit.short(),
                rejected.message,
                names::RETRY
            );
            let hold = whole(HoldReason::CommitRejected, message);
            return self.holds.push(hold);
        }
        if fleet.image.spec.rollout.paused {
            let hold =
                whole(HoldReason::Paused, "rollout.paused is true: no node is started; those in flight finish".into());
            return self.holds.push(hold);
        }
        let max = resolve(&fleet.image.spec.rollout.max_unavailable, self.selected());
        for node in self.candidates() {
            let (ours, others) = self.down_beside(node);
            if ours.len() + others.len() >= max {
                let hold = match ours.is_empty() {
                    true => whole(
                        HoldReason::NodesUnavailable,
                        format!(
                            "{} of the selected nodes may be unavailable at once (rollout.maxUnavailable), and as many are, without us: {}",
                            max,
                            others.join(", ")
                        ),
                    ),
                    false => Hold {
                        node: Some(node.name.clone()),
                        ..whole(
                            HoldReason::BudgetSpent,
                            format!(
                                "waits for its turn: {max} of the selected nodes may be unavailable at once (rollout.maxUnavailable)"
                            ),
                        )
                    },
                };
                self.holds.push(hold);
                continue;
            }
            let Some(pods) = &node.pods else {
                self.wake_in(DRAIN_LOOK);
                continue;
            };
            if let Some(hold) = drain::precheck(&node.name, pods, &fleet.image.spec.drain) {
                self.holds.push(hold);
                self.wake_in(DRAIN_LOOK);
                continue;
            }
            self.book.attempts += 1;
            let uid = fleet.uid().split('-').next().unwrap_or_default();
            self.book.slots.push(Slot {
                node: node.name.clone(),
                attempt: AttemptId(format!("{uid}-{}", self.book.attempts)),
                commit: fleet.commit().clone(),
                boot_id: node.boot_id.clone(),
                since: whole_seconds(self.now),
                permitted: None,
                withdrawn: None,
                outcome: None,
            });
        }
    }

    /// Nodes other than this one that are down: in our slots, and for other causes.
    fn down_beside(&self, node: &NodeView) -> (Vec<&'a str>, Vec<String>) {
        let (mut ours, mut others) = (vec![], vec![]);
        for other in self.fleet.nodes.values().filter(|n| n.exists && n.name != node.name) {
            let in_slot =
                self.book.slots.iter().any(|s| s.node == other.name) || self.fleet.slot(&other.name).is_some();
            match other {
                n if in_slot => ours.push(n.name.as_str()),
                n if n.selected && !n.ready => others.push(format!("{} (not Ready)", n.name)),
                n if n.selected && n.unschedulable => others.push(format!("{} (cordoned)", n.name)),
                _ => {}
            }
        }
        (ours, others)
    }

    // ---- everything else ------------------------------------------------------------------------------

    /// NodeOS objects as they shall be, stray cordons of ours, and the end of a deletion.
    fn look_after_the_rest(&mut self) {
        let fleet = self.fleet;
        let mut pulls = self.free_pulls();
        let mut left_over = false;
        for node in fleet.nodes.values() {
            if fleet.slot(&node.name).is_some() || self.book.slots.iter().any(|s| s.node == node.name) {
                left_over = true;
                continue;
            }
            if node.exists && node.cordoned_by.as_deref() == Some(fleet.owner().as_str()) {
                left_over = true;
                self.uncordon(node);
                continue;
            }
            let wanted = node.exists && node.selected && !fleet.deleting();
            match &node.node_os {
                None if wanted => {
                    let object = self.new_node_os(&node.name, &mut pulls);
                    self.steps.push(Step::CreateNodeOS(Box::new(object)));
                }
                Some(node_os) if node_os.spec.os_image.uid == fleet.uid() && !wanted => {
                    left_over = true;
                    self.steps.push(Step::DeleteNodeOS(Box::new(node_os.clone())));
                }
                Some(node_os) if wanted => self.assign(node, node_os, &mut pulls),
                None | Some(_) => {}
            }
        }
        if fleet.deleting() && !left_over && self.book.slots.is_empty() {
            self.steps.push(Step::RemoveFinalizer);
        }
    }

    /// How many more nodes may download now.
    fn free_pulls(&self) -> usize {
        let busy = self.fleet.nodes.values().filter_map(|n| n.node_os.as_ref()).filter(|n| {
            let status = n.status.as_ref();
            let done = status.and_then(|s| s.pulled.as_ref()) == Some(self.fleet.commit());
            let given_up = status.and_then(|s| s.problem.as_ref()).is_some_and(|p| !p.retrying);
            n.spec.may_pull && n.spec.os_image.uid == self.fleet.uid() && !done && !given_up
        });
        usize::try_from(self.fleet.image.spec.rollout.max_staging).unwrap_or(1).saturating_sub(busy.count())
    }

    /// What a node that is not in a slot shall hold ready. A rejected commit is dropped everywhere.
    fn spec_for(&self, current: Option<&NodeOSSpec>, pulls: &mut usize) -> NodeOSSpec {
        let spec = &self.fleet.image.spec;
        let rejected = self.rejected(self.fleet.commit()).is_some();
        let mut image = spec.image.clone();
        image.ostree.remote.get_or_insert_with(|| self.fleet.name().to_owned());
        let image = (!rejected).then_some(image);
        let keeps = current.is_some_and(|c| c.may_pull && commit_of(c) == image.as_ref().map(|i| &i.ostree.commit));
        let may_pull = image.is_some() && (keeps || *pulls > 0);
        if may_pull && !keeps {
            *pulls -= 1;
        }
        NodeOSSpec {
            os_image: OSImageRef { name: self.fleet.name().into(), uid: self.fleet.uid().into() },
            image,
            may_pull,
            health: spec.health.clone(),
            permit: None,
            released: current.and_then(|c| c.released.clone()),
        }
    }

    fn new_node_os(&self, node: &str, pulls: &mut usize) -> NodeOS {
        let mut object = NodeOS::new(node, self.spec_for(None, pulls));
        object.metadata = ObjectMeta {
            name: Some(node.to_owned()),
            labels: Some(BTreeMap::from([(names::OSIMAGE_LABEL.to_owned(), self.fleet.name().to_owned())])),
            ..ObjectMeta::default()
        };
        object
    }

    fn assign(&mut self, node: &NodeView, node_os: &NodeOS, pulls: &mut usize) {
        let ours = node_os.spec.os_image.uid == self.fleet.uid();
        let orphan = !self.fleet.existing_images.contains(&node_os.spec.os_image.uid);
        if !ours && !orphan {
            return;
        }
        let there = node.booted() == Some(self.fleet.commit());
        let mut no_pull_needed = usize::MAX;
        let spec = self.spec_for(Some(&node_os.spec), if there { &mut no_pull_needed } else { pulls });
        if spec != node_os.spec {
            let label = self.fleet.name().to_owned();
            let mut object = NodeOS { spec, status: None, ..node_os.clone() };
            object.metadata.labels.get_or_insert_default().insert(names::OSIMAGE_LABEL.to_owned(), label);
            self.steps.push(Step::UpdateNodeOS { object: Box::new(object), change: Change::Assign });
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
