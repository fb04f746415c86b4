//! Tells the story of a rollout as Events of the OSImage, with the Node as the related object: one for every
//! deed that disturbs a node, and one for every change of the status that a person would want to hear of.
//! What is done to every node of a fleet at once (NodeOS objects made, leave to download) is only logged.
//!
//! An Event that cannot be written is logged and forgotten: nothing depends on it.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client, Resource, ResourceExt,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use osimage_crds::{
    ConditionType, OSImage, OSImageStatus,
    condition::{self, bounded},
    names,
    osimage::{Blocker, Slot, SlotOutcome},
};
use osimage_planner::{HoldReason, plan::Change};
use tracing::{info, warn};

use crate::execute::Deed;

/// Bytes of a note that the API takes.
const MAX_NOTE: usize = 1000;

/// One thing to tell.
#[derive(Debug, PartialEq)]
pub struct Tale {
    kind: EventType,
    /// What happened, in one word; from a fixed set.
    reason: Cow<'static, str>,
    /// What was being done, in one word.
    action: &'static str,
    note: String,
    node: Option<String>,
}

/// Writes Events.
pub struct Teller {
    client: Client,
    reporter: Reporter,
}

impl Teller {
    pub fn new(client: Client, instance: String) -> Self {
        let reporter = Reporter { controller: names::OPERATOR_MANAGER.into(), instance: Some(instance) };
        Teller { client, reporter }
    }

    /// Writes one Event for each tale.
    pub async fn tell(&self, image: &OSImage, tales: Vec<Tale>) {
        for tale in tales {
            let Tale { kind, reason, action, note, node } = tale;
            info!(osimage = image.name_any(), %reason, "{note}");
            let secondary = node.map(|name| ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(name),
                ..ObjectReference::default()
            });
            let event = Event {
                type_: kind,
                reason: reason.to_string(),
                note: Some(bounded(&note, MAX_NOTE)),
                action: action.into(),
                secondary,
            };
            // A recorder that lives longer would fold a second event of a kind into the first and drop its note.
            let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
            if let Err(error) = recorder.publish(&event, &image.object_ref(&())).await {
                warn!(%reason, error = crate::error::chain(&error), "cannot write an event");
            }
        }
    }
}

/// What there is to tell of a pass: the status before it and after it, and what was done.
pub fn story(before: &OSImageStatus, after: &OSImageStatus, deeds: &[Deed]) -> Vec<Tale> {
    let mut tales = of_status(before, after);
    tales.extend(deeds.iter().filter_map(of_deed));
    tales
}

/// The spec cannot be understood.
pub fn invalid_spec(before: &OSImageStatus, message: &str) -> Vec<Tale> {
    let told = condition::find(&before.conditions, ConditionType::Degraded).is_some_and(|c| c.message == message);
    if told { vec![] } else { vec![warning("InvalidSpec", "Validate", None, message.to_owned())] }
}

fn normal(reason: &'static str, action: &'static str, node: Option<&str>, note: String) -> Tale {
    Tale { kind: EventType::Normal, reason: reason.into(), action, note, node: node.map(Into::into) }
}

fn warning(reason: &'static str, action: &'static str, node: Option<&str>, note: String) -> Tale {
    Tale { kind: EventType::Warning, ..normal(reason, action, node, note) }
}

fn of_deed(deed: &Deed) -> Option<Tale> {
    match deed {
        Deed::Cordoned { node } => Some(normal("NodeCordoned", "Cordon", Some(node), format!("cordoned {node}"))),
        Deed::Uncordoned { node } => {
            Some(normal("NodeUncordoned", "Uncordon", Some(node), format!("uncordoned {node}")))
        }
        Deed::Evicted { node, pods } => {
            let pods: Vec<String> = pods.iter().map(|p| format!("{}/{}", p.namespace, p.name)).collect();
            let note = format!("evicted from {node}: {}", pods.join(", "));
            Some(normal("PodsEvicted", "Drain", Some(node), note))
        }
        Deed::Deleted { node, pods } => {
            let pods: Vec<String> = pods.iter().map(|p| format!("{}/{}", p.namespace, p.name)).collect();
            let note = format!("deleted from {node}, past drain.timeout: {}", pods.join(", "));
            Some(warning("PodsDeleted", "Drain", Some(node), note))
        }
        Deed::Changed { node, change, commit } => of_change(node, *change, commit.as_deref().unwrap_or_default()),
        Deed::Made { .. } | Deed::Removed { .. } | Deed::Held | Deed::LetGo => None,
    }
}

fn of_change(node: &str, change: Change, commit: &str) -> Option<Tale> {
    match change {
        Change::Permit => {
            let note = format!("{node} may reboot into {commit}");
            Some(normal("PermitGiven", "Permit", Some(node), note))
        }
        Change::Acknowledge => {
            let note = format!("{node} is Ready and healthy on {commit}, and may keep it");
            Some(normal("NodeVerified", "Acknowledge", Some(node), note))
        }
        Change::Withdraw => {
            let note = format!("the permit of {node} was taken back");
            Some(warning("PermitWithdrawn", "Withdraw", Some(node), note))
        }
        Change::Assign | Change::Release => None,
    }
}

fn of_status(before: &OSImageStatus, after: &OSImageStatus) -> Vec<Tale> {
    let mut tales: Vec<Tale> = after
        .slots
        .iter()
        .filter_map(|slot| of_slot(before.slots.iter().find(|s| s.attempt == slot.attempt), slot))
        .collect();
    let known_failure = |attempt, outcome| before.failures.iter().any(|f| f.attempt == attempt && f.outcome == outcome);
    for failure in after.failures.iter().filter(|f| !known_failure(f.attempt.clone(), f.outcome)) {
        let note = format!("{} did not keep {}: {}", failure.node, failure.commit.short(), failure.message);
        tales.push(warning(failure.outcome.as_str(), "Update", Some(&failure.node), note));
    }
    for rejected in after.rejected.iter().filter(|r| before.rejected.iter().all(|b| b.commit != r.commit)) {
        let note = format!("commit {} is not tried again: {}", rejected.commit.short(), rejected.message);
        tales.push(warning("CommitRejected", "Reject", None, note));
    }
    for blocker in after.blockers.iter().filter(|b| !before.blockers.iter().any(|known| known.same(b))) {
        tales.extend(of_blocker(blocker));
    }
    let turned = |kind| condition::is_true(&before.conditions, kind) != condition::is_true(&after.conditions, kind);
    if turned(ConditionType::Ready) && condition::is_true(&after.conditions, ConditionType::Ready) {
        tales.push(normal("RolloutComplete", "Update", None, after.message.clone()));
    }
    if turned(ConditionType::Paused) {
        tales.push(match condition::is_true(&after.conditions, ConditionType::Paused) {
            true => normal("Paused", "Pause", None, "no node is started; those in flight finish".into()),
            false => normal("Resumed", "Resume", None, "nodes are started again".into()),
        });
    }
    tales
}

fn of_slot(before: Option<&Slot>, slot: &Slot) -> Option<Tale> {
    let Slot { node, attempt, commit, boot_id: _, since: _, permitted, withdrawn: _, unproven: _, outcome, ended: _ } =
        slot;
    let Some(before) = before else {
        let note = format!("{node} is next: it goes to {} (attempt {attempt})", commit.short());
        return Some(normal("SlotTaken", "Reserve", Some(node), note));
    };
    match outcome.filter(|_| before.outcome.is_none()) {
        Some(SlotOutcome::Booted) => {
            Some(normal("NodeUpdated", "Update", Some(node), format!("{node} runs {}", commit.short())))
        }
        Some(SlotOutcome::Cancelled) => {
            Some(normal("AttemptCancelled", "Cancel", Some(node), format!("{node} is not rebooted after all")))
        }
        // Told as the failure that it is.
        Some(SlotOutcome::Failed) => None,
        None if permitted.is_some() && before.permitted.is_none() => {
            Some(normal("NodeDrained", "Drain", Some(node), format!("{node} is drained")))
        }
        None => None,
    }
}

/// What a person is told of when it begins to wait. The rest is told otherwise, or is every rollout's first minute.
fn of_blocker(blocker: &Blocker) -> Option<Tale> {
    const TOLD_OTHERWISE: [HoldReason; 6] = [
        HoldReason::CommitRejected,
        HoldReason::NodeFailed,
        HoldReason::NodeLost,
        HoldReason::DaemonSilent,
        HoldReason::NodeNotReady,
        HoldReason::Paused,
    ];
    if TOLD_OTHERWISE.iter().any(|reason| reason.as_str() == blocker.reason) {
        return None;
    }
    let node = blocker.node.as_deref();
    let note = node.map_or_else(|| blocker.message.clone(), |node| format!("{node}: {}", blocker.message));
    Some(Tale { reason: blocker.reason.clone().into(), ..warning("", "Wait", node, note) })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use osimage_crds::{
        AttemptId, Commit,
        condition::Verdict,
        nodeos::Outcome,
        osimage::{Failure, Rejected, whole_seconds},
    };

    use super::*;

    fn commit() -> Commit {
        "0123456789abcdef".repeat(4).parse().unwrap()
    }

    fn slot() -> Slot {
        Slot {
            node: "n".into(),
            attempt: AttemptId("u-1".into()),
            commit: commit(),
            boot_id: "b".into(),
            since: whole_seconds(Timestamp::UNIX_EPOCH),
            permitted: None,
            withdrawn: None,
            unproven: None,
            outcome: None,
            ended: None,
        }
    }

    fn with_slot(slot: Slot) -> OSImageStatus {
        OSImageStatus { slots: vec![slot], ..OSImageStatus::default() }
    }

    fn blocked(reason: &str, message: &str) -> OSImageStatus {
        let since = whole_seconds(Timestamp::UNIX_EPOCH);
        let blocker =
            Blocker { node: Some("n".into()), reason: reason.into(), object: None, message: message.into(), since };
        OSImageStatus { blockers: vec![blocker], ..OSImageStatus::default() }
    }

    fn condition(kind: ConditionType, holds: bool) -> OSImageStatus {
        let mut status = OSImageStatus::default();
        let verdict = Verdict { holds, reason: "Because", message: String::new() };
        condition::set(&mut status.conditions, kind, verdict, None, Timestamp::UNIX_EPOCH);
        status
    }

    #[test]
    fn a_status_tells_what_has_changed_and_nothing_else() {
        let now = || whole_seconds(Timestamp::UNIX_EPOCH);
        let empty = OSImageStatus::default();
        let permitted = Slot { permitted: Some(now()), ..slot() };
        let ended = |outcome| with_slot(Slot { outcome: Some(outcome), ..permitted.clone() });
        let failure = Failure {
            node: "n".into(),
            attempt: AttemptId("u-1".into()),
            commit: commit(),
            outcome: Outcome::RolledBack,
            message: "check web failed".into(),
            time: now(),
        };
        let failed = OSImageStatus { failures: vec![failure], ..empty.clone() };
        let rejected = Rejected { commit: commit(), message: "it failed".into(), time: now() };
        let rejected = OSImageStatus { rejected: vec![rejected], ..empty.clone() };
        let (ready, unready) = (condition(ConditionType::Ready, true), condition(ConditionType::Ready, false));
        let (paused, resumed) = (condition(ConditionType::Paused, true), condition(ConditionType::Paused, false));
        let cases: [(&OSImageStatus, &OSImageStatus, &[&str]); 15] = [
            (&empty, &with_slot(slot()), &["SlotTaken"]),
            (&with_slot(slot()), &with_slot(slot()), &[]),
            (&with_slot(slot()), &with_slot(permitted.clone()), &["NodeDrained"]),
            (&with_slot(permitted.clone()), &ended(SlotOutcome::Booted), &["NodeUpdated"]),
            (&with_slot(permitted.clone()), &ended(SlotOutcome::Failed), &[]),
            (&with_slot(slot()), &ended(SlotOutcome::Cancelled), &["AttemptCancelled"]),
            (&ended(SlotOutcome::Booted), &empty, &[]),
            (&empty, &failed, &["RolledBack"]),
            (&failed, &failed, &[]),
            (&empty, &rejected, &["CommitRejected"]),
            (&empty, &blocked("DrainBlocked", "by a budget"), &["DrainBlocked"]),
            (&blocked("DrainBlocked", "by a budget"), &blocked("DrainBlocked", "still"), &[]),
            (&empty, &blocked("DaemonSilent", "no answer"), &[]),
            (&unready, &ready, &["RolloutComplete"]),
            (&paused, &resumed, &["Resumed"]),
        ];
        for (before, after, reasons) in cases {
            let tales = of_status(before, after);
            assert_eq!(tales.iter().map(|t| t.reason.as_ref()).collect::<Vec<_>>(), reasons, "{after:?}");
        }
    }

    #[test]
    fn a_bad_spec_is_told_once() {
        let mut status = OSImageStatus::default();
        assert_eq!(invalid_spec(&status, "bad").len(), 1);
        let verdict = Verdict { holds: true, reason: "InvalidSpec", message: "bad".into() };
        condition::set(&mut status.conditions, ConditionType::Degraded, verdict, None, Timestamp::UNIX_EPOCH);
        assert_eq!(invalid_spec(&status, "bad"), []);
    }
}
