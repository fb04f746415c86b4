//! Which node takes a slot next, and why the others do not.

use super::*;

impl<'a> Draft<'a> {
    /// Nodes that hold the commit and wait for their turn, in order. Holds are for [`Draft::reserve`].
    pub(super) fn candidates(&self) -> Vec<&'a NodeView> {
        let stopped = self.fleet.deleting()
            || self.fleet.image.spec.rollout.paused
            || self.rejected(self.fleet.commit()).is_some();
        let nodes = self.fleet.nodes.values().filter(|n| !stopped && self.eligible(n).is_ok());
        nodes.collect()
    }

    /// Whether a node could take a slot, budgets and pods aside; else why not.
    pub(super) fn eligible(&self, node: &NodeView) -> Result<(), Option<Hold>> {
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

    pub(super) fn reserve(&mut self) {
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
    pub(super) fn down_beside(&self, node: &NodeView) -> (Vec<&'a str>, Vec<String>) {
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
}
