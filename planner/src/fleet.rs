//! The complete input of a rollout decision. Built in one place (the operator's `observe`).

use std::collections::{BTreeMap, BTreeSet};

use osimage_crds::{Commit, NodeOS, OSImage, OSImageStatus, names, osimage::Slot};

/// One OSImage and everything that its rollout depends on, as seen at one moment.
///
/// # What may be old
/// * The OSImage, and Node and NodeOS of every node in a slot, are read from the API server itself, and at one
///   version of the OSImage: read it, read those nodes, read it again, and begin anew if its resourceVersion has
///   changed. A cache could otherwise show the boot before the one that the slot was taken in, which looks like a
///   reboot.
/// * Everything else may come from caches, if it is taken **before** the last read of the OSImage. Then the slot
///   book is at least as new as the rest, and a write that carries an old resourceVersion fails; the other way
///   round, an operator could act on a slot that another one has given back in between.
#[derive(Clone, Debug, PartialEq)]
pub struct Fleet {
    /// The OSImage, read from the API server itself (not from a cache), so that its slot book is fresh.
    pub image: OSImage,
    /// UIDs of all OSImages that exist: a NodeOS of one that does not may be taken over.
    pub existing_images: BTreeSet<String>,
    /// Every node that the selector matches, every node on which something of ours is left, and all control plane
    /// nodes.
    pub nodes: BTreeMap<String, NodeView>,
    /// The node that the operator itself runs on: it goes last.
    pub operator_node: Option<String>,
    /// Nodes of the cluster, selected or not, that are Ready and not cordoned: where evicted pods can go.
    pub refuges: BTreeSet<String>,
    /// What the API server last answered to evictions that it refused, by pod UID. Only for messages.
    pub refusals: BTreeMap<String, String>,
    /// What the gates of `rollout.gates` said, where they were asked (see [`crate::rollout::asks_gates`]).
    pub gates: Vec<GateFacts>,
}

/// What one gate said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateFacts {
    /// Its name.
    pub name: String,
    /// What it said.
    pub state: GateState,
}

/// What a gate said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GateState {
    /// Nodes may be started.
    Open,
    /// They may not, for this reason.
    Closed(String),
    /// It could not be asked, for this reason.
    Unknown(String),
}

/// One node, as seen at one moment.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// resourceVersion of the Node as observed.
    pub resource_version: String,
    /// Whether the Node object exists.
    pub exists: bool,
    /// Whether the OSImage's selector matches it.
    pub selected: bool,
    /// An older OSImage that selects it as well. Such a node is the older one's: it does not count as selected.
    pub claimed_by: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations that keep autoscalers away and that are on it already, of
    /// [`names::KEEP_AUTOSCALERS_AWAY`].
    pub kept_from_autoscalers: BTreeSet<String>,
    /// Those of them that we added: value of the annotation `osimage.dev/added-annotations`.
    pub added: BTreeSet<String>,
    /// Whether its Ready condition is true.
    pub ready: bool,
    /// Its conditions, type to status, where it is in a slot.
    pub conditions: BTreeMap<String, String>,
    /// Whether it is cordoned, by whomever.
    pub unschedulable: bool,
    /// Who cordoned it, when it was one of us: value of the annotation `osimage.dev/cordoned-by`.
    pub cordoned_by: Option<String>,
    /// Boot ID as its kubelet reports it.
    pub boot_id: String,
    /// Its NodeOS, with the resourceVersion it was read at.
    pub node_os: Option<NodeOS>,
    /// Its pods, where they were asked for (see [`crate::rollout::inspect`]).
    pub pods: Option<Vec<PodFacts>>,
    /// Volumes that are attached to it and that no pod uses which stays, where its pods were asked for.
    pub attached: Vec<String>,
}

/// One pod on a node, reduced to what a drain decides by.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: a StatefulSet gives the same name again.
    pub uid: String,
    /// Made by a DaemonSet.
    pub daemon_set: bool,
    /// A static pod's mirror.
    pub mirror: bool,
    /// Succeeded or Failed.
    pub finished: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its Ready condition is true.
    pub ready: bool,
    /// The pod of this very operator.
    pub ourselves: bool,
    /// Being deleted.
    pub terminating: bool,
    /// Uses an emptyDir volume.
    pub empty_dir: bool,
    /// No controller will make it again.
    pub unmanaged: bool,
    /// The PodDisruptionBudgets that select it.
    pub budgets: Vec<BudgetFacts>,
}

/// One PodDisruptionBudget.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BudgetFacts {
    /// Its name (the namespace is the pod's).
    pub name: String,
    /// `status.disruptionsAllowed`.
    pub allowed: i32,
    /// Whether pods that are not Ready may go although it allows no disruption (KEP-3017): always by its
    /// `unhealthyPodEvictionPolicy`, or because enough of its pods are healthy.
    pub lets_unready: bool,
}

impl std::fmt::Display for PodFacts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pod {}/{}", self.namespace, self.name)
    }
}

impl Fleet {
    /// The commit that the OSImage asks for.
    pub fn commit(&self) -> &Commit {
        &self.image.spec.image.ostree.commit
    }

    /// Its status as last written; empty before that.
    pub fn status(&self) -> OSImageStatus {
        self.image.status.clone().unwrap_or_default()
    }

    /// Its UID.
    pub fn uid(&self) -> &str {
        self.image.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.image.metadata.name.as_deref().unwrap_or_default()
    }

    /// How a node says that this OSImage cordoned it.
    pub fn owner(&self) -> String {
        format!("{}@{}", self.name(), self.uid())
    }

    /// Whether it is being deleted.
    pub fn deleting(&self) -> bool {
        self.image.metadata.deletion_timestamp.is_some()
    }

    /// Whether our finalizer holds it.
    pub fn has_finalizer(&self) -> bool {
        self.image.metadata.finalizers.iter().flatten().any(|f| f == names::FINALIZER)
    }

    /// The slot of a node in the book as last written.
    pub fn slot(&self, node: &str) -> Option<&Slot> {
        self.image.status.as_ref()?.slots.iter().find(|s| s.node == node)
    }
}

impl NodeView {
    /// The commit that runs, as the node's daemon reports it.
    pub fn booted(&self) -> Option<&Commit> {
        Some(&self.node_os.as_ref()?.status.as_ref()?.booted.as_ref()?.commit)
    }

    /// The boot ID, as the node's daemon reports it.
    pub fn daemon_boot_id(&self) -> Option<&str> {
        self.node_os.as_ref()?.status.as_ref()?.boot_id.as_deref()
    }

    /// Whether daemon and kubelet speak of the same boot.
    pub fn boots_agree(&self) -> bool {
        !self.boot_id.is_empty() && self.daemon_boot_id() == Some(self.boot_id.as_str())
    }

    /// Whether the daemon's status speaks of the spec as it is.
    pub fn daemon_is_current(&self) -> bool {
        self.node_os.as_ref().is_some_and(|n| {
            let observed = n.status.as_ref().and_then(|s| s.observed_generation);
            observed.is_some() && observed == n.metadata.generation
        })
    }

    /// Whether the node cannot take work, for whatever cause.
    pub fn unavailable(&self) -> bool {
        !self.ready || self.unschedulable
    }
}
