//! A real control plane as plain processes: etcd, kube-apiserver, kube-controller-manager and, on request,
//! kube-scheduler, on free loopback ports with certificates of their own.
//!
//! The API server can be killed or frozen and started again on the same port and data. All of it is gone when the
//! value is dropped.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use rustix::process::Signal;

use crate::audit::{self, Mark, Request};
use crate::pki::{CertFiles, Pki};
use crate::process::{Cmd, Process, lock};
use crate::scratch::Scratch;
use crate::tools;

/// How long a component may take to answer, on a busy machine.
const READY: Duration = Duration::from_secs(90);
/// How often ports are chosen anew when somebody else took one between our look and the component's bind.
const PORT_ATTEMPTS: usize = 4;
/// Life of the service account tokens we hand out.
const TOKEN_SECONDS: i64 = 24 * 3600;

/// What to start, and how patient the control plane is with nodes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Start kube-scheduler (Deployments, DaemonSets).
    pub scheduler: bool,
    /// Start kube-controller-manager (PDB status, node lifecycle, garbage collection, service accounts…).
    pub controller_manager: bool,
    /// Without a sign of life for this long, the node-lifecycle controller marks a node Unknown.
    pub node_monitor_grace: Duration,
    /// Further flags for kube-apiserver.
    pub api_server_flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scheduler: false,
            controller_manager: true,
            node_monitor_grace: Duration::from_secs(120),
            api_server_flags: Vec::new(),
        }
    }
}

/// How the API server goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// Killed: connections are reset, new ones refused.
    Kill,
    /// Frozen: connections stay open and nothing answers.
    Freeze,
}

/// A running control plane.
pub struct ControlPlane {
    // Processes come before the folder: fields are dropped in this order.
    scheduler: Option<Process>,
    controller_manager: Option<Process>,
    api_server: Mutex<Option<Process>>,
    _etcd: Process,
    bin: PathBuf,
    pki: Pki,
    ports: Ports,
    options: Options,
    client: Client,
    scratch: Scratch,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    etcd: u16,
    etcd_peer: u16,
    api: u16,
    controller_manager: u16,
    scheduler: u16,
}

impl ControlPlane {
    /// Starts everything and returns when the API server is ready and the controllers have begun to work.
    pub async fn start(options: Options) -> Result<Self> {
        let bin = tokio::task::spawn_blocking(tools::kubernetes).await??;
        let mut last = None;
        for _ in 0..PORT_ATTEMPTS {
            match Self::start_on(Ports::choose()?, &bin, &options).await {
                Ok(plane) => return Ok(plane),
                Err(error) if format!("{error:#}").contains("address already in use") => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow!("no free ports")))
    }

    async fn start_on(ports: Ports, bin: &Path, options: &Options) -> Result<Self> {
        let scratch = Scratch::new("plane")?;
        let pki = Pki::create(&scratch.path().join("pki"))?;
        let etcd = start_etcd(bin, scratch.path(), ports)?;
        let server = format!("https://127.0.0.1:{}", ports.api);
        pki.server(
            "apiserver",
            &["127.0.0.1", "10.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"],
        )?;
        fs::write(scratch.path().join("audit-policy.yaml"), audit::POLICY)?;
        for (name, user, group) in [
            ("admin", "testbed-admin", Some("system:masters")),
            // The stand-in for things outside the cluster, told apart from the tests in the audit log.
            ("kubelet", "testbed-kubelet", Some("system:masters")),
            ("kcm", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
        ] {
            let cert = pki.client(name, user, group)?;
            write_kubeconfig(&kubeconfig_path(scratch.path(), name), &server, &pki.ca(), &User::Cert(cert))?;
        }
        let client = client_from(&kubeconfig_path(scratch.path(), "admin")).await?;
        let mut plane = Self {
            scheduler: None,
            controller_manager: None,
            api_server: Mutex::new(None),
            _etcd: etcd,
            bin: bin.to_owned(),
            pki,
            ports,
            options: options.clone(),
            client,
            scratch,
        };
        plane.start_api_server().await?;
        if options.controller_manager {
            plane.controller_manager = Some(plane.spawn_controller_manager()?);
        }
        if options.scheduler {
            plane.scheduler = Some(plane.spawn_scheduler()?);
        }
        if options.controller_manager {
            plane.wait_for_default_account().await?;
        }
        Ok(plane)
    }

    /// The administrator's client, without hidden retries: a 429 is returned as it is.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// A client from any kubeconfig, without hidden retries.
    pub async fn client_for(&self, kubeconfig: &Path) -> Result<Client> {
        client_from(kubeconfig).await
    }

    /// The path of a kubeconfig made at start: `admin` or `kubelet`.
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        kubeconfig_path(self.scratch.path(), name)
    }

    /// Address of the API server.
    pub fn server(&self) -> String {
        format!("https://127.0.0.1:{}", self.ports.api)
    }

    /// The folder of logs and files, removed on drop.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// A kubeconfig for a user by client certificate.
    pub fn kubeconfig_for_user(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let file = format!("user-{}", user.replace([':', '/'], "-"));
        let cert = self.pki.client(&file, user, group)?;
        let path = kubeconfig_path(self.scratch.path(), &file);
        write_kubeconfig(&path, &self.server(), &self.pki.ca(), &User::Cert(cert))?;
        Ok(path)
    }

    /// A kubeconfig with a token of a service account, as a pod gets it.
    ///
    /// With `pod` the token is bound to that pod, so that it carries the name of the pod's node and dies with the pod.
    pub async fn kubeconfig_for_service_account(
        &self,
        namespace: &str,
        account: &str,
        pod: Option<&str>,
    ) -> Result<PathBuf> {
        let bound = match pod {
            Some(name) => {
                let pods: Api<Pod> = Api::namespaced(self.client(), namespace);
                let pod = pods.get(name).await.with_context(|| format!("read pod {namespace}/{name}"))?;
                Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(name.to_owned()),
                    uid: pod.metadata.uid,
                })
            }
            None => None,
        };
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: None,
                bound_object_ref: bound,
                expiration_seconds: Some(TOKEN_SECONDS),
            }),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        let answer: TokenRequest = accounts
            .create_subresource("token", account, &PostParams::default(), &request)
            .await
            .with_context(|| format!("get a token for {namespace}/{account}"))?;
        let token = answer.status.and_then(|s| s.token).ok_or_else(|| anyhow!("the token request has no answer"))?;
        let path =
            kubeconfig_path(self.scratch.path(), &format!("sa-{namespace}-{account}-{}", pod.unwrap_or("unbound")));
        write_kubeconfig(&path, &self.server(), &self.pki.ca(), &User::Token(token))?;
        Ok(path)
    }

    /// Applies YAML (any number of documents) by server-side apply, as a person would with kubectl.
    pub async fn apply_yaml(&self, yaml: &str) -> Result<String> {
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "-"], Some(yaml)).await
    }

    /// Applies a file or a folder of YAML.
    pub async fn apply_path(&self, path: &Path) -> Result<String> {
        let path = path.to_string_lossy();
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &path], None).await
    }

    /// Runs the real kubectl as administrator and returns its stdout; stderr is in the error.
    pub async fn kubectl(&self, args: &[&str], stdin: Option<&str>) -> Result<String> {
        use tokio::io::AsyncWriteExt;
        let mut child = tokio::process::Command::new(self.bin.join("kubectl"))
            .arg("--kubeconfig")
            .arg(self.kubeconfig("admin"))
            .args(args)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start kubectl")?;
        if let Some(mut pipe) = child.stdin.take() {
            // A kubectl that fails early closes the pipe; its own message says why.
            let _ = pipe.write_all(stdin.unwrap_or_default().as_bytes()).await;
        }
        let out = child.wait_with_output().await?;
        if !out.status.success() {
            bail!("kubectl {} failed: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Takes the API server away.
    pub fn stop_api_server(&self, how: Outage) {
        let mut slot = lock(&self.api_server);
        match how {
            Outage::Kill => drop(slot.take()),
            Outage::Freeze => {
                if let Some(process) = slot.as_ref() {
                    process.signal(Signal::STOP);
                }
            }
        }
    }

    /// Brings the API server back on the same port and data; returns when it is ready.
    pub async fn start_api_server(&self) -> Result<()> {
        {
            let mut slot = lock(&self.api_server);
            match slot.as_ref() {
                Some(process) if process.exited().is_none() => process.signal(Signal::CONT),
                _ => *slot = Some(self.spawn_api_server()?),
            }
        }
        self.wait_ready().await
    }

    /// Waits until the API server says it is ready.
    pub async fn wait_ready(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let ask = self.client.request_text(request);
            let last = match tokio::time::timeout(Duration::from_secs(2), ask).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            if let Some(process) = lock(&self.api_server).as_ref()
                && let Some(status) = process.exited()
            {
                bail!("kube-apiserver ended ({status}):\n{}", process.log_tail(15));
            }
            if start.elapsed() > READY {
                let log = crate::process::tail(&self.log("kube-apiserver"), 15);
                bail!("kube-apiserver is not ready after {READY:?}: {last}\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The current end of the audit log.
    pub fn audit_mark(&self) -> Result<Mark> {
        audit::mark(&self.audit_log())
    }

    /// Every request since `mark` (reads by the control plane's own components are not logged).
    pub fn requests_since(&self, mark: Mark) -> Result<Vec<Request>> {
        audit::requests_since(&self.audit_log(), mark)
    }

    /// Requests since `mark` that ask for a change, in order. Lease renewals are included: see [`Request::is_lease`].
    pub fn writes_since(&self, mark: Mark) -> Result<Vec<Request>> {
        Ok(self.requests_since(mark)?.into_iter().filter(Request::is_write).collect())
    }

    /// Writes since `mark` counted by user, verb and resource (with subresource).
    pub fn write_counts_since(&self, mark: Mark) -> Result<BTreeMap<(String, String, String), usize>> {
        let mut counts = BTreeMap::new();
        for write in self.writes_since(mark)? {
            let resource = if write.subresource.is_empty() {
                write.resource
            } else {
                format!("{}/{}", write.resource, write.subresource)
            };
            *counts.entry((write.user, write.verb, resource)).or_default() += 1;
        }
        Ok(counts)
    }

    /// The log of a component.
    pub fn log(&self, component: &str) -> PathBuf {
        self.scratch.path().join("logs").join(format!("{component}.log"))
    }

    fn audit_log(&self) -> PathBuf {
        self.scratch.path().join("audit.log")
    }

    async fn wait_for_default_account(&self) -> Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), "default");
        let start = Instant::now();
        while accounts.get_opt("default").await.context("read the default service account")?.is_none() {
            if let Some(status) = self.controller_manager.as_ref().and_then(Process::exited) {
                let log = crate::process::tail(&self.log("kube-controller-manager"), 15);
                bail!("kube-controller-manager ended ({status}):\n{log}");
            }
            if start.elapsed() > READY {
                bail!("kube-controller-manager made no service account in {READY:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn spawn_api_server(&self) -> Result<Process> {
        let pki = self.scratch.path().join("pki");
        let path = |file: &str| pki.join(file).display().to_string();
        let cmd = Cmd::new("kube-apiserver", self.bin.join("kube-apiserver"))
            .args([
                format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd),
                "--bind-address=127.0.0.1".into(),
                "--advertise-address=127.0.0.1".into(),
                format!("--secure-port={}", self.ports.api),
                "--endpoint-reconciler-type=none".into(),
                "--service-cluster-ip-range=10.0.0.0/24".into(),
                "--allow-privileged=true".into(),
                "--profiling=false".into(),
                format!("--client-ca-file={}", self.pki.ca().display()),
                format!("--tls-cert-file={}", path("apiserver.crt")),
                format!("--tls-private-key-file={}", path("apiserver.key")),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-key-file={}", self.pki.token_public_key().display()),
                format!("--service-account-signing-key-file={}", self.pki.token_key().display()),
                format!("--requestheader-client-ca-file={}", self.pki.ca().display()),
                "--requestheader-allowed-names=front-proxy".into(),
                "--requestheader-username-headers=X-Remote-User".into(),
                "--requestheader-group-headers=X-Remote-Group".into(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                format!("--audit-policy-file={}", self.scratch.path().join("audit-policy.yaml").display()),
                format!("--audit-log-path={}", self.audit_log().display()),
                "--audit-log-maxsize=4096".into(),
            ])
            .args(&self.options.api_server_flags);
        Process::spawn(cmd, &self.log("kube-apiserver"))
    }

    fn spawn_controller_manager(&self) -> Result<Process> {
        let kubeconfig = self.kubeconfig("kcm").display().to_string();
        let cmd = Cmd::new("kube-controller-manager", self.bin.join("kube-controller-manager")).args([
            format!("--kubeconfig={kubeconfig}"),
            format!("--authentication-kubeconfig={kubeconfig}"),
            format!("--authorization-kubeconfig={kubeconfig}"),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.ports.controller_manager),
            "--leader-elect=false".into(),
            "--use-service-account-credentials=true".into(),
            format!("--root-ca-file={}", self.pki.ca().display()),
            format!("--service-account-private-key-file={}", self.pki.token_key().display()),
            "--controllers=*,-node-ipam-controller,-node-route-controller,-cloud-node-lifecycle-controller".into(),
            "--node-monitor-period=1s".into(),
            format!("--node-monitor-grace-period={}s", self.options.node_monitor_grace.as_secs()),
            "--profiling=false".into(),
            "--kube-api-qps=300".into(),
            "--kube-api-burst=500".into(),
        ]);
        Process::spawn(cmd, &self.log("kube-controller-manager"))
    }

    fn spawn_scheduler(&self) -> Result<Process> {
        let kubeconfig = self.kubeconfig("scheduler").display().to_string();
        let cmd = Cmd::new("kube-scheduler", self.bin.join("kube-scheduler")).args([
            format!("--kubeconfig={kubeconfig}"),
            format!("--authentication-kubeconfig={kubeconfig}"),
            format!("--authorization-kubeconfig={kubeconfig}"),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.ports.scheduler),
            "--leader-elect=false".into(),
            "--profiling=false".into(),
        ]);
        Process::spawn(cmd, &self.log("kube-scheduler"))
    }
}

fn start_etcd(bin: &Path, dir: &Path, ports: Ports) -> Result<Process> {
    let url = format!("http://127.0.0.1:{}", ports.etcd);
    let peer = format!("http://127.0.0.1:{}", ports.etcd_peer);
    let cmd = Cmd::new("etcd", bin.join("etcd")).args([
        "--name=t".into(),
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=t={peer}"),
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]);
    Process::spawn(cmd, &dir.join("logs/etcd.log"))
}

impl Ports {
    fn choose() -> Result<Self> {
        let mut ports = free_ports(5)?.into_iter();
        let mut next = || ports.next().ok_or_else(|| anyhow!("no free port"));
        Ok(Self { etcd: next()?, etcd_peer: next()?, api: next()?, controller_manager: next()?, scheduler: next()? })
    }
}

/// Free loopback ports below the range that outgoing connections use, so that none is taken while a server restarts.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    const LOW: u16 = 18_000;
    const SPAN: u16 = 14_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test binaries that run side by side begin in different places.
    let start = (std::process::id() as u16).wrapping_mul(101);
    let mut held = Vec::new();
    for _ in 0..SPAN {
        if held.len() == count {
            break;
        }
        let port = LOW + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % SPAN;
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push((listener, port));
        }
    }
    if held.len() < count {
        bail!("fewer than {count} free loopback ports between {LOW} and {}", LOW + SPAN);
    }
    Ok(held.into_iter().map(|(_, port)| port).collect())
}

enum User {
    Cert(CertFiles),
    Token(String),
}

fn kubeconfig_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.kubeconfig"))
}

fn write_kubeconfig(path: &Path, server: &str, ca: &Path, user: &User) -> Result<()> {
    let user = match user {
        User::Cert(files) => serde_json::json!({"client-certificate": files.cert, "client-key": files.key}),
        User::Token(token) => serde_json::json!({"token": token}),
    };
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": ca}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    fs::write(path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("write {}", path.display()))
}

async fn client_from(kubeconfig: &Path) -> Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}
