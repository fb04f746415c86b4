//! A large fleet in the middle of a rollout: half of it is updated, some nodes are in slots, some failed, some download.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use osimage_crds::{
    AttemptId, Commit, NodeOS, NodeOSSpec, NodeOSStatus, OSImage, OSImageSpec, OSImageStatus, Period, names,
    nodeos::{Deployment, OSImageRef, Outcome},
    osimage::{Drain, Failure, Health, Image, OSTreeImage, Reboot, Rollout, Slot, Verification},
};
use osimage_planner::{Fleet, NodeView};

/// Now, in this fleet.
pub const NOW: Timestamp = Timestamp::constant(1_800_000_000, 0);

const UID: &str = "0a1b2c3d-1111";

fn commit(digit: char) -> Commit {
    digit.to_string().repeat(64).parse().unwrap()
}

/// A fleet of so many nodes, where `budget` of them may be down, and as many are in slots.
pub fn fleet(nodes: usize, budget: IntOrString) -> Fleet {
    let slots = osimage_planner::rollout::resolve(&budget, nodes);
    let mut image = image(budget);
    let nodes: Vec<NodeView> = (0..nodes).map(|i| node(&image, i, nodes)).collect();
    let (slots, failures) = (nodes.iter().skip(nodes.len() / 2).take(slots), nodes.iter().rev().take(5));
    image.status = Some(OSImageStatus {
        attempts: i64::try_from(nodes.len()).unwrap(),
        slots: slots.map(slot).collect(),
        failures: failures.map(failure).collect(),
        ..OSImageStatus::default()
    });
    Fleet {
        image,
        existing_images: BTreeSet::from([UID.to_owned()]),
        nodes: nodes.into_iter().map(|n| (n.name.clone(), n)).collect(),
        operator_node: None,
        refuges: BTreeSet::new(),
        refusals: BTreeMap::new(),
        gates: vec![],
    }
}

fn image(budget: IntOrString) -> OSImage {
    let verification = Verification { gpg: None, insecure_skip: Some(true) };
    let url = "http://repo.example.org/os".into();
    let ostree = OSTreeImage { url, remote: None, ref_: None, commit: commit('2'), verification };
    let mut image = OSImage::new(
        "fleet",
        OSImageSpec {
            image: Image { ostree },
            node_selector: LabelSelector::default(),
            rollout: Rollout {
                max_unavailable: budget,
                failure_budget: IntOrString::Int(10),
                topology_key: Some("zone".into()),
                ..Rollout::default()
            },
            drain: Drain::default(),
            reboot: Reboot { timeout: Period::seconds(600) },
            health: Health { deadline: Period::seconds(600), soak: Period::seconds(30), checks: vec![] },
        },
    );
    image.metadata = ObjectMeta {
        name: Some("fleet".into()),
        uid: Some(UID.into()),
        generation: Some(3),
        finalizers: Some(vec![names::FINALIZER.into()]),
        ..ObjectMeta::default()
    };
    image
}

fn node(image: &OSImage, number: usize, of: usize) -> NodeView {
    let name = format!("node-{number:05}.rack-{}.example.org", number % 40);
    let mut wanted = image.spec.image.clone();
    wanted.ostree.remote = Some("fleet".into());
    let spec = NodeOSSpec {
        os_image: OSImageRef { name: "fleet".into(), uid: UID.into() },
        image: Some(wanted),
        may_pull: true,
        health: image.spec.health.clone(),
        permit: None,
        retry: None,
        released: None,
    };
    let mut node_os = NodeOS::new(&name, spec);
    node_os.metadata.generation = Some(1);
    let updated = number < of / 2;
    let boot_id = format!("boot-{number}");
    node_os.status = Some(NodeOSStatus {
        observed_generation: Some(1),
        boot_id: Some(boot_id.clone()),
        booted: Some(Deployment { commit: commit(if updated { '2' } else { '1' }), version: None, pinned: false }),
        pulled: (!number.is_multiple_of(3) || updated).then(|| commit('2')),
        message: "holds 222222222222 and waits for its turn".into(),
        ..NodeOSStatus::default()
    });
    NodeView {
        labels: BTreeMap::from([("zone".to_owned(), format!("z{}", number * 3 / of))]),
        exists: true,
        selected: true,
        // Here and there one is down by itself, and its message is long.
        ready: number % 1000 != 999,
        boot_id,
        node_os: Some(node_os),
        name,
        ..NodeView::default()
    }
}

fn slot(node: &NodeView) -> Slot {
    serde_json::from_value(serde_json::json!({
        "node": node.name,
        "attempt": node.boot_id.replace("boot", "0a1b2c3d"),
        "commit": commit('2'),
        "bootID": node.boot_id,
        "since": Time(NOW),
        "permitted": Time(NOW),
    }))
    .unwrap()
}

fn failure(node: &NodeView) -> Failure {
    Failure {
        node: node.name.clone(),
        attempt: AttemptId("0a1b2c3d-7".into()),
        commit: commit('2'),
        outcome: Outcome::RolledBack,
        message: "health checks failed until the deadline of 600s: ".repeat(20),
        time: Time(NOW),
    }
}
