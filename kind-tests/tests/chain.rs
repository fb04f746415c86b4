//! The whole chain on real parts: from `kubectl apply` to a verified host, and back from a bad one.
//!
//! Each test is a promise. All of them run the shipped binaries, with the rights that the chart gives them, on a real
//! control plane and on hosts driven by real libostree.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::time::Duration;

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, ResourceExt};
use osimage_crds::{
    ConditionType, NodeOS, OSImage, condition,
    nodeos::{AttemptState, Outcome},
    osimage::{Phase, RolloutResult},
};
use osimage_kind_tests::{
    cluster::Outage,
    host::{HostEvent, Power},
    product::Product,
    repo::OsCommit,
    server::Fault,
    tools,
    wait::until,
    witness::{Seen, Witness, announce},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit, broadcast};

const MINUTE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(180);

/// Beds at once: each has a control plane and several hosts, there may be two cores, and deadlines are short. (The one
/// that is at rest goes beside.)
static BEDS: Semaphore = Semaphore::const_new(1);
static BED_AT_REST: Semaphore = Semaphore::const_new(1);

/// A product on `nodes` hosts of version 1, or a clear skip.
async fn product(nodes: usize) -> Option<(Product, SemaphorePermit<'static>)> {
    product_on(&BEDS, nodes).await
}

async fn product_on(beds: &'static Semaphore, nodes: usize) -> Option<(Product, SemaphorePermit<'static>)> {
    match tools::require_host_support() {
        Ok(()) => {}
        Err(error) if tools::may_skip() => {
            eprintln!("SKIPPED: {error:#}");
            return None;
        }
        Err(error) => panic!("{error:#} (OSIMAGE_TEST_ALLOW_SKIP=1 skips such tests)"),
    }
    let permit = beds.acquire().await.unwrap();
    Some((Product::start(nodes).await.unwrap(), permit))
}

/// Ends a test with the bed's report when something in it fails.
async fn explain<T>(product: &Product, result: Result<T>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error:#}\n{}", product.bed.report().await),
    }
}

fn boots(product: &Product) -> Vec<u32> {
    product.bed.nodes.iter().map(|n| n.host.boot_now().map(|b| b.number).unwrap_or(0)).collect()
}

fn degraded(image: &OSImage) -> Option<String> {
    let conditions = &image.status.as_ref()?.conditions;
    let found = condition::find(conditions, ConditionType::Degraded)?;
    (found.status == "True").then(|| format!("{}: {}", found.reason, found.message))
}

/// Six replicas over the nodes, of which five must be available.
const WORKLOAD: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: web, image: web}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web, namespace: default}
spec:
  minAvailable: 5
  selector: {matchLabels: {app: web}}
"#;

async fn workload(product: &Product) -> Result<()> {
    product.bed.plane.apply_yaml(WORKLOAD).await?;
    product
        .bed
        .until("the workload to run", MINUTE, || async {
            let ready =
                product.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"]).await?;
            if ready != "6" {
                bail!("{ready:?} replicas are ready")
            }
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_commit_reaches_every_node_within_the_budget() {
    let Some((product, _bed)) = product(3).await else { return };
    let run = async {
        workload(&product).await?;
        for node in &product.bed.nodes {
            node.host.sh("echo mine > /etc/local.conf; echo kept > /var/lib/kept").await?;
        }
        let before: Vec<String> =
            product.bed.nodes.iter().map(|n| n.host.default_entry().map(|e| e.options)).collect::<Result<_>>()?;
        let witness = Witness::start(&product.bed);
        let v2 = product.images.v2.clone();
        product.apply(&v2, |_| {}).await?;
        product.wait_updated(&v2, LONG).await?;
        assert_eq!(witness.worst().len(), 1, "one at a time, and the witness saw it: {:?}", witness.worst());
        for (node, options) in product.bed.nodes.iter().zip(before) {
            let host = &node.host;
            assert_eq!(
                host.sh("cat /etc/local.conf /var/lib/kept").await?,
                "mine\nkept\n",
                "/etc is merged, /var is kept"
            );
            let without = |o: &str| o.split(' ').filter(|a| !a.starts_with("ostree=")).collect::<Vec<_>>().join(" ");
            assert_eq!(without(&host.default_entry()?.options), without(&options), "kernel arguments are kept");
            assert_eq!(host.boot_entries()?.len(), 2, "the old deployment is kept");
            assert_eq!(host.sh("ostree refs --list osimage/hold").await?, "", "holds are dropped");
            assert!(!host.sh("ostree admin status").await?.contains("Pinned: yes"), "nothing stays pinned");
            let status = product.node_os(&node.name).await?.status.unwrap_or_default();
            let attempt = status.last_attempt.expect("an attempt");
            assert_eq!((attempt.state, attempt.outcome), (AttemptState::Finished, Some(Outcome::Booted)));
            assert_eq!(status.booted.and_then(|b| b.version).as_deref(), Some("2"));
        }
        let image = product.osimage().await?;
        assert!(condition::is_true(&image.status.unwrap_or_default().conditions, ConditionType::Ready));
        let line = product.kubectl(&["get", "osimage", "fleet", "--no-headers"]).await?;
        assert!(line.contains("3/3") && line.contains("Updated"), "{line}");
        product.kubectl(&["wait", "--for=condition=Ready", "osimage/fleet", "--timeout=5s"]).await?;
        let events = product.kubectl(&["describe", "osimage", "fleet"]).await?;
        assert!(events.contains("Events:"), "{events}");
        Ok(())
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_commit_costs_one_node_and_goes_no_further() {
    let Some((product, _bed)) = product(3).await else { return };
    let run = async {
        let (v3, v4) = (product.images.v3.clone(), product.images.v4.clone());
        let witness = Witness::start(&product.bed);
        let before = boots(&product);
        product.apply(&v3, |_| {}).await?;
        let image = product.wait_phase("Halted", &v3, LONG).await?;
        let status = image.status.clone().unwrap_or_default();
        assert_eq!(status.failures.len(), 1);
        assert_eq!(status.failures[0].outcome, Outcome::RolledBack);
        assert_eq!(status.rejected[0].commit.as_str(), v3.checksum);
        assert!(status.message.contains("self test"), "the reason is told: {}", status.message);
        assert!(degraded(&image).is_some_and(|d| d.starts_with("CommitRejected")), "{:?}", degraded(&image));
        product.nothing_left().await?;
        let after = boots(&product);
        let moved: Vec<u32> = before.iter().zip(&after).map(|(b, a)| a - b).collect();
        assert_eq!(moved.iter().filter(|n| **n == 2).count(), 1, "one node went and came back: {moved:?}");
        assert_eq!(moved.iter().filter(|n| **n == 0).count(), 2, "the others never left: {moved:?}");
        for node in &product.bed.nodes {
            assert_eq!(node.host.booted_commit()?, product.images.v1.checksum);
        }
        assert_eq!(witness.worst().len(), 1);
        // Another commit is not held back by the rejected one.
        product.apply(&v4, |_| {}).await?;
        product.wait_updated(&v4, LONG).await
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_allows_nothing_is_named_and_waited_for() {
    let Some((product, _bed)) = product(2).await else { return };
    let run = async {
        product.bed.plane.apply_yaml(&WORKLOAD.replace("minAvailable: 5", "minAvailable: 6")).await?;
        workload_is_spread(&product).await?;
        let before = boots(&product);
        let v2 = product.images.v2.clone();
        product.apply(&v2, |_| {}).await?;
        let status = product
            .bed
            .until("the drain to be named", LONG, || async {
                let status = product.osimage().await?.status.unwrap_or_default();
                let named = status.blockers.iter().filter(|b| b.reason == "DrainBlocked").count();
                if named != 2 || status.phase != Some(Phase::Waiting) {
                    bail!("{:?}: {:?}", status.phase, status.blockers)
                }
                Ok(status)
            })
            .await?;
        let blocker = status.blockers.iter().find(|b| b.reason == "DrainBlocked").expect("it was counted");
        assert_eq!(blocker.object.as_deref(), Some("PodDisruptionBudget default/web"));
        assert!(blocker.message.contains("Pod default/web-"), "{}", blocker.message);
        assert_eq!(status.attempts, 0, "no node was disturbed");
        product.nothing_left().await?;
        assert_eq!(boots(&product), before);
        product.kubectl(&["patch", "pdb", "web", "--type=merge", "-p", r#"{"spec":{"minAvailable":4}}"#]).await?;
        product.wait_updated(&v2, LONG).await
    };
    explain(&product, run.await).await;
}

async fn workload_is_spread(product: &Product) -> Result<()> {
    let nodes = product.bed.nodes.len();
    product
        .bed
        .until("the workload to run on every node", MINUTE, || async {
            let on = product
                .kubectl(&[
                    "get",
                    "pods",
                    "-l",
                    "app=web",
                    "-o",
                    "jsonpath={range .items[?(@.status.phase=='Running')]}{.spec.nodeName}{'\\n'}{end}",
                ])
                .await?;
            let distinct: std::collections::BTreeSet<&str> = on.lines().collect();
            if distinct.len() != nodes || on.lines().count() != 6 {
                bail!("it runs on {distinct:?}")
            }
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_commit_is_undone_while_the_api_server_is_gone() {
    for outage in [Outage::Kill, Outage::Freeze] {
        let Some((product, _bed)) = product(2).await else { return };
        let run = async {
            let v3 = product.images.v3.clone();
            let mut events: Vec<_> = product.bed.nodes.iter().map(|n| (n.host.clone(), n.host.events())).collect();
            product.apply(&v3, |_| {}).await?;
            let host = tokio::time::timeout(LONG, first_shutdown(&mut events)).await?;
            product.bed.plane.stop_api_server(outage);
            let first = match host.power() {
                Power::Up(boot) | Power::ShuttingDown(boot) => boot.number,
                Power::Booting | Power::Off => 1,
            };
            // Into the bad one, and by itself back: nobody can tell the node to.
            let back = host.wait_boot_after(first + 1, LONG).await?;
            assert_eq!(back.commit, product.images.v1.checksum, "the old tree runs");
            product.bed.plane.start_api_server().await?;
            let image = product.wait_phase("Halted", &v3, LONG).await?;
            let status = image.status.unwrap_or_default();
            assert_eq!(
                (status.failures[0].outcome, status.failures[0].node.as_str()),
                (Outcome::RolledBack, host.name())
            );
            assert!(status.failures[0].message.contains("self test"), "{}", status.failures[0].message);
            product.nothing_left().await
        };
        explain(&product, run.await).await;
    }
}

async fn first_shutdown(
    hosts: &mut [(osimage_kind_tests::host::FakeHost, broadcast::Receiver<HostEvent>)],
) -> osimage_kind_tests::host::FakeHost {
    let waits = hosts.iter_mut().map(|(host, events)| {
        Box::pin(async move {
            while !matches!(events.recv().await, Ok(HostEvent::ShutdownRequested(_))) {}
            host.clone()
        })
    });
    futures::future::select_all(waits).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_node_that_nobody_can_acknowledge_goes_back_and_says_so() {
    let Some((product, _bed)) = product(1).await else { return };
    let run = async {
        let v2 = product.images.v2.clone();
        let mut events = vec![(product.bed.nodes[0].host.clone(), product.bed.nodes[0].host.events())];
        product.apply(&v2, |o| o["spec"]["health"]["deadline"] = json!("8s")).await?;
        let host = tokio::time::timeout(LONG, first_shutdown(&mut events)).await?;
        product.bed.plane.stop_api_server(Outage::Kill);
        let back = host.wait_boot_after(2, LONG).await?;
        assert_eq!(back.commit, product.images.v1.checksum);
        product.bed.plane.start_api_server().await?;
        let status = product.wait_phase("Halted", &v2, LONG).await?.status.unwrap_or_default();
        assert!(status.message.contains("not acknowledged"), "{}", status.message);
        // The outage was to blame: a person says so, and it goes on.
        product.kubectl(&["annotate", "osimage", "fleet", "osimage.dev/retry=after-the-outage"]).await?;
        product.wait_updated(&v2, LONG).await
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guard_alone_brings_a_node_back() {
    let Some((product, _bed)) = product(1).await else { return };
    let run = async {
        let (v3, node) = (product.images.v3.clone(), &product.bed.nodes[0]);
        let mut events = vec![(node.host.clone(), node.host.events())];
        product.apply(&v3, |o| o["spec"]["health"]["deadline"] = json!("8s")).await?;
        let host = tokio::time::timeout(LONG, first_shutdown(&mut events)).await?;
        product.bed.daemon(&node.name)?.stop(); // no container runtime on the new system
        let back = host.wait_boot_after(2, LONG).await?;
        assert_eq!(back.commit, product.images.v1.checksum, "{}", host.journal(2, "osimage-guard.service"));
        product.bed.daemon(&node.name)?.resume();
        let status = product.wait_phase("Halted", &v3, LONG).await?.status.unwrap_or_default();
        assert_eq!(status.failures[0].outcome, Outcome::RolledBack);
        assert!(status.failures[0].message.contains("guard"), "{}", status.failures[0].message);
        product.nothing_left().await
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stray_reboot_before_the_permit_boots_the_old_tree() {
    let Some((product, _bed)) = product(1).await else { return };
    let run = async {
        let (v2, node) = (product.images.v2.clone(), &product.bed.nodes[0]);
        product.apply(&v2, |o| o["spec"]["rollout"] = json!({"paused": true})).await?;
        product
            .bed
            .until("the node to hold the commit", MINUTE, || async {
                let pulled = product.node_os(&node.name).await?.status.and_then(|s| s.pulled);
                if pulled.map(|c| c.to_string()) != Some(v2.checksum.clone()) {
                    bail!("it does not")
                }
                Ok(())
            })
            .await?;
        assert_eq!(node.host.reboot().await?.commit, product.images.v1.checksum);
        product.apply(&v2, |_| {}).await?;
        product.wait_updated(&v2, LONG).await
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_operators_at_once_keep_the_budget() {
    let Some((product, _bed)) = product(3).await else { return };
    let run = async {
        // Both act, as after a partition that one of them has not noticed.
        product.start_rival("operator-1").await?;
        let witness = Witness::start(&product.bed);
        for commit in [&product.images.v2, &product.images.v4] {
            product.apply(commit, |_| {}).await?;
            product.wait_updated(commit, LONG).await?;
        }
        assert_eq!(witness.worst().len(), 1, "{:?}", witness.worst());
        Ok(())
    };
    explain(&product, run.await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_osimage_leaves_nodes_as_they_were() {
    let Some((product, _bed)) = product(2).await else { return };
    let run = async {
        let v2 = product.images.v2.clone();
        let (mut seen, task) = announce(&product.bed.client());
        product.apply(&v2, |_| {}).await?;
        wait_for(
            &mut seen,
            &|s: &Seen| matches!(s, Seen::Node(n) if n.spec.as_ref().and_then(|s| s.unschedulable) == Some(true)),
        )
        .await?;
        task.abort();
        product.kubectl(&["delete", "osimage", "fleet", "--timeout=120s"]).await?;
        let left = product.kubectl(&["get", "nodeoses", "-o", "name"]).await?;
        assert_eq!(left, "");
        product.nothing_left().await?;
        for node in &product.bed.nodes {
            product
                .bed
                .until("the host to drop what it holds", MINUTE, || async {
                    let status = node.host.sh("ostree refs --list osimage/hold; ostree admin status").await?;
                    if status.contains("staged") || status.contains("Pinned: yes") || status.contains("osimage/hold") {
                        bail!("{status}")
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    };
    explain(&product, run.await).await;
}

// ---- waves, zones, windows ----

/// What a watch of nodes saw of cordons: the order, the pauses, and nodes of two zones at once.
#[derive(Default)]
struct Cordons {
    down: std::collections::BTreeMap<String, String>,
    order: Vec<String>,
    canary_back: Option<std::time::Instant>,
    pause: Option<Duration>,
    two_zones: Option<String>,
}

impl Cordons {
    fn see(&mut self, node: &Node) {
        let (name, zone) = (node.name_any(), node.labels().get("zone").cloned().unwrap_or_default());
        if node.spec.as_ref().and_then(|s| s.unschedulable) != Some(true) {
            if self.down.remove(&name).is_some() && self.order == [name] {
                self.canary_back = Some(std::time::Instant::now());
            }
            return;
        }
        if self.down.insert(name.clone(), zone).is_none() {
            self.order.push(name);
            if self.order.len() == 2 {
                self.pause = self.canary_back.map(|back| back.elapsed());
            }
        }
        let zones: std::collections::BTreeSet<&String> = self.down.values().collect();
        if zones.len() > 1 {
            self.two_zones = Some(format!("{:?}", self.down));
        }
    }
}

/// Twelve nodes, three waves, three zones, a window that closes midway, a budget that blocks one node, and an operator
/// that is killed every few seconds from the first to the last.
#[tokio::test(flavor = "multi_thread")]
async fn the_whole_engine_holds_with_an_operator_that_dies_all_the_time() {
    let Some((product, _bed)) = product(12).await else { return };
    let run = async {
        for (index, node) in product.bed.nodes.iter().enumerate() {
            product.kubectl(&["label", "node", &node.name, &format!("zone=z{}", index % 3)]).await?;
        }
        product.kubectl(&["label", "node", "node-9", "pinned=yes"]).await?;
        product.bed.plane.apply_yaml(PINNED).await?;
        let (mut seen, watch) = announce(&product.bed.client());
        let cordons = std::sync::Arc::new(std::sync::Mutex::new(Cordons::default()));
        let notes = std::sync::Arc::clone(&cordons);
        let follow = tokio::spawn(async move {
            loop {
                match seen.recv().await {
                    Ok(Seen::Node(node)) => notes.lock().unwrap().see(&node),
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        });
        let witness = Witness::start(&product.bed);
        let operator = product.bed.operator(0)?;
        let kills = async {
            loop {
                tokio::time::sleep(Duration::from_millis(2000 + u64::from(std::process::id()) % 3000)).await;
                operator.restart().unwrap();
            }
        };
        tokio::select! {
            done = twelve_nodes(&product) => done?,
            () = kills => {}
        }
        watch.abort();
        follow.await?;
        let cordons = cordons.lock().unwrap();
        assert_eq!(cordons.two_zones, None, "never two zones at once");
        assert!(witness.worst().len() <= 2, "{:?}", witness.worst());
        assert_eq!(cordons.order.len(), 12, "each node was taken once: {:?}", cordons.order);
        assert_eq!(cordons.order[0], "node-1", "the canary goes first");
        assert_eq!(cordons.order[11], "node-9", "the blocked one last");
        assert!(cordons.pause >= Some(Duration::from_secs(28)), "the canary soaked: {:?}", cordons.pause);
        Ok(())
    };
    explain(&product, run.await).await;
}

/// From the first node to the last, with the window closing between.
async fn twelve_nodes(product: &Product) -> Result<()> {
    let v2 = product.images.v2.clone();
    // The window of this minute closes after three; the worst case is made so long that only the next 60 s begin nodes.
    // That is enough for the canary on a slow machine, and by their soaks too little for three waves on a fast one.
    let now = k8s_openapi::jiff::Timestamp::now().to_zoned(k8s_openapi::jiff::tz::TimeZone::UTC);
    let left = 180 - i64::from(now.second());
    let window = json!([{"schedule": format!("{} {} * * *", now.minute(), now.hour()), "duration": "3m"}]);
    let rollout = |windows: serde_json::Value| {
        json!({
            "maxUnavailable": 2,
            "topologyKey": "zone",
            "minReadySeconds": 1,
            "waves": [
                {"name": "canary", "size": 1, "soak": "30s"},
                {"name": "early", "size": 3, "soak": "25s"},
                {"name": "most", "size": 7},
            ],
            "windows": windows,
        })
    };
    let spec = |o: &mut serde_json::Value, windows: serde_json::Value| {
        o["spec"]["rollout"] = rollout(windows);
        o["spec"]["drain"] = json!({"timeout": format!("{}s", left - 60 - 35)});
        o["spec"]["reboot"] = json!({"timeout": "20s"});
        o["spec"]["health"]["deadline"] = json!("15s");
    };
    product.apply(&v2, |o| spec(o, window)).await?;
    let held = held_by(product, "WindowClosed").await?;
    assert!((1..12).contains(&held.counts.updated), "it closed midway: {:?}", held.counts);
    let open = json!([{"schedule": "* * * * *", "duration": "2h"}]);
    product.apply(&v2, |o| spec(o, open)).await?;
    let held = held_by(product, "DrainBlocked").await?;
    assert_eq!(held.counts.updated, 11, "all but the one whose pod may not go");
    let blocker = held.blockers.iter().find(|b| b.reason == "DrainBlocked").expect("it was looked for");
    assert_eq!(
        (blocker.node.as_deref(), blocker.object.as_deref()),
        (Some("node-9"), Some("PodDisruptionBudget default/pinned"))
    );
    product.kubectl(&["patch", "pdb", "pinned", "--type=merge", "-p", r#"{"spec":{"minAvailable":0}}"#]).await?;
    product.wait_updated(&v2, LONG).await?;
    let status = product.osimage().await?.status.unwrap_or_default();
    let rollout = status.rollout.expect("the rollout is told");
    let waves: Vec<(i32, i32)> = rollout.waves.iter().map(|w| (w.nodes, w.updated)).collect();
    assert_eq!(waves, [(1, 1), (3, 3), (7, 7)]);
    assert!(rollout.finished.is_some() && status.failures.is_empty(), "{:?}", status.failures);
    // Another commit, and the one before is history.
    let v4 = product.images.v4.clone();
    product.apply(&v4, |o| o["spec"]["rollout"] = json!({"paused": true})).await?;
    product
        .bed
        .until("the history", MINUTE, || async {
            let status = product.osimage().await?.status.unwrap_or_default();
            let past = status.history.first().cloned();
            match past.filter(|p| p.commit.as_str() == v2.checksum) {
                Some(past) if past.updated == 12 && past.result == RolloutResult::Finished => Ok(()),
                other => bail!("{other:?}"),
            }
        })
        .await
}

/// Waits until the rollout stands still for this reason.
async fn held_by(product: &Product, reason: &str) -> Result<osimage_crds::OSImageStatus> {
    product
        .bed
        .until(&format!("the rollout to wait for {reason}"), LONG, || async {
            let status = product.osimage().await?.status.unwrap_or_default();
            let held = status.blockers.iter().any(|b| b.reason == reason);
            if !held || !status.slots.is_empty() || status.phase != Some(Phase::Waiting) {
                bail!("{:?}: {} {:?}", status.phase, status.message, status.slots)
            }
            Ok(status)
        })
        .await
}

/// One pod that can run only on node-9, and must not go.
const PINNED: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: pinned, namespace: default}
spec:
  replicas: 1
  selector: {matchLabels: {app: pinned}}
  template:
    metadata: {labels: {app: pinned}}
    spec:
      nodeSelector: {pinned: "yes"}
      terminationGracePeriodSeconds: 1
      containers: [{name: pinned, image: pinned}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: pinned, namespace: default}
spec:
  minAvailable: 1
  selector: {matchLabels: {app: pinned}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_does_not_end_gives_the_node_back() {
    let Some((product, _bed)) = product(1).await else { return };
    let run = async {
        // One pod that takes its time: its budget lets it go, but it does not stop.
        product.bed.plane.apply_yaml(SLOW_POD).await?;
        product
            .bed
            .until("the slow pod to run", MINUTE, || async {
                let phase = product
                    .kubectl(&["get", "pods", "-l", "app=slow", "-o", "jsonpath={.items[*].status.phase}"])
                    .await?;
                if phase != "Running" {
                    bail!("{phase}")
                }
                Ok(())
            })
            .await?;
        let v2 = product.images.v2.clone();
        product.apply(&v2, |o| o["spec"]["drain"] = json!({"timeout": "3s"})).await?;
        let deferred = product
            .bed
            .until("the node to be given back", LONG, || async {
                let status = product.osimage().await?.status.unwrap_or_default();
                match status.deferred.first() {
                    Some(deferred) if status.slots.is_empty() => Ok(deferred.clone()),
                    other => bail!("{other:?}, slots {:?}", status.slots),
                }
            })
            .await?;
        assert_eq!((deferred.node.as_str(), deferred.times), ("node-1", 1));
        product.nothing_left().await?;
        assert_eq!(product.bed.nodes[0].host.booted_commit()?, product.images.v1.checksum);
        Ok(())
    };
    explain(&product, run.await).await;
}

const SLOW_POD: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: slow, namespace: default}
spec:
  replicas: 1
  selector: {matchLabels: {app: slow}}
  template:
    metadata:
      labels: {app: slow}
      annotations: {testbed.osimage.dev/terminates-after: "600"}
    spec:
      terminationGracePeriodSeconds: 600
      containers: [{name: slow, image: slow}]
"#;

// ---- who dies when ----

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Operator,
    Daemon,
}

/// A step of the protocol, recognised by what it leaves in the API.
struct StepOf {
    name: &'static str,
    reached: fn(&Seen, &str) -> bool,
}

fn node_os<'a>(seen: &'a Seen, target: &str) -> Option<&'a NodeOS> {
    match seen {
        Seen::NodeOS(n) => {
            Some(n.as_ref()).filter(|n| n.spec.image.as_ref().is_some_and(|i| i.ostree.commit.as_str() == target))
        }
        Seen::Image(_) | Seen::Node(_) => None,
    }
}

fn attempt_is(seen: &Seen, target: &str, state: AttemptState) -> bool {
    let attempt = node_os(seen, target).and_then(|n| n.status.as_ref()?.last_attempt.as_ref());
    attempt.is_some_and(|a| a.state == state && a.commit.as_str() == target)
}

fn slot_is(seen: &Seen, target: &str, is: fn(&osimage_crds::osimage::Slot) -> bool) -> bool {
    let Seen::Image(image) = seen else { return false };
    image.status.iter().flat_map(|s| &s.slots).any(|s| s.commit.as_str() == target && is(s))
}

/// The steps of DESIGN section 5, in order.
const STEPS: [StepOf; 15] = [
    StepOf { name: "the image is assigned", reached: |s, t| node_os(s, t).is_some() },
    StepOf {
        name: "the pull is under way",
        reached: |s, t| {
            node_os(s, t).is_some_and(|n| {
                n.status.as_ref().is_some_and(|s| s.phase == Some(osimage_crds::nodeos::NodePhase::Pulling))
            })
        },
    },
    StepOf {
        name: "the commit is held",
        reached: |s, t| {
            node_os(s, t)
                .is_some_and(|n| n.status.as_ref().and_then(|s| s.pulled.as_ref()).is_some_and(|c| c.as_str() == t))
        },
    },
    StepOf { name: "the slot is reserved", reached: |s, t| slot_is(s, t, |_| true) },
    StepOf {
        name: "the node is cordoned",
        reached: |s, _| matches!(s, Seen::Node(n) if n.annotations().contains_key(osimage_crds::names::CORDONED_BY)),
    },
    StepOf { name: "the permit is in the book", reached: |s, t| slot_is(s, t, |s| s.permitted.is_some()) },
    StepOf { name: "the permit is given", reached: |s, t| node_os(s, t).is_some_and(|n| n.spec.permit.is_some()) },
    StepOf { name: "the way back is prepared", reached: |s, t| attempt_is(s, t, AttemptState::Armed) },
    StepOf {
        name: "the deployment is staged",
        reached: |s, t| node_os(s, t).is_some_and(|n| n.status.as_ref().and_then(|s| s.staged.as_ref()).is_some()),
    },
    StepOf { name: "the host is on trial", reached: |s, t| attempt_is(s, t, AttemptState::Verifying) },
    StepOf { name: "the host is healthy", reached: |s, t| attempt_is(s, t, AttemptState::Healthy) },
    StepOf {
        name: "the attempt is acknowledged",
        reached: |s, t| node_os(s, t).is_some_and(|n| n.spec.permit.as_ref().is_some_and(|p| p.acknowledged)),
    },
    StepOf { name: "the attempt is over", reached: |s, t| attempt_is(s, t, AttemptState::Finished) },
    StepOf { name: "the outcome is in the book", reached: |s, t| slot_is(s, t, |s| s.outcome.is_some()) },
    StepOf {
        name: "the attempt is released",
        reached: |s, t| {
            node_os(s, t).is_some_and(|n| {
                n.spec.permit.is_none() && n.spec.released.is_some() && attempt_is(s, t, AttemptState::Finished)
            })
        },
    },
];

async fn wait_for(seen: &mut broadcast::Receiver<Seen>, reached: &dyn Fn(&Seen) -> bool) -> Result<Seen> {
    let look = async {
        loop {
            match seen.recv().await {
                Ok(object) if reached(&object) => return Ok(object),
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => bail!("the watch has ended"),
            }
        }
    };
    tokio::time::timeout(LONG, look).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_killed_at_any_step_delays_and_breaks_nothing() {
    killed_at_every_step(Victim::Operator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_at_any_step_delays_and_breaks_nothing() {
    killed_at_every_step(Victim::Daemon).await;
}

/// One bed, one move of the whole fleet per step, and a kill -9 the moment that the step shows.
async fn killed_at_every_step(victim: Victim) {
    let Some((product, _bed)) = product(2).await else { return };
    // Pulls take a moment, so that one can be killed in it.
    product.server.inject("objects", Fault::Delay(Duration::from_millis(20)));
    let witness = Witness::start(&product.bed);
    for (round, step) in STEPS.iter().enumerate() {
        let target = if round % 2 == 0 { product.images.v2.clone() } else { product.images.v4.clone() };
        let run = async {
            let (mut seen, task) = announce(&product.bed.client());
            product.apply(&target, |_| {}).await?;
            let checksum = target.checksum.clone();
            let object = wait_for(&mut seen, &|s: &Seen| (step.reached)(s, &checksum)).await?;
            match victim {
                Victim::Operator => product.bed.operator(0)?.restart()?,
                Victim::Daemon => product.bed.daemon(&on_node(&object))?.kill(),
            }
            task.abort();
            product.wait_updated(&target, LONG).await
        };
        let run = run.await.map_err(|e| e.context(format!("{victim:?} killed when {}", step.name)));
        explain(&product, run).await;
        eprintln!("{victim:?} killed when {}: converged", step.name);
    }
    assert_eq!(witness.worst().len(), 1, "{:?}", witness.worst());
    let image = product.osimage().await.unwrap();
    assert_eq!(image.status.unwrap().failures, [], "a killed process is no failure of a commit");
}

/// The steps of the way back.
const STEPS_BACK: [StepOf; 5] = [
    StepOf { name: "the bad host is on trial", reached: |s, t| attempt_is(s, t, AttemptState::Verifying) },
    StepOf { name: "the host rolls back", reached: |s, t| attempt_is(s, t, AttemptState::RollingBack) },
    StepOf { name: "the host is back", reached: |s, t| attempt_is(s, t, AttemptState::Finished) },
    StepOf {
        name: "the failure is in the book",
        reached: |s, t| slot_is(s, t, |s| s.outcome == Some(osimage_crds::osimage::SlotOutcome::Failed)),
    },
    StepOf {
        name: "the failed attempt is released",
        reached: |s, _| matches!(s, Seen::NodeOS(n) if n.spec.permit.is_none() && n.spec.released.is_some()),
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_killed_on_the_way_back_delays_and_breaks_nothing() {
    killed_on_the_way_back(Victim::Operator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_on_the_way_back_delays_and_breaks_nothing() {
    killed_on_the_way_back(Victim::Daemon).await;
}

/// A bad commit, tried again for each step by `osimage.dev/retry`.
async fn killed_on_the_way_back(victim: Victim) {
    let Some((product, _bed)) = product(1).await else { return };
    let (v1, v3) = (product.images.v1.clone(), product.images.v3.clone());
    for (round, step) in STEPS_BACK.iter().enumerate() {
        let run = async {
            let (mut seen, task) = announce(&product.bed.client());
            product
                .apply(&v3, |o| {
                    o["metadata"]["annotations"] = json!({"osimage.dev/retry": round.to_string()});
                    o["spec"]["health"]["deadline"] = json!("6s");
                })
                .await?;
            // What an earlier round left is not what this one does.
            let attempt = format!("-{}", round + 1);
            let is_new = |s: &Seen| match s {
                Seen::NodeOS(n) => {
                    let last = n.status.as_ref().and_then(|s| s.last_attempt.as_ref());
                    last.is_some_and(|a| a.attempt.0.ends_with(&attempt))
                }
                Seen::Image(_) | Seen::Node(_) => true,
            };
            let object = wait_for(&mut seen, &|s: &Seen| is_new(s) && (step.reached)(s, &v3.checksum)).await?;
            match victim {
                Victim::Operator => product.bed.operator(0)?.restart()?,
                Victim::Daemon => product.bed.daemon(&on_node(&object))?.kill(),
            }
            task.abort();
            product
                .bed
                .until("the node to be back and the commit rejected", LONG, || async {
                    let status = product.osimage().await?.status.unwrap_or_default();
                    let failed = status.failures.iter().any(|f| f.attempt.0.ends_with(&attempt));
                    if !failed || !status.slots.is_empty() || status.phase != Some(Phase::Halted) {
                        bail!("{:?} with {:?} and slots {:?}", status.phase, status.failures, status.slots)
                    }
                    let outcome = status.failures[0].outcome;
                    if outcome != Outcome::RolledBack {
                        bail!("it ended as {outcome}")
                    }
                    Ok(())
                })
                .await?;
            product.nothing_left().await?;
            assert_eq!(product.bed.nodes[0].host.booted_commit()?, v1.checksum);
            Ok(())
        };
        let run = run.await.map_err(|e: anyhow::Error| e.context(format!("{victim:?} killed when {}", step.name)));
        explain(&product, run).await;
        eprintln!("{victim:?} killed when {}: the node is back", step.name);
    }
}

fn on_node(seen: &Seen) -> String {
    match seen {
        Seen::NodeOS(n) => n.name_any(),
        Seen::Node(n) => n.name_any(),
        Seen::Image(i) => {
            i.status.iter().flat_map(|s| &s.slots).map(|s| s.node.clone()).next().unwrap_or_else(|| "node-1".into())
        }
    }
}

// ---- bad input ----

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_at_admission_with_the_field_and_the_fix() {
    let Some((product, _bed)) = product(1).await else { return };
    let v2 = product.images.v2.clone();
    type Edit = fn(&mut serde_json::Value);
    let rows: [(&str, Edit, &str); 22] = [
        ("short commit", |o| o["spec"]["image"]["ostree"]["commit"] = json!("abc"), "spec.image.ostree.commit"),
        (
            "upper case",
            |o| o["spec"]["image"]["ostree"]["commit"] = json!("A".repeat(64)),
            "64 lower-case hexadecimal digits",
        ),
        (
            "no verification",
            |o| o["spec"]["image"]["ostree"]["verification"] = json!({}),
            "exactly one of gpg and insecureSkip",
        ),
        (
            "two verifications",
            |o| o["spec"]["image"]["ostree"]["verification"]["insecureSkip"] = json!(true),
            "exactly one of gpg and insecureSkip",
        ),
        (
            "skip false",
            |o| o["spec"]["image"]["ostree"]["verification"] = json!({"insecureSkip": false}),
            "insecureSkip can only be true",
        ),
        ("keys", |o| o["spec"]["image"]["ostree"]["verification"]["gpg"]["keys"] = json!("key"), "ASCII-armored"),
        (
            "password",
            |o| o["spec"]["image"]["ostree"]["url"] = json!("https://me:secret@example.org/repo"),
            "must not hold a user or password",
        ),
        (
            "window",
            |o| o["spec"]["rollout"] = json!({"windows": [{"schedule": "60 2 * * *", "duration": "1h"}]}),
            "field 1 of schedule (minute)",
        ),
        (
            "time zone",
            |o| {
                o["spec"]["rollout"] =
                    json!({"windows": [{"schedule": "0 2 * * *", "duration": "1h", "timeZone": "Mars/Olympus"}]})
            },
            "timeZone must be a name of the IANA",
        ),
        (
            "wave",
            |o| o["spec"]["rollout"] = json!({"waves": [{"name": "a", "size": 1, "nodeSelector": {}}]}),
            "exactly one of nodeSelector and size",
        ),
        ("duration twice", |o| o["spec"]["reboot"]["timeout"] = json!("30m1h"), "must be a duration like 90s"),
        ("url", |o| o["spec"]["image"]["ostree"]["url"] = json!("ftp://x"), "http://, https:// or file://"),
        ("zero budget", |o| o["spec"]["rollout"] = json!({"maxUnavailable": 0}), "rollout.paused"),
        ("odd budget", |o| o["spec"]["rollout"] = json!({"maxUnavailable": "0%"}), "1% to 100%"),
        (
            "selector",
            |o| o["spec"]["nodeSelector"] = json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            "values must be set for In",
        ),
        (
            "no selector",
            |o| {
                o["spec"].as_object_mut().unwrap().remove("nodeSelector");
            },
            "nodeSelector",
        ),
        ("duration", |o| o["spec"]["reboot"]["timeout"] = json!("soon"), "must be a duration like 90s"),
        ("soak", |o| o["spec"]["health"]["soak"] = json!("1h"), "health.soak must be shorter"),
        (
            "check",
            |o| o["spec"]["health"]["checks"][0]["http"] = json!({"url": "http://127.0.0.1:1/"}),
            "exactly one of exec, systemdUnit, http, podsReady and nodeCondition",
        ),
        (
            "gate",
            |o| o["spec"]["rollout"] = json!({"gates": [{"name": "g"}]}),
            "exactly one of prometheus and alertmanager",
        ),
        (
            "gate's URL",
            |o| o["spec"]["rollout"] = gate(json!({"prometheus": {"url": "http://me:secret@p:9090", "query": "up"}})),
            "must not hold a user or password",
        ),
        (
            "gate's matcher",
            |o| {
                o["spec"]["rollout"] = gate(json!({"alertmanager": {"url": "http://a:9093", "matchers": ["severity"]}}))
            },
            "each must be a matcher such as",
        ),
    ];
    for (fact, edit, said) in rows {
        let refused = product.apply(&v2, edit).await.expect_err(fact);
        let text = format!("{refused:#}");
        assert!(text.contains(said), "{fact}: {text}");
    }
    let unknown = product.apply(&v2, |o| o["spec"]["rollout"] = json!({"maxUnavailabel": 2})).await;
    assert!(unknown.is_err(), "a misspelt field is not silently dropped by kubectl");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_cannot_do_is_named_and_changes_nothing_on_it() {
    let Some((product, _bed)) = product(2).await else { return };
    let run = async {
        let images = &product.images;
        let missing = OsCommit { checksum: "0123456789abcdef".repeat(4), version: "missing".into() };
        let foreign_keys = images.foreign_key.public_armored.clone();
        refused(&product, &missing, "CommitNotFound", |_| {}).await?;
        refused(&product, &images.unsigned, "SignatureInvalid", |_| {}).await?;
        refused(&product, &images.foreign, "SignatureInvalid", |_| {}).await?;
        refused(&product, &images.v2, "SignatureInvalid", |o| {
            o["spec"]["image"]["ostree"]["verification"]["gpg"]["keys"] = json!(foreign_keys)
        })
        .await?;
        refused(&product, &images.v2, "KeysInvalid", |o| {
            o["spec"]["image"]["ostree"]["verification"]["gpg"]["keys"] =
                json!("-----BEGIN PGP PUBLIC KEY BLOCK-----\ngarbage\n-----END PGP PUBLIC KEY BLOCK-----\n")
        })
        .await?;
        refused(&product, &images.v2, "RefMismatch", |o| o["spec"]["image"]["ostree"]["ref"] = json!("another/branch"))
            .await?;

        product.server.inject("*.filez", Fault::FlipByte);
        refused(&product, &images.v2, "ObjectCorrupted", |_| {}).await?;
        product.server.clear();
        product.server.down();
        refused(&product, &images.v4, "RepoUnreachable", |_| {}).await?;
        // The disk first: what is tried again by itself would find the server up and the disk free.
        for node in &product.bed.nodes {
            node.host.no_space(true)?;
        }
        product.server.up()?;
        refused(&product, &images.v4, "NoSpace", |_| {}).await?;
        for node in &product.bed.nodes {
            node.host.no_space(false)?;
        }
        // What passes by itself is tried again by itself.
        product.wait_updated(&images.v4, LONG).await?;
        product.bed.nodes[0].host.pretend_not_ostree().await?;
        product.bed.daemon("node-1")?.kill();
        product.apply(&images.v2, |_| {}).await?;
        degraded_as(&product, "node-1", "UnsupportedHost").await
    };
    explain(&product, run.await).await;
}

/// Applies, waits until node and OSImage say why it cannot be done, and compares the hosts with before.
async fn refused(
    product: &Product,
    commit: &OsCommit,
    reason: &str,
    edit: impl FnOnce(&mut serde_json::Value),
) -> Result<()> {
    let state = async |name: &str| {
        let host = &product.bed.node(name)?.host;
        let entries: Vec<String> = host.boot_entries()?.iter().map(|e| format!("{} {}", e.commit, e.options)).collect();
        Ok::<_, anyhow::Error>((
            host.boot_id()?,
            entries,
            host.sh("ostree admin status; ostree refs; find /etc -type f | sort").await?,
        ))
    };
    let before = state("node-1").await?;
    product.apply(commit, edit).await?;
    degraded_as(product, "node-1", reason).await?;
    assert_eq!(state("node-1").await?, before, "{reason}: nothing on the host is changed");
    eprintln!("{} is refused as {reason}", commit.version);
    Ok(())
}

async fn degraded_as(product: &Product, node: &str, reason: &str) -> Result<()> {
    product
        .bed
        .until(&format!("{node} and the OSImage to be Degraded as {reason}"), MINUTE, || async {
            let status = product.node_os(node).await?.status.unwrap_or_default();
            let found = condition::find(&status.conditions, ConditionType::Degraded).cloned();
            let current = status.observed_generation == product.node_os(node).await?.metadata.generation;
            let Some(found) = found.filter(|c| c.status == "True" && c.reason == reason && current) else {
                bail!("the node says {:?}", status.conditions)
            };
            assert!(!found.message.is_empty());
            let image = product.osimage().await?;
            match degraded(&image) {
                Some(text) if text.starts_with(reason) => Ok(()),
                other => bail!("the OSImage says {other:?}"),
            }
        })
        .await
}

// ---- rights ----

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_s_token_writes_the_status_of_its_own_node_and_nothing_else() {
    let Some((product, _bed)) = product(2).await else { return };
    let run = async {
        product.apply(&product.images.v1.clone(), |_| {}).await?;
        product.wait_phase("Updated", &product.images.v1.clone(), MINUTE).await?;
        let config = product.bed.plane.dir().join("daemon-node-1.kubeconfig");
        let client = product.bed.plane.client_for(&config).await?;
        let node_oses: Api<NodeOS> = Api::all(client.clone());
        let status = |text: &str| kube::api::Patch::Merge(json!({"status": {"message": text}}));
        let params = kube::api::PatchParams::default();
        node_oses.patch_status("node-1", &params, &status("mine")).await?;
        let denied = |what: &str, result: bool| assert!(result, "{what} was allowed");
        denied("another node's status", node_oses.patch_status("node-2", &params, &status("not mine")).await.is_err());
        let spec = kube::api::Patch::Merge(json!({"spec": {"mayPull": true}}));
        denied("its own spec", node_oses.patch("node-1", &params, &spec).await.is_err());
        denied("deletion", node_oses.delete("node-1", &Default::default()).await.is_err());
        let nodes: Api<Node> = Api::all(client.clone());
        let cordon = kube::api::Patch::Merge(json!({"spec": {"unschedulable": true}}));
        denied("a cordon", nodes.patch("node-1", &params, &cordon).await.is_err());
        let images: Api<OSImage> = Api::all(client);
        denied("reading OSImages", images.list(&Default::default()).await.is_err());
        Ok(())
    };
    explain(&product, run.await).await;
}

// ---- health of the cluster ----

fn gate(what: serde_json::Value) -> serde_json::Value {
    let mut gate = json!({"name": "alerts"});
    gate.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
    json!({"gates": [gate]})
}

/// Plays Alertmanager: answers every request with the body that the test sets, and remembers what was asked.
struct Alertmanager {
    url: String,
    body: tokio::sync::watch::Sender<String>,
    asked: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
}

impl Alertmanager {
    async fn start(body: &str) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let (body, answer) = tokio::sync::watch::channel(body.to_owned());
        let asked = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
        let remembered = std::sync::Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let n = stream.read(&mut request).await.unwrap_or(0);
                let line = String::from_utf8_lossy(&request[..n]).lines().next().unwrap_or_default().to_owned();
                remembered.lock().unwrap().push(line);
                let body = answer.borrow().clone();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
            }
        });
        Ok(Alertmanager { url, body, asked })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firing_alert_holds_the_rollout_and_so_does_an_alertmanager_that_talks_nonsense() {
    let Some((product, _bed)) = product(2).await else { return };
    let run = async {
        let alertmanager = Alertmanager::start("<html>not yet</html>").await?;
        let (v2, before) = (product.images.v2.clone(), boots(&product));
        let held = async |reason: &str, said: &str| -> Result<()> {
            let status = product
                .bed
                .until(&format!("{reason} to be told"), MINUTE, || async {
                    let status = product.osimage().await?.status.unwrap_or_default();
                    let told = status.blockers.iter().any(|b| {
                        let of_the_gate = b.reason == reason && b.object.as_deref() == Some("Gate alerts");
                        of_the_gate && b.message.contains(said)
                    });
                    if !told || status.phase != Some(Phase::Waiting) {
                        bail!("{:?}: {:?}", status.phase, status.blockers)
                    }
                    Ok(status)
                })
                .await?;
            assert_eq!((status.attempts, status.failures.len()), (0, 0), "nothing was begun, and nothing failed");
            Ok(())
        };
        let matchers = json!(["severity=\"critical\"", "alertname!=\"Watchdog\""]);
        product
            .apply(&v2, |o| {
                o["spec"]["rollout"] = gate(json!({"alertmanager": {"url": alertmanager.url, "matchers": matchers}}))
            })
            .await?;
        held("GateUnknown", "it does not answer as Alertmanager does").await?;
        let alert = json!([{
            "labels": {"alertname": "EtcdNoLeader", "severity": "critical"}, "annotations": {},
            "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
        }]);
        alertmanager.body.send_replace(alert.to_string());
        held("GateClosed", "firing: EtcdNoLeader").await?;
        product.nothing_left().await?;
        assert_eq!(boots(&product), before);
        alertmanager.body.send_replace("[]".into());
        product.wait_updated(&v2, LONG).await?;
        let asked = alertmanager.asked();
        let expected = "GET /api/v2/alerts?active=true&silenced=false&inhibited=false&filter=severity%3D%22critical%22&filter=alertname%21%3D%22Watchdog%22 HTTP/1.1";
        assert!(asked.iter().all(|line| line == expected), "{asked:?}");
        eprintln!("the gate was asked {} times", asked.len());
        Ok(())
    };
    explain(&product, run.await).await;
}

/// A DaemonSet whose pods never get ready by themselves.
const AGENT: &str = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: default}
spec:
  selector: {matchLabels: {app: agent}}
  updateStrategy: {type: OnDelete}
  template:
    metadata: {labels: {app: agent}, annotations: {testbed.osimage.dev/ready: "false"}}
    spec:
      tolerations: [{operator: Exists}]
      containers: [{name: agent, image: agent}]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_not_ready_on_the_new_system_sends_its_node_back_and_is_named() {
    let Some((product, _bed)) = product(1).await else { return };
    let run = async {
        product.bed.plane.apply_yaml(AGENT).await?;
        let v2 = product.images.v2.clone();
        let checks = json!([
            {"name": "self-test", "exec": {"command": ["/bin/true"]}},
            {"name": "disk", "nodeCondition": {"type": "DiskPressure", "status": "False"}},
            {"name": "agent", "podsReady": {"namespace": "default", "selector": {"matchLabels": {"app": "agent"}}}},
        ]);
        product.apply(&v2, |o| o["spec"]["health"]["checks"] = checks).await?;
        let told = || async {
            let image = product.osimage().await?.status.unwrap_or_default();
            let unproven = image.slots.first().and_then(|s| s.unproven.clone()).unwrap_or_default();
            if !unproven.contains("check agent: Pod default/agent-") || !image.message.contains("check agent") {
                bail!("{unproven:?}: {}", image.message)
            }
            let node_os = product.node_os(&product.bed.nodes[0].name).await?;
            let checks: Vec<String> = node_os
                .status
                .unwrap_or_default()
                .checks
                .into_iter()
                .map(|c| format!("{} {}", c.name, c.passing))
                .collect();
            assert_eq!(checks, ["self-test true"], "the host makes its own checks, and no others");
            Ok(())
        };
        product.bed.until("the check to be named while it is waited for", LONG, told).await?;
        let status = product.wait_phase("Halted", &v2, LONG).await?.status.unwrap_or_default();
        let failure = &status.failures[0];
        assert_eq!(failure.outcome, Outcome::RolledBack);
        for part in ["not acknowledged: check agent: Pod default/agent-", "is not Ready", "its host says"] {
            assert!(failure.message.contains(part), "{part}: {}", failure.message);
        }
        eprintln!("{}", failure.message);
        product.nothing_left().await?;
        assert_eq!(product.bed.nodes[0].host.booted_commit()?, product.images.v1.checksum);
        product
            .kubectl(&["annotate", "pod", "-l", "app=agent", "--overwrite", "testbed.osimage.dev/ready=true"])
            .await?;
        product.kubectl(&["annotate", "osimage", "fleet", "osimage.dev/retry=the-agent-is-mended"]).await?;
        product.wait_updated(&v2, LONG).await
    };
    explain(&product, run.await).await;
}

// ---- at rest ----

/// Fifty nodes that have nothing to do, for five minutes: the audit log shows no write of ours but the lease of the
/// leader election.
#[tokio::test(flavor = "multi_thread")]
async fn at_rest_nothing_is_written() {
    let Some((product, _bed)) = product_on(&BED_AT_REST, 50).await else { return };
    let run = async {
        let v1 = product.images.v1.clone();
        product.apply(&v1, |_| {}).await?;
        product.wait_phase("Updated", &v1, LONG).await?;
        let ours = |r: &osimage_kind_tests::audit::Request| r.user.contains("osimage-operator") && !r.is_lease();
        // What the start has stirred up settles first.
        until("the start to settle", LONG, || async {
            let mark = product.bed.plane.audit_mark()?;
            tokio::time::sleep(Duration::from_secs(10)).await;
            let writes = product.bed.plane.writes_since(mark)?;
            match writes.iter().filter(|r| ours(r)).count() {
                0 => Ok(()),
                n => bail!("{n} writes in 10 s"),
            }
        })
        .await?;
        let mark = product.bed.plane.audit_mark()?;
        tokio::time::sleep(Duration::from_secs(300)).await;
        let all = product.bed.plane.writes_since(mark)?;
        assert!(!all.is_empty(), "the log records at least the lease");
        let writes: Vec<_> = all.iter().filter(|r| ours(r)).collect();
        assert!(writes.is_empty(), "{writes:#?}");
        Ok(())
    };
    explain(&product, run.await).await;
}
