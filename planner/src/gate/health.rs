//! `rollout.gates`: a node is started only while monitoring says that it may be.

use osimage_crds::osimage::Gate;

use crate::{
    fleet::{GateFacts, GateState},
    plan::{Hold, HoldReason},
};

/// Every gate that is not open. One that has not been asked is not.
pub fn check(gates: &[Gate], facts: &[GateFacts]) -> Vec<Hold> {
    gates.iter().filter_map(|gate| held(&gate.name, facts)).collect()
}

fn held(name: &str, facts: &[GateFacts]) -> Option<Hold> {
    let (reason, message) = match facts.iter().find(|f| f.name == name).map(|f| &f.state) {
        Some(GateState::Open) => return None,
        Some(GateState::Closed(why)) => {
            (HoldReason::GateClosed, format!("gate {name} is closed, and no node is started: {why}"))
        }
        Some(GateState::Unknown(why)) => {
            (HoldReason::GateUnknown, format!("gate {name} cannot be asked, and no node is started: {why}"))
        }
        None => (HoldReason::GateUnknown, format!("gate {name} has not been asked yet")),
    };
    Some(Hold { node: None, reason, object: Some(format!("Gate {name}")), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_holds_unless_it_is_known_to_be_open() {
        let gate = |name: &str| Gate { name: name.into(), prometheus: None, alertmanager: None };
        let closed = || GateState::Closed("firing: NodeDown".into());
        let unknown = || GateState::Unknown("no answer".into());
        let rows = [
            ("no gates", vec![], vec![], vec![]),
            ("open", vec!["a"], vec![("a", GateState::Open)], vec![]),
            ("closed", vec!["a"], vec![("a", closed())], vec![(HoldReason::GateClosed, "firing: NodeDown")]),
            ("cannot be asked", vec!["a"], vec![("a", unknown())], vec![(HoldReason::GateUnknown, "no answer")]),
            ("not asked", vec!["a"], vec![], vec![(HoldReason::GateUnknown, "has not been asked")]),
            (
                "only another one is open",
                vec!["a"],
                vec![("b", GateState::Open)],
                vec![(HoldReason::GateUnknown, "has not been asked")],
            ),
            (
                "one of three is open",
                vec!["a", "b", "c"],
                vec![("c", unknown()), ("b", GateState::Open), ("a", closed())],
                vec![(HoldReason::GateClosed, "gate a"), (HoldReason::GateUnknown, "gate c")],
            ),
            ("one that is not in the spec any more", vec![], vec![("a", closed())], vec![]),
        ];
        for (fact, gates, facts, expected) in rows {
            let gates: Vec<Gate> = gates.into_iter().map(gate).collect();
            let facts: Vec<GateFacts> =
                facts.into_iter().map(|(name, state)| GateFacts { name: name.into(), state }).collect();
            let holds = check(&gates, &facts);
            assert_eq!(holds.len(), expected.len(), "{fact}: {holds:?}");
            for (hold, (reason, text)) in holds.iter().zip(expected) {
                assert!(hold.reason == reason && hold.message.contains(text), "{fact}: {hold:?}");
                assert!(hold.node.is_none() && hold.reason.blocks(), "{fact}");
            }
        }
    }
}
