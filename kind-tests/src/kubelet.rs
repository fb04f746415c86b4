//! A small kubelet: what the API server sees of a node, without containers.
//!
//! It registers the node, keeps its lease, reports boot id and OS image, brings pods bound to it to Running and Ready,
//! and removes deleted pods after they have had time to end. It can go down and come up with another boot id. It runs
//! on the real API; everything beyond the node (taints, PDBs, scheduling, tokens) is left to the real controllers.
//!
//! While the API server is away it tries again quietly.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::process::lock;

/// Seconds that the pod's processes take to end after SIGTERM, or `grace` for the whole grace period.
pub const TERMINATES_AFTER: &str = "testbed.osimage.dev/terminates-after";
/// `false` keeps a pod from getting ready.
pub const READY: &str = "testbed.osimage.dev/ready";
/// How long to wait before an API call is tried again.
const RETRY: Duration = Duration::from_millis(300);
/// What most containers take to end.
const DEFAULT_TERMINATION: Duration = Duration::from_millis(500);

/// A node.
#[derive(Clone, Debug)]
pub struct KubeletOptions {
    /// Node name.
    pub name: String,
    /// Labels set at registration.
    pub labels: BTreeMap<String, String>,
    /// Used for addresses.
    pub index: u16,
    /// How often the lease is renewed. The control plane's grace must be longer.
    pub lease_period: Duration,
}

impl KubeletOptions {
    /// A worker whose lease is renewed every 20 s.
    pub fn new(name: &str, index: u16) -> Self {
        Self { name: name.to_owned(), labels: BTreeMap::new(), index, lease_period: Duration::from_secs(20) }
    }
}

/// What the kubelet finds out about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemInfo {
    /// `status.nodeInfo.bootID`.
    pub boot_id: String,
    /// `status.nodeInfo.osImage`.
    pub os_image: String,
}

/// A pod that runs on the node, as far as the harness needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningPod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Service account.
    pub service_account: String,
    /// Name of the DaemonSet, ReplicaSet… that controls it.
    pub controller: Option<String>,
}

/// The kubelet of one node. Stops when dropped; the node then looks dead after the lease's grace.
pub struct FakeKubelet {
    node: Arc<NodeAgent>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

struct NodeAgent {
    client: Client,
    options: KubeletOptions,
    /// Pod UID to the boot in which its containers were started.
    started: Mutex<HashMap<String, String>>,
    running: watch::Sender<BTreeMap<String, RunningPod>>,
}

impl FakeKubelet {
    /// Makes the kubelet; the node does not exist before [`FakeKubelet::up`].
    pub fn new(client: Client, options: KubeletOptions) -> Self {
        let node =
            NodeAgent { client, options, started: Mutex::default(), running: watch::Sender::new(BTreeMap::new()) };
        Self { node: Arc::new(node), tasks: Mutex::default() }
    }

    /// Node name.
    pub fn name(&self) -> &str {
        &self.node.options.name
    }

    /// Follows the pods that run here, by UID. Empty while the node is down.
    pub fn running(&self) -> watch::Receiver<BTreeMap<String, RunningPod>> {
        self.node.running.subscribe()
    }

    /// The machine has booted: report it, keep it alive, run its pods. Returns at once.
    pub fn up(&self, system: SystemInfo) {
        let node = Arc::clone(&self.node);
        self.replace(vec![
            tokio::spawn({
                let (node, system) = (Arc::clone(&node), system.clone());
                async move {
                    retry(|| node.register(&system)).await;
                }
            }),
            tokio::spawn({
                let node = Arc::clone(&node);
                async move {
                    loop {
                        retry(|| node.renew_lease()).await;
                        tokio::time::sleep(node.options.lease_period).await;
                    }
                }
            }),
            tokio::spawn(async move { node.run_pods(&system.boot_id).await }),
        ]);
    }

    /// The machine has stopped: nothing runs, and Ready turns Unknown, as the controller would find out after a while.
    pub fn down(&self) {
        self.leave("Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.");
    }

    /// The machine is about to stop: Ready turns False, as with the kubelet's graceful shutdown.
    pub fn shutting_down(&self) {
        self.leave("False", "KubeletNotReady", "node is shutting down");
    }

    /// The kubelet dies and says nothing: the control plane must find out by the lease.
    pub fn vanish(&self) {
        self.replace(Vec::new());
        self.node.running.send_replace(BTreeMap::new());
    }

    fn leave(&self, status: &'static str, reason: &'static str, message: &'static str) {
        let node = Arc::clone(&self.node);
        self.replace(vec![tokio::spawn(async move {
            retry(|| node.set_ready(status, reason, message)).await;
        })]);
        self.node.running.send_replace(BTreeMap::new());
    }

    fn replace(&self, new: Vec<JoinHandle<()>>) {
        for old in std::mem::replace(&mut *lock(&self.tasks), new) {
            old.abort();
        }
    }
}

impl Drop for FakeKubelet {
    fn drop(&mut self) {
        self.replace(Vec::new());
    }
}

/// Repeats an action until it works.
async fn retry<F, Fut>(mut action: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<()>>,
{
    while action().await.is_err() {
        tokio::time::sleep(RETRY).await;
    }
}

impl NodeAgent {
    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    async fn register(&self, system: &SystemInfo) -> Result<()> {
        let name = &self.options.name;
        let nodes = self.nodes();
        if nodes.get_opt(name).await?.is_none() {
            let mut labels = self.options.labels.clone();
            labels.insert("kubernetes.io/hostname".into(), name.clone());
            labels.insert("kubernetes.io/os".into(), "linux".into());
            labels.insert("kubernetes.io/arch".into(), "amd64".into());
            let node: Node = serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels},
                "spec": {"podCIDR": format!("10.244.{}.0/24", self.options.index)},
            }))?;
            match nodes.create(&PostParams::default(), &node).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(error).context("create the node"),
            }
        }
        let now = Timestamp::now().to_string();
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            json!({"type": kind, "status": status, "reason": reason, "message": message,
                   "lastHeartbeatTime": now, "lastTransitionTime": now})
        };
        let resources = json!({"cpu": "8", "memory": "16Gi", "pods": "110", "ephemeral-storage": "100Gi"});
        let status = json!({"status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
                condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
            ],
            "addresses": [
                {"type": "InternalIP", "address": format!("10.99.{}.{}", self.options.index / 250, self.options.index % 250 + 1)},
                {"type": "Hostname", "address": name},
            ],
            "nodeInfo": {
                "architecture": "amd64", "operatingSystem": "linux",
                "bootID": system.boot_id, "osImage": system.os_image,
                "machineID": name, "systemUUID": name,
                "kernelVersion": "6.12.0-testbed", "containerRuntimeVersion": "testbed://1",
                "kubeletVersion": "v1.36.3", "kubeProxyVersion": "",
            },
        }});
        nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.context("report the node")?;
        Ok(())
    }

    /// Changes the Ready condition only; a node that was deleted stays deleted.
    async fn set_ready(&self, status: &str, reason: &str, message: &str) -> Result<()> {
        let now = Timestamp::now().to_string();
        let patch = json!({"status": {"conditions": [{
            "type": "Ready", "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }]}});
        // Conditions merge by type.
        match self.nodes().patch_status(&self.options.name, &PatchParams::default(), &Patch::Strategic(&patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).context("report the node"),
        }
    }

    async fn renew_lease(&self) -> Result<()> {
        const SECONDS: i32 = 3600;
        let name = &self.options.name;
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), "kube-node-lease");
        let spec = json!({
            "holderIdentity": name, "leaseDurationSeconds": SECONDS,
            "renewTime": format!("{:.6}", Timestamp::now()),
        });
        let patch = json!({"spec": spec});
        match leases.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => {
                let lease: Lease = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
                leases.create(&PostParams::default(), &lease).await.context("create the lease")?;
                Ok(())
            }
            Err(error) => Err(error).context("renew the lease"),
        }
    }

    async fn run_pods(self: &Arc<Self>, boot_id: &str) {
        let pods: Api<Pod> = Api::all(self.client.clone());
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.options.name));
        let mut ends: HashMap<String, JoinHandle<()>> = HashMap::new();
        let mut stream = watcher(pods, config).boxed();
        loop {
            match stream.try_next().await {
                Ok(Some(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod))) => {
                    self.pod_changed(pod, boot_id, &mut ends).await;
                }
                Ok(Some(watcher::Event::Delete(pod))) => self.forget(&pod, &mut ends),
                Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => {}
                // The stream goes on by itself after an error.
                Ok(None) | Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn pod_changed(self: &Arc<Self>, pod: Pod, boot_id: &str, ends: &mut HashMap<String, JoinHandle<()>>) {
        let uid = pod.uid().unwrap_or_default();
        let finished =
            pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_some_and(|p| p == "Succeeded" || p == "Failed");
        if pod.metadata.deletion_timestamp.is_some() {
            let node = Arc::clone(self);
            ends.entry(uid).or_insert_with(|| tokio::spawn(async move { node.end_pod(pod).await }));
            return;
        }
        if finished {
            return;
        }
        let wants_ready = pod.annotations().get(READY).is_none_or(|v| v != "false");
        let restarted = lock(&self.started).get(&uid).is_some_and(|b| b != boot_id);
        if restarted || !is_reported(&pod, wants_ready) {
            // A failure heals itself: the next change, or the relist after an outage, comes here again.
            let status = self.pod_status(&pod, wants_ready, restarted);
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            for _ in 0..3 {
                match pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if status.code == 404 => return,
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
            }
        }
        lock(&self.started).insert(uid.clone(), boot_id.to_owned());
        self.running.send_if_modified(|running| running.insert(uid.clone(), describe(&pod, &uid)).is_none());
    }

    fn forget(&self, pod: &Pod, ends: &mut HashMap<String, JoinHandle<()>>) {
        let uid = pod.uid().unwrap_or_default();
        if let Some(task) = ends.remove(&uid) {
            task.abort();
        }
        lock(&self.started).remove(&uid);
        self.running.send_if_modified(|running| running.remove(&uid).is_some());
    }

    /// Gives the pod its time to end, then removes it for good.
    async fn end_pod(&self, pod: Pod) {
        let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(0).max(0);
        let grace = Duration::from_secs(seconds.unsigned_abs());
        let wanted = match pod.annotations().get(TERMINATES_AFTER).map(String::as_str) {
            Some("grace") => grace,
            Some(text) => text.parse().map_or(DEFAULT_TERMINATION, Duration::from_secs_f64),
            None => DEFAULT_TERMINATION,
        };
        tokio::time::sleep(wanted.min(grace)).await;
        let uid = pod.uid().unwrap_or_default();
        self.running.send_if_modified(|running| running.remove(&uid).is_some());
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteParams::default()
        };
        loop {
            match pods.delete(&pod.name_any(), &now).await {
                Ok(_) => return,
                // Gone, or another pod of that name.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    fn pod_status(&self, pod: &Pod, ready: bool, restarted: bool) -> Value {
        let now = Timestamp::now().to_string();
        let text = if ready { "True" } else { "False" };
        let old = |name: &str| {
            let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_ref())?;
            statuses.iter().find(|c| c.name == name).map(|c| c.restart_count)
        };
        let containers: Vec<Value> = pod
            .spec
            .iter()
            .flat_map(|s| &s.containers)
            .map(|c| {
                json!({
                    "name": c.name, "image": c.image.clone().unwrap_or_default(), "imageID": "testbed",
                    "ready": ready, "started": true,
                    "restartCount": old(&c.name).unwrap_or(0) + i32::from(restarted),
                    "state": {"running": {"startedAt": now}},
                })
            })
            .collect();
        let ip = self.address_of(pod);
        json!({"status": {
            "phase": "Running",
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
                {"type": "Initialized", "status": "True", "lastTransitionTime": now},
                {"type": "ContainersReady", "status": text, "lastTransitionTime": now},
                {"type": "Ready", "status": text, "lastTransitionTime": now},
            ],
            "containerStatuses": containers,
            "podIP": ip, "podIPs": [{"ip": ip}],
            "startTime": pod.status.as_ref().and_then(|s| s.start_time.as_ref()).map_or(now.clone(), |t| t.0.to_string()),
        }})
    }

    fn address_of(&self, pod: &Pod) -> String {
        let hash = pod.uid().unwrap_or_default().bytes().fold(7_u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        format!("10.244.{}.{}", self.options.index % 250, hash % 250 + 2)
    }
}

/// Whether the pod's status says already what we would say.
fn is_reported(pod: &Pod, ready: bool) -> bool {
    let Some(status) = &pod.status else { return false };
    let text = if ready { "True" } else { "False" };
    status.phase.as_deref() == Some("Running")
        && status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == text)
}

fn describe(pod: &Pod, uid: &str) -> RunningPod {
    RunningPod {
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        uid: uid.to_owned(),
        service_account: pod.spec.as_ref().and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        controller: pod.owner_references().iter().find(|o| o.controller == Some(true)).map(|o| o.name.clone()),
    }
}
