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

    pub(super) fn selected(&self) -> usize {
        self.fleet.nodes.values().filter(|n| n.selected && n.exists).count()
    }
}
