//! Scenarios as data: each file in `scenarios/` is a promise, a fleet in short, and the plan that follows from it as text.
//! `UPDATE=1 cargo test -p osimage-planner --test scenarios` writes the plans anew; read the difference before you keep it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::disallowed_methods)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
};

use k8s_openapi::jiff::Timestamp;
use osimage_crds::{NodeOS, OSImage, OSImageStatus, names};
use osimage_planner::{
    Fleet, NodeView, Plan, Step,
    fleet::{BudgetFacts, PodFacts},
    rollout,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// One file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Scenario {
    /// What is promised.
    promise: String,
    /// The time of the pass.
    #[serde(default = "noon")]
    now: Timestamp,
    /// What the OSImage's spec has beside the image, an object that replaces parts of it.
    #[serde(default)]
    spec: Value,
    /// Its annotations.
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    /// Its status, as the last pass left it.
    #[serde(default)]
    status: Value,
    /// The nodes: by default Ready, on commit 1, and holding commit 2, which is wanted.
    nodes: BTreeMap<String, Node>,
    /// The plan, as text.
    #[serde(default)]
    plan: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Node {
    /// It runs the wanted commit.
    updated: bool,
    /// It has not downloaded the wanted commit.
    not_pulled: bool,
    not_ready: bool,
    /// By whom; `us` is this OSImage.
    cordoned_by: Option<String>,
    labels: BTreeMap<String, String>,
    /// Pods, by name, with the number of disruptions that their budget allows.
    pods: BTreeMap<String, Option<i32>>,
    /// The running boot.
    boot: Option<String>,
    /// The last attempt, as the daemon tells it.
    attempt: Option<Value>,
}

const UID: &str = "0a1b2c3d-1111";

fn noon() -> Timestamp {
    "2026-03-10T12:00:00Z".parse().unwrap()
}

fn commit(digit: char) -> String {
    digit.to_string().repeat(64)
}

/// Lays an object over another.
fn lay_over(below: &mut Value, above: &Value) {
    match (below, above) {
        (Value::Object(below), Value::Object(above)) => {
            above.iter().for_each(|(key, value)| lay_over(below.entry(key).or_insert(Value::Null), value));
        }
        (_, Value::Null) => {}
        (below, above) => *below = above.clone(),
    }
}

impl Scenario {
    fn fleet(&self) -> Fleet {
        let verification = json!({ "insecureSkip": true });
        let wanted = json!({ "ostree": { "url": "http://r", "commit": commit('2'), "verification": verification } });
        let mut spec = json!({ "image": wanted, "nodeSelector": {} });
        lay_over(&mut spec, &self.spec);
        let metadata = json!({
            "name": "fleet", "uid": UID, "generation": 1, "finalizers": [names::FINALIZER], "annotations": self.annotations,
        });
        let object = json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "OSImage", "metadata": metadata, "spec": spec,
        });
        let mut image: OSImage = serde_json::from_value(object).expect("spec");
        let mut status = serde_json::to_value(OSImageStatus::default()).unwrap();
        lay_over(&mut status, &self.status);
        image.status = Some(serde_json::from_value(status).expect("status"));
        let view = |(name, node): (&String, &Node)| (name.clone(), node.view(name, &image));
        Fleet {
            nodes: self.nodes.iter().map(view).collect(),
            existing_images: BTreeSet::from([UID.to_owned()]),
            operator_node: None,
            refuges: self.nodes.keys().cloned().collect(),
            refusals: BTreeMap::new(),
            gates: vec![],
            image,
        }
    }
}

impl Node {
    fn view(&self, name: &str, image: &OSImage) -> NodeView {
        let boot = self.boot.clone().unwrap_or_else(|| "boot-1".into());
        let mut wanted = image.spec.image.clone();
        wanted.ostree.remote = Some("fleet".into());
        let object = json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "NodeOS",
            "metadata": { "name": name, "generation": 1 },
            "spec": {
                "osImage": { "name": "fleet", "uid": UID }, "image": wanted, "mayPull": true, "health": image.spec.health,
            },
            "status": {
                "observedGeneration": 1, "phase": "Pulled", "message": "m", "bootID": boot,
                "booted": { "commit": commit(if self.updated { '2' } else { '1' }) },
                "pulled": (!self.not_pulled).then(|| commit('2')),
                "lastAttempt": self.attempt,
            },
        });
        let node_os: NodeOS = serde_json::from_value(object).expect("node");
        let pod = |(pod, allowed): (&String, &Option<i32>)| PodFacts {
            namespace: "web".into(),
            name: pod.clone(),
            uid: pod.clone(),
            ready: true,
            budgets: allowed
                .iter()
                .map(|allowed| BudgetFacts { name: "pdb".into(), allowed: *allowed, lets_unready: false })
                .collect(),
            ..PodFacts::default()
        };
        NodeView {
            name: name.into(),
            exists: true,
            selected: true,
            labels: self.labels.clone(),
            ready: !self.not_ready,
            unschedulable: self.cordoned_by.is_some(),
            cordoned_by: self.cordoned_by.as_ref().filter(|by| *by == "us").map(|_| format!("fleet@{UID}")),
            boot_id: boot,
            node_os: Some(node_os),
            pods: Some(self.pods.iter().map(pod).collect()),
            ..NodeView::default()
        }
    }
}

/// What a person would want to know of a plan, in stable lines.
fn text(plan: &Plan) -> String {
    let mut out = String::new();
    let status = &plan.status;
    let phase = status.phase.map(|p| format!("{p:?}")).unwrap_or_default();
    writeln!(out, "says {phase}, {}: {}", status.progress, status.message).unwrap();
    for slot in &status.slots {
        let state = match (slot.outcome, &slot.withdrawn, &slot.permitted) {
            (Some(outcome), _, _) => format!("{outcome:?}"),
            (None, Some(_), _) => "withdrawn".into(),
            (None, None, Some(_)) => "permitted".into(),
            (None, None, None) => "to be drained".into(),
        };
        writeln!(out, "slot {}: {state}", slot.node).unwrap();
    }
    for rejected in &status.rejected {
        writeln!(out, "rejected {}: {}", rejected.commit.short(), rejected.message).unwrap();
    }
    for step in &plan.steps {
        writeln!(out, "step {}", step_text(step)).unwrap();
    }
    let mut holds: Vec<String> = plan
        .holds
        .iter()
        .map(|h| format!("hold {} {}: {}", h.node.as_deref().unwrap_or("all"), h.reason.as_str(), h.message))
        .collect();
    holds.sort();
    holds.iter().for_each(|hold| writeln!(out, "{hold}").unwrap());
    if let Some(wake) = plan.wake {
        writeln!(out, "looks again in {} s", wake.as_secs()).unwrap();
    }
    out
}

fn step_text(step: &Step) -> String {
    let named = |object: &NodeOS| object.metadata.name.clone().unwrap_or_default();
    match step {
        Step::AddFinalizer => "add the finalizer".into(),
        Step::RemoveFinalizer => "remove the finalizer".into(),
        Step::CreateNodeOS(object) => format!("create NodeOS {}", named(object)),
        Step::UpdateNodeOS { object, change } => format!("{change:?} NodeOS {}", named(object)),
        Step::DeleteNodeOS(object) => format!("delete NodeOS {}", named(object)),
        Step::Cordon { node, .. } => format!("cordon {node}"),
        Step::Uncordon { node, .. } => format!("uncordon {node}"),
        Step::Delete { node, pods, .. } => format!("delete {} pods of {node}", pods.len()),
        Step::Evict { node, pods, .. } => format!("evict {} pods of {node}", pods.len()),
    }
}

/// The file with another plan; everything before it is kept as it was written.
fn with_plan(file: &str, plan: &str) -> String {
    let kept = file.find("\nplan: |").map_or(file, |at| &file[..=at]);
    let lines: String = plan.lines().map(|line| format!("  {line}\n")).collect();
    format!("{}\nplan: |\n{lines}", kept.trim_end())
}

#[test]
fn every_promise_is_kept() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut broken = vec![];
    for path in &paths {
        let file = std::fs::read_to_string(path).unwrap();
        let scenario: Scenario = serde_saphyr::from_str(&file).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let plan = text(&rollout::plan(&scenario.fleet(), scenario.now));
        if plan.trim_end() == scenario.plan.trim_end() {
            continue;
        }
        match std::env::var_os("UPDATE") {
            Some(_) => std::fs::write(path, with_plan(&file, &plan)).unwrap(),
            None => broken.push(format!("{}: {}\n{plan}", path.display(), scenario.promise)),
        }
    }
    assert!(paths.len() >= 10, "there are {} scenarios", paths.len());
    assert!(broken.is_empty(), "{}\nUPDATE=1 writes them anew", broken.join("\n"));
}
