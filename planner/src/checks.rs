//! Health checks that only the cluster can make: pods of a node Ready, a condition of its Node. They hold back the
//! acknowledgement of a node whose host is healthy. Called for nodes on trial alone.

use kube::core::{Selector, SelectorExt};
use osimage_crds::osimage::{Check, NodeConditionCheck, PodsReadyCheck};

use crate::fleet::{NodeView, PodFacts};

/// What the checks of the cluster say of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All hold.
    Holds,
    /// One asks for pods, and they are not known in this pass.
    PodsNotListed,
    /// These do not hold, in the order of the spec.
    Fails(Vec<Failing>),
}

/// One check that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failing {
    /// The object that it failed on, as `Kind namespace/name`.
    pub object: String,
    /// Which check, and why.
    pub message: String,
}

/// Whether one of the checks needs the pods of a node.
pub fn ask_for_pods(checks: &[Check]) -> bool {
    checks.iter().any(|c| c.pods_ready.is_some())
}

/// Makes the checks of the cluster, and leaves out those of the host.
pub fn verdict(node: &NodeView, checks: &[Check]) -> Verdict {
    if ask_for_pods(checks) && node.pods.is_none() {
        return Verdict::PodsNotListed;
    }
    let failing: Vec<Failing> = checks.iter().filter_map(|check| fails(node, check)).collect();
    if failing.is_empty() { Verdict::Holds } else { Verdict::Fails(failing) }
}

fn fails(node: &NodeView, check: &Check) -> Option<Failing> {
    let Check { name, exec: _, systemd_unit: _, http: _, pods_ready, node_condition } = check;
    let pods = pods_ready.as_ref().and_then(|c| pods_fail(node, c));
    let (object, why) = pods.or_else(|| condition_fails(node, node_condition.as_ref()?))?;
    Some(Failing { object, message: format!("check {name}: {why}") })
}

fn pods_fail(node: &NodeView, check: &PodsReadyCheck) -> Option<(String, String)> {
    let this = format!("Node {}", node.name);
    let Ok(selector) = Selector::try_from(check.selector.clone()) else {
        return Some((this, "its selector cannot be understood".into()));
    };
    let there = |pod: &&PodFacts| {
        let namespace = check.namespace.as_ref().is_none_or(|namespace| *namespace == pod.namespace);
        namespace && !pod.finished && !pod.terminating && selector.matches(&pod.labels)
    };
    let mut pods: Vec<&PodFacts> = node.pods.iter().flatten().filter(there).collect();
    if pods.is_empty() {
        let whose = check.namespace.as_ref().map_or_else(String::new, |namespace| format!(" of namespace {namespace}"));
        return Some((this, format!("no pod{whose} on the node matches its selector")));
    }
    pods.retain(|pod| !pod.ready);
    pods.sort_by_key(|pod| (&pod.namespace, &pod.name));
    let first = pods.first()?;
    let others = match pods.len() - 1 {
        0 => String::new(),
        n => format!(", nor are {n} others"),
    };
    Some((first.to_string(), format!("{first} is not Ready{others}")))
}

fn condition_fails(node: &NodeView, check: &NodeConditionCheck) -> Option<(String, String)> {
    let NodeConditionCheck { type_, status } = check;
    let wanted = status.as_str();
    let why = match node.conditions.get(type_) {
        Some(is) if is == wanted => return None,
        Some(is) => format!("condition {type_} of Node {} is {is}, not {wanted}", node.name),
        None => format!("Node {} has no condition {type_}", node.name),
    };
    Some((format!("Node {}", node.name), why))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn check(what: serde_json::Value) -> Check {
        let mut check = json!({"name": "c"});
        check.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        serde_json::from_value(check).unwrap()
    }

    fn pod(namespace: &str, name: &str, ready: bool) -> PodFacts {
        let labels = BTreeMap::from([("app".into(), "cni".into())]);
        PodFacts { namespace: namespace.into(), name: name.into(), ready, labels, ..PodFacts::default() }
    }

    fn node(pods: Vec<PodFacts>) -> NodeView {
        let conditions = BTreeMap::from([("Ready".into(), "True".into()), ("Odd".into(), "Unknown".into())]);
        NodeView { name: "n".into(), pods: Some(pods), conditions, ..NodeView::default() }
    }

    #[test]
    fn pods_of_a_selector_are_there_and_ready() {
        let other = PodFacts { labels: BTreeMap::new(), ..pod("kube-system", "other", false) };
        let ready = || pod("kube-system", "cni-1", true);
        let cni = json!({"podsReady": {"namespace": "kube-system", "selector": {"matchLabels": {"app": "cni"}}}});
        let everywhere = json!({"podsReady": {"selector": {"matchLabels": {"app": "cni"}}}});
        let rows = [
            ("one that is Ready, and one of others", &cni, vec![ready(), other.clone()], None),
            ("none at all", &cni, vec![], Some("Node n: check c: no pod of namespace kube-system on the node matches")),
            ("only others", &everywhere, vec![other], Some("Node n: check c: no pod on the node matches")),
            ("in another namespace", &cni, vec![pod("x", "cni-1", true)], Some("Node n: check c: no pod of namespace")),
            (
                "in any namespace",
                &everywhere,
                vec![ready(), pod("x", "cni-2", false)],
                Some("Pod x/cni-2: check c: Pod x/cni-2 is not Ready"),
            ),
            (
                "two are not Ready",
                &everywhere,
                vec![pod("b", "b", false), pod("a", "a", false), ready()],
                Some("Pod a/a: check c: Pod a/a is not Ready, nor are 1 others"),
            ),
            (
                "finished ones do not matter",
                &cni,
                vec![ready(), PodFacts { finished: true, ..pod("kube-system", "job", false) }],
                None,
            ),
            (
                "leaving ones do not matter",
                &cni,
                vec![ready(), PodFacts { terminating: true, ..pod("kube-system", "old", false) }],
                None,
            ),
            (
                "only one that leaves",
                &cni,
                vec![PodFacts { terminating: true, ..ready() }],
                Some("Node n: check c: no pod of namespace kube-system on the node matches"),
            ),
        ];
        for (fact, what, pods, expected) in rows {
            said(fact, &node(pods), what, expected);
        }
        let unknown = NodeView { pods: None, ..node(vec![]) };
        assert_eq!(verdict(&unknown, &[check(cni)]), Verdict::PodsNotListed);
    }

    #[test]
    fn a_condition_has_its_status() {
        let rows = [
            ("as wanted", "Ready", "True", None),
            ("wanted to be unknown", "Odd", "Unknown", None),
            ("otherwise", "Odd", "False", Some("Node n: check c: condition Odd of Node n is Unknown, not False")),
            ("absent", "None", "Unknown", Some("Node n: check c: Node n has no condition None")),
        ];
        for (fact, type_, status, expected) in rows {
            said(fact, &node(vec![]), &json!({"nodeCondition": {"type": type_, "status": status}}), expected);
        }
    }

    #[test]
    fn checks_of_the_host_are_its_own_affair() {
        let host = check(json!({"systemdUnit": {"unit": "kubelet.service"}}));
        let unlisted = NodeView { pods: None, ..node(vec![]) };
        assert_eq!(verdict(&unlisted, &[host]), Verdict::Holds);
    }

    fn said(fact: &str, node: &NodeView, what: &serde_json::Value, expected: Option<&str>) {
        let said = match verdict(node, &[check(what.clone())]) {
            Verdict::Holds => None,
            Verdict::PodsNotListed => Some("not listed".to_owned()),
            Verdict::Fails(failing) => Some(format!("{}: {}", failing[0].object, failing[0].message)),
        };
        let matches = match (expected, &said) {
            (Some(expected), Some(said)) => said.starts_with(expected),
            (expected, said) => expected.is_none() && said.is_none(),
        };
        assert!(matches, "{fact}: {said:?}");
    }
}
