//! The status of a large fleet is an object that etcd, caches and people can still carry.
#![allow(clippy::unwrap_used)]

mod large;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use osimage_crds::osimage::Rollout;
use osimage_planner::{Fleet, rollout};

const NODES: usize = 5_000;
const MOST: usize = 64 * 1024;

fn size(fleet: &Fleet) -> usize {
    serde_json::to_vec(&rollout::plan(fleet, large::NOW).status).unwrap().len()
}

#[test]
fn the_status_of_5000_nodes_is_small() {
    let mut silent = large::fleet(NODES, Rollout::default().max_unavailable);
    for node in silent.nodes.values_mut() {
        node.node_os.as_mut().unwrap().metadata.generation = Some(9);
        node.ready = false;
    }
    for (fact, fleet) in [
        ("the default budget", large::fleet(NODES, Rollout::default().max_unavailable)),
        ("slots for 2 %", large::fleet(NODES, IntOrString::String("2%".into()))),
        ("every node is silent and not Ready", silent),
    ] {
        let size = size(&fleet);
        println!("{fact}: {size} bytes");
        assert!(size < MOST, "{fact}: {size} bytes");
    }
}
