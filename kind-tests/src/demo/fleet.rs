//! What the demo knows of the cluster: told by watches, kept as values, asked by the view and by the checks.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::events::v1::Event;
use kube::ResourceExt;
use osimage_crds::{
    NodeOS, OSImage, OSImageStatus,
    nodeos::{NodePhase, Outcome},
    osimage::Slot,
};

/// Everything that is known.
#[derive(Default)]
pub struct Fleet {
    /// The OSImage.
    pub image: Option<OSImage>,
    /// The nodes, by name.
    pub nodes: BTreeMap<String, NodeTrack>,
    /// The pods of the workload.
    pub workload: Workload,
    /// What the operator told, oldest first.
    pub told: Vec<Told>,
}

/// One node.
#[derive(Default)]
pub struct NodeTrack {
    /// The Node.
    pub node: Option<Node>,
    /// The NodeOS.
    pub node_os: Option<NodeOS>,
    /// Bytes of the last download.
    pub pulled: Option<(i64, Option<i64>)>,
    down: Clock,
}

/// Adds up how long something holds.
#[derive(Default)]
pub struct Clock {
    since: Option<Instant>,
    total: Duration,
}

impl Clock {
    fn note(&mut self, holds: bool, now: Instant) {
        match (holds, self.since) {
            (true, None) => self.since = Some(now),
            (false, Some(since)) => {
                self.total += now.saturating_duration_since(since);
                self.since = None;
            }
            (true, Some(_)) | (false, None) => {}
        }
    }

    fn total(&self, now: Instant) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// One event of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Since the start of the demo.
    pub at: Duration,
    /// Something needs, or needed, attention.
    pub warning: bool,
    /// One word.
    pub reason: String,
    /// One sentence.
    pub note: String,
}

/// The workload's pods that count for its disruption budget: Ready, and not on their way out.
#[derive(Default)]
pub struct Workload {
    pods: HashMap<String, bool>,
    fresh: Option<HashMap<String, bool>>,
    lowest: Option<usize>,
}

/// One change of a pod, as a watch tells it.
pub enum PodChange {
    /// A list begins.
    ListBegins,
    /// A pod of the list.
    Listed(Box<Pod>),
    /// The list is complete.
    ListEnds,
    /// A pod is new or has changed.
    Changed(Box<Pod>),
    /// A pod is gone.
    Gone(Box<Pod>),
}

impl Workload {
    /// How many are available now.
    pub fn available(&self) -> usize {
        self.pods.values().filter(|available| **available).count()
    }

    /// From now on the lowest number is remembered.
    pub fn remember(&mut self) {
        self.lowest = Some(self.available());
    }

    /// The lowest number since [`Workload::remember`].
    pub fn lowest(&self) -> Option<usize> {
        self.lowest
    }

    /// Takes a change in.
    pub fn note(&mut self, change: PodChange) {
        match change {
            PodChange::ListBegins => self.fresh = Some(HashMap::new()),
            PodChange::Listed(pod) => {
                self.fresh.get_or_insert_default().insert(pod.uid().unwrap_or_default(), is_available(&pod));
            }
            PodChange::ListEnds => self.pods = self.fresh.take().unwrap_or_default(),
            PodChange::Changed(pod) => {
                self.pods.insert(pod.uid().unwrap_or_default(), is_available(&pod));
            }
            PodChange::Gone(pod) => {
                self.pods.remove(&pod.uid().unwrap_or_default());
            }
        }
        let now = self.available();
        self.lowest = self.lowest.map(|lowest| lowest.min(now));
    }
}

fn is_available(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// Where a node stands, in one word: from its NodeOS, its slot and its Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its daemon has not spoken yet.
    Unknown,
    /// For its download, or for its turn.
    Waiting,
    /// Downloads.
    Pulling,
    /// Holds the commit.
    Pulled,
    /// Has a slot.
    Cordoning,
    /// Pods are evicted.
    Draining,
    /// Writes the deployment.
    Staging,
    /// Is down.
    Rebooting,
    /// On trial.
    Verifying,
    /// Waits for the acknowledgement.
    Healthy,
    /// Goes back.
    RollingBack,
    /// Is uncordoned.
    Releasing,
    /// Runs the commit.
    Updated,
    /// Failed on the commit.
    Failed(Outcome),
    /// The commit was rejected before its turn came.
    Spared,
    /// Says what is wrong.
    Problem,
}

impl Stage {
    /// As it is shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Stage::Unknown => "-",
            Stage::Waiting => "Waiting",
            Stage::Pulling => "Pulling",
            Stage::Pulled => "Pulled",
            Stage::Cordoning => "Cordoning",
            Stage::Draining => "Draining",
            Stage::Staging => "Staging",
            Stage::Rebooting => "Rebooting",
            Stage::Verifying => "Verifying",
            Stage::Healthy => "Healthy",
            Stage::RollingBack => "RollingBack",
            Stage::Releasing => "Releasing",
            Stage::Updated => "Updated",
            Stage::Failed(outcome) => outcome.as_str(),
            Stage::Spared => "Spared",
            Stage::Problem => "Problem",
        }
    }
}

impl Fleet {
    /// Takes a Node in.
    pub fn note_node(&mut self, node: Node, now: Instant) {
        let track = self.nodes.entry(node.name_any()).or_default();
        track.node = Some(node);
        let down = track.cordoned() || !track.ready();
        track.down.note(down, now);
    }

    /// Takes a NodeOS in.
    pub fn note_node_os(&mut self, node_os: NodeOS) {
        let track = self.nodes.entry(node_os.name_any()).or_default();
        if let Some(pull) = node_os.status.as_ref().and_then(|s| s.pull.as_ref()) {
            track.pulled = Some((pull.bytes, pull.total_bytes));
        }
        track.node_os = Some(node_os);
    }

    /// Takes an event in, if it is the operator's.
    pub fn note_event(&mut self, event: &Event, at: Duration) {
        if event.reporting_controller.as_deref() == Some(osimage_crds::names::OPERATOR_MANAGER) {
            self.told.push(Told {
                at,
                warning: event.type_.as_deref() == Some("Warning"),
                reason: event.reason.clone().unwrap_or_default(),
                note: event.note.clone().unwrap_or_default(),
            });
        }
    }

    /// A new rollout begins: what is counted per rollout starts from zero.
    pub fn begin(&mut self) {
        for track in self.nodes.values_mut() {
            track.down = Clock::default();
            track.pulled = None;
        }
    }

    /// The status of the OSImage, if it speaks of the spec as it is now.
    pub fn status(&self) -> Option<&OSImageStatus> {
        let image = self.image.as_ref()?;
        image.status.as_ref().filter(|s| s.observed_generation == image.metadata.generation)
    }

    /// Where a node stands.
    pub fn stage(&self, name: &str) -> Stage {
        let (Some(track), Some(image)) = (self.nodes.get(name), &self.image) else { return Stage::Unknown };
        let Some(status) = track.node_os.as_ref().and_then(|o| o.status.as_ref()) else { return Stage::Unknown };
        let phase = status.phase.unwrap_or(NodePhase::Waiting);
        let target = &image.spec.image.ostree.commit;
        let book = self.status();
        if let Some(slot) = book.and_then(|b| b.slots.iter().find(|s| s.node == name)) {
            return in_slot(track, slot, phase);
        }
        let failure = book.and_then(|b| b.failures.iter().find(|f| f.node == name && f.commit == *target));
        if let Some(failure) = failure {
            return Stage::Failed(failure.outcome);
        }
        if status.booted.as_ref().is_some_and(|b| b.commit == *target) {
            return Stage::Updated;
        }
        if book.is_some_and(|b| b.rejected.iter().any(|r| r.commit == *target)) {
            return Stage::Spared;
        }
        if status.problem.is_some() {
            return Stage::Problem;
        }
        match phase {
            NodePhase::Pulling => Stage::Pulling,
            NodePhase::Pulled if status.pulled.as_ref() == Some(target) => Stage::Pulled,
            _ => Stage::Waiting,
        }
    }
}

fn in_slot(track: &NodeTrack, slot: &Slot, phase: NodePhase) -> Stage {
    if slot.outcome.is_some() {
        return Stage::Releasing;
    }
    if slot.permitted.is_none() {
        return if track.cordoned() { Stage::Draining } else { Stage::Cordoning };
    }
    match phase {
        NodePhase::RollingBack => Stage::RollingBack,
        _ if !track.ready() => Stage::Rebooting,
        NodePhase::Rebooting => Stage::Rebooting,
        NodePhase::Verifying => Stage::Verifying,
        NodePhase::Healthy => Stage::Healthy,
        NodePhase::Idle | NodePhase::Failed => Stage::Releasing,
        NodePhase::Waiting | NodePhase::Pulling | NodePhase::Pulled | NodePhase::Staging => Stage::Staging,
    }
}

impl NodeTrack {
    /// Whether the scheduler leaves it alone.
    pub fn cordoned(&self) -> bool {
        self.node.as_ref().and_then(|n| n.spec.as_ref()?.unschedulable).unwrap_or(false)
    }

    /// Whether its kubelet says Ready.
    pub fn ready(&self) -> bool {
        let status = self.node.as_ref().and_then(|n| n.status.as_ref());
        let conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    }

    /// How long it has been cordoned or not Ready in this rollout.
    pub fn down(&self, now: Instant) -> Duration {
        self.down.total(now)
    }

    /// Version of the booted tree.
    pub fn version(&self) -> Option<&str> {
        self.node_os.as_ref()?.status.as_ref()?.booted.as_ref()?.version.as_deref()
    }

    /// What its daemon says.
    pub fn message(&self) -> &str {
        self.node_os.as_ref().and_then(|o| o.status.as_ref()).map_or("", |s| &s.message)
    }
}

#[cfg(test)]
pub mod tests {
    use serde_json::{Value, json};

    use super::*;

    const OLD: &str = "1111111111111111111111111111111111111111111111111111111111111111";
    const NEW: &str = "2222222222222222222222222222222222222222222222222222222222222222";

    fn node(cordoned: bool, ready: bool) -> Node {
        let ready = if ready { "True" } else { "Unknown" };
        serde_json::from_value(json!({
            "metadata": {"name": "node-1"},
            "spec": {"unschedulable": cordoned},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    }

    fn node_os(phase: &str, booted: &str) -> NodeOS {
        serde_json::from_value(json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "NodeOS", "metadata": {"name": "node-1"},
            "spec": {"osImage": {"name": "demo", "uid": "u"}},
            "status": {
                "phase": phase, "pulled": NEW, "message": "one line that is rather long, as messages may be",
                "booted": {"commit": booted, "version": "1"},
                "pull": {"bytes": 400_000, "totalBytes": 900_000},
            },
        }))
        .unwrap()
    }

    fn image(status: Value) -> OSImage {
        let mut object = json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "OSImage", "metadata": {"name": "demo", "generation": 2},
            "spec": {"nodeSelector": {}, "image": {"ostree": {
                "url": "http://127.0.0.1:1", "commit": NEW, "verification": {"insecureSkip": true},
            }}},
            "status": status,
        });
        object["status"]["observedGeneration"] = json!(2);
        serde_json::from_value(object).unwrap()
    }

    /// One node of two that downloads.
    pub fn pulling() -> Fleet {
        let mut fleet = Fleet::default();
        fleet.note_node(node(true, true), Instant::now());
        fleet.note_node_os(node_os("Pulling", OLD));
        fleet.image =
            Some(image(json!({"phase": "Progressing", "progress": "0/1", "message": "words and words ".repeat(30)})));
        let told = |n: u64| Told {
            at: Duration::from_secs(n),
            warning: n.is_multiple_of(2),
            reason: "NodeDrained".into(),
            note: "a node is drained and so on and on ".repeat(5),
        };
        fleet.told = (0..9).map(told).collect();
        fleet
    }

    #[test]
    fn a_stage_follows_from_slot_node_and_daemon() {
        let slot = |more: Value| {
            let mut slot = json!({"node": "node-1", "attempt": "u-1", "commit": NEW, "bootID": "b", "since": "2026-01-01T00:00:00Z"});
            if let (Some(slot), Value::Object(more)) = (slot.as_object_mut(), more) {
                slot.extend(more);
            }
            json!({"slots": [slot]})
        };
        let now = "2026-01-01T00:00:01Z";
        let permitted = || slot(json!({"permitted": now}));
        let failure = json!({"failures": [{"node": "node-1", "attempt": "u-1", "commit": NEW, "outcome": "RolledBack", "message": "", "time": now}]});
        let rejected = json!({"rejected": [{"commit": NEW, "message": "", "time": now}]});
        let (free, cordoned, down) = ((false, true), (true, true), (true, false));
        let rows = [
            (json!({}), free, "Idle", OLD, Stage::Waiting),
            (json!({}), free, "Pulling", OLD, Stage::Pulling),
            (json!({}), free, "Pulled", OLD, Stage::Pulled),
            (json!({}), free, "Idle", NEW, Stage::Updated),
            (slot(json!({})), free, "Pulled", OLD, Stage::Cordoning),
            (slot(json!({})), cordoned, "Pulled", OLD, Stage::Draining),
            (permitted(), cordoned, "Pulled", OLD, Stage::Staging),
            (permitted(), down, "Rebooting", OLD, Stage::Rebooting),
            (permitted(), down, "Staging", OLD, Stage::Rebooting),
            (permitted(), cordoned, "Verifying", NEW, Stage::Verifying),
            (permitted(), cordoned, "Healthy", NEW, Stage::Healthy),
            (permitted(), down, "RollingBack", NEW, Stage::RollingBack),
            (slot(json!({"permitted": now, "outcome": "Failed"})), cordoned, "Failed", OLD, Stage::Releasing),
            (failure, free, "Failed", OLD, Stage::Failed(Outcome::RolledBack)),
            (rejected, free, "Idle", OLD, Stage::Spared),
        ];
        for (status, (unschedulable, ready), phase, booted, expected) in rows {
            let mut fleet = Fleet::default();
            fleet.note_node(node(unschedulable, ready), Instant::now());
            fleet.note_node_os(node_os(phase, booted));
            fleet.image = Some(image(status.clone()));
            assert_eq!(fleet.stage("node-1"), expected, "{phase} with {status}");
        }
        assert_eq!(Fleet::default().stage("node-1"), Stage::Unknown);
    }

    #[test]
    fn time_down_is_that_of_cordoned_or_not_ready() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut fleet = Fleet::default();
        for (second, cordoned, ready) in
            [(0, false, true), (1, true, true), (3, true, false), (4, true, true), (6, false, true), (10, false, false)]
        {
            fleet.note_node(node(cordoned, ready), at(second));
        }
        assert_eq!(fleet.nodes["node-1"].down(at(12)), Duration::from_secs(7));
        fleet.begin();
        assert_eq!(fleet.nodes["node-1"].down(at(12)), Duration::ZERO);
    }

    #[test]
    fn the_lowest_number_of_available_replicas_is_remembered_over_a_new_list() {
        let pod = |uid: &str, ready: bool, leaving: bool| -> Box<Pod> {
            let ready = if ready { "True" } else { "False" };
            let leaves = leaving.then_some("2026-01-01T00:00:00Z");
            let pod = json!({
                "metadata": {"uid": uid, "deletionTimestamp": leaves},
                "status": {"conditions": [{"type": "Ready", "status": ready}]},
            });
            Box::new(serde_json::from_value(pod).unwrap())
        };
        let mut workload = Workload::default();
        workload.note(PodChange::Changed(pod("a", true, false)));
        workload.note(PodChange::Changed(pod("b", true, false)));
        assert_eq!((workload.available(), workload.lowest()), (2, None));
        workload.remember();
        workload.note(PodChange::ListBegins);
        workload.note(PodChange::Listed(pod("a", true, false)));
        workload.note(PodChange::Listed(pod("b", true, false)));
        workload.note(PodChange::ListEnds);
        assert_eq!(workload.lowest(), Some(2), "a list is taken as a whole");
        workload.note(PodChange::Changed(pod("a", true, true)));
        workload.note(PodChange::Gone(pod("a", true, true)));
        workload.note(PodChange::Changed(pod("c", false, false)));
        workload.note(PodChange::Changed(pod("c", true, false)));
        assert_eq!((workload.available(), workload.lowest()), (2, Some(1)));
    }
}
