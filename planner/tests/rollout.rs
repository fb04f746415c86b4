//! Rollout decisions, row by row. The course of whole rollouts is the simulator's; here is what it cannot tell: which
//! hold is named, what a message says, what is counted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use osimage_crds::{
    AttemptId, Commit, ConditionType, NodeOS, NodeOSSpec, NodeOSStatus, OSImage, OSImageSpec, OSImageStatus, Period,
    condition, names,
    nodeos::{Attempt, AttemptState, Deployment, OSImageRef, Outcome, Problem, ProblemReason},
    osimage::{
        Approval, Drain, Failure, Gate, Health, Image, OSTreeImage, OnDrainTimeout, Phase, Reboot, Rollout,
        RolloutResult, Slot, SlotOutcome, Verification, Wave,
    },
    window::Window,
};
use osimage_planner::{
    Fleet, HoldReason, NodeView, Plan, Step,
    fleet::{BudgetFacts, GateFacts, GateState, PodFacts},
    plan::Change,
    rollout,
};

const UID: &str = "0a1b2c3d-1111";

fn commit(digit: char) -> Commit {
    digit.to_string().repeat(64).parse().unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn image() -> OSImage {
    let verification = Verification { gpg: None, insecure_skip: Some(true) };
    let ostree = OSTreeImage { url: "http://r".into(), remote: None, ref_: None, commit: commit('2'), verification };
    let mut image = OSImage::new(
        "fleet",
        OSImageSpec {
            image: Image { ostree },
            node_selector: LabelSelector::default(),
            rollout: Rollout::default(),
            drain: Drain::default(),
            reboot: Reboot { timeout: Period::seconds(60) },
            health: Health { deadline: Period::seconds(60), soak: Period::seconds(3), checks: vec![] },
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

/// A Ready node that holds the new commit and waits for its turn.
fn node(name: &str) -> NodeView {
    let mut remote = image().spec.image;
    remote.ostree.remote = Some("fleet".into());
    let mut node_os = NodeOS::new(
        name,
        NodeOSSpec {
            os_image: OSImageRef { name: "fleet".into(), uid: UID.into() },
            image: Some(remote),
            may_pull: true,
            health: image().spec.health,
            permit: None,
            retry: None,
            released: None,
        },
    );
    node_os.metadata.generation = Some(1);
    node_os.status = Some(NodeOSStatus {
        observed_generation: Some(1),
        boot_id: Some("boot-1".into()),
        booted: Some(Deployment { commit: commit('1'), version: None, pinned: false }),
        pulled: Some(commit('2')),
        ..NodeOSStatus::default()
    });
    NodeView {
        name: name.into(),
        exists: true,
        selected: true,
        ready: true,
        boot_id: "boot-1".into(),
        node_os: Some(node_os),
        pods: Some(vec![]),
        ..NodeView::default()
    }
}

fn status(node: &mut NodeView) -> &mut NodeOSStatus {
    node.node_os.as_mut().unwrap().status.as_mut().unwrap()
}

fn updated(name: &str) -> NodeView {
    let mut node = node(name);
    status(&mut node).booted.as_mut().unwrap().commit = commit('2');
    node
}

fn slot(node: &str) -> Slot {
    Slot {
        node: node.into(),
        attempt: AttemptId("0a1b2c3d-1".into()),
        commit: commit('2'),
        boot_id: "boot-1".into(),
        since: Time(at(0)),
        permitted: None,
        withdrawn: None,
        unproven: None,
        outcome: None,
        ended: None,
    }
}

fn fleet(nodes: impl IntoIterator<Item = NodeView>) -> Fleet {
    Fleet {
        image: image(),
        existing_images: BTreeSet::from([UID.to_owned()]),
        nodes: nodes.into_iter().map(|n| (n.name.clone(), n)).collect(),
        operator_node: None,
        refuges: BTreeSet::new(),
        refusals: BTreeMap::new(),
        gates: vec![],
    }
}

fn with_status(mut fleet: Fleet, status: OSImageStatus) -> Fleet {
    fleet.image.status = Some(status);
    fleet
}

fn in_slot(node: NodeView, slot: Slot) -> Fleet {
    with_status(fleet([node]), OSImageStatus { slots: vec![slot], attempts: 1, ..OSImageStatus::default() })
}

fn slots(plan: &Plan) -> Vec<&str> {
    plan.status.slots.iter().map(|s| s.node.as_str()).collect()
}

fn reasons(plan: &Plan) -> Vec<HoldReason> {
    plan.holds.iter().map(|h| h.reason).collect()
}

fn degraded(plan: &Plan) -> (bool, &str) {
    let found = condition::find(&plan.status.conditions, ConditionType::Degraded).unwrap();
    (found.status == "True", found.reason.as_str())
}

#[test]
fn one_node_is_started_before_anything_is_done_to_it() {
    let plan = rollout::plan(&fleet([node("a"), node("b"), node("c")]), at(10));
    assert_eq!(slots(&plan), ["a"]);
    assert_eq!(plan.steps, [], "the slot is written first; the next pass acts on it");
    assert_eq!(plan.status.slots[0].attempt.0, "0a1b2c3d-1");
    let next = rollout::plan(&with_status(fleet([node("a"), node("b"), node("c")]), plan.status), at(11));
    assert!(
        matches!(&next.steps[..], [Step::Cordon { node, owner, .. }] if node == "a" && owner == &format!("fleet@{UID}"))
    );
}

#[test]
fn the_budget_counts_every_node_that_is_down_for_any_cause() {
    let mut rows = vec![];
    for (fact, edit) in [
        ("not Ready", (|n: &mut NodeView| n.ready = false) as fn(&mut NodeView)),
        ("cordoned by a person", |n| n.unschedulable = true),
    ] {
        let mut down = updated("z");
        edit(&mut down);
        rows.push((fact, down));
    }
    for (fact, down) in rows {
        let plan = rollout::plan(&fleet([node("a"), down]), at(10));
        assert_eq!(slots(&plan), Vec::<&str>::new(), "{fact}");
        assert_eq!(plan.status.blockers[0].reason, "NodesUnavailable", "{fact}");
        assert!(plan.status.message.contains("z ("), "the node is named: {}", plan.status.message);
    }
}

#[test]
fn budgets_round_down_and_are_never_zero() {
    for (budget, nodes, expected) in [
        (IntOrString::Int(3), 10, 3),
        (IntOrString::String("10%".into()), 50, 5),
        (IntOrString::String("10%".into()), 19, 1),
        (IntOrString::String("10%".into()), 3, 1),
        (IntOrString::String("100%".into()), 7, 7),
    ] {
        assert_eq!(rollout::resolve(&budget, nodes), expected, "{budget:?} of {nodes}");
    }
}

#[test]
fn a_node_that_cannot_be_drained_is_not_disturbed_and_another_is_tried() {
    let budgets = vec![BudgetFacts { name: "db".into(), allowed: 0, lets_unready: false }];
    let pod =
        PodFacts { namespace: "prod".into(), name: "db-0".into(), uid: "u".into(), budgets, ..PodFacts::default() };
    let blocked = NodeView { pods: Some(vec![pod]), ..node("a") };
    let plan = rollout::plan(&fleet([blocked.clone(), node("b")]), at(10));
    assert_eq!(slots(&plan), ["b"]);
    let alone = rollout::plan(&fleet([blocked]), at(10));
    assert_eq!((slots(&alone), alone.status.phase), (vec![], Some(Phase::Waiting)));
    let blocker = &alone.status.blockers[0];
    assert_eq!(
        (blocker.reason.as_str(), blocker.object.as_deref()),
        ("DrainBlocked", Some("PodDisruptionBudget prod/db"))
    );
    assert!(blocker.message.contains("Pod prod/db-0"));
    assert!(alone.wake.is_some(), "budgets are looked at again");
}

#[test]
fn paused_starts_nothing_and_finishes_what_is_in_flight() {
    let mut paused = in_slot(NodeView { unschedulable: true, ..node("a") }, slot("a"));
    paused.nodes.insert("b".into(), node("b"));
    paused.image.spec.rollout.paused = true;
    let plan = rollout::plan(&paused, at(10));
    assert_eq!(slots(&plan), ["a"]);
    assert!(plan.status.slots[0].permitted.is_some(), "goes on");
    assert!(reasons(&plan).contains(&HoldReason::Paused));
}

#[test]
fn a_permit_waits_for_the_last_pod_and_for_the_book() {
    let pod =
        PodFacts { namespace: "n".into(), name: "p".into(), uid: "u".into(), terminating: true, ..PodFacts::default() };
    let drained = NodeView { unschedulable: true, ..node("a") };
    let stopping = rollout::plan(&in_slot(NodeView { pods: Some(vec![pod]), ..drained.clone() }, slot("a")), at(10));
    assert_eq!(stopping.status.slots[0].permitted, None);
    let ready = rollout::plan(&in_slot(drained.clone(), slot("a")), at(10));
    assert_eq!((ready.status.slots[0].permitted.clone(), ready.steps.len()), (Some(Time(at(10))), 0));
    let given = rollout::plan(&in_slot(drained, ready.status.slots[0].clone()), at(11));
    let [Step::UpdateNodeOS { object, change: Change::Permit }] = &given.steps[..] else { panic!("{:?}", given.steps) };
    let permit = object.spec.permit.as_ref().unwrap();
    assert_eq!((permit.boot_id.as_str(), permit.expires.0), ("boot-1", at(70)));
}

#[test]
fn a_failure_rejects_the_commit_and_says_why() {
    let mut failed = NodeView {
        unschedulable: true,
        cordoned_by: Some(format!("fleet@{UID}")),
        boot_id: "boot-3".into(),
        ..node("a")
    };
    status(&mut failed).boot_id = Some("boot-3".into());
    status(&mut failed).last_attempt = Some(Attempt {
        attempt: slot("a").attempt,
        commit: commit('2'),
        previous: commit('1'),
        boot_id: "boot-1".into(),
        state: AttemptState::Finished,
        outcome: Some(Outcome::RolledBack),
        message: "health checks failed: web: exit code 1".into(),
    });
    let mut fleet = in_slot(failed, Slot { permitted: Some(Time(at(5))), ..slot("a") });
    fleet.nodes.insert("b".into(), node("b"));
    let plan = rollout::plan(&fleet, at(10));
    assert_eq!(plan.status.slots[0].outcome, Some(SlotOutcome::Failed));
    assert_eq!(plan.status.phase, Some(Phase::Halted));
    assert_eq!(slots(&plan), ["a"], "b is not started");
    assert_eq!(degraded(&plan), (true, "CommitRejected"));
    for part in ["RolledBack on node a", "web: exit code 1", names::RETRY] {
        assert!(plan.status.message.contains(part), "{part}: {}", plan.status.message);
    }
    // Given back, b drops the commit; nothing goes on until somebody says so.
    let end = with_status(fleet.clone(), OSImageStatus { slots: vec![], ..plan.status.clone() });
    let end = rollout::plan(&end, at(20));
    assert!(end.steps.iter().any(|s| matches!(s, Step::UpdateNodeOS { object, .. } if object.spec.image.is_none())));
    assert_eq!(slots(&end), Vec::<&str>::new());
    let mut retry = with_status(fleet, OSImageStatus { slots: vec![], ..plan.status });
    retry.image.metadata.annotations = Some(BTreeMap::from([(names::RETRY.to_owned(), "1".to_owned())]));
    let plan = rollout::plan(&retry, at(30));
    assert_eq!((plan.status.rejected.len(), plan.status.failures.len()), (0, 0));
    assert_eq!(plan.status.retry_handled.as_deref(), Some("1"));
}

#[test]
fn with_a_budget_of_two_the_first_failure_stops_only_its_node() {
    let failure = Failure {
        node: "a".into(),
        attempt: slot("a").attempt,
        commit: commit('2'),
        outcome: Outcome::FellBack,
        message: "m".into(),
        time: Time(at(1)),
    };
    let mut fleet = with_status(
        fleet([node("a"), node("b")]),
        OSImageStatus { failures: vec![failure], ..OSImageStatus::default() },
    );
    fleet.image.spec.rollout.failure_budget = IntOrString::Int(2);
    let plan = rollout::plan(&fleet, at(10));
    assert_eq!(slots(&plan), ["b"]);
    assert_eq!((degraded(&plan), plan.status.counts.failed), ((true, "NodeFailed"), 1));
}

#[test]
fn a_silent_node_is_lost_and_keeps_its_slot_until_it_speaks() {
    let mut gone = in_slot(
        NodeView { ready: false, unschedulable: true, ..node("a") },
        Slot { permitted: Some(Time(at(0))), ..slot("a") },
    );
    gone.nodes.get_mut("a").unwrap().boot_id = "boot-2".into();
    let early = rollout::plan(&gone, at(149));
    assert_eq!(early.status.failures, []);
    assert!(early.wake.is_some(), "looks again at the deadline");
    let late = rollout::plan(&gone, at(150));
    assert_eq!(late.status.failures[0].outcome, Outcome::Lost);
    assert_eq!((slots(&late), late.status.slots[0].outcome), (vec!["a"], None));
    assert_eq!(late.status.phase, Some(Phase::Halted));
}

#[test]
fn what_a_daemon_cannot_do_is_named_on_the_osimage() {
    let mut bad = node("a");
    let problem = Problem {
        reason: ProblemReason::SignatureInvalid,
        message: "not signed by the given keys".into(),
        retrying: false,
    };
    status(&mut bad).pulled = None;
    status(&mut bad).problem = Some(problem);
    let plan = rollout::plan(&fleet([bad]), at(10));
    assert_eq!(degraded(&plan), (true, "SignatureInvalid"));
    assert!(plan.status.message.contains("a: not signed by the given keys"), "{}", plan.status.message);
    assert_eq!(plan.steps, []);
}

#[test]
fn a_silent_daemon_is_made_a_matter_of_only_after_a_while() {
    let mut silent = node("a");
    silent.node_os.as_mut().unwrap().status = None;
    let first = rollout::plan(&fleet([silent.clone()]), at(10));
    assert_eq!((first.status.phase, first.wake.is_some()), (Some(Phase::Progressing), true));
    assert_eq!(first.status.blockers[0].reason, "DaemonSilent", "it is listed at once");
    let later = rollout::plan(&with_status(fleet([silent]), first.status), at(40));
    assert_eq!(later.status.phase, Some(Phase::Waiting));
    assert!(later.status.message.contains("node daemon"), "{}", later.status.message);
}

#[test]
fn downloads_are_limited() {
    let mut fleet = fleet((0..5).map(|i| NodeView { node_os: None, ..node(&format!("n{i}")) }));
    fleet.image.spec.rollout.max_staging = 2;
    let plan = rollout::plan(&fleet, at(10));
    let may: Vec<bool> = plan.steps.iter().map(|s| matches!(s, Step::CreateNodeOS(o) if o.spec.may_pull)).collect();
    assert_eq!(may, [true, true, false, false, false]);
}

#[test]
fn a_deleted_osimage_gives_its_nodes_back_before_it_goes() {
    let mut deleted =
        fleet([NodeView { cordoned_by: Some(format!("fleet@{UID}")), unschedulable: true, ..node("a") }, node("b")]);
    deleted.image.metadata.deletion_timestamp = Some(Time(at(1)));
    let plan = rollout::plan(&deleted, at(10));
    assert!(matches!(&plan.steps[..], [Step::Uncordon { .. }, Step::DeleteNodeOS(_)]), "{:?}", plan.steps);
    deleted.nodes.clear();
    assert_eq!(rollout::plan(&deleted, at(10)).steps, [Step::RemoveFinalizer]);
}

#[test]
fn a_node_of_another_osimage_is_left_alone_unless_that_is_gone() {
    let mut other = node("a");
    other.node_os.as_mut().unwrap().spec.os_image = OSImageRef { name: "other".into(), uid: "other-uid".into() };
    let mut fleet = fleet([other]);
    fleet.existing_images.insert("other-uid".into());
    let plan = rollout::plan(&fleet, at(10));
    assert_eq!((plan.steps, reasons(&rollout::plan(&fleet, at(10)))), (vec![], vec![HoldReason::OwnedByOther]));
    fleet.existing_images.remove("other-uid");
    assert!(matches!(&rollout::plan(&fleet, at(10)).steps[..], [Step::UpdateNodeOS { change: Change::Assign, .. }]));
}

#[test]
fn a_node_that_an_older_osimage_selects_is_given_up_and_named() {
    let claimed = NodeView { selected: false, claimed_by: Some("elder".into()), ..node("a") };
    let plan = rollout::plan(&fleet([claimed, node("b")]), at(10));
    assert_eq!(slots(&plan), ["b"]);
    assert!(matches!(&plan.steps[..], [Step::DeleteNodeOS(_)]), "the older one makes its own: {:?}", plan.steps);
    assert!(plan.holds.iter().any(|h| h.reason == HoldReason::OwnedByOther && h.message.contains("OSImage elder")));
    assert_eq!(plan.status.counts.selected, 1);
}

#[test]
fn the_finalizer_comes_before_the_first_deed() {
    let mut fresh = fleet([node("a")]);
    fresh.image.metadata.finalizers = None;
    let plan = rollout::plan(&fresh, at(10));
    assert_eq!((plan.steps, plan.status), (vec![Step::AddFinalizer], OSImageStatus::default()));
}

#[test]
fn an_unchanged_fleet_gives_an_unchanged_status() {
    let once = rollout::plan(&fleet([updated("a"), updated("b")]), at(10));
    assert_eq!(once.status.phase, Some(Phase::Updated));
    let again = rollout::plan(&with_status(fleet([updated("a"), updated("b")]), once.status.clone()), at(1000));
    assert_eq!((again.status, again.steps), (once.status, vec![]));
}

// ---- waves, topology, order ----

fn wave(name: &str, size: i32) -> Wave {
    let size = Some(IntOrString::Int(size));
    Wave { name: name.into(), node_selector: None, size, soak: Period::seconds(60), approval: Approval::Automatic }
}

fn labelled(node: NodeView, key: &str, value: &str) -> NodeView {
    NodeView { labels: BTreeMap::from([(key.to_owned(), value.to_owned())]), ..node }
}

#[test]
fn the_next_wave_begins_when_the_one_before_has_soaked() {
    let mut canary = fleet([node("a"), node("b")]);
    canary.image.spec.rollout.waves = vec![wave("canary", 1)];
    canary.image.spec.rollout.max_unavailable = IntOrString::Int(2);
    let first = rollout::plan(&canary, at(10));
    assert_eq!(slots(&first), ["a"], "one is in the wave, though two may be down");
    assert!(first.holds.iter().any(|h| h.reason == HoldReason::WaveNotOpen && h.message.contains("0 of 1")));

    canary.nodes.insert("a".into(), updated("a"));
    let status = OSImageStatus { slots: vec![], ..first.status };
    let soaking = rollout::plan(&with_status(canary.clone(), status), at(20));
    assert_eq!(slots(&soaking), Vec::<&str>::new());
    assert!(reasons(&soaking).contains(&HoldReason::WaveSoaking));
    assert_eq!(soaking.status.rollout.as_ref().unwrap().waves[0].completed, Some(Time(at(20))));
    let soaked = rollout::plan(&with_status(canary, soaking.status), at(80));
    assert_eq!(slots(&soaked), ["b"]);
}

#[test]
fn a_manual_wave_waits_for_an_approval_of_this_commit() {
    let mut manual = fleet([node("a")]);
    manual.image.spec.rollout.waves = vec![Wave { approval: Approval::Manual, ..wave("all", 9) }];
    let waits = rollout::plan(&manual, at(10));
    assert_eq!((slots(&waits), waits.status.phase), (vec![], Some(Phase::Waiting)));
    assert!(
        waits
            .status
            .message
            .contains("kubectl annotate osimage fleet --overwrite approve.osimage.dev/all=222222222222")
    );
    for (value, begins) in
        [("1".repeat(64), false), ("2".repeat(11), false), ("2".repeat(12), true), ("2".repeat(64), true)]
    {
        manual.image.metadata.annotations =
            Some(BTreeMap::from([("approve.osimage.dev/all".to_owned(), value.clone())]));
        assert_eq!(slots(&rollout::plan(&manual, at(11))).len(), usize::from(begins), "{value}");
    }
}

#[test]
fn a_node_in_two_waves_is_an_invalid_spec_that_names_the_field() {
    let selector = |value: &str| serde_json::from_value(serde_json::json!({"matchLabels": {"pool": value}})).unwrap();
    let mut overlapping = fleet([labelled(node("a"), "pool", "x")]);
    let by_label = |name: &str| Wave { size: None, node_selector: Some(selector("x")), ..wave(name, 0) };
    overlapping.image.spec.rollout.waves = vec![by_label("one"), by_label("two")];
    let plan = rollout::plan(&overlapping, at(10));
    assert_eq!((slots(&plan), degraded(&plan)), (vec![], (true, "InvalidSpec")));
    assert!(plan.status.message.contains("spec.rollout.waves[1].nodeSelector: node a"), "{}", plan.status.message);
}

#[test]
fn one_topology_value_is_done_before_the_next() {
    let zone = |name: &str, zone: &str| labelled(node(name), "zone", zone);
    let mut zones = fleet([zone("a", "2"), zone("b", "1"), zone("c", "1")]);
    zones.image.spec.rollout.topology_key = Some("zone".into());
    zones.image.spec.rollout.max_unavailable = IntOrString::Int(3);
    let plan = rollout::plan(&zones, at(10));
    assert_eq!(slots(&plan), ["b", "c"], "both of zone 1, none of zone 2");
    assert!(plan.holds.iter().any(|h| h.reason == HoldReason::TopologyBusy && h.node.as_deref() == Some("a")));
}

#[test]
fn control_plane_nodes_go_one_at_a_time_and_only_while_the_others_are_ready() {
    let control = |name: &str| labelled(node(name), names::CONTROL_PLANE_LABEL, "");
    let mut three = fleet([control("a"), control("b"), node("w")]);
    three.image.spec.rollout.max_unavailable = IntOrString::Int(3);
    assert_eq!(slots(&rollout::plan(&three, at(10))), ["a", "w"]);
    // One that this OSImage does not select counts as well.
    three.nodes.insert("b".into(), NodeView { selected: false, ready: false, node_os: None, ..control("b") });
    let plan = rollout::plan(&three, at(10));
    assert_eq!(slots(&plan), ["w"]);
    assert!(
        plan.holds.iter().any(|h| h.reason == HoldReason::ControlPlaneBusy && h.message.contains("b is not Ready"))
    );
}

#[test]
fn the_operators_own_node_goes_last() {
    let mut own = fleet([node("a"), node("b")]);
    own.operator_node = Some("a".into());
    assert_eq!(slots(&rollout::plan(&own, at(10))), ["b"]);
}

// ---- drains that end ----

fn full(node: &str) -> NodeView {
    let pod = PodFacts { namespace: "n".into(), name: "p".into(), uid: "u".into(), ready: true, ..PodFacts::default() };
    NodeView { unschedulable: true, pods: Some(vec![pod]), ..self::node(node) }
}

#[test]
fn a_drain_that_takes_too_long_gives_the_node_back_and_comes_later() {
    let overdue = rollout::plan(&in_slot(full("a"), slot("a")), at(600));
    assert_eq!(overdue.status.slots[0].outcome, Some(SlotOutcome::Cancelled));
    let deferred = &overdue.status.deferred[0];
    assert_eq!((deferred.times, deferred.until.0), (1, at(900)));
    let free = OSImageStatus { slots: vec![], ..overdue.status };
    let mut later = with_status(fleet([node("a"), node("b")]), free);
    let plan = rollout::plan(&later, at(700));
    assert_eq!(slots(&plan), ["b"], "another node is tried");
    assert!(reasons(&plan).contains(&HoldReason::NodeDeferred));
    later.nodes.remove("b");
    assert_eq!(slots(&rollout::plan(&later, at(900))), ["a"], "and this one again after the pause");
}

#[test]
fn by_force_what_is_left_is_deleted_and_waited_for_once_more() {
    let mut forced = in_slot(full("a"), slot("a"));
    forced.image.spec.drain.on_timeout = OnDrainTimeout::Force;
    assert!(matches!(&rollout::plan(&forced, at(599)).steps[..], [Step::Evict { .. }]));
    let late = rollout::plan(&forced, at(600));
    assert!(matches!(&late.steps[..], [Step::Delete { pods, .. }] if pods.len() == 1), "{:?}", late.steps);
    assert_eq!(late.status.slots[0].permitted, None, "deleted pods are waited for");
    forced.nodes.get_mut("a").unwrap().pods.as_mut().unwrap()[0].terminating = true;
    assert_eq!(rollout::plan(&forced, at(700)).status.slots[0].permitted, None);
    assert!(rollout::plan(&forced, at(1200)).status.slots[0].permitted.is_some(), "but not for ever");
}

#[test]
fn a_volume_that_is_still_attached_is_waited_for() {
    let attached = vec!["PersistentVolume pv-1".to_owned()];
    let plan = rollout::plan(&in_slot(NodeView { unschedulable: true, attached, ..node("a") }, slot("a")), at(10));
    assert_eq!(plan.status.slots[0].permitted, None);
    assert!(plan.status.message.contains("waits for PersistentVolume pv-1 to be detached"), "{}", plan.status.message);
}

#[test]
fn on_a_lone_node_the_operators_own_pod_stays() {
    let mut lone = in_slot(full("a"), slot("a"));
    lone.nodes.get_mut("a").unwrap().pods.as_mut().unwrap()[0].ourselves = true;
    assert!(rollout::plan(&lone, at(10)).status.slots[0].permitted.is_some());
    lone.refuges = BTreeSet::from(["b".to_owned()]);
    assert!(matches!(&rollout::plan(&lone, at(10)).steps[..], [Step::Evict { .. }]), "it moves where it can");
}

#[test]
fn a_slot_is_freed_after_the_node_was_ready_long_enough() {
    let ended = Slot { outcome: Some(SlotOutcome::Booted), ended: Some(Time(at(100))), ..slot("a") };
    let mut released = updated("a");
    released.node_os.as_mut().unwrap().spec.released = Some(slot("a").attempt);
    let mut fleet = in_slot(released, ended);
    fleet.image.spec.rollout.min_ready_seconds = 30;
    fleet.nodes.insert("b".into(), node("b"));
    assert_eq!(slots(&rollout::plan(&fleet, at(129))), ["a"]);
    fleet.nodes.get_mut("a").unwrap().ready = false;
    assert_eq!(slots(&rollout::plan(&fleet, at(130))), ["a"], "not while it is not Ready");
    fleet.nodes.get_mut("a").unwrap().ready = true;
    assert_eq!(rollout::plan(&fleet, at(130)).status.slots.iter().filter(|s| s.node == "a").count(), 0);
}

#[test]
fn the_history_tells_how_each_rollout_ended() {
    let done = rollout::plan(&fleet([updated("a")]), at(10));
    assert_eq!(done.status.rollout.as_ref().unwrap().finished, Some(Time(at(10))));
    let mut next = with_status(fleet([updated("a")]), done.status);
    next.image.spec.image.ostree.commit = commit('3');
    let plan = rollout::plan(&next, at(50));
    let past = &plan.status.history[0];
    assert_eq!((past.result, past.updated, past.ended.0), (RolloutResult::Finished, 1, at(50)));
    assert_eq!(plan.status.rollout.unwrap().commit, commit('3'));
}

// ---- windows ----

fn window(schedule: &str, duration: u64) -> Window {
    Window { schedule: schedule.into(), duration: Period::seconds(duration), time_zone: "UTC".into() }
}

#[test]
fn a_node_is_started_only_when_its_worst_case_ends_inside_the_window() {
    let mut windowed = fleet([node("a")]);
    windowed.image.spec.rollout.windows = vec![window("0 2 * * *", 3600)]; // 02:00 to 03:00; the worst case is 12 minutes
    let hour = 3600;
    for (second, begins) in [(hour, false), (2 * hour, true), (3 * hour - 720, true), (3 * hour - 719, false)] {
        let plan = rollout::plan(&windowed, at(second));
        assert_eq!(slots(&plan).len(), usize::from(begins), "at {second}");
        let open = condition::find(&plan.status.conditions, ConditionType::WindowOpen).unwrap();
        assert_eq!(open.status == "True", begins, "at {second}");
    }
    let closed = rollout::plan(&windowed, at(hour));
    assert_eq!((closed.status.phase, closed.wake), (Some(Phase::Waiting), Some(std::time::Duration::from_secs(3600))));
    assert!(closed.status.message.contains("1970-01-01T02:00:00Z"), "{}", closed.status.message);
    // In flight it finishes.
    let mut flying = in_slot(NodeView { unschedulable: true, ..node("a") }, slot("a"));
    flying.image.spec.rollout.windows = windowed.image.spec.rollout.windows.clone();
    assert!(rollout::plan(&flying, at(100)).status.slots[0].permitted.is_some());
}

#[test]
fn windows_that_cannot_be_understood_or_never_suffice_are_an_invalid_spec() {
    for (windows, said) in [
        (vec![window("0 2 30 2 *", 3600)], "spec.rollout.windows[0].schedule"),
        (vec![window("0 2 * * *", 600)], "no window is longer than 600 s"),
        (
            vec![Window { time_zone: "Mars/Olympus".into(), ..window("0 2 * * *", 3600) }],
            "spec.rollout.windows[0].timeZone",
        ),
    ] {
        let mut bad = fleet([node("a")]);
        bad.image.spec.rollout.windows = windows;
        let plan = rollout::plan(&bad, at(2 * 3600));
        assert_eq!((slots(&plan), degraded(&plan)), (vec![], (true, "InvalidSpec")), "{said}");
        assert!(plan.status.message.contains(said), "{said}: {}", plan.status.message);
    }
}

// ---- health of the cluster ----

fn gated(node: NodeView, states: &[GateState]) -> Fleet {
    let mut fleet = fleet([node]);
    for (index, state) in states.iter().enumerate() {
        let name = format!("gate-{index}");
        fleet.image.spec.rollout.gates.push(Gate { name: name.clone(), prometheus: None, alertmanager: None });
        fleet.gates.push(GateFacts { name, state: state.clone() });
    }
    fleet
}

#[test]
fn a_node_is_started_only_while_every_gate_is_open() {
    let closed = || GateState::Closed("firing: NodeDown".into());
    let unknown = || GateState::Unknown("no answer within 5 s".into());
    for (fact, states, told) in [
        ("none", vec![], vec![]),
        ("all open", vec![GateState::Open, GateState::Open], vec![]),
        ("one of two closed", vec![GateState::Open, closed()], vec!["GateClosed"]),
        ("one closed, one silent", vec![unknown(), closed()], vec!["GateClosed", "GateUnknown"]),
    ] {
        let fleet = gated(node("a"), &states);
        let plan = rollout::plan(&fleet, at(10));
        assert_eq!(slots(&plan).len(), usize::from(told.is_empty()), "{fact}");
        let blockers: Vec<&str> = plan.status.blockers.iter().map(|b| b.reason.as_str()).collect();
        assert_eq!(blockers, told, "{fact}");
        if told.is_empty() {
            continue;
        }
        assert_eq!((plan.status.phase, degraded(&plan).0), (Some(Phase::Waiting), false), "{fact}");
        assert!(plan.status.message.contains("NodeDown"), "{fact}: {}", plan.status.message);
        assert_eq!(plan.wake, Some(Duration::from_secs(15)), "{fact}: it is asked again");
        let again = rollout::plan(&with_status(fleet, plan.status.clone()), at(25));
        assert_eq!(again.status, plan.status, "{fact}: what has not changed is not written");
    }
}

#[test]
fn gates_are_asked_only_when_a_node_could_be_started() {
    let edit = |edit: fn(&mut Fleet)| {
        let mut fleet = gated(node("a"), &[GateState::Open]);
        fleet.gates.clear();
        edit(&mut fleet);
        fleet
    };
    for (fact, fleet, asks) in [
        ("a node waits", edit(|_| {}), true),
        ("there are no gates", edit(|f| f.image.spec.rollout.gates.clear()), false),
        ("all is done", edit(|f| f.nodes = BTreeMap::from([("a".into(), updated("a"))])), false),
        ("paused", edit(|f| f.image.spec.rollout.paused = true), false),
        ("no window is open", edit(|f| f.image.spec.rollout.windows = vec![window("0 2 * * *", 3600)]), false),
        (
            "another node is down",
            edit(|f| {
                f.nodes.insert("b".into(), NodeView { ready: false, ..updated("b") });
            }),
            false,
        ),
        ("it is being deleted", edit(|f| f.image.metadata.deletion_timestamp = Some(Time(at(1)))), false),
        ("its pods are not known", edit(|f| f.nodes.get_mut("a").unwrap().pods = None), false),
    ] {
        assert_eq!(rollout::asks_gates(&fleet, at(10)), asks, "{fact}");
    }
    let plan = rollout::plan(&edit(|_| {}), at(10));
    assert_eq!(
        (slots(&plan), reasons(&plan)),
        (vec![], vec![HoldReason::GateUnknown]),
        "one that was not asked is not open"
    );
}

/// Node a after its reboot into the new commit, in this state of its attempt.
fn on_trial(state: AttemptState, pods: Option<Vec<PodFacts>>) -> NodeView {
    let mut node = NodeView { unschedulable: true, boot_id: "boot-2".into(), pods, ..updated("a") };
    let attempt = slot("a");
    status(&mut node).boot_id = Some("boot-2".into());
    status(&mut node).last_attempt = Some(Attempt {
        attempt: attempt.attempt,
        commit: commit('2'),
        previous: commit('1'),
        boot_id: "boot-1".into(),
        state,
        outcome: None,
        message: "m".into(),
    });
    node
}

fn checked(node: NodeView, slot: Slot) -> Fleet {
    let mut fleet = in_slot(node, slot);
    fleet.image.spec.health.checks = serde_json::from_value(serde_json::json!([
        {"name": "host", "exec": {"command": ["true"]}},
        {"name": "cni", "podsReady": {"selector": {"matchLabels": {"app": "cni"}}}},
        {"name": "net", "nodeCondition": {"type": "NetworkUnavailable", "status": "False"}},
    ]))
    .unwrap();
    fleet
}

fn cni(ready: bool) -> PodFacts {
    let labels = BTreeMap::from([("app".into(), "cni".into())]);
    PodFacts { namespace: "kube-system".into(), name: "cni-x".into(), ready, labels, ..PodFacts::default() }
}

#[test]
fn a_healthy_host_is_acknowledged_only_when_the_checks_of_the_cluster_hold() {
    let network = |mut node: NodeView, is: &str| {
        node.conditions = BTreeMap::from([("NetworkUnavailable".to_owned(), is.to_owned())]);
        node
    };
    let permitted = || Slot { permitted: Some(Time(at(5))), ..slot("a") };
    let earlier = || Slot { unproven: Some("check cni: earlier".into()), ..permitted() };
    let healthy = |ready| on_trial(AttemptState::Healthy, Some(vec![cni(ready)]));
    let not_ready = "check cni: Pod kube-system/cni-x is not Ready";
    let unavailable = "check net: condition NetworkUnavailable of Node a is True, not False";
    let both = format!("{not_ready}; {unavailable}");
    let verifying = on_trial(AttemptState::Verifying, Some(vec![cni(false)]));
    let back = on_trial(AttemptState::RollingBack, Some(vec![cni(false)]));
    let cut = on_trial(AttemptState::Healthy, None);
    for (fact, node, slot, acknowledged, unproven) in [
        ("all hold", network(healthy(true), "False"), earlier(), true, None),
        ("a pod does not", network(healthy(false), "False"), permitted(), false, Some(not_ready)),
        ("a condition does not", network(healthy(true), "True"), earlier(), false, Some(unavailable)),
        ("neither does", network(healthy(false), "True"), permitted(), false, Some(both.as_str())),
        (
            "the node is not Ready",
            NodeView { ready: false, ..network(healthy(true), "False") },
            permitted(),
            false,
            Some("the node is not Ready"),
        ),
        ("pods were not listed this time", network(cut, "False"), earlier(), false, Some("check cni: earlier")),
        ("the host is not healthy", network(verifying, "False"), earlier(), false, None),
        ("the host goes back", network(back, "False"), earlier(), false, Some("check cni: earlier")),
    ] {
        let plan = rollout::plan(&checked(node, slot), at(10));
        let told = plan.steps.iter().any(|s| matches!(s, Step::UpdateNodeOS { change: Change::Acknowledge, .. }));
        assert_eq!((told, plan.status.slots[0].unproven.as_deref()), (acknowledged, unproven), "{fact}");
        assert!(reasons(&plan).contains(&HoldReason::Verifying), "{fact}: {:?}", plan.holds);
    }
    let fleet = checked(network(healthy(false), "True"), permitted());
    let plan = rollout::plan(&fleet, at(10));
    let named: Vec<_> = plan.holds.iter().map(|h| h.object.as_deref()).collect();
    assert_eq!(named, [Some("Pod kube-system/cni-x"), Some("Node a")], "each is named");
    assert_eq!(plan.wake, Some(Duration::from_secs(5)), "pods are not watched");
    assert_eq!(rollout::plan(&with_status(fleet, plan.status.clone()), at(11)).status, plan.status, "written once");
}

#[test]
fn a_node_that_went_back_tells_which_check_of_the_cluster_did_not_hold() {
    let why = "check cni: Pod kube-system/cni-x is not Ready";
    for (fact, outcome, unproven, said) in [
        ("a check did not hold", Outcome::RolledBack, Some(why), format!("not acknowledged: {why}; its host says: m")),
        ("the host found it", Outcome::RolledBack, None, "m".to_owned()),
        ("it fell back by itself", Outcome::FellBack, Some(why), "m".to_owned()),
    ] {
        let mut back = on_trial(AttemptState::Finished, None);
        status(&mut back).last_attempt.as_mut().unwrap().outcome = Some(outcome);
        let slot = Slot { permitted: Some(Time(at(5))), unproven: unproven.map(str::to_owned), ..slot("a") };
        let plan = rollout::plan(&checked(back, slot), at(90));
        assert_eq!(plan.status.failures[0].message, said, "{fact}");
    }
}

#[test]
fn pods_are_listed_for_nodes_that_wait_to_be_acknowledged_and_each_has_its_turn() {
    let permitted = || Slot { permitted: Some(Time(at(5))), ..slot("a") };
    for (fact, state, listed) in
        [("healthy", AttemptState::Healthy, true), ("still checked by its host", AttemptState::Verifying, false)]
    {
        let fleet = checked(on_trial(state, None), permitted());
        assert_eq!(rollout::inspect(&fleet, at(10)).contains("a"), listed, "{fact}");
    }
    let mut unasked = checked(on_trial(AttemptState::Healthy, None), permitted());
    unasked.image.spec.health.checks.retain(|c| c.pods_ready.is_none());
    assert!(rollout::inspect(&unasked, at(10)).is_empty(), "no check asks for pods");

    let mut many = checked(on_trial(AttemptState::Healthy, None), permitted());
    let names: Vec<String> = (0..120).map(|n| format!("n{n:03}")).collect();
    let view = |name: &String| NodeView { name: name.clone(), ..on_trial(AttemptState::Healthy, None) };
    many.nodes = names.iter().map(|n| (n.clone(), view(n))).collect();
    let slots = names.iter().map(|n| Slot { node: n.clone(), ..permitted() }).collect();
    many.image.status = Some(OSImageStatus { slots, ..OSImageStatus::default() });
    let mut seen = BTreeSet::new();
    for second in [0, 5, 10] {
        let listed = rollout::inspect(&many, at(second));
        assert_eq!(listed.len(), 50, "bounded");
        seen.extend(listed);
    }
    assert_eq!(seen.len(), 120, "none is left out");
}

#[test]
fn a_permit_is_withdrawn_in_writing_even_where_it_never_arrived() {
    // Another operator may be about to write the permit, by what it read before: that write has to be refused.
    let withdrawn = || {
        let mut slot = slot("a");
        slot.permitted = Some(Time(at(0)));
        slot.withdrawn = Some("did not reboot".into());
        in_slot(node("a"), slot)
    };
    let mut fleet = withdrawn();
    let plan = rollout::plan(&fleet, at(100));
    let [Step::UpdateNodeOS { object, change: Change::Withdraw }] = &plan.steps[..] else { panic!("{:?}", plan.steps) };
    assert_eq!(object.spec.released, Some(slot("a").attempt));
    assert_eq!(plan.status.slots[0].outcome, None, "the slot is kept until the daemon has seen it");

    let node_os = fleet.nodes.get_mut("a").unwrap().node_os.as_mut().unwrap();
    node_os.spec.released = Some(slot("a").attempt);
    assert_eq!(rollout::plan(&fleet, at(100)).status.slots[0].outcome, Some(SlotOutcome::Cancelled), "it has seen it");
    fleet.nodes.get_mut("a").unwrap().node_os.as_mut().unwrap().metadata.generation = Some(2);
    assert_eq!(rollout::plan(&fleet, at(100)).status.slots[0].outcome, None, "it has not heard of it yet");
}

#[test]
fn a_slot_of_another_boot_gets_neither_cordon_nor_permit() {
    // As the kubelet tells; the daemon has not been heard yet. It may be another machine that took the name.
    let mut node = node("a");
    node.boot_id = "boot-2".into();
    let plan = rollout::plan(&in_slot(node.clone(), slot("a")), at(10));
    assert_eq!((plan.status.slots[0].outcome, plan.steps), (Some(SlotOutcome::Cancelled), vec![]));
    let permitted = Slot { permitted: Some(Time(at(5))), ..slot("a") };
    assert_eq!(rollout::plan(&in_slot(node, permitted), at(10)).steps, []);
}
