//! Control plane nodes go one at a time, and only while all others of them are Ready: etcd needs its majority.

use osimage_crds::names::CONTROL_PLANE_LABEL;

use super::{Down, hold};
use crate::{
    fleet::{Fleet, NodeView},
    plan::{Hold, HoldReason},
};

/// Whether this is a control plane node.
pub fn is(node: &NodeView) -> bool {
    node.labels.contains_key(CONTROL_PLANE_LABEL)
}

/// Holds a control plane node while another one is down. `down` has all nodes of the fleet, selected or not.
pub fn check(node: &NodeView, down: &Down<'_>, fleet: &Fleet) -> Option<Hold> {
    if !is(node) {
        return None;
    }
    let mut beside = down.beside(&node.name);
    let (name, cause) = beside.find(|(name, _)| fleet.nodes.get(*name).is_some_and(is))?;
    let why = cause.unwrap_or("being updated");
    Some(hold(
        node,
        HoldReason::ControlPlaneBusy,
        format!("waits: control plane node {name} is {why}, and they go one at a time"),
    ))
}
