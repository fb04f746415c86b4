//! The course of one slot; see the table in the module above.

use super::*;

impl Draft<'_> {
    /// One slot, one pass further.
    pub(super) fn advance(&mut self, mut slot: Slot) {
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
        // The name alone could be of another time: the counter that makes it goes back with a restored etcd.
        let same = |a: &Attempt| a.attempt == slot.attempt && a.commit == slot.commit && a.boot_id == slot.boot_id;
        let attempt = status.last_attempt.filter(same);
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
    pub(super) fn node_is_gone(&mut self, mut slot: Slot) {
        if slot.outcome.is_none() {
            slot.outcome = Some(SlotOutcome::Cancelled);
            self.book.slots.push(slot);
        }
    }

    /// Somebody deleted the NodeOS of a node in a slot. The host may be anywhere in its attempt, so it is asked
    /// again: a new NodeOS without a permit makes it give up, or tell how far it is.
    pub(super) fn node_os_is_gone(&mut self, slot: Slot, node: &NodeView) {
        if slot.outcome.is_some() {
            return; // a cordon that is left is taken away by look_after_the_rest
        }
        let object = self.new_node_os(&node.name, &mut 1);
        self.steps.push(Step::CreateNodeOS(Box::new(object)));
        self.hold(&node.name, HoldReason::DaemonSilent, "its NodeOS was deleted and is made again");
        self.book.slots.push(slot);
    }

    /// Whether a slot that has not been permitted is not wanted any more.
    pub(super) fn unwanted(&self, slot: &Slot, node: &NodeView) -> bool {
        let other_commit = slot.commit != *self.fleet.commit();
        self.fleet.deleting() || !node.selected || other_commit || self.rejected(&slot.commit).is_some()
    }

    pub(super) fn before_permit(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS) {
        // The slot may have been taken by an old view: a node that does not hold the commit cannot go on.
        let pulled = node_os.status.as_ref().and_then(|s| s.pulled.as_ref()) == Some(&slot.commit);
        let assigned = commit_of(&node_os.spec) == Some(&slot.commit) && node_os.spec.os_image.uid == self.fleet.uid();
        let dropped = !assigned || (node.daemon_is_current() && !pulled);
        // The kubelet may be heard before the daemon, and may be another machine's that took the name, in another zone.
        let rebooted = !node.boot_id.is_empty() && node.boot_id != slot.boot_id;
        if dropped || rebooted || self.unwanted(slot, node) {
            slot.outcome = Some(SlotOutcome::Cancelled);
            return;
        }
        if !node.unschedulable {
            self.steps.push(Step::Cordon {
                node: node.name.clone(),
                owner: self.fleet.owner(),
                annotate: missing_annotations(node),
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
        // Where there is nowhere else to go, our own pod stays: without it nobody would give the permit.
        let alone = !self.fleet.refuges.iter().any(|name| *name != node.name);
        let movable: Vec<PodFacts> = pods.iter().filter(|p| !(p.ourselves && alone)).cloned().collect();
        let pods = &movable;
        let verdict = drain::assess(&node.name, pods, policy, &self.fleet.refusals);
        if !verdict.evict.is_empty() {
            self.steps.push(Step::Evict {
                node: node.name.clone(),
                pods: verdict.evict.clone(),
                grace_period_seconds: policy.grace_period_seconds,
            });
        }
        if let Some(waits) = drain_waits(&verdict, &node.attached) {
            self.hold(&node.name, HoldReason::Draining, waits);
            // That a budget lets pods go one after another is the ordinary course; it is told when it takes long.
            if self.due(after(slot.since.0, DRAIN_BLOCKED_AFTER)) {
                self.holds.extend(verdict.blocked.into_iter().chain(verdict.refused));
            }
            if !self.drain_is_overdue(slot, node, pods) {
                return;
            }
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

    /// A node that is not empty by the deadline is given back, or what is left is deleted. Says whether the node may go
    /// down as it is: when even deleted pods do not stop within as much time again.
    fn drain_is_overdue(&mut self, slot: &mut Slot, node: &NodeView, pods: &[PodFacts]) -> bool {
        let policy = &self.fleet.image.spec.drain;
        let timeout = policy.timeout.get();
        if !self.due(after(slot.since.0, timeout)) {
            return false;
        }
        match policy.on_timeout {
            OnDrainTimeout::Abort => {
                let what = drain::precheck(&node.name, pods, policy)
                    .map_or_else(|| "its pods did not stop".to_owned(), |h| h.message);
                self.defer(&slot.node, &format!("was not emptied within {}: {what}", policy.timeout));
                slot.outcome = Some(SlotOutcome::Cancelled);
                false
            }
            OnDrainTimeout::Force => {
                let left = drain::remains(pods, policy);
                if !left.is_empty() {
                    let (node, grace_period_seconds) = (node.name.clone(), policy.grace_period_seconds);
                    self.steps.retain(|s| !matches!(s, Step::Evict { node: evicted, .. } if *evicted == node));
                    self.steps.push(Step::Delete { node, pods: left, grace_period_seconds });
                }
                self.due(after(slot.since.0, timeout * 2))
            }
        }
    }

    /// When the permit runs out, and when the node counts as lost.
    pub(super) fn deadlines(&self, slot: &Slot) -> (Timestamp, Timestamp) {
        let spec = &self.fleet.image.spec;
        let given = slot.permitted.as_ref().unwrap_or(&slot.since).0;
        let reboot = spec.reboot.timeout.get();
        (after(given, reboot), after(given, reboot + spec.health.deadline.get() + LOST_GRACE))
    }

    pub(super) fn permit(&self, slot: &Slot, acknowledged: bool) -> Permit {
        Permit {
            attempt: slot.attempt.clone(),
            commit: slot.commit.clone(),
            boot_id: slot.boot_id.clone(),
            issued: slot.permitted.clone().unwrap_or_else(|| slot.since.clone()),
            expires: whole_seconds(self.deadlines(slot).0),
            acknowledged,
        }
    }

    pub(super) fn await_reboot(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS) {
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
        // One that is on another boot would not obey it; it may even be another machine of that name, with pods.
        if !permitted && !released && !rebooted {
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
    pub(super) fn withdraw(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS, attempt: Option<Attempt>) {
        let permitted = node_os.spec.permit.as_ref().is_some_and(|p| p.attempt == slot.attempt);
        let released = node_os.spec.released.as_ref() == Some(&slot.attempt);
        if permitted || !released {
            // Written even where the permit never arrived: another operator may still be about to write it, by what it
            // read before, and must be refused.
            self.update(node_os, Change::Withdraw, |spec| {
                spec.permit = None;
                spec.released = Some(slot.attempt.clone());
            });
        } else if node.daemon_is_current() && attempt.is_none() {
            let why = slot.withdrawn.clone().unwrap_or_default();
            return self.conclude(slot, node, Outcome::NeverRebooted, why);
        }
        match node_os.status.as_ref().and_then(|s| s.problem.as_ref()) {
            Some(problem) => self.hold(&node.name, HoldReason::NodeProblem(problem.reason), problem.message.clone()),
            None => {
                self.hold(&node.name, HoldReason::Rebooting, "its permit was withdrawn; waits for its daemon to agree")
            }
        }
        self.watch_for_silence(slot, node);
    }

    pub(super) fn after_reboot(
        &mut self,
        slot: &mut Slot,
        node: &NodeView,
        node_os: &NodeOS,
        attempt: Option<Attempt>,
    ) {
        let Some(attempt) = attempt else {
            // It rebooted without having begun the attempt: nobody's fault, and nothing was changed.
            slot.outcome = Some(SlotOutcome::Cancelled);
            return;
        };
        let acknowledged = node_os.spec.permit.as_ref().is_some_and(|p| p.attempt == slot.attempt && p.acknowledged);
        let proven = node.ready && node.boots_agree() && node.booted() == Some(&slot.commit);
        let problem = node_os.status.as_ref().and_then(|s| s.problem.clone());
        if let Some(problem) = &problem {
            self.hold(&node.name, HoldReason::NodeProblem(problem.reason), problem.message.clone());
        }
        match attempt.state {
            AttemptState::Healthy if acknowledged => {
                slot.unproven = None;
                self.hold(&node.name, HoldReason::Verifying, "is acknowledged; waits for the host to confirm");
            }
            AttemptState::Healthy if proven => self.prove(slot, node, node_os),
            AttemptState::Healthy => {
                slot.unproven = Some("the node is not Ready".into());
                self.hold(&node.name, HoldReason::Verifying, "its host is healthy; waits for the node to be Ready");
            }
            AttemptState::Armed | AttemptState::Verifying => {
                slot.unproven = None;
                self.hold(&node.name, HoldReason::Verifying, attempt.message);
            }
            AttemptState::RollingBack | AttemptState::Finished => {
                self.hold(&node.name, HoldReason::Verifying, attempt.message);
            }
        }
        self.watch_for_silence(slot, node);
    }

    /// Acknowledges a node whose host is healthy when the checks of the cluster hold, too; else remembers which do not,
    /// because the host that goes back at its deadline cannot tell.
    fn prove(&mut self, slot: &mut Slot, node: &NodeView, node_os: &NodeOS) {
        let failing = match checks::verdict(node, &self.fleet.image.spec.health.checks) {
            checks::Verdict::Holds => {
                slot.unproven = None;
                let permit = self.permit(slot, true);
                self.update(node_os, Change::Acknowledge, |spec| spec.permit = Some(permit));
                self.hold(&node.name, HoldReason::Verifying, "is healthy and is being acknowledged");
                return;
            }
            checks::Verdict::PodsNotListed => {
                self.hold(&node.name, HoldReason::Verifying, "its host is healthy; its pods have not been listed yet");
                vec![]
            }
            checks::Verdict::Fails(failing) => failing,
        };
        if !failing.is_empty() {
            let texts: Vec<&str> = failing.iter().map(|f| f.message.as_str()).collect();
            slot.unproven = Some(bounded(&texts.join("; "), MAX_UNPROVEN));
        }
        let hold = |f: checks::Failing| Hold {
            node: Some(node.name.clone()),
            reason: HoldReason::Verifying,
            object: Some(f.object),
            message: f.message,
        };
        self.holds.extend(failing.into_iter().map(hold));
        self.wake_in(PROOF_LOOK);
    }

    /// Past all deadlines the node counts as lost. Its slot is kept: it is down, whatever it is.
    pub(super) fn watch_for_silence(&mut self, slot: &Slot, node: &NodeView) {
        let (_, lost) = self.deadlines(slot);
        if self.due(lost) {
            let said = node.node_os.as_ref().and_then(|n| n.status.as_ref()).and_then(|s| s.problem.as_ref());
            let said = said.map_or_else(|| "look at its console".to_owned(), |p| format!("it says: {}", p.message));
            let message = format!(
                "has no outcome after {} for its reboot and {} to become healthy; {said}",
                self.fleet.image.spec.reboot.timeout, self.fleet.image.spec.health.deadline
            );
            self.count_failure(slot, Outcome::Lost, message.clone());
            self.hold(&node.name, HoldReason::NodeLost, message);
        }
    }

    pub(super) fn conclude(&mut self, slot: &mut Slot, node: &NodeView, outcome: Outcome, message: String) {
        match outcome {
            Outcome::Booted => {
                self.forgive(slot);
                self.book.deferred.retain(|d| d.node != slot.node);
                slot.outcome = Some(SlotOutcome::Booted);
            }
            // A host that did not go down says nothing of the commit: its node is tried again later.
            Outcome::NeverRebooted => {
                let why = slot.withdrawn.clone().unwrap_or(message);
                self.forgive(slot);
                self.defer(&slot.node, &why);
                slot.outcome = Some(SlotOutcome::Cancelled);
            }
            Outcome::NotFinalized | Outcome::FellBack | Outcome::RolledBack | Outcome::Lost => {
                let unproven = slot.unproven.take().filter(|_| outcome == Outcome::RolledBack);
                let message = unproven.map_or_else(
                    || message.clone(),
                    |why| format!("not acknowledged: {why}; its host says: {message}"),
                );
                self.count_failure(slot, outcome, message);
                slot.outcome = Some(SlotOutcome::Failed);
            }
        }
        slot.ended = Some(whole_seconds(self.now));
        self.hold(&node.name, HoldReason::Releasing, "is being given back");
    }

    /// The attempt is over: uncordon, mark it as released, and only then let the slot go.
    pub(super) fn give_back(&mut self, slot: Slot, node: &NodeView, node_os: &NodeOS) {
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
        } else if slot.outcome == Some(SlotOutcome::Booted) && !self.has_settled(&slot, node) {
            self.book.slots.push(slot);
        }
    }

    /// A verified node has been Ready for `rollout.minReadySeconds`.
    fn has_settled(&mut self, slot: &Slot, node: &NodeView) -> bool {
        let seconds = u64::try_from(self.fleet.image.spec.rollout.min_ready_seconds).unwrap_or(0);
        let Some(ended) = slot.ended.as_ref().filter(|_| seconds > 0) else { return true };
        let settled = self.due(after(ended.0, Duration::from_secs(seconds))) && node.ready;
        if !settled {
            let message =
                format!("is updated; its slot is freed after it was Ready for {seconds} s (rollout.minReadySeconds)");
            self.hold(&node.name, HoldReason::Releasing, message);
        }
        settled
    }

    pub(super) fn uncordon(&mut self, node: &NodeView) {
        self.steps.push(Step::Uncordon {
            node: node.name.clone(),
            remove: node.added.clone(),
            resource_version: node.resource_version.clone(),
        });
    }

    pub(super) fn update(&mut self, node_os: &NodeOS, change: Change, edit: impl FnOnce(&mut NodeOSSpec)) {
        let mut object = NodeOS { status: None, ..node_os.clone() };
        edit(&mut object.spec);
        self.steps.push(Step::UpdateNodeOS { object: Box::new(object), change });
    }
}

/// What an emptied node still waits for.
fn drain_waits(verdict: &drain::Verdict, attached: &[String]) -> Option<String> {
    if let Some(pod) = verdict.stopping.first() {
        return Some(format!("waits for {pod} to stop"));
    }
    if !verdict.done() {
        let (left, blocked) = (verdict.evict.len() + verdict.later, verdict.blocked.len());
        return Some(format!("evicts {left} pods; {blocked} cannot go now"));
    }
    attached.first().map(|volume| format!("waits for {volume} to be detached"))
}

/// Annotations that keep autoscalers away and that the node does not have.
fn missing_annotations(node: &NodeView) -> BTreeSet<String> {
    let all = names::KEEP_AUTOSCALERS_AWAY.into_iter().map(str::to_owned);
    all.filter(|a| !node.kept_from_autoscalers.contains(a)).collect()
}
