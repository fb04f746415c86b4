//! Builds the [`Fleet`] of one pass: the only place that reads the cluster in order to decide.
//!
//! The OSImage is read from the API server itself, because its slot book is what keeps the budget; pods are
//! listed there too, node by node and only where a decision needs them; so are Node and NodeOS of the few nodes
//! in slots. All other nodes, NodeOS objects and PodDisruptionBudgets come from the stores. Decides nothing, writes
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::{
    api::{
        core::v1::{Node, Pod},
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, ResourceExt,
    api::ListParams,
    core::{Selector, SelectorExt},
};
use osimage_crds::{NodeOS, OSImage, names};
use osimage_planner::{
    Fleet, NodeView,
    fleet::{BudgetFacts, PodFacts},
};

use crate::{context::Context, error::ObserveError, volumes};

/// Pods asked for at once.
const PAGE: u32 = 250;
/// Nodes whose pods are listed at the same time.
const LISTS_AT_ONCE: usize = 4;
/// What a kubelet marks the mirror of a static pod with.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// What the stores say of nodes. Taken **before** the OSImage is read: then the slot book is at least as new as the
/// nodes, and a step for a slot that another operator has given back since carries an old version, and fails.
pub struct Seen {
    nodes: Vec<Arc<Node>>,
    node_oses: Vec<NodeOS>,
}

/// Looks into the stores.
pub fn seen(ctx: &Context) -> Seen {
    let node_oses = ctx.stores.node_oses.state();
    // One that cannot be read is left out: whatever is decided about its node fails, because it exists.
    let node_oses = node_oses.iter().filter_map(|guard| guard.0.as_ref().ok().cloned()).collect();
    Seen { nodes: ctx.stores.nodes.state(), node_oses }
}

/// The OSImage as it is now; `None` when it is gone.
pub async fn image(ctx: &Context, name: &str) -> Result<Option<OSImage>, ObserveError> {
    Api::<OSImage>::all(ctx.client.clone()).get_opt(name).await.map_err(ObserveError::ReadImage)
}

/// Replaces what the stores say of nodes in slots by what the API server says, all at one version of the slot book.
/// A store that is behind shows the boot before the one that a slot was taken in, and that looks like a reboot.
pub async fn slots(ctx: &Context, mut seen: Seen, image: &OSImage) -> Result<Seen, ObserveError> {
    let slots: Vec<&str> = image.status.iter().flat_map(|s| &s.slots).map(|s| s.node.as_str()).collect();
    if slots.is_empty() {
        return Ok(seen);
    }
    let nodes: Api<Node> = Api::all(ctx.client.clone());
    let node_oses: Api<NodeOS> = Api::all(ctx.client.clone());
    for name in slots {
        let failed = |source| ObserveError::ReadSlot { node: name.to_owned(), source };
        let (node, node_os) = futures::try_join!(nodes.get_opt(name), node_oses.get_opt(name)).map_err(failed)?;
        seen.nodes.retain(|n| n.name_any() != name);
        seen.nodes.extend(node.map(Arc::new));
        seen.node_oses.retain(|n| n.name_any() != name);
        seen.node_oses.extend(node_os);
    }
    let again = self::image(ctx, &image.name_any()).await?;
    match again.and_then(|i| i.resource_version()) == image.resource_version() {
        true => Ok(seen),
        false => Err(ObserveError::BookMoved),
    }
}

/// Everything but the pods.
pub async fn fleet(ctx: &Context, seen: Seen, image: OSImage) -> Result<Fleet, ObserveError> {
    let selector: Selector = image.spec.node_selector.clone().try_into().map_err(ObserveError::ParseSelector)?;
    let existing_images = existing(ctx, &image, &seen.node_oses).await?;
    let refuges = seen.nodes.iter().map(|n| node_view(n)).filter(|n| !n.unavailable()).map(|n| n.name).collect();
    let older = older(&image, ctx.stores.images.state().iter().filter_map(|guard| guard.0.as_ref().ok()));
    let nodes = assemble(&image, &selector, &older, seen);
    let operator_node = ctx.own.node.clone();
    Ok(Fleet { image, existing_images, nodes, operator_node, refuges, refusals: BTreeMap::new(), gates: vec![] })
}

/// Adds the pods of the given nodes, and what was last said of their evictions.
pub async fn pods(ctx: &Context, fleet: &mut Fleet, nodes: BTreeSet<String>) -> Result<(), ObserveError> {
    let budgets = Budgets::new(&ctx.stores.budgets.state());
    // Of nodes on trial only the pods matter.
    let slots = fleet.image.status.iter().flat_map(|s| &s.slots);
    let on_trial: BTreeSet<String> = slots.filter(|s| s.permitted.is_some()).map(|s| s.node.clone()).collect();
    let attachments = if nodes.is_subset(&on_trial) { vec![] } else { volumes::attachments(ctx).await? };
    let mut lists = stream::iter(nodes)
        .map(|node| async move { list_pods(ctx, &node).await.map(|pods| (node, pods)) })
        .buffer_unordered(LISTS_AT_ONCE);
    while let Some((node, pods)) = lists.try_next().await? {
        if let Some(view) = fleet.nodes.get_mut(&node) {
            if !on_trial.contains(&node) {
                view.attached = volumes::leaving(ctx, &node, &attachments, &pods).await?;
            }
            let facts = |pod: &Pod| PodFacts { ourselves: is_own(ctx, pod), ..pod_facts(pod, &budgets) };
            view.pods = Some(pods.iter().map(facts).collect());
        }
    }
    let uids = fleet.nodes.values().flat_map(|n| n.pods.iter().flatten()).map(|p| p.uid.as_str()).collect();
    fleet.refusals = ctx.refusals.of(fleet.name(), &uids);
    Ok(())
}

fn is_own(ctx: &Context, pod: &Pod) -> bool {
    ctx.own.pod.as_ref().is_some_and(|(ns, name)| pod.namespace().as_ref() == Some(ns) && pod.name_any() == *name)
}

async fn list_pods(ctx: &Context, node: &str) -> Result<Vec<Pod>, ObserveError> {
    let api: Api<Pod> = Api::all(ctx.client.clone());
    let mut params = ListParams::default().fields(&format!("spec.nodeName={node}")).limit(PAGE);
    let mut pods = Vec::new();
    loop {
        let page =
            api.list(&params).await.map_err(|source| ObserveError::ListPods { node: node.to_owned(), source })?;
        pods.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(pods),
        }
    }
}

/// UIDs of the OSImages that exist. The store may not know yet of one that was just made, and a node must not be
/// taken from it: an owner that the store does not know is asked for.
async fn existing(ctx: &Context, image: &OSImage, node_oses: &[NodeOS]) -> Result<BTreeSet<String>, ObserveError> {
    let mut known: BTreeSet<String> = ctx.stores.images.state().iter().filter_map(|i| i.uid()).collect();
    known.extend(image.uid());
    let owners = node_oses.iter().map(|n| &n.spec.os_image).filter(|owner| !known.contains(&owner.uid));
    let doubtful: BTreeMap<&str, &str> = owners.map(|owner| (owner.uid.as_str(), owner.name.as_str())).collect();
    let api: Api<OSImage> = Api::all(ctx.client.clone());
    let mut confirmed = Vec::new();
    for (uid, name) in doubtful {
        let found = api
            .get_metadata_opt(name)
            .await
            .map_err(|source| ObserveError::ReadOwner { name: name.to_owned(), source })?;
        confirmed.extend(found.and_then(|owner| owner.metadata.uid).filter(|found| found == uid));
    }
    known.extend(confirmed);
    Ok(known)
}

/// The OSImages that were there before this one, with what they select: a node is the oldest one's.
fn older<'a>(image: &OSImage, all: impl IntoIterator<Item = &'a OSImage>) -> Vec<(String, Selector)> {
    let age = |i: &OSImage| (i.metadata.creation_timestamp.clone().map(|t| t.0), i.uid());
    let before = all.into_iter().filter(|i| i.metadata.deletion_timestamp.is_none() && age(i) < age(image));
    let selectors = before.map(|i| Some((i.name_any(), Selector::try_from(i.spec.node_selector.clone()).ok()?)));
    selectors.flatten().collect()
}

/// The nodes that the OSImage selects, and those on which something of it is left.
fn assemble(
    image: &OSImage,
    selector: &Selector,
    older: &[(String, Selector)],
    seen: Seen,
) -> BTreeMap<String, NodeView> {
    let Seen { nodes, node_oses } = seen;
    let uid = image.uid().unwrap_or_default();
    let owner = format!("{}@{uid}", image.name_any());
    let mut node_oses: BTreeMap<String, NodeOS> = node_oses.into_iter().map(|n| (n.name_any(), n)).collect();
    let slots: BTreeSet<&str> = image.status.iter().flat_map(|s| &s.slots).map(|s| s.node.as_str()).collect();
    let mut views = BTreeMap::new();
    for node in &nodes {
        let name = node.name_any();
        let node_os = node_oses.remove(&name);
        let conditions = if slots.contains(name.as_str()) { conditions(node) } else { BTreeMap::new() };
        let matches = selector.matches(node.labels());
        let claim = older.iter().filter(|_| matches).find(|(_, selector)| selector.matches(node.labels()));
        let claimed_by = claim.map(|(name, _)| name.clone());
        let selected = matches && claimed_by.is_none();
        let view = NodeView { selected, claimed_by, node_os, conditions, ..node_view(node) };
        let ours = view.node_os.as_ref().is_some_and(|n| n.spec.os_image.uid == uid);
        let cordoned = view.cordoned_by.as_deref() == Some(owner.as_str());
        let control_plane = view.labels.contains_key(names::CONTROL_PLANE_LABEL);
        if matches || control_plane || ours || cordoned || slots.contains(name.as_str()) {
            views.insert(name, view);
        }
    }
    // What is left of nodes whose Node object is gone.
    let orphans = node_oses.into_values().filter(|n| n.spec.os_image.uid == uid);
    for node_os in orphans {
        let name = node_os.name_any();
        views.insert(name.clone(), NodeView { name, node_os: Some(node_os), ..NodeView::default() });
    }
    for name in slots {
        views.entry(name.into()).or_insert_with(|| NodeView { name: name.into(), ..NodeView::default() });
    }
    views
}

fn conditions(node: &Node) -> BTreeMap<String, String> {
    let all = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    all.map(|c| (c.type_.clone(), c.status.clone())).collect()
}

/// What a decision reads of a Node. Whether it is selected, its NodeOS, its pods and all its conditions are added
/// elsewhere.
pub fn node_view(node: &Node) -> NodeView {
    let status = node.status.as_ref();
    let ready = status
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|conditions| conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
    NodeView {
        name: node.name_any(),
        resource_version: node.resource_version().unwrap_or_default(),
        exists: true,
        selected: false,
        claimed_by: None,
        labels: node.labels().clone(),
        kept_from_autoscalers: kept_from_autoscalers(node),
        added: added(node),
        ready,
        conditions: BTreeMap::new(),
        unschedulable: node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false),
        cordoned_by: node.annotations().get(names::CORDONED_BY).cloned(),
        boot_id: status.and_then(|s| s.node_info.as_ref()).map(|info| info.boot_id.clone()).unwrap_or_default(),
        node_os: None,
        pods: None,
        attached: vec![],
    }
}

fn kept_from_autoscalers(node: &Node) -> BTreeSet<String> {
    let all = names::KEEP_AUTOSCALERS_AWAY.into_iter().filter(|a| node.annotations().contains_key(*a));
    all.map(str::to_owned).collect()
}

/// Only names that we could have added: the annotation is on an object that others write, too.
fn added(node: &Node) -> BTreeSet<String> {
    let text = node.annotations().get(names::ADDED).map(String::as_str).unwrap_or_default();
    let known = text.split(',').filter(|a| names::KEEP_AUTOSCALERS_AWAY.contains(a));
    known.map(str::to_owned).collect()
}

/// PodDisruptionBudgets with their selectors parsed once, by namespace.
struct Budgets(BTreeMap<String, Vec<(Selector, BudgetFacts)>>);

impl Budgets {
    fn new<'a>(budgets: impl IntoIterator<Item = &'a Arc<PodDisruptionBudget>>) -> Self {
        let mut by_namespace: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for budget in budgets {
            // One without a selector selects nothing. One that cannot be parsed is refused by the API server.
            let Some(selector) = budget.spec.as_ref().and_then(|s| s.selector.clone()) else { continue };
            let Ok(selector) = Selector::try_from(selector) else { continue };
            let facts = BudgetFacts {
                name: budget.name_any(),
                allowed: disruptions_allowed(budget),
                lets_unready: lets_unready(budget),
            };
            by_namespace.entry(budget.namespace().unwrap_or_default()).or_default().push((selector, facts));
        }
        Budgets(by_namespace)
    }

    fn of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Vec<BudgetFacts> {
        let here = self.0.get(namespace).into_iter().flatten();
        let mut found: Vec<_> = here.filter(|(selector, _)| selector.matches(labels)).map(|(_, f)| f.clone()).collect();
        found.sort();
        found
    }
}

/// How many pods a budget lets go now. One that nobody has counted yet lets none go.
pub fn disruptions_allowed(budget: &PodDisruptionBudget) -> i32 {
    budget.status.as_ref().map_or(0, |s| s.disruptions_allowed.unwrap_or_default())
}

/// Whether a budget lets pods go that are not Ready although it allows no disruption.
fn lets_unready(budget: &PodDisruptionBudget) -> bool {
    let always = budget.spec.as_ref().and_then(|s| s.unhealthy_pod_eviction_policy.as_deref()) == Some("AlwaysAllow");
    let enough = |current: Option<i32>, desired: Option<i32>| current.unwrap_or(0) >= desired.unwrap_or(0).max(1);
    let healthy = budget.status.as_ref().is_some_and(|s| enough(s.current_healthy, s.desired_healthy));
    always || healthy
}

/// What a drain reads of a pod.
fn pod_facts(pod: &Pod, budgets: &Budgets) -> PodFacts {
    let controller: Option<&OwnerReference> = pod.owner_references().iter().find(|o| o.controller == Some(true));
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_ref());
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let namespace = pod.namespace().unwrap_or_default();
    PodFacts {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        daemon_set: controller.is_some_and(|o| o.kind == "DaemonSet"),
        mirror: pod.annotations().contains_key(MIRROR_ANNOTATION),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        empty_dir: volumes.is_some_and(|all| all.iter().any(|v| v.empty_dir.is_some())),
        unmanaged: controller.is_none(),
        labels: pod.labels().clone(),
        ready: pod
            .status
            .iter()
            .flat_map(|s| s.conditions.iter().flatten())
            .any(|c| c.type_ == "Ready" && c.status == "True"),
        ourselves: false,
        budgets: budgets.of(&namespace, pod.labels()),
        namespace,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
    use osimage_crds::osimage::OSImageStatus;
    use serde_json::json;

    use super::*;

    fn from<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn node(name: &str, pool: &str) -> Arc<Node> {
        Arc::new(from(json!({"metadata": {"name": name, "labels": {"pool": pool}}})))
    }

    fn node_os(name: &str, uid: &str) -> NodeOS {
        from(json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "NodeOS", "metadata": {"name": name},
            "spec": {"osImage": {"name": "web", "uid": uid}}
        }))
    }

    fn image(slots: &[&str]) -> OSImage {
        let commit = "0123456789abcdef".repeat(4);
        let mut image: OSImage = from(json!({
            "apiVersion": "osimage.dev/v1alpha1", "kind": "OSImage", "metadata": {"name": "web", "uid": "u1"},
            "spec": {
                "image": {"ostree": {"url": "https://x/repo", "commit": commit, "verification": {"insecureSkip": true}}},
                "nodeSelector": {"matchLabels": {"pool": "a"}}
            }
        }));
        let slots = slots.iter().map(|node| {
            from(
                json!({"node": node, "attempt": "1", "commit": commit, "bootID": "b", "since": "2026-01-01T00:00:00Z"}),
            )
        });
        image.status = Some(OSImageStatus { slots: slots.collect(), ..OSImageStatus::default() });
        image
    }

    #[test]
    fn a_fleet_is_what_is_selected_and_what_is_left_of_us() {
        let mut cordoned = node("cordoned", "b").as_ref().clone();
        cordoned.annotations_mut().insert(names::CORDONED_BY.into(), "web@u1".into());
        let mut others_cordon = node("others-cordon", "b").as_ref().clone();
        others_cordon.annotations_mut().insert(names::CORDONED_BY.into(), "web@u0".into());
        let nodes = vec![
            node("selected", "a"),
            node("other", "b"),
            node("ours", "b"),
            node("in-slot", "b"),
            node("not-ours", "b"),
            Arc::new(cordoned),
            Arc::new(others_cordon),
        ];
        let node_oses = vec![
            node_os("ours", "u1"),
            node_os("not-ours", "u2"),
            node_os("gone", "u1"),
            node_os("gone-not-ours", "u2"),
        ];
        let image = image(&["in-slot", "gone-in-slot"]);
        let selector = image.spec.node_selector.clone().try_into().unwrap();
        let views = assemble(&image, &selector, &[], Seen { nodes, node_oses });
        let seen: Vec<_> =
            views.values().map(|v| (v.name.as_str(), v.exists, v.selected, v.node_os.is_some())).collect();
        assert_eq!(
            seen,
            [
                ("cordoned", true, false, false),
                ("gone", false, false, true),
                ("gone-in-slot", false, false, false),
                ("in-slot", true, false, false),
                ("ours", true, false, true),
                ("selected", true, true, false),
            ]
        );
    }

    #[test]
    fn of_two_osimages_the_older_one_keeps_a_node() {
        let made = |name: &str, second: i64, uid: &str| {
            let mut image = image(&[]);
            image.metadata.name = Some(name.into());
            image.metadata.uid = Some(uid.into());
            image.metadata.creation_timestamp = Some(Time(Timestamp::from_second(second).unwrap()));
            image
        };
        let (first, second, twin) = (made("first", 1, "u9"), made("second", 2, "u1"), made("twin", 2, "u2"));
        let all = [&second, &first, &twin];
        let names = |image| older(image, all).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&first), Vec::<String>::new());
        assert_eq!(names(&second), ["first"]);
        assert_eq!(names(&twin), ["second", "first"], "of the same second the UID decides");
        let selector = second.spec.node_selector.clone().try_into().unwrap();
        let seen = Seen { nodes: vec![node("both", "a")], node_oses: vec![] };
        let views = assemble(&second, &selector, &older(&second, all), seen);
        assert_eq!((views["both"].selected, views["both"].claimed_by.as_deref()), (false, Some("first")));
        let mut leaving = first.clone();
        leaving.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(9).unwrap()));
        assert!(older(&second, [&leaving]).is_empty(), "one that is being deleted gives its nodes back");
    }

    #[test]
    fn a_node_is_read_as_a_kubelet_writes_it() {
        let ready = |status: &str| {
            json!({"conditions": [
            {"type": "MemoryPressure", "status": "True"}, {"type": "Ready", "status": status}]})
        };
        let base = NodeView { name: "n".into(), exists: true, ..NodeView::default() };
        let cases = [
            ("bare", json!({"metadata": {"name": "n"}}), base.clone()),
            (
                "ready",
                json!({"metadata": {"name": "n"}, "status": ready("True")}),
                NodeView { ready: true, ..base.clone() },
            ),
            ("not ready", json!({"metadata": {"name": "n"}, "status": ready("False")}), base.clone()),
            ("silent", json!({"metadata": {"name": "n"}, "status": ready("Unknown")}), base.clone()),
            (
                "cordoned by us",
                json!({"metadata": {"name": "n", "annotations": {names::CORDONED_BY: "web@u1"}}, "spec": {"unschedulable": true}}),
                NodeView { unschedulable: true, cordoned_by: Some("web@u1".into()), ..base.clone() },
            ),
            (
                "with its boot",
                json!({"metadata": {"name": "n"}, "status": {"nodeInfo": {
                    "architecture": "", "bootID": "b1", "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "",
                    "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""}}}),
                NodeView { boot_id: "b1".into(), ..base.clone() },
            ),
        ];
        for (what, node, view) in cases {
            assert_eq!(node_view(&from(node)), view, "{what}");
        }
    }

    fn budget(namespace: &str, name: &str, spec: serde_json::Value, allowed: Option<i32>) -> Arc<PodDisruptionBudget> {
        let status = allowed
            .map(|n| json!({"disruptionsAllowed": n, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1}));
        let mut budget = json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
        if let Some(status) = status {
            budget["status"] = status;
        }
        Arc::new(from(budget))
    }

    #[test]
    fn a_pod_has_the_budgets_that_select_it_in_its_namespace() {
        let web = json!({"selector": {"matchLabels": {"app": "web"}}});
        let budgets = [
            budget("shop", "web", web.clone(), Some(2)),
            budget("shop", "other", json!({"selector": {"matchLabels": {"app": "db"}}}), Some(1)),
            budget("shop", "all", json!({"selector": {}}), Some(0)),
            budget("shop", "nothing", json!({}), Some(0)),
            budget(
                "shop",
                "not-in",
                json!({"selector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]}}),
                None,
            ),
            budget(
                "shop",
                "broken",
                json!({"selector": {"matchExpressions": [{"key": "app", "operator": "Like"}]}}),
                Some(0),
            ),
            budget("elsewhere", "web", web, Some(0)),
        ];
        let facts = Budgets::new(&budgets).of("shop", &BTreeMap::from([("app".into(), "web".into())]));
        let facts: Vec<_> = facts.iter().map(|f| (f.name.as_str(), f.allowed)).collect();
        assert_eq!(facts, [("all", 0), ("not-in", 0), ("web", 2)]);
    }

    #[test]
    fn a_pod_is_reduced_to_what_a_drain_asks() {
        let owner = |kind: &str, controller: bool| json!([{"apiVersion": "apps/v1", "kind": kind, "name": "o", "uid": "o", "controller": controller}]);
        let meta = |more: serde_json::Value| {
            let mut meta =
                json!({"namespace": "shop", "name": "p", "uid": "1", "ownerReferences": owner("ReplicaSet", true)});
            meta.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            meta
        };
        let base = PodFacts { namespace: "shop".into(), name: "p".into(), uid: "1".into(), ..PodFacts::default() };
        let pod = |meta: serde_json::Value| json!({"metadata": meta});
        let cases = [
            ("of a ReplicaSet", pod(meta(json!({}))), base.clone()),
            (
                "of a DaemonSet",
                pod(meta(json!({"ownerReferences": owner("DaemonSet", true)}))),
                PodFacts { daemon_set: true, ..base.clone() },
            ),
            ("bare", pod(meta(json!({"ownerReferences": []}))), PodFacts { unmanaged: true, ..base.clone() }),
            (
                "owned but not controlled",
                pod(meta(json!({"ownerReferences": owner("Thing", false)}))),
                PodFacts { unmanaged: true, ..base.clone() },
            ),
            (
                "static",
                pod(meta(json!({"annotations": {MIRROR_ANNOTATION: "x"}}))),
                PodFacts { mirror: true, ..base.clone() },
            ),
            (
                "stopping",
                pod(meta(json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}))),
                PodFacts { terminating: true, ..base.clone() },
            ),
            (
                "succeeded",
                json!({"metadata": meta(json!({})), "status": {"phase": "Succeeded"}}),
                PodFacts { finished: true, ..base.clone() },
            ),
            (
                "failed",
                json!({"metadata": meta(json!({})), "status": {"phase": "Failed"}}),
                PodFacts { finished: true, ..base.clone() },
            ),
            ("running", json!({"metadata": meta(json!({})), "status": {"phase": "Running"}}), base.clone()),
            (
                "with an emptyDir",
                json!({"metadata": meta(json!({})), "spec": {"containers": [], "volumes": [{"name": "c", "configMap": {}}, {"name": "e", "emptyDir": {}}]}}),
                PodFacts { empty_dir: true, ..base.clone() },
            ),
        ];
        for (what, pod, facts) in cases {
            assert_eq!(pod_facts(&from(pod), &Budgets::new([])), facts, "{what}");
        }
    }
}
