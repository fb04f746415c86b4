//! What the OSImage says of its rollout: counts, conditions, blockers, one line. No decision is made here, and
//! none is made from what is written here except from the slot book, failures and rejected commits.

use std::{collections::BTreeSet, time::Duration};

use k8s_openapi::jiff::Timestamp;
use osimage_crds::{
    ConditionType, Conditions, OSImageStatus,
    condition::{self, Verdict, bounded},
    osimage::{Blocker, Counts, Phase, SlotOutcome, whole_seconds},
};

use crate::{
    fleet::{Fleet, NodeView},
    gate,
    plan::{Hold, HoldReason},
};

/// Blockers that are listed, the most important first.
const MAX_BLOCKERS: usize = 20;
/// Bytes of one message.
const MAX_MESSAGE: usize = 512;

/// A daemon that has just been asked something is given this long before its silence is made a matter of.
pub const DAEMON_ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// Completes the status around the book. Times move only where what they speak of has changed, so that an
/// unchanged rollout gives an unchanged status.
pub fn status(fleet: &Fleet, book: OSImageStatus, holds: &[Hold], now: Timestamp) -> OSImageStatus {
    let counts = count(fleet, &book);
    let rejected = book.rejected.iter().find(|r| r.commit == *fleet.commit()).map(|r| r.message.clone());
    let mut blocking: Vec<&Hold> = holds.iter().filter(|h| h.reason.blocks()).collect();
    blocking.sort_by(|a, b| (a.reason, &a.node, &a.object).cmp(&(b.reason, &b.node, &b.object)));
    let blockers = blockers(&book, &blocking, now);
    blocking.retain(|hold| hold.reason != HoldReason::DaemonSilent || is_old(&blockers, hold, now));
    let phase = phase(fleet, &counts, book.slots.len(), rejected.is_some(), &blocking);
    let message = bounded(&line(fleet, phase, &counts, holds, &blocking), MAX_MESSAGE);
    let mut status = OSImageStatus {
        observed_generation: fleet.image.metadata.generation,
        phase: Some(phase),
        message,
        progress: format!("{}/{}", counts.updated, counts.selected),
        counts,
        blockers,
        ..book
    };
    set_conditions(fleet, &mut status, phase, holds, &blocking, now);
    status
}

fn is_old(blockers: &[Blocker], hold: &Hold, now: Timestamp) -> bool {
    let since = blockers.iter().find(|b| b.node == hold.node && b.reason == hold.reason.as_str()).map(|b| b.since.0);
    let age = since.and_then(|since| Duration::try_from(now.duration_since(since)).ok());
    age.is_none_or(|age| age >= DAEMON_ANSWERS_WITHIN)
}

fn count(fleet: &Fleet, book: &OSImageStatus) -> Counts {
    // A slot that only waits for minReadySeconds is that of a verified node.
    let busy = book.slots.iter().filter(|s| s.outcome != Some(SlotOutcome::Booted));
    let busy: BTreeSet<&str> = busy.map(|s| s.node.as_str()).collect();
    let failures = book.failures.iter().filter(|f| f.commit == *fleet.commit());
    let failures: BTreeSet<&str> = failures.map(|f| f.node.as_str()).collect();
    let in_slot = |n: &NodeView| busy.contains(n.name.as_str());
    let failed = |n: &NodeView| failures.contains(n.name.as_str());
    let updated = |n: &&NodeView| n.booted() == Some(fleet.commit()) && !in_slot(n) && !failed(n);
    let pulled = |n: &&NodeView| {
        let pulled = n.node_os.as_ref().and_then(|o| o.status.as_ref()).and_then(|s| s.pulled.as_ref());
        !updated(n) && !in_slot(n) && pulled == Some(fleet.commit())
    };
    let number = |of: &dyn Fn(&&NodeView) -> bool| {
        let nodes = fleet.nodes.values().filter(|n| n.selected && n.exists);
        i32::try_from(nodes.filter(of).count()).unwrap_or(i32::MAX)
    };
    Counts {
        selected: number(&|_| true),
        updated: number(&updated),
        pulled: number(&pulled),
        updating: number(&|n| in_slot(n)),
        failed: i32::try_from(book.failures.iter().filter(|f| f.commit == *fleet.commit()).count()).unwrap_or(i32::MAX),
        unavailable: number(&|n| n.unavailable()),
    }
}

fn phase(fleet: &Fleet, counts: &Counts, slots: usize, rejected: bool, blocking: &[&Hold]) -> Phase {
    if fleet.deleting() {
        Phase::Deleting
    } else if rejected {
        Phase::Halted
    } else if counts.updated == counts.selected && slots == 0 {
        Phase::Updated
    } else if fleet.image.spec.rollout.paused {
        Phase::Paused
    } else if counts.updating == 0 && !blocking.is_empty() {
        Phase::Waiting
    } else {
        Phase::Progressing
    }
}

fn line(fleet: &Fleet, phase: Phase, counts: &Counts, holds: &[Hold], blocking: &[&Hold]) -> String {
    let first = blocking.first().map(|h| said(h)).unwrap_or_default();
    match phase {
        Phase::Updated if counts.selected == 0 => "nodeSelector matches no node".into(),
        Phase::Updated => format!("all {} nodes run {}", counts.selected, fleet.commit().short()),
        Phase::Halted | Phase::Waiting | Phase::Paused => first,
        Phase::Deleting => format!("gives back {} nodes", counts.updating),
        Phase::Progressing => {
            let moving =
                holds.iter().find(|h| !h.reason.blocks() && h.node.is_some() && h.reason > HoldReason::PullQueued);
            match (moving, blocking.first()) {
                (Some(hold), _) => said(hold),
                (None, Some(hold)) => said(hold),
                (None, None) => {
                    format!("{} of {} nodes run {}", counts.updated, counts.selected, fleet.commit().short())
                }
            }
        }
    }
}

fn said(hold: &Hold) -> String {
    match &hold.node {
        Some(node) => format!("{node}: {}", hold.message),
        None => hold.message.clone(),
    }
}

fn blockers(book: &OSImageStatus, blocking: &[&Hold], now: Timestamp) -> Vec<Blocker> {
    let mut blockers: Vec<Blocker> = Vec::new();
    for hold in blocking {
        let mut blocker = Blocker {
            node: hold.node.clone(),
            reason: hold.reason.as_str().into(),
            object: hold.object.clone(),
            message: bounded(&hold.message, MAX_MESSAGE),
            since: whole_seconds(now),
        };
        if blockers.iter().any(|b| b.same(&blocker)) {
            continue;
        }
        if let Some(known) = book.blockers.iter().find(|b| b.same(&blocker)) {
            blocker.since = known.since.clone();
        }
        blockers.push(blocker);
        if blockers.len() == MAX_BLOCKERS {
            break;
        }
    }
    blockers
}

fn set_conditions(
    fleet: &Fleet,
    status: &mut OSImageStatus,
    phase: Phase,
    holds: &[Hold],
    blocking: &[&Hold],
    now: Timestamp,
) {
    let generation = fleet.image.metadata.generation;
    let message = status.message.clone();
    let done = phase == Phase::Updated;
    let moving = matches!(phase, Phase::Progressing | Phase::Waiting | Phase::Deleting)
        || holds.iter().any(|h| h.node.is_some() && h.reason >= HoldReason::Draining);
    let trouble = blocking.iter().find(|h| needs_a_person(h.reason));
    let reason = match (done, blocking.first()) {
        (true, _) if status.counts.selected == 0 => "NoNodes",
        (true, _) => "Updated",
        (false, Some(hold)) => hold.reason.as_str(),
        (false, None) => "Progressing",
    };
    let degraded = trouble.map_or(Verdict { holds: false, reason: "AsExpected", message: String::new() }, |hold| {
        Verdict { holds: true, reason: hold.reason.as_str(), message: said(hold) }
    });
    let paused = fleet.image.spec.rollout.paused;
    let conditions = &mut status.conditions;
    condition::set(
        conditions,
        ConditionType::Ready,
        Verdict { holds: done, reason, message: message.clone() },
        generation,
        now,
    );
    condition::set(conditions, ConditionType::Progressing, Verdict { holds: moving, reason, message }, generation, now);
    condition::set(conditions, ConditionType::Degraded, degraded, generation, now);
    set_window(fleet, conditions, now);
    let verdict =
        Verdict { holds: paused, reason: if paused { "PausedBySpec" } else { "NotPaused" }, message: String::new() };
    condition::set(conditions, ConditionType::Paused, verdict, generation, now);
}

/// Says whether nodes may be started by the clock.
fn set_window(fleet: &Fleet, conditions: &mut Conditions, now: Timestamp) {
    if fleet.image.spec.rollout.windows.is_empty() {
        conditions.retain(|c| c.type_ != ConditionType::WindowOpen.as_str());
        return;
    }
    let verdict = match gate::window::check(fleet, now) {
        None => Verdict { holds: true, reason: "Open", message: String::new() },
        Some((hold, _)) => Verdict { holds: false, reason: hold.reason.as_str(), message: hold.message },
    };
    condition::set(conditions, ConditionType::WindowOpen, verdict, fleet.image.metadata.generation, now);
}

/// Whether waiting alone will not help, as far as is known.
const fn needs_a_person(reason: HoldReason) -> bool {
    match reason {
        HoldReason::InvalidSpec
        | HoldReason::CommitRejected
        | HoldReason::NodeFailed
        | HoldReason::NodeLost
        | HoldReason::NodeProblem(_)
        | HoldReason::OwnedByOther => true,
        HoldReason::DrainBlocked
        | HoldReason::DaemonSilent
        | HoldReason::NodeNotReady
        | HoldReason::Paused
        | HoldReason::NodesUnavailable
        | HoldReason::NodeDeferred
        | HoldReason::WaveNotApproved
        | HoldReason::WindowClosed
        | HoldReason::GateClosed
        | HoldReason::GateUnknown
        | HoldReason::WaveNotOpen
        | HoldReason::WaveSoaking
        | HoldReason::TopologyBusy
        | HoldReason::ControlPlaneBusy
        | HoldReason::BudgetSpent
        | HoldReason::PullQueued
        | HoldReason::Pulling
        | HoldReason::Draining
        | HoldReason::Rebooting
        | HoldReason::Verifying
        | HoldReason::Releasing => false,
    }
}
