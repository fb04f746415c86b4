//! `rollout.maxUnavailable`: as many selected nodes as that may be down, whatever the cause.

use super::{Down, hold, whole};
use crate::{
    fleet::NodeView,
    plan::{Hold, HoldReason},
};

/// Names that are listed in a message.
const NAMED: usize = 3;

/// Holds a node while as many of the selected others are down as may be. `down` has selected nodes and slots only.
pub fn check(node: &NodeView, down: &Down<'_>, max: usize) -> Option<Hold> {
    let itself = down.others.contains_key(node.name.as_str());
    let others = down.others.len() - usize::from(itself);
    if down.ours.len() + others < max {
        return None;
    }
    let may = format!("{max} of the selected nodes may be unavailable at once (rollout.maxUnavailable)");
    if !down.ours.is_empty() {
        return Some(hold(node, HoldReason::BudgetSpent, format!("waits for its turn: {may}")));
    }
    let named = down.others.iter().filter(|(name, _)| **name != node.name).take(NAMED);
    let mut names: Vec<String> = named.map(|(name, cause)| format!("{name} ({cause})")).collect();
    if others > NAMED {
        names.push(format!("and {} more", others - NAMED));
    }
    Some(whole(HoldReason::NodesUnavailable, format!("{may}, and as many are, without us: {}", names.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeView {
        NodeView { name: name.into(), ..NodeView::default() }
    }

    #[test]
    fn what_is_down_counts_but_the_node_itself_does_not() {
        let down = |ours: &[&'static str], others: &[&'static str]| Down {
            ours: ours.iter().copied().collect(),
            others: others.iter().map(|n| (*n, "not Ready")).collect(),
        };
        for (fact, down, max, expected) in [
            ("nothing is down", down(&[], &[]), 1, None),
            ("one of ours", down(&["b"], &[]), 1, Some(HoldReason::BudgetSpent)),
            ("one of two", down(&["b"], &[]), 2, None),
            ("another is down", down(&[], &["b"]), 1, Some(HoldReason::NodesUnavailable)),
            ("only itself is down", down(&[], &["a"]), 1, None),
            ("itself and another", down(&[], &["a", "b"]), 1, Some(HoldReason::NodesUnavailable)),
            ("both kinds", down(&["b"], &["c"]), 2, Some(HoldReason::BudgetSpent)),
        ] {
            assert_eq!(check(&node("a"), &down, max).map(|h| h.reason), expected, "{fact}");
        }
        let many = down(&[], &["b", "c", "d", "e"]);
        assert!(check(&node("a"), &many, 2).unwrap().message.ends_with("d (not Ready), and 1 more"));
    }
}
