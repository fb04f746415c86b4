//! What is remembered from pass to pass, in the status of the OSImage: failures, rejected commits, retries.

use super::*;

impl Draft<'_> {
    /// A new value of the annotation clears what is remembered of failures, in the same write that
    /// remembers the value.
    pub(super) fn obey_retry(&mut self) {
        let wish = self.fleet.image.metadata.annotations.as_ref().and_then(|a| a.get(names::RETRY));
        if wish.is_some() && wish != self.book.retry_handled.as_ref() {
            self.book.retry_handled = wish.cloned();
            self.book.failures.clear();
            self.book.rejected.clear();
        }
    }

    pub(super) fn forget_other_commits(&mut self) {
        let commit = self.fleet.commit();
        let in_flight: BTreeSet<AttemptId> = self.fleet.status().slots.into_iter().map(|s| s.attempt).collect();
        self.book.failures.retain(|f| f.commit == *commit || in_flight.contains(&f.attempt));
    }

    pub(super) fn rejected(&self, commit: &Commit) -> Option<&Rejected> {
        self.book.rejected.iter().find(|r| r.commit == *commit)
    }

    pub(super) fn failure(&self, node: &str) -> Option<&Failure> {
        self.book.failures.iter().find(|f| f.node == node && f.commit == *self.fleet.commit())
    }

    /// Counts a failure once per attempt; a later, better known outcome replaces an earlier one.
    pub(super) fn count_failure(&mut self, slot: &Slot, outcome: Outcome, message: String) {
        let known = self.book.failures.iter().find(|f| f.attempt == slot.attempt);
        if known.is_some_and(|f| f.outcome == outcome) {
            return;
        }
        let time = known.map_or_else(|| whole_seconds(self.now), |f| f.time.clone());
        let message = bounded(&message, MAX_MESSAGE);
        self.book.failures.retain(|f| f.node != slot.node || f.commit != slot.commit);
        self.book.failures.push(Failure {
            node: slot.node.clone(),
            attempt: slot.attempt.clone(),
            commit: slot.commit.clone(),
            outcome,
            message: message.clone(),
            time: time.clone(),
        });
        if self.has_spent_the_budget(&slot.commit) && self.rejected(&slot.commit).is_none() {
            let message = format!("{} on node {}: {message}", outcome, slot.node);
            self.book.rejected.insert(0, Rejected { commit: slot.commit.clone(), message, time });
            self.book.rejected.truncate(MAX_REJECTED);
        }
    }

    /// Whether as many nodes failed on a commit as may.
    pub(super) fn has_spent_the_budget(&self, commit: &Commit) -> bool {
        let budget = resolve(&self.fleet.image.spec.rollout.failure_budget, self.selected());
        self.book.failures.iter().filter(|f| f.commit == *commit).count() >= budget
    }

    /// A node that counted as lost is verified after all.
    pub(super) fn forgive(&mut self, slot: &Slot) {
        let before = self.book.failures.len();
        self.book.failures.retain(|f| f.attempt != slot.attempt);
        if self.book.failures.len() < before && !self.has_spent_the_budget(&slot.commit) {
            self.book.rejected.retain(|r| r.commit != slot.commit);
        }
    }

    /// Come back to this node later, after a pause that doubles each time.
    pub(super) fn defer(&mut self, node: &str, message: &str) {
        let times = self.book.deferred.iter().find(|d| d.node == node).map_or(1, |d| d.times.saturating_add(1));
        let doublings = u32::try_from(times - 1).unwrap_or(0).min(8);
        let pause = (DRAIN_AGAIN * 2_u32.pow(doublings)).min(DRAIN_AGAIN_AT_MOST);
        self.book.deferred.retain(|d| d.node != node);
        self.book.deferred.push(Deferred {
            node: node.into(),
            times,
            until: whole_seconds(after(self.now, pause)),
            message: bounded(message, MAX_MESSAGE),
        });
    }

    pub(super) fn deferred(&self, node: &str) -> Option<&Deferred> {
        self.book.deferred.iter().find(|d| d.node == node && d.until.0 > self.now)
    }

    /// The rollout of the current commit: begun, its waves, finished; the one before goes into the history.
    pub(super) fn keep_history(&mut self) {
        let now = whole_seconds(self.now);
        let commit = self.fleet.commit().clone();
        if let Some(past) = self.book.rollout.take_if(|r| r.commit != commit) {
            let rejected = self.rejected(&past.commit).is_some();
            let result = match (&past.finished, rejected) {
                (_, true) => RolloutResult::Rejected,
                (Some(_), false) => RolloutResult::Finished,
                (None, false) => RolloutResult::Superseded,
            };
            let on_it = self.fleet.nodes.values().filter(|n| n.selected && n.booted() == Some(&past.commit)).count();
            let failed = self.book.failures.iter().filter(|f| f.commit == past.commit).count();
            self.book.history.insert(
                0,
                PastRollout {
                    commit: past.commit,
                    started: past.started,
                    finished: past.finished,
                    ended: now.clone(),
                    result,
                    updated: i32::try_from(on_it).unwrap_or(i32::MAX),
                    failed: i32::try_from(failed).unwrap_or(i32::MAX),
                },
            );
            self.book.history.truncate(MAX_HISTORY);
        }
        let started = now;
        self.book.rollout.get_or_insert(RolloutStatus { commit, started, finished: None, waves: vec![] });
    }

    /// Counts the waves. That a wave was complete is remembered: a node that joins later does not close the next ones.
    pub(super) fn count_waves(&mut self, members: &gate::wave::Membership<'_>) {
        let now = whole_seconds(self.now);
        let waves = self.fleet.image.spec.rollout.waves.iter().enumerate().map(|(index, wave)| {
            let nodes: Vec<&str> = members.iter().filter(|(_, w)| **w == index).map(|(name, _)| *name).collect();
            let updated = nodes.iter().filter(|name| self.is_updated(name)).count();
            let known = self.book.rollout.iter().flat_map(|r| &r.waves).find(|w| w.name == wave.name);
            let completed =
                known.and_then(|w| w.completed.clone()).or_else(|| (updated == nodes.len()).then(|| now.clone()));
            let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
            WaveStatus { name: wave.name.clone(), nodes: number(nodes.len()), updated: number(updated), completed }
        });
        let waves: Vec<WaveStatus> = waves.collect();
        let all = members.keys().all(|name| self.is_updated(name)) && !members.is_empty();
        if let Some(rollout) = &mut self.book.rollout {
            rollout.waves = waves;
            if all && rollout.finished.is_none() {
                rollout.finished = Some(now);
            }
        }
    }

    pub(super) fn all_done(&self, members: &gate::wave::Membership<'_>) -> bool {
        members.keys().all(|name| self.is_updated(name))
    }

    fn is_updated(&self, node: &str) -> bool {
        let there = self.fleet.nodes.get(node).is_some_and(|n| n.booted() == Some(self.fleet.commit()));
        // Searched for only where the node could be in it at all.
        let slot = || self.book.slots.iter().find(|s| s.node == node);
        let busy = there && slot().is_some_and(|s| s.outcome != Some(SlotOutcome::Booted));
        there && !busy && self.failure(node).is_none()
    }

    pub(super) fn selected(&self) -> usize {
        self.fleet.nodes.values().filter(|n| n.selected && n.exists).count()
    }
}
