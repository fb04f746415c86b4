//! `rollout.topologyKey`: nodes of two different values are never down at once because of us.

use std::collections::BTreeMap;

use super::{Down, hold};
use crate::{
    fleet::NodeView,
    plan::{Hold, HoldReason},
};

/// The value of a node; nodes without the label are a group of their own.
pub fn value<'a>(node: &'a NodeView, key: &str) -> &'a str {
    node.labels.get(key).map_or("", String::as_str)
}

/// Holds a node while a node of another value is down.
pub fn check(node: &NodeView, key: &str, down: &Down<'_>, nodes: &BTreeMap<String, NodeView>) -> Option<Hold> {
    let own = value(node, key);
    let other = down.beside(&node.name).find_map(|(name, cause)| {
        let value = value(nodes.get(name)?, key);
        (value != own).then_some((name, cause, value))
    })?;
    let (name, cause, value) = other;
    let why = cause.map_or_else(|| "is being updated".to_owned(), |cause| format!("is {cause}"));
    let message =
        format!("waits: {name} in {key}={value} {why}, and this node is in {key}={own} (rollout.topologyKey)");
    Some(hold(node, HoldReason::TopologyBusy, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "zone";

    fn node(name: &str, zone: Option<&str>) -> NodeView {
        let labels = zone.map(|z| (KEY.to_owned(), z.to_owned())).into_iter().collect();
        NodeView { name: name.into(), labels, ..NodeView::default() }
    }

    #[test]
    fn only_one_value_is_down_at_once() {
        let all = [node("a", Some("1")), node("b", Some("1")), node("c", Some("2")), node("d", None), node("e", None)];
        let nodes: BTreeMap<String, NodeView> = all.into_iter().map(|n| (n.name.clone(), n)).collect();
        for (fact, ours, others, candidate, held) in [
            ("nothing is down", vec![], vec![], "a", false),
            ("the same value", vec!["b"], vec![], "a", false),
            ("another value", vec!["c"], vec![], "a", true),
            ("another value, without us", vec![], vec!["c"], "a", true),
            ("itself", vec![], vec!["a"], "a", false),
            ("without the label", vec!["d"], vec![], "e", false),
            ("with and without", vec!["d"], vec![], "a", true),
        ] {
            let others = others.into_iter().map(|n| (n, "cordoned")).collect();
            let down = Down { ours: ours.into_iter().collect(), others };
            assert_eq!(check(&nodes[candidate], KEY, &down, &nodes).is_some(), held, "{fact}");
        }
    }
}
