//! Which node takes a slot next, and why the others do not.

use super::*;
use crate::gate::{Down, wave::Membership};

impl<'a> Draft<'a> {
    /// The selected nodes in the order in which they go: by value of the topology key, so that one value is done before
    /// the next; the operator's own node last.
    pub(super) fn order(&self) -> Vec<&'a NodeView> {
        let key = self.fleet.image.spec.rollout.topology_key.as_deref();
        let own = self.fleet.operator_node.as_deref();
        let mut nodes: Vec<&NodeView> = self.fleet.nodes.values().filter(|n| n.exists && n.selected).collect();
        nodes.sort_by_cached_key(|n| {
            let group = key.map_or("", |key| gate::topology::value(n, key));
            (own == Some(n.name.as_str()), group, n.name.as_str())
        });
        nodes
    }

    /// Nodes that hold the commit and wait for their turn, wave by wave, in order, as far as waves have begun.
    pub(super) fn candidates(
        &self,
        order: &[&'a NodeView],
        members: &Membership<'_>,
        closed: usize,
    ) -> Vec<&'a NodeView> {
        let stopped = self.fleet.deleting()
            || self.fleet.image.spec.rollout.paused
            || self.rejected(self.fleet.commit()).is_some();
        let wave = |n: &NodeView| members.get(n.name.as_str()).copied().unwrap_or(usize::MAX);
        let nodes = order.iter().copied().filter(|n| !stopped && wave(n) < closed && self.eligible(n).is_ok());
        let mut nodes: Vec<&NodeView> = nodes.collect();
        nodes.sort_by_key(|n| wave(n));
        nodes
    }

    /// Whether a node could take a slot, budgets and pods aside; else why not.
    pub(super) fn eligible(&self, node: &NodeView) -> Result<(), Option<Hold>> {
        let commit = self.fleet.commit();
        let hold = |reason, message: &str| {
            Err(Some(Hold { node: Some(node.name.clone()), reason, object: None, message: message.into() }))
        };
        if !node.exists || !node.selected || self.taken.contains(node.name.as_str()) {
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
        if let Some(deferred) = self.deferred(&node.name) {
            let message =
                format!("{} ({} in a row); is tried again at {}", deferred.message, deferred.times, deferred.until.0);
            return hold(HoldReason::NodeDeferred, &message);
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

    pub(super) fn reserve(&mut self) {
        let fleet = self.fleet;
        for node in fleet.nodes.values() {
            if let Err(Some(hold)) = self.eligible(node) {
                self.holds.push(hold);
            }
        }
        let claims =
            fleet.nodes.values().filter(|_| !fleet.deleting()).filter_map(|n| Some((n, n.claimed_by.as_ref()?)));
        for (node, older) in claims {
            let message =
                format!("is also selected by OSImage {older}, which is older and keeps it: let only one select it");
            self.hold(&node.name, HoldReason::OwnedByOther, message);
        }
        for deferred in self.book.deferred.clone() {
            self.due(deferred.until.0);
        }
        let order = self.order();
        let members = match gate::wave::membership(fleet, &order) {
            Ok(members) => members,
            Err(message) => return self.holds.push(gate::whole(HoldReason::InvalidSpec, message)),
        };
        self.count_waves(&members);
        if fleet.deleting() {
            return;
        }
        if let Some(hold) = self.halted() {
            return self.holds.push(hold);
        }
        if let Some((hold, opens)) = gate::window::check(fleet, self.now) {
            if let Some(opens) = opens {
                self.due(opens);
            }
            // Where all is done, a closed window holds nothing.
            if !self.all_done(&members) || hold.reason == HoldReason::InvalidSpec {
                self.holds.push(hold);
            }
            return;
        }
        let statuses = self.book.rollout.iter().flat_map(|r| r.waves.clone()).collect::<Vec<_>>();
        let closed = gate::wave::closed(fleet, &statuses, self.now);
        let waiting = closed.as_ref().is_some_and(|c| members.values().any(|w| *w >= c.from));
        if let Some(closed) = closed.as_ref().filter(|_| waiting) {
            self.holds.push(closed.hold.clone());
            if let Some(opens) = closed.opens {
                self.due(opens);
            }
        }
        let candidates = self.candidates(&order, &members, closed.map_or(usize::MAX, |c| c.from));
        self.take(&candidates);
    }

    /// What stops every start.
    fn halted(&self) -> Option<Hold> {
        if let Some(rejected) = self.rejected(self.fleet.commit()) {
            let message = format!(
                "commit {} is rejected ({}); apply another commit, or set the annotation {} to a new value to try it again",
                rejected.commit.short(),
                rejected.message,
                names::RETRY
            );
            return Some(gate::whole(HoldReason::CommitRejected, message));
        }
        let message = "rollout.paused is true: no node is started; those in flight finish";
        self.fleet.image.spec.rollout.paused.then(|| gate::whole(HoldReason::Paused, message.into()))
    }

    /// Takes slots for as many candidates as the gates let through.
    fn take(&mut self, candidates: &[&'a NodeView]) {
        let fleet = self.fleet;
        let rollout = &fleet.image.spec.rollout;
        let max = resolve(&rollout.max_unavailable, self.selected());
        let mut slots = self.taken.clone();
        let begun = self.book.slots.iter().filter_map(|s| fleet.nodes.get_key_value(&s.node));
        slots.extend(begun.map(|(name, _)| name.as_str()));
        let in_scope = |n: &&NodeView| n.selected || slots.contains(n.name.as_str());
        let mut down = Down::new(fleet.nodes.values().filter(in_scope), &slots);
        let mut everywhere = Down::new(fleet.nodes.values(), &slots);
        let mut at_the_gates = false;
        for node in candidates {
            let held = gate::budget::check(node, &down, max)
                .or_else(|| gate::control_plane::check(node, &everywhere, fleet))
                .or_else(|| gate::topology::check(node, rollout.topology_key.as_deref()?, &down, &fleet.nodes));
            if let Some(hold) = held {
                self.holds.push(hold);
                continue;
            }
            let Some(pods) = &node.pods else {
                self.wake_in(DRAIN_LOOK);
                continue;
            };
            if let Some(hold) = drain::precheck(&node.name, pods, &fleet.image.spec.drain) {
                self.holds.push(hold);
                self.wake_in(BLOCKED_LOOK);
                continue;
            }
            if !self.gates.is_empty() {
                at_the_gates = true;
                continue;
            }
            down.ours.insert(&node.name);
            everywhere.ours.insert(&node.name);
            self.take_slot(node);
        }
        if at_the_gates {
            self.holds.append(&mut self.gates);
            self.wake_in(GATE_LOOK);
        }
    }

    fn take_slot(&mut self, node: &NodeView) {
        self.book.attempts += 1;
        let uid = self.fleet.uid().split('-').next().unwrap_or_default();
        self.book.slots.push(Slot {
            node: node.name.clone(),
            attempt: AttemptId(format!("{uid}-{}", self.book.attempts)),
            commit: self.fleet.commit().clone(),
            boot_id: node.boot_id.clone(),
            since: whole_seconds(self.now),
            permitted: None,
            withdrawn: None,
            unproven: None,
            outcome: None,
            ended: None,
        });
    }
}
