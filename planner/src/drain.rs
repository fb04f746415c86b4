//! Which pods of a node to evict now, which are waited for, and which block. One bounded round per pass;
//! nothing is remembered between passes.

use std::collections::BTreeMap;

use kube::core::{Selector, SelectorExt};
use osimage_crds::osimage::Drain;

use crate::{
    fleet::{BudgetFacts, PodFacts},
    plan::{Hold, HoldReason, PodRef},
};

/// Evictions in one pass, at most: a round stays short, and the API server is not flooded.
const EVICTIONS_A_PASS: usize = 20;

/// What a drain looks like now.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Evict these.
    pub evict: Vec<PodRef>,
    /// Evicted, or deleted by somebody; still stopping.
    pub stopping: Vec<String>,
    /// Evictable, but not now, and why.
    pub blocked: Vec<Hold>,
    /// Tried again in this pass, although the API server refused them in the last one.
    pub refused: Vec<Hold>,
    /// Evictable in a later pass.
    pub later: usize,
}

impl Verdict {
    /// Whether nothing is left that has to go.
    pub fn done(&self) -> bool {
        let Verdict { evict, stopping, blocked, refused: _, later } = self;
        evict.is_empty() && stopping.is_empty() && blocked.is_empty() && *later == 0
    }
}

/// Looks at the pods of a node. Pods of DaemonSets, mirrors of static pods and finished pods are left alone.
/// A budget that allows n disruptions lets n pods go in this pass.
pub fn assess(node: &str, pods: &[PodFacts], policy: &Drain, refusals: &BTreeMap<String, String>) -> Verdict {
    let mut verdict = Verdict::default();
    let mut allowed: BTreeMap<(&str, &str), i32> = BTreeMap::new();
    for pod in pods.iter().filter(|p| has_to_go(p, policy)) {
        if pod.terminating {
            verdict.stopping.push(pod.to_string());
            continue;
        }
        for budget in &pod.budgets {
            allowed.entry((&pod.namespace, &budget.name)).or_insert(budget.allowed);
        }
        let allows = |b: &BudgetFacts| allowed.get(&(pod.namespace.as_str(), b.name.as_str())).copied().unwrap_or(0);
        let left = |b: &BudgetFacts| if lets_go(pod, b) { 1 } else { allows(b) };
        if let Some(hold) = block(node, pod, policy, left) {
            verdict.blocked.push(hold);
            continue;
        }
        if verdict.evict.len() == EVICTIONS_A_PASS {
            verdict.later += 1;
            continue;
        }
        for budget in pod.budgets.iter().filter(|b| !lets_go(pod, b)) {
            if let Some(left) = allowed.get_mut(&(pod.namespace.as_str(), budget.name.as_str())) {
                *left -= 1;
            }
        }
        if let Some(refusal) = refusals.get(&pod.uid) {
            let message = format!("the API server refused to evict {pod}: {refusal}");
            verdict.refused.push(hold(node, pod.to_string(), message));
        }
        verdict.evict.push(PodRef::from(pod));
    }
    verdict
}

/// Whether a node could be emptied at all as things are: what makes no sense to begin is not begun. Budgets
/// that allow some, if not all, are fine: the rest follows as replacements become ready.
pub fn precheck(node: &str, pods: &[PodFacts], policy: &Drain) -> Option<Hold> {
    let movable = pods.iter().filter(|p| has_to_go(p, policy) && !p.terminating);
    let left = |pod: &PodFacts, budget: &BudgetFacts| if lets_go(pod, budget) { 1 } else { budget.allowed };
    movable.filter_map(|pod| block(node, pod, policy, |budget| left(pod, budget))).next()
}

/// What is left on a node past its deadline, for deletion: all that has to go and does not go yet.
pub fn remains(pods: &[PodFacts], policy: &Drain) -> Vec<PodRef> {
    let left = pods.iter().filter(|p| has_to_go(p, policy) && !p.terminating);
    left.map(PodRef::from).collect()
}

fn has_to_go(pod: &PodFacts, policy: &Drain) -> bool {
    let stays = pod.daemon_set || pod.mirror || pod.finished || policy.skip;
    let chosen = policy.pod_selector.as_ref().is_none_or(|selector| {
        // One that cannot be parsed is refused at admission; to empty more is the safe side.
        Selector::try_from(selector.clone()).map_or(true, |s| s.matches(&pod.labels))
    });
    !stays && chosen
}

/// Whether a budget that allows no disruption lets this pod go, because it is not Ready anyway.
fn lets_go(pod: &PodFacts, budget: &BudgetFacts) -> bool {
    !pod.ready && budget.lets_unready
}

impl From<&PodFacts> for PodRef {
    fn from(pod: &PodFacts) -> Self {
        PodRef { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
    }
}

fn hold(node: &str, object: String, message: String) -> Hold {
    Hold { node: Some(node.into()), reason: HoldReason::DrainBlocked, object: Some(object), message }
}

/// Why a pod cannot be evicted now: the object that blocks, and what would end it.
fn block(node: &str, pod: &PodFacts, policy: &Drain, left: impl Fn(&BudgetFacts) -> i32) -> Option<Hold> {
    if pod.empty_dir && !policy.delete_empty_dir_data {
        let message = format!(
            "{pod} uses an emptyDir volume, whose content an eviction deletes: set drain.deleteEmptyDirData, or move the pod"
        );
        return Some(hold(node, pod.to_string(), message));
    }
    if pod.unmanaged && !policy.delete_unmanaged_pods {
        let message = format!(
            "{pod} has no controller that would make it again: set drain.deleteUnmanagedPods, or delete the pod"
        );
        return Some(hold(node, pod.to_string(), message));
    }
    if pod.budgets.len() > 1 {
        let budgets: Vec<&str> = pod.budgets.iter().map(|b| b.name.as_str()).collect();
        let message = format!(
            "{pod} is selected by {} PodDisruptionBudgets ({}), and the API server refuses to evict such a pod: let one select it",
            budgets.len(),
            budgets.join(", ")
        );
        return Some(hold(node, pod.to_string(), message));
    }
    let budget = pod.budgets.iter().find(|b| left(b) <= 0)?;
    let object = format!("PodDisruptionBudget {}/{}", pod.namespace, budget.name);
    let message = format!(
        "{object} allows no disruption now, so {pod} cannot be evicted: wait for its pods to be ready, add replicas, or relax it"
    );
    Some(hold(node, object, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> PodFacts {
        PodFacts { namespace: "web".into(), name: name.into(), uid: format!("uid-{name}"), ..PodFacts::default() }
    }

    fn guarded(name: &str, allowed: i32) -> PodFacts {
        PodFacts { budgets: vec![BudgetFacts { name: "pdb".into(), allowed, lets_unready: false }], ..pod(name) }
    }

    fn names(verdict: &Verdict) -> Vec<&str> {
        verdict.evict.iter().map(|p| p.name.as_str()).collect()
    }

    #[test]
    fn pods_that_stay_with_the_node_are_left_alone() {
        let pods = [
            PodFacts { daemon_set: true, ..pod("a") },
            PodFacts { mirror: true, ..pod("b") },
            PodFacts { finished: true, ..pod("c") },
        ];
        assert!(assess("n", &pods, &Drain::default(), &BTreeMap::new()).done());
    }

    #[test]
    fn a_stopping_pod_is_waited_for() {
        let verdict = assess("n", &[PodFacts { terminating: true, ..pod("a") }], &Drain::default(), &BTreeMap::new());
        assert!(!verdict.done() && verdict.evict.is_empty() && verdict.blocked.is_empty());
        assert_eq!(verdict.stopping, ["Pod web/a"]);
    }

    #[test]
    fn a_budget_lets_as_many_go_as_it_allows() {
        let pods = [guarded("a", 1), guarded("b", 1), pod("c")];
        let verdict = assess("n", &pods, &Drain::default(), &BTreeMap::new());
        assert_eq!(names(&verdict), ["a", "c"]);
        assert_eq!(verdict.blocked[0].object.as_deref(), Some("PodDisruptionBudget web/pdb"));
        assert!(verdict.blocked[0].message.contains("Pod web/b"));
        assert_eq!(precheck("n", &pods, &Drain::default()), None, "one may go, the rest follows");
    }

    #[test]
    fn a_budget_that_allows_nothing_is_named_before_the_node_is_touched() {
        let hold = precheck("n", &[guarded("a", 0), pod("b")], &Drain::default()).unwrap();
        assert_eq!(hold.reason, HoldReason::DrainBlocked);
        assert!(
            hold.message.contains("PodDisruptionBudget web/pdb") && hold.message.contains("Pod web/a"),
            "{}",
            hold.message
        );
    }

    #[test]
    fn data_and_bare_pods_block_until_the_policy_lets_them_go() {
        let pods = [PodFacts { empty_dir: true, ..pod("a") }, PodFacts { unmanaged: true, ..pod("b") }];
        let verdict = assess("n", &pods, &Drain::default(), &BTreeMap::new());
        assert_eq!(verdict.blocked.len(), 2);
        assert!(verdict.blocked[0].message.contains("drain.deleteEmptyDirData"));
        assert!(verdict.blocked[1].message.contains("drain.deleteUnmanagedPods"));
        let policy = Drain { delete_empty_dir_data: true, delete_unmanaged_pods: true, ..Drain::default() };
        assert_eq!(names(&assess("n", &pods, &policy, &BTreeMap::new())), ["a", "b"]);
    }

    #[test]
    fn a_pod_that_is_not_ready_goes_where_its_budget_lets_it() {
        let row = |ready, lets_unready| {
            let budgets = vec![BudgetFacts { name: "pdb".into(), allowed: 0, lets_unready }];
            assess("n", &[PodFacts { ready, budgets, ..pod("a") }], &Drain::default(), &BTreeMap::new()).evict.len()
        };
        assert_eq!((row(true, true), row(false, false), row(false, true)), (0, 0, 1));
    }

    #[test]
    fn a_policy_may_choose_pods_or_leave_all() {
        let labelled = PodFacts { labels: BTreeMap::from([("app".into(), "db".into())]), ..pod("db") };
        let pods = [labelled, pod("web")];
        let selector = serde_json::from_value(serde_json::json!({"matchLabels": {"app": "db"}})).unwrap();
        let chosen = Drain { pod_selector: Some(selector), ..Drain::default() };
        assert_eq!(names(&assess("n", &pods, &chosen, &BTreeMap::new())), ["db"]);
        assert!(assess("n", &pods, &Drain { skip: true, ..Drain::default() }, &BTreeMap::new()).done());
    }

    #[test]
    fn a_refused_pod_is_named_and_tried_again() {
        let refusals = BTreeMap::from([("uid-a".to_owned(), "webhook says no".to_owned())]);
        let verdict = assess("n", &[pod("a")], &Drain::default(), &refusals);
        assert_eq!(names(&verdict), ["a"]);
        assert!(verdict.refused[0].message.contains("webhook says no"));
    }

    #[test]
    fn a_round_is_bounded_and_says_that_more_follows() {
        let pods: Vec<_> = (0..50).map(|i| pod(&format!("p{i}"))).collect();
        let verdict = assess("n", &pods, &Drain::default(), &BTreeMap::new());
        assert_eq!((verdict.evict.len(), verdict.later), (EVICTIONS_A_PASS, 50 - EVICTIONS_A_PASS));
        assert!(!verdict.done());
    }
}
