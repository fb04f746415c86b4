//! Everything wired together: a control plane, fake booted hosts with their kubelets and daemons, and operators.
//!
//! A host that goes down takes its kubelet and its daemon with it; when it is up they come back with its new boot id.
//! The product's manifests are applied by the caller; nothing here knows the product's API but the names of its kinds,
//! for the report that a failed wait prints.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures::future::try_join_all;
use kube::Client;
use rustix::process::Signal;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use crate::cluster::{ControlPlane, Options};
use crate::daemon::{Container, Daemon, Factory};
use crate::host::sysroot::Template;
use crate::host::{Boot, FakeHost, HostEvent, HostOptions, Power};
use crate::kubelet::{FakeKubelet, KubeletOptions, RunningPod, SystemInfo};
use crate::process::{Cmd, Process, lock};
use crate::wait::until;

/// How long a DaemonSet's pod may take to show up on a node.
const POD_TIMEOUT: Duration = Duration::from_secs(60);
/// Lines of each log in the report of a failed wait.
const REPORT_LINES: usize = 25;

/// What to build.
#[derive(Clone, Debug)]
pub struct BedOptions {
    /// Nodes are called `node-1`…
    pub nodes: usize,
    /// The control plane.
    pub plane: Options,
    /// Labels of every node.
    pub labels: Vec<(String, String)>,
    /// How often kubelets renew their leases.
    pub lease_period: Duration,
}

impl BedOptions {
    /// `nodes` nodes and a control plane with a scheduler.
    pub fn new(nodes: usize) -> Self {
        Self {
            nodes,
            plane: Options { scheduler: true, ..Options::default() },
            labels: Vec::new(),
            lease_period: Duration::from_secs(20),
        }
    }
}

/// One node.
pub struct BedNode {
    /// Node and host name.
    pub name: String,
    /// The machine.
    pub host: FakeHost,
    /// Its kubelet.
    pub kubelet: Arc<FakeKubelet>,
    daemon: Mutex<Option<Arc<Daemon>>>,
    link: JoinHandle<()>,
}

impl Drop for BedNode {
    fn drop(&mut self) {
        self.link.abort();
    }
}

/// A running bed. Everything in it ends when it is dropped.
pub struct TestBed {
    operators: Mutex<Vec<Arc<Operator>>>,
    /// The nodes, `node-1` first.
    pub nodes: Vec<BedNode>,
    /// The control plane.
    pub plane: Arc<ControlPlane>,
}

impl TestBed {
    /// Starts the control plane and boots all hosts, side by side; returns when all nodes are Ready.
    pub async fn start(options: BedOptions, template: &Template) -> Result<Self> {
        let hosts = async {
            try_join_all((1..=options.nodes).map(|n| async move {
                let host = FakeHost::create(HostOptions::new(&format!("node-{n}")), template).await?;
                host.boot().await?;
                Ok::<_, anyhow::Error>(host)
            }))
            .await
        };
        let (plane, hosts) = tokio::try_join!(ControlPlane::start(options.plane.clone()), hosts)?;
        let plane = Arc::new(plane);
        let client = plane.client_for(&plane.kubeconfig("kubelet")).await?;
        let nodes = hosts
            .into_iter()
            .zip(1_u16..)
            .map(|(host, index)| attach(host, index, client.clone(), &options))
            .collect::<Result<Vec<_>>>()?;
        let bed = Self { operators: Mutex::default(), nodes, plane };
        bed.wait_nodes_ready(Duration::from_secs(60)).await?;
        Ok(bed)
    }

    /// The administrator's client.
    pub fn client(&self) -> Client {
        self.plane.client()
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&BedNode> {
        self.nodes.iter().find(|n| n.name == name).ok_or_else(|| anyhow!("no node {name}"))
    }

    /// Runs the node daemon on every node: see [`TestBed::start_daemon`].
    pub async fn start_daemons(&self, pods: &DaemonPods, make: DaemonFactory) -> Result<()> {
        for node in &self.nodes {
            self.start_daemon(&node.name, pods, Arc::clone(&make)).await?;
        }
        Ok(())
    }

    /// Runs the node daemon on a node as the kubelet would run its DaemonSet's pod: each start waits for the pod, gets
    /// a token bound to it, and asks `make` for arguments and environment.
    pub async fn start_daemon(&self, node: &str, pods: &DaemonPods, make: DaemonFactory) -> Result<()> {
        let node = self.node(node)?;
        let (plane, kubelet, pods) = (Arc::clone(&self.plane), Arc::clone(&node.kubelet), pods.clone());
        let (name, boot_host) = (node.name.clone(), node.host.clone());
        let factory: Factory = Arc::new(move |boot: Boot| {
            let (plane, kubelet, pods) = (Arc::clone(&plane), Arc::clone(&kubelet), pods.clone());
            let (make, name, host) = (Arc::clone(&make), name.clone(), boot_host.clone());
            Box::pin(async move {
                let kubeconfig = daemon_kubeconfig(&plane, &kubelet, &pods).await?;
                make(&DaemonContext { node: name, host, boot, kubeconfig })
            })
        });
        let log = self.log_of(&format!("daemon-{}", node.name));
        *lock(&node.daemon) = Some(Arc::new(Daemon::start(&node.host, &log, factory)));
        Ok(())
    }

    /// The daemon of a node.
    pub fn daemon(&self, node: &str) -> Result<Arc<Daemon>> {
        lock(&self.node(node)?.daemon).clone().ok_or_else(|| anyhow!("no daemon was started on {node}"))
    }

    /// Starts one more operator; the first has index 0.
    pub fn start_operator(&self, container: Container) -> Result<Arc<Operator>> {
        let mut operators = lock(&self.operators);
        let log = self.log_of(&format!("operator-{}", operators.len()));
        let operator = Arc::new(Operator { container, log, process: Mutex::default() });
        operator.start()?;
        operators.push(Arc::clone(&operator));
        Ok(operator)
    }

    /// An operator by index.
    pub fn operator(&self, index: usize) -> Result<Arc<Operator>> {
        lock(&self.operators).get(index).cloned().ok_or_else(|| anyhow!("no operator {index} was started"))
    }

    /// Waits until every node that is up is Ready.
    pub async fn wait_nodes_ready(&self, timeout: Duration) -> Result<()> {
        let nodes: kube::Api<k8s_openapi::api::core::v1::Node> = kube::Api::all(self.client());
        until("all nodes to be Ready", timeout, || async {
            for node in &self.nodes {
                if !matches!(node.host.power(), Power::Up(_)) {
                    continue;
                }
                let seen = nodes.get_opt(&node.name).await?.ok_or_else(|| anyhow!("{} is not there", node.name))?;
                let conditions = seen.status.and_then(|s| s.conditions).unwrap_or_default();
                if !conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True") {
                    bail!("{} is not Ready", node.name);
                }
            }
            Ok(())
        })
        .await
    }

    /// Polls `look` until it is `Ok`; at the deadline the error carries [`TestBed::report`].
    pub async fn until<T, F, Fut>(&self, what: &str, timeout: Duration, look: F) -> Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        match until(what, timeout, look).await {
            Ok(value) => Ok(value),
            Err(error) => bail!("{error:#}\n\n{}", self.report().await),
        }
    }

    /// What one wants to see when a test has failed: our objects, nodes, pods, the ends of all logs.
    pub async fn report(&self) -> String {
        let mut text = String::new();
        let mut section = |title: &str, body: &str| {
            text.push_str(&format!("==== {title}\n{}\n", body.trim_end()));
        };
        for (title, args) in [
            ("OSImages", &["get", "osimages", "-o", "yaml"][..]),
            ("NodeOSes", &["get", "nodeoses", "-o", "yaml"]),
            ("nodes and pods", &["get", "nodes,pods,pdb", "-A", "-o", "wide"]),
            ("events", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
        ] {
            let limited = tokio::time::timeout(Duration::from_secs(10), self.plane.kubectl(args, None));
            let body = match limited.await {
                Ok(Ok(out)) => out,
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "no answer".to_owned(),
            };
            section(title, &body);
        }
        for (index, operator) in lock(&self.operators).iter().enumerate() {
            section(&format!("operator {index}"), &operator.log_tail(REPORT_LINES));
        }
        for node in &self.nodes {
            let entries = node.host.boot_entries().map(|entries| {
                entries
                    .iter()
                    .map(|e| format!("  {} {}.{}", e.version, e.commit, e.serial))
                    .collect::<Vec<_>>()
                    .join("\n")
            });
            let menu = entries.unwrap_or_else(|e| format!("  {e:#}"));
            section(
                &format!("host {}", node.name),
                &format!("{:?}\nboot menu:\n{menu}\n{}", node.host.power(), node.host.log_tail(10)),
            );
            if let Some(daemon) = lock(&node.daemon).as_ref() {
                section(&format!("daemon of {}", node.name), &daemon.log_tail(REPORT_LINES));
            }
        }
        text
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.plane.log(name)
    }
}

/// Which pods stand for the node daemon.
#[derive(Clone, Debug)]
pub struct DaemonPods {
    /// Their namespace.
    pub namespace: String,
    /// The DaemonSet that owns them.
    pub daemon_set: String,
    /// Their service account.
    pub service_account: String,
}

/// What a daemon's arguments depend on.
pub struct DaemonContext {
    /// Node name.
    pub node: String,
    /// The machine.
    pub host: FakeHost,
    /// The running boot.
    pub boot: Boot,
    /// Access to the API server with the token of the daemon's pod.
    pub kubeconfig: PathBuf,
}

/// Makes a daemon's container.
pub type DaemonFactory = Arc<dyn Fn(&DaemonContext) -> Result<Container> + Send + Sync>;

/// A token of the daemon's pod. While the API server is away, the last one: a pod's token file is still there then.
async fn daemon_kubeconfig(plane: &ControlPlane, kubelet: &FakeKubelet, pods: &DaemonPods) -> Result<PathBuf> {
    let last = plane.dir().join(format!("daemon-{}.kubeconfig", kubelet.name()));
    match fresh_kubeconfig(plane, kubelet, pods, last.is_file()).await {
        Ok(fresh) => {
            std::fs::copy(&fresh, &last)?;
            Ok(last)
        }
        Err(_) if last.is_file() => Ok(last),
        Err(error) => Err(error),
    }
}

async fn fresh_kubeconfig(
    plane: &ControlPlane,
    kubelet: &FakeKubelet,
    pods: &DaemonPods,
    have_one: bool,
) -> Result<PathBuf> {
    let patience = if have_one { Duration::from_secs(2) } else { POD_TIMEOUT };
    let is_ours = |pod: &RunningPod| {
        pod.namespace == pods.namespace && pod.controller.as_deref() == Some(pods.daemon_set.as_str())
    };
    let mut running = kubelet.running();
    // The borrow of the watched value must not live across an await.
    let found = tokio::time::timeout(patience, running.wait_for(|all| all.values().any(is_ours)))
        .await
        .ok()
        .and_then(|seen| seen.ok()?.values().find(|p| is_ours(p)).map(|p| p.name.clone()));
    let pod =
        found.ok_or_else(|| anyhow!("no pod of {}/{} runs on {}", pods.namespace, pods.daemon_set, kubelet.name()))?;
    let token = plane.kubeconfig_for_service_account(&pods.namespace, &pods.service_account, Some(&pod));
    tokio::time::timeout(patience, token).await.context("no answer to the token request")?
}

fn attach(host: FakeHost, index: u16, client: Client, options: &BedOptions) -> Result<BedNode> {
    let name = host.name().to_owned();
    let mut kubelet_options = KubeletOptions::new(&name, index);
    kubelet_options.labels = options.labels.iter().cloned().collect();
    kubelet_options.lease_period = options.lease_period;
    let kubelet = Arc::new(FakeKubelet::new(client, kubelet_options));
    // Subscribed before the first look, so that no boot is missed.
    let mut events = host.events();
    let boot = host.boot_now()?;
    kubelet.up(SystemInfo { boot_id: boot.id, os_image: boot.os_image });
    let link = tokio::spawn({
        let (kubelet, mut power) = (Arc::clone(&kubelet), host.watch_power());
        async move {
            loop {
                match events.recv().await {
                    Ok(HostEvent::Up(boot)) => kubelet.up(SystemInfo { boot_id: boot.id, os_image: boot.os_image }),
                    Ok(HostEvent::ShutdownRequested(_)) => kubelet.shutting_down(),
                    Ok(HostEvent::Down { .. }) => kubelet.down(),
                    Ok(HostEvent::Finalized { .. } | HostEvent::BootFailed(_)) => {}
                    Err(RecvError::Lagged(_)) => {
                        if let Power::Up(boot) = power.borrow_and_update().clone() {
                            kubelet.up(SystemInfo { boot_id: boot.id, os_image: boot.os_image });
                        }
                    }
                    Err(RecvError::Closed) => return,
                }
            }
        }
    });
    Ok(BedNode { name, host, kubelet, daemon: Mutex::default(), link })
}

/// An operator process with the machine's namespaces.
pub struct Operator {
    container: Container,
    log: PathBuf,
    process: Mutex<Option<Process>>,
}

impl Operator {
    /// Starts it again after a kill. An operator that still runs is left alone.
    pub fn start(&self) -> Result<()> {
        let mut slot = lock(&self.process);
        if slot.as_ref().is_some_and(|p| p.exited().is_none()) {
            return Ok(());
        }
        let mut cmd = Cmd::new("operator", &self.container.program)
            .args(&self.container.args)
            .clear_env()
            .env("PATH", crate::host::init::PATH);
        for (key, value) in &self.container.env {
            cmd = cmd.env(key, value);
        }
        *slot = Some(Process::spawn(cmd, &self.log)?);
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&self) {
        lock(&self.process).take();
    }

    /// `kill -9` and start.
    pub fn restart(&self) -> Result<()> {
        self.kill();
        self.start()
    }

    /// SIGTERM, then waits for its end.
    pub async fn terminate(&self, timeout: Duration) -> Result<ExitStatus> {
        let mut exit = match lock(&self.process).as_ref() {
            Some(process) => {
                process.signal(Signal::TERM);
                process.exit_watch()
            }
            None => bail!("the operator is not running"),
        };
        let ended = tokio::time::timeout(timeout, exit.wait_for(Option::is_some)).await;
        let status = ended.context("the operator does not end on SIGTERM")?.context("the operator is gone")?;
        status.ok_or_else(|| anyhow!("the operator has no exit status"))
    }

    /// Freezes (a partition, a long pause) or thaws it.
    pub fn freeze(&self, on: bool) {
        if let Some(process) = lock(&self.process).as_ref() {
            process.signal(if on { Signal::STOP } else { Signal::CONT });
        }
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<i32> {
        lock(&self.process).as_ref().filter(|p| p.exited().is_none()).map(Process::pid)
    }

    /// The log's end.
    pub fn log_tail(&self, lines: usize) -> String {
        crate::process::tail(&self.log, lines)
    }

    /// The log file, over all starts.
    pub fn log(&self) -> &Path {
        &self.log
    }
}
