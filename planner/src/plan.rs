//! What a rollout decision says: the status to write, the steps to take, what is waited for, and when to
//! look again.

use std::{collections::BTreeSet, time::Duration};

use osimage_crds::{NodeOS, OSImageStatus, nodeos::ProblemReason};

/// The decision of one pass. The status is written first, with the resourceVersion that the OSImage was read
/// at; only when that went well are the steps carried out, in order. A conflict means: look again.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct Plan {
    /// The status to write; equal to the one observed when nothing has changed.
    pub status: OSImageStatus,
    /// What to do, each step repeatable.
    pub steps: Vec<Step>,
    /// Why nodes are not acted on.
    pub holds: Vec<Hold>,
    /// When to look again, at the latest.
    pub wake: Option<Duration>,
}

/// One thing to do. Each is a single write to the API server, or a bounded number of evictions.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Hold the deletion of the OSImage until its nodes are given back.
    AddFinalizer,
    /// Let the OSImage go.
    RemoveFinalizer,
    /// Make the NodeOS of a node.
    CreateNodeOS(Box<NodeOS>),
    /// Replace the spec of a NodeOS, on condition that it is still as it was read (its resourceVersion).
    UpdateNodeOS {
        /// The object as it shall be.
        object: Box<NodeOS>,
        /// What the change means, for events and logs.
        change: Change,
    },
    /// Remove the NodeOS of a node that is no longer ours, on condition that it is still as it was read.
    DeleteNodeOS(Box<NodeOS>),
    /// Cordon a node, saying in the same write that it was us, on condition that the Node is still as it was
    /// read: an operator with an old view must not cordon a node that another has given back meanwhile.
    Cordon {
        /// The node.
        node: String,
        /// Value of the annotation `osimage.dev/cordoned-by`.
        owner: String,
        /// Annotations to set to `true` with it, so that autoscalers leave the node alone; remembered in
        /// `osimage.dev/added-annotations`.
        annotate: BTreeSet<String>,
        /// resourceVersion of the Node as observed; a conflict means: look again.
        resource_version: String,
    },
    /// Uncordon a node that we cordoned, removing the annotation in the same write, on the same condition.
    Uncordon {
        /// The node.
        node: String,
        /// Annotations that we added with the cordon.
        remove: BTreeSet<String>,
        /// resourceVersion of the Node as observed; a conflict means: look again.
        resource_version: String,
    },
    /// Delete pods that were not evicted in time, whatever PodDisruptionBudgets say (`drain.onTimeout: Force`).
    Delete {
        /// The node.
        node: String,
        /// The pods.
        pods: Vec<PodRef>,
        /// Seconds they have to stop; what they ask for when absent.
        grace_period_seconds: Option<i64>,
    },
    /// Evict pods from a node.
    Evict {
        /// The node.
        node: String,
        /// The pods.
        pods: Vec<PodRef>,
        /// Seconds they have to stop; what they ask for when absent.
        grace_period_seconds: Option<i64>,
    },
}

/// What a change of a NodeOS means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another image, other checks, or leave to download.
    Assign,
    /// The node may reboot.
    Permit,
    /// The node may keep what it booted.
    Acknowledge,
    /// The permit is taken back.
    Withdraw,
    /// The attempt is closed: no permit is given for it any more.
    Release,
}

/// One pod, by what identifies it for an eviction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; the eviction is refused for another pod of this name.
    pub uid: String,
}

/// A reason not to act yet. The same value feeds blockers, messages, metrics and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The node that waits; `None` when the whole rollout does.
    pub node: Option<String>,
    /// Why.
    pub reason: HoldReason,
    /// The object that blocks, as `Kind namespace/name`.
    pub object: Option<String>,
    /// What is waited for, and what would end the waiting.
    pub message: String,
}

/// Why something waits. The order is that of importance to a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldReason {
    /// The spec contradicts itself.
    InvalidSpec,
    /// The commit failed too often.
    CommitRejected,
    /// The node failed on this commit.
    NodeFailed,
    /// The node has been silent since its reboot.
    NodeLost,
    /// The node's daemon says that it cannot do what is asked.
    NodeProblem(ProblemReason),
    /// A pod cannot be evicted.
    DrainBlocked,
    /// The node could not be emptied, or did not go down, in time, and is come back to later.
    NodeDeferred,
    /// A wave waits for a person.
    WaveNotApproved,
    /// No maintenance window is open, or none is long enough.
    WindowClosed,
    /// One of `rollout.gates` is closed.
    GateClosed,
    /// One of `rollout.gates` could not be asked.
    GateUnknown,
    /// No daemon has answered on the node.
    DaemonSilent,
    /// Another OSImage owns the node.
    OwnedByOther,
    /// The node is not Ready.
    NodeNotReady,
    /// `rollout.paused` is set.
    Paused,
    /// As many nodes as may be are unavailable for causes that are not ours.
    NodesUnavailable,
    /// The wave before has not been updated.
    WaveNotOpen,
    /// The wave before soaks.
    WaveSoaking,
    /// A node of another value of `rollout.topologyKey` is down.
    TopologyBusy,
    /// Another control plane node is down.
    ControlPlaneBusy,
    /// As many nodes are unavailable as may be.
    BudgetSpent,
    /// As many nodes download as may at once.
    PullQueued,
    /// The node downloads.
    Pulling,
    /// Evicted pods are still stopping.
    Draining,
    /// The node goes down and comes back.
    Rebooting,
    /// The node runs the new system on trial.
    Verifying,
    /// The node is given back.
    Releasing,
}

impl HoldReason {
    /// One word for machines.
    pub const fn as_str(self) -> &'static str {
        match self {
            HoldReason::InvalidSpec => "InvalidSpec",
            HoldReason::CommitRejected => "CommitRejected",
            HoldReason::NodeFailed => "NodeFailed",
            HoldReason::NodeLost => "NodeLost",
            HoldReason::NodeProblem(problem) => problem.as_str(),
            HoldReason::DrainBlocked => "DrainBlocked",
            HoldReason::NodeDeferred => "NodeDeferred",
            HoldReason::WaveNotApproved => "WaveNotApproved",
            HoldReason::WindowClosed => "WindowClosed",
            HoldReason::GateClosed => "GateClosed",
            HoldReason::GateUnknown => "GateUnknown",
            HoldReason::DaemonSilent => "DaemonSilent",
            HoldReason::OwnedByOther => "OwnedByOther",
            HoldReason::NodeNotReady => "NodeNotReady",
            HoldReason::Paused => "Paused",
            HoldReason::NodesUnavailable => "NodesUnavailable",
            HoldReason::WaveNotOpen => "WaveNotOpen",
            HoldReason::WaveSoaking => "WaveSoaking",
            HoldReason::TopologyBusy => "TopologyBusy",
            HoldReason::ControlPlaneBusy => "ControlPlaneBusy",
            HoldReason::BudgetSpent => "BudgetSpent",
            HoldReason::PullQueued => "PullQueued",
            HoldReason::Pulling => "Pulling",
            HoldReason::Draining => "Draining",
            HoldReason::Rebooting => "Rebooting",
            HoldReason::Verifying => "Verifying",
            HoldReason::Releasing => "Releasing",
        }
    }

    /// Whether a person should hear of it: something outside the rollout's own course holds it up.
    pub const fn blocks(self) -> bool {
        match self {
            HoldReason::InvalidSpec
            | HoldReason::CommitRejected
            | HoldReason::NodeDeferred
            | HoldReason::WaveNotApproved
            | HoldReason::WindowClosed
            | HoldReason::GateClosed
            | HoldReason::GateUnknown
            | HoldReason::NodeFailed
            | HoldReason::NodeLost
            | HoldReason::NodeProblem(_)
            | HoldReason::DrainBlocked
            | HoldReason::DaemonSilent
            | HoldReason::OwnedByOther
            | HoldReason::NodeNotReady
            | HoldReason::Paused
            | HoldReason::NodesUnavailable => true,
            HoldReason::WaveNotOpen
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
}
