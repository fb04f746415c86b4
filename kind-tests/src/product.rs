//! The product on a bed, installed as its users install it: the chart by real Helm, the shipped binaries with the
//! rights that the chart gives them. The operator runs as a process beside the cluster, the daemons in their hosts.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use kube::{Api, ResourceExt};
use osimage_crds::{NodeOS, OSImage};

use crate::{
    bed::{BedOptions, DaemonPods, Operator, TestBed},
    cluster::{ControlPlane, free_ports},
    daemon::Container,
    host::sysroot::Template,
    repo::{Images, OsCommit},
    server::RepoServer,
    tools,
};

/// Namespace and release of the chart.
pub const NAMESPACE: &str = "osimage-system";
/// Name of the release, and so of everything in it.
pub const RELEASE: &str = "osimage-operator";
const DAEMON: &str = "osimage-operator-node-daemon";

/// A bed with the product on it.
pub struct Product {
    /// Control plane, hosts, kubelets, daemons, operators.
    pub bed: TestBed,
    /// What can be installed on the hosts.
    pub images: Images,
    /// Serves it.
    pub server: RepoServer,
}

impl Product {
    /// `nodes` synthetic hosts on v1, the chart installed, daemons and one operator running.
    pub async fn start(nodes: usize) -> Result<Self> {
        let images = Images::synthetic()?;
        let template = Template::synthetic(&images.repo.path(), &images.v1)?;
        Self::with(BedOptions::new(nodes), images, &template).await
    }

    /// The same with hosts and images of one's own.
    pub async fn with(options: BedOptions, images: Images, template: &Template) -> Result<Self> {
        let server = RepoServer::start(&images.repo.path())?;
        let bed = TestBed::start(options, template).await?;
        let product = Product { bed, images, server };
        product.install().await?;
        product.start_daemons().await?;
        product.start_operator("operator-0").await?;
        Ok(product)
    }

    /// `helm install`. The Deployment has no replicas: the operator is a process of ours.
    pub async fn install(&self) -> Result<()> {
        helm(&self.bed.plane, &["install", RELEASE, "--create-namespace", "--set", "operator.replicas=0"]).await
    }

    /// Starts one more operator, with its service account's token.
    pub async fn start_operator(&self, name: &str) -> Result<Arc<Operator>> {
        self.operator(name, true).await
    }

    /// Starts one more operator that acts without asking for the lease, as one that was cut off and believes that
    /// it still holds it.
    pub async fn start_rival(&self, name: &str) -> Result<Arc<Operator>> {
        self.operator(name, false).await
    }

    async fn operator(&self, name: &str, elect: bool) -> Result<Arc<Operator>> {
        let kubeconfig = self.bed.plane.kubeconfig_for_service_account(NAMESPACE, RELEASE, None).await?;
        let own = self.bed.plane.dir().join(format!("{name}.kubeconfig"));
        std::fs::copy(&kubeconfig, &own)?;
        let port = free_ports(1)?.first().copied().context("no free port")?;
        let env = [
            ("KUBECONFIG", own.display().to_string()),
            ("POD_NAMESPACE", NAMESPACE.to_owned()),
            ("POD_NAME", name.to_owned()),
            ("METRICS_ADDRESS", format!("127.0.0.1:{port}")),
            ("LEADER_ELECT", elect.to_string()),
            ("LEASE_NAME", RELEASE.to_owned()),
            ("LEASE_DURATION", "3s".to_owned()),
            ("LOG_FORMAT", "text".to_owned()),
            ("RUST_LOG", "info,osimage_operator=debug".to_owned()),
        ];
        let env = env.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        self.bed.start_operator(Container { program: tools::shipped("osimage-operator")?, args: vec![], env })
    }

    /// Runs the node daemon on every node.
    pub async fn start_daemons(&self) -> Result<()> {
        let pods =
            DaemonPods { namespace: NAMESPACE.into(), daemon_set: DAEMON.into(), service_account: DAEMON.into() };
        let program = tools::shipped("osimage-node-daemon")?;
        let make = Arc::new(move |context: &crate::bed::DaemonContext| {
            let env = [
                ("KUBECONFIG", context.kubeconfig.display().to_string()),
                ("NODE_NAME", context.node.clone()),
                ("METRICS_ADDRESS", String::new()),
                ("LOG_FORMAT", "text".to_owned()),
                ("RUST_LOG", "info,osimage_node_daemon=debug".to_owned()),
            ];
            let env = env.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            Ok(Container { program: program.clone(), args: vec![], env })
        });
        self.bed.start_daemons(&pods, make).await
    }

    /// An OSImage that moves every node to `commit`, with deadlines short enough for a test, and the self test of
    /// the tree as its health check. `edit` may change anything.
    pub fn manifest(&self, commit: &OsCommit, edit: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut object = serde_json::json!({
            "apiVersion": "osimage.dev/v1alpha1",
            "kind": "OSImage",
            "metadata": {"name": "fleet"},
            "spec": {
                "image": {"ostree": {
                    "url": self.server.url(),
                    "commit": commit.checksum,
                    "verification": {"gpg": {"keys": self.images.key.public_armored}},
                }},
                "nodeSelector": {},
                "reboot": {"timeout": "60s"},
                "health": {
                    "deadline": "20s",
                    "soak": "1s",
                    "checks": [{"name": "self-test", "exec": {"command": ["/bin/sh", "-c", SELF_TEST]}}],
                },
            },
        });
        edit(&mut object);
        object.to_string()
    }

    /// Applies [`Product::manifest`].
    pub async fn apply(&self, commit: &OsCommit, edit: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
        self.bed.plane.apply_yaml(&self.manifest(commit, edit)).await.map(drop)
    }

    /// The OSImage `fleet`.
    pub async fn osimage(&self) -> Result<OSImage> {
        Ok(Api::<OSImage>::all(self.bed.client()).get("fleet").await?)
    }

    /// The NodeOS of a node.
    pub async fn node_os(&self, node: &str) -> Result<NodeOS> {
        Ok(Api::<NodeOS>::all(self.bed.client()).get(node).await?)
    }

    /// Waits until the OSImage `fleet` says Ready for `commit`, and sees for itself that it is true.
    pub async fn wait_updated(&self, commit: &OsCommit, timeout: Duration) -> Result<()> {
        self.wait_phase("Updated", commit, timeout).await?;
        self.nothing_left().await?;
        for node in &self.bed.nodes {
            let booted = node.host.booted_commit()?;
            if booted != commit.checksum {
                bail!("{} runs {booted}, not {}", node.name, commit.checksum);
            }
        }
        Ok(())
    }

    /// Waits until the OSImage `fleet` is in this phase for `commit`, with no slot taken.
    pub async fn wait_phase(&self, phase: &str, commit: &OsCommit, timeout: Duration) -> Result<OSImage> {
        self.bed
            .until(&format!("OSImage fleet to be {phase} on {}", commit.version), timeout, || async {
                let image = self.osimage().await?;
                let status = image.status.clone().unwrap_or_default();
                let current = image.spec.image.ostree.commit.as_str() == commit.checksum
                    && status.observed_generation == image.metadata.generation;
                let is = status.phase.map(|p| format!("{p:?}")).unwrap_or_default();
                if !current || is != phase || !status.slots.is_empty() {
                    bail!("it is {is:?} with slots {:?}: {}", status.slots, status.message);
                }
                Ok(image)
            })
            .await
    }

    /// No node is cordoned, no cordon is signed, no permit is out.
    pub async fn nothing_left(&self) -> Result<()> {
        self.bed
            .until("nodes to be given back", Duration::from_secs(20), || async {
                let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(self.bed.client());
                for node in nodes.list(&Default::default()).await? {
                    let cordoned = node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
                    if cordoned || node.annotations().contains_key(osimage_crds::names::CORDONED_BY) {
                        bail!("{} is still cordoned", node.name_any());
                    }
                }
                let node_oses: Api<NodeOS> = Api::all(self.bed.client());
                match node_oses.list(&Default::default()).await?.items.iter().find(|n| n.spec.permit.is_some()) {
                    Some(node_os) => Err(anyhow!("{} still has a permit", node_os.name_any())),
                    None => Ok(()),
                }
            })
            .await
    }

    /// Runs commands of the real kubectl as administrator.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.bed.plane.kubectl(args, None).await
    }
}

/// What the trees of the bed test themselves with.
pub const SELF_TEST: &str =
    "if test -e /usr/lib/osimage-test/broken; then echo 'self test: /usr/lib/osimage-test/broken exists'; exit 1; fi";

/// Runs the real Helm on the chart of this repository.
pub async fn helm(plane: &ControlPlane, args: &[&str]) -> Result<()> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/osimage-operator");
    let (verb, rest) = args.split_first().context("helm needs a verb")?;
    let (release, rest) = rest.split_first().context("helm needs a release")?;
    let mut command = tokio::process::Command::new(tools::kubernetes()?.join("helm"));
    command.arg(verb).arg(release);
    if *verb != "uninstall" {
        command.arg(chart);
    }
    // Its caches belong to the bed, not to the person who runs it.
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, plane.dir().join("helm"));
    }
    command.args(rest).args(["--namespace", NAMESPACE]).arg("--kubeconfig").arg(plane.kubeconfig("admin"));
    let output = command.kill_on_drop(true).output().await.context("run helm")?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "helm {}: {}{}",
        args.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
