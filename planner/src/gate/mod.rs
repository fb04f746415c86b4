//! What may hold a node back, one file per reason. A gate looks at plain values and says why not, or nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    fleet::NodeView,
    plan::{Hold, HoldReason},
};

pub mod budget;
pub mod control_plane;
pub mod health;
pub mod topology;
pub mod wave;
pub mod window;

/// Nodes that cannot take work now, or soon will not.
#[derive(Clone, Debug, Default)]
pub struct Down<'a> {
    /// In our slots.
    pub ours: BTreeSet<&'a str>,
    /// For other causes, with the cause.
    pub others: BTreeMap<&'a str, &'static str>,
}

impl<'a> Down<'a> {
    /// Sorts nodes into what is in slots and what is down without us.
    pub fn new(nodes: impl IntoIterator<Item = &'a NodeView>, slots: &BTreeSet<&'a str>) -> Self {
        let mut down = Down::default();
        for node in nodes.into_iter().filter(|n| n.exists) {
            let name = node.name.as_str();
            if slots.contains(name) {
                down.ours.insert(name);
            } else if !node.ready {
                down.others.insert(name, "not Ready");
            } else if node.unschedulable {
                down.others.insert(name, "cordoned");
            }
        }
        down
    }

    /// All but this node.
    pub fn beside(&self, node: &str) -> impl Iterator<Item = (&'a str, Option<&'static str>)> {
        let ours = self.ours.iter().map(|name| (*name, None));
        let others = self.others.iter().map(|(name, cause)| (*name, Some(*cause)));
        let node = node.to_owned();
        ours.chain(others).filter(move |(name, _)| *name != node)
    }
}

/// A hold of one node.
fn hold(node: &NodeView, reason: HoldReason, message: String) -> Hold {
    Hold { node: Some(node.name.clone()), reason, object: None, message }
}

/// A hold of the whole rollout.
pub fn whole(reason: HoldReason, message: String) -> Hold {
    Hold { node: None, reason, object: None, message }
}
