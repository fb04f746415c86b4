//! What happens in the demo, in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use osimage_crds::nodeos::Outcome;
use osimage_crds::osimage::{Health, Phase};
use osimage_crds::{NodeOS, OSImage, OSImageStatus};

use super::console::Console;
use super::example;
use super::fleet::Fleet;
use super::follow::Follower;
use super::live::{TICK, View};
use super::verdict::{self, Account, Evidence, Experience};
use crate::bed::{BedOptions, TestBed};
use crate::debian::DebianOs;
use crate::product::{NAMESPACE, Product};
use crate::repo::{Images, OsCommit};
use crate::scratch::{Scratch, interrupted};
use crate::server::{Fault, RepoServer};
use crate::wait::until;

const NODES: usize = 4;
const OSIMAGE: &str = "demo";
/// Bytes per second of the repository, so that a download can be watched.
const REPOSITORY_RATE: u64 = 700_000;
/// A rollout takes well under a minute.
const ROLLOUT_TIMEOUT: Duration = Duration::from_secs(240);
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// After the halt: whether the other nodes are really left alone.
const STILL: Duration = Duration::from_secs(3);
/// Events of `kubectl describe` that are shown.
const EVENTS_SHOWN: usize = 6;

/// Plays the demo; an error says why it failed. Everything has ended when this returns.
pub async fn run(console: &Arc<Console>, files: &Scratch) -> Result<()> {
    let product = set_up(console).await?;
    let result = async {
        install(console, &product).await?;
        let mut demo = Demo::begin(console, &product, files).await?;
        let first = demo.good_update().await?;
        demo.bad_update(first).await
    }
    .await;
    if result.is_err() && !interrupted() {
        console.step("It failed. What was seen last:");
        let report = product.bed.report().await;
        console.output(&report);
    }
    console.step("Cleaning up");
    drop(product);
    result
}

async fn set_up(console: &Arc<Console>) -> Result<Product> {
    console.step("A Debian as an OSTree image");
    let (images, template) = {
        let console = Arc::clone(console);
        let build = move || {
            let os = DebianOs::build_or_reuse(&|what| console.note(what))?;
            Ok::<_, anyhow::Error>((os.images()?, os.template()))
        };
        tokio::task::spawn_blocking(build).await??
    };
    for (commit, what) in [
        (&images.v1, "what all hosts run"),
        (&images.v2, "good: one more package"),
        (&images.v3, "bad: boots, and its self test fails"),
    ] {
        console.more(&format!("version {}  {}  {what}", commit.version, short(commit)));
    }
    let server = RepoServer::start(&images.repo.path())?;
    server.inject("/objects/", Fault::Rate(REPOSITORY_RATE));
    console.note(&format!("signed by {}, served on {} at {} kB/s", key(&images), server.url(), REPOSITORY_RATE / 1000));
    console.step(&format!("A control plane, and {NODES} hosts booted from version 1"));
    let bed = TestBed::start(BedOptions::new(NODES), &template).await?;
    let product = Product { bed, images, server };
    show(
        console,
        &product,
        &[
            "get",
            "nodes",
            "-o",
            "custom-columns=NODE:.metadata.name,OS:.status.nodeInfo.osImage,BOOT:.status.nodeInfo.bootID",
        ],
    )
    .await?;

    Ok(product)
}

async fn install(console: &Console, product: &Product) -> Result<()> {
    console.step("The product: chart, operator, a daemon on each node");
    console
        .command(&format!("helm install osimage-operator charts/osimage-operator -n {NAMESPACE} --create-namespace"));
    product.install().await?;
    product.start_daemons().await?;
    product.start_operator("operator-0").await.map(drop)
}

/// Types a command of kubectl and shows what it prints.
async fn show(console: &Console, product: &Product, args: &[&str]) -> Result<String> {
    console.command(&format!("kubectl {}", args.join(" ")));
    let text = product.kubectl(args).await?;
    console.output(&text);
    Ok(text)
}

fn short(commit: &OsCommit) -> &str {
    commit.checksum.get(..12).unwrap_or(&commit.checksum)
}

/// The end of the key's fingerprint.
fn key(images: &Images) -> &str {
    images.key.id.get(24..).unwrap_or(&images.key.id)
}

struct Demo<'a> {
    console: &'a Console,
    product: &'a Product,
    files: &'a Scratch,
    follower: Follower,
    /// Least replicas of the workload.
    least: usize,
}

/// What the first rollout leaves for the verdict.
struct First {
    experiences: Vec<Experience>,
    arrived: usize,
}

impl<'a> Demo<'a> {
    /// Starts the workload and the watches.
    async fn begin(console: &'a Console, product: &'a Product, files: &'a Scratch) -> Result<Self> {
        console.step("A workload that must not go down");
        let file = example::full_path("workload.yaml");
        apply(console, product, "workload.yaml", &file.display().to_string()).await?;
        let start = Instant::now().checked_sub(console.elapsed()).unwrap_or_else(Instant::now);
        let follower = Follower::start(&product.bed.client(), OSIMAGE, "app=web", start);
        let number = async |args: &[&str]| -> Result<usize> {
            product.kubectl(args).await?.trim().parse().with_context(|| format!("kubectl {}", args.join(" ")))
        };
        let replicas = number(&["get", "deployment", "web", "-o", "jsonpath={.spec.replicas}"]).await?;
        let least = number(&["get", "pdb", "web", "-o", "jsonpath={.spec.minAvailable}"]).await?;
        until("the workload to be available", WORKLOAD_TIMEOUT, || async {
            let available = follower.look(|fleet| fleet.workload.available());
            if available < replicas { bail!("{available} of {replicas} replicas") } else { Ok(()) }
        })
        .await?;
        follower.edit(|fleet| fleet.workload.remember());
        console.note(&format!("{replicas} replicas are available, {least} must be at any time"));
        Ok(Self { console, product, files, follower, least })
    }

    async fn good_update(&mut self) -> Result<First> {
        let commit = &self.product.images.v2;
        self.console.step(&format!("Version {}: good. One node at a time", commit.version));
        let boots = self.boots()?;
        self.roll_out(commit, |status| match status.phase {
            Some(Phase::Updated) => Some(Ok(())),
            Some(Phase::Halted) => Some(Err(anyhow!("the good commit was rejected: {}", status.message))),
            _ => None,
        })
        .await?;
        self.product.nothing_left().await?;
        show(self.console, self.product, &["get", "osimage"]).await?;
        let arrived =
            self.product.bed.nodes.iter().filter(|n| n.host.booted_commit().ok().as_ref() == Some(&commit.checksum));
        Ok(First { arrived: arrived.count(), experiences: self.experiences(commit, &boots)? })
    }

    async fn bad_update(&mut self, first: First) -> Result<()> {
        let commit = &self.product.images.v3;
        self.console.step(&format!("Version {}: bad. It boots, and its health checks fail", commit.version));
        let boots = self.boots()?;
        self.roll_out(commit, |status| match status.phase {
            Some(Phase::Halted) => Some(Ok(())),
            Some(Phase::Updated) => Some(Err(anyhow!("the bad commit was taken for good"))),
            _ => None,
        })
        .await?;
        self.product.nothing_left().await?;
        // Nothing to wait for: the point is that nothing happens.
        tokio::time::sleep(STILL).await;
        show(self.console, self.product, &["get", "osimage"]).await?;
        show(self.console, self.product, &["get", "nodeos"]).await?;
        self.console.command(&format!("kubectl describe osimage {OSIMAGE}"));
        let text = self.product.kubectl(&["describe", "osimage", OSIMAGE]).await?;
        self.console.output(&relevant(&text));
        let experiences = self.experiences(commit, &boots)?;
        self.conclude(first, experiences)
    }

    /// Applies the example with this commit and shows the rollout until `over` has an answer.
    async fn roll_out(&self, commit: &OsCommit, over: impl Fn(&OSImageStatus) -> Option<Result<()>>) -> Result<()> {
        self.follower.edit(Fleet::begin);
        let told = self.follower.look(|fleet| fleet.told.len());
        self.apply_osimage(commit).await?;
        let mut view = View::new(self.console, self.least, told);
        let begin = Instant::now();
        let answer = loop {
            let answer = self.follower.look(|fleet| {
                view.show(fleet);
                current(fleet, commit).and_then(&over)
            });
            if let Some(answer) = answer {
                break answer;
            }
            if self.product.bed.operator(0)?.pid().is_none() {
                break Err(anyhow!("the operator has ended"));
            }
            if begin.elapsed() > ROLLOUT_TIMEOUT {
                let last = self.status().map(|s| s.message).unwrap_or_default();
                break Err(anyhow!("version {} is not out after {ROLLOUT_TIMEOUT:?}: {last}", commit.version));
            }
            tokio::time::sleep(TICK).await;
        };
        self.console.settle();
        answer
    }

    /// `kubectl apply` of the example, and what matters in it.
    async fn apply_osimage(&self, commit: &OsCommit) -> Result<()> {
        let (images, url) = (&self.product.images, self.product.server.url());
        let example = example::read("osimage.yaml")?;
        let filled = example::fill(&example, &url, &commit.checksum, &images.key.public_armored)?;
        let file = self.files.path().join(format!("osimage-{}.yaml", commit.version));
        std::fs::write(&file, &filled)?;
        apply(self.console, self.product, "osimage.yaml", &file.display().to_string()).await?;
        let spec = serde_saphyr::from_str::<OSImage>(&filled)?.spec;
        let Health { deadline, soak, checks } = &spec.health;
        let names: Vec<&str> = checks.iter().map(|c| c.name.as_str()).collect();
        for line in [
            format!("url: {url}"),
            format!("commit: {}… (version {}), signed by {}", short(commit), commit.version, key(images)),
            format!("maxUnavailable: {}", budget(&spec.rollout.max_unavailable)),
            format!("health: deadline {deadline}, soak {soak}, checks {}", names.join(" and ")),
        ] {
            self.console.more(&format!("    {line}"));
        }
        Ok(())
    }

    fn conclude(&self, first: First, second: Vec<Experience>) -> Result<()> {
        let nodes = &self.product.bed.nodes;
        let accounts = nodes.iter().zip(first.experiences).zip(second).map(|((node, good), bad)| {
            let commit = node.host.booted_commit()?;
            let version = self.follower.look(|fleet| fleet.nodes.get(&node.name)?.version().map(str::to_owned));
            Ok(Account { node: node.name.clone(), commit, version: version.unwrap_or_default(), good, bad })
        });
        let evidence = Evidence {
            nodes: accounts.collect::<Result<Vec<_>>>()?,
            good: self.product.images.v2.checksum.clone(),
            on_good_after_first: first.arrived,
            halted_because: self.status().map(|s| s.message).unwrap_or_default(),
            lowest: self.follower.look(|fleet| fleet.workload.lowest()).unwrap_or(0),
            least: self.least,
            cordoned: self
                .follower
                .look(|fleet| fleet.nodes.iter().filter(|(_, n)| n.cordoned()).map(|(name, _)| name.clone()).collect()),
        };
        self.console.step("What each host runs, and how long it was cordoned or not Ready");
        for line in verdict::table(&evidence.nodes) {
            self.console.row(&line);
        }
        let failed = verdict::print(self.console, &verdict::checks(&evidence));
        if failed.is_empty() { Ok(()) } else { bail!(failed.join("; ")) }
    }

    fn status(&self) -> Option<OSImageStatus> {
        self.follower.look(|fleet| fleet.image.as_ref()?.status.clone())
    }

    fn boots(&self) -> Result<Vec<u32>> {
        self.product.bed.nodes.iter().map(|n| Ok(n.host.boot_now()?.number)).collect()
    }

    /// What each node went through for `commit`, with the boots that it had before.
    fn experiences(&self, commit: &OsCommit, before: &[u32]) -> Result<Vec<Experience>> {
        let (boots, now) = (self.boots()?, Instant::now());
        let nodes = self.product.bed.nodes.iter().zip(boots.iter().zip(before));
        Ok(nodes
            .map(|(node, (boots, before))| {
                self.follower.look(|fleet| {
                    let track = fleet.nodes.get(&node.name);
                    let outcome = track.and_then(|t| outcome_of(t.node_os.as_ref()?, commit));
                    Experience { outcome, boots: boots - before, down: track.map(|t| t.down(now)).unwrap_or_default() }
                })
            })
            .collect())
    }
}

fn budget(value: &IntOrString) -> String {
    match value {
        IntOrString::Int(n) => n.to_string(),
        IntOrString::String(text) => text.clone(),
    }
}

async fn apply(console: &Console, product: &Product, name: &str, file: &str) -> Result<()> {
    console.command(&format!("kubectl apply -f {}", example::path(name)));
    console.output(&product.kubectl(&["apply", "-f", file]).await?);
    Ok(())
}

/// The status, if it speaks of this commit and no node is in a slot.
fn current<'f>(fleet: &'f Fleet, commit: &OsCommit) -> Option<&'f OSImageStatus> {
    let asked = fleet.image.as_ref()?.spec.image.ostree.commit.as_str();
    fleet.status().filter(|s| asked == commit.checksum && s.slots.is_empty())
}

fn outcome_of(node_os: &NodeOS, commit: &OsCommit) -> Option<Outcome> {
    let attempt = node_os.status.as_ref()?.last_attempt.as_ref()?;
    (attempt.commit.as_str() == commit.checksum).then_some(attempt.outcome)?
}

/// Of `kubectl describe osimage`: the blockers and the last events.
fn relevant(text: &str) -> String {
    let mut kept = Vec::new();
    let mut inside = false;
    for line in text.lines().skip_while(|l| *l != "Status:").take_while(|l| !l.starts_with("Events:")) {
        let depth = line.len() - line.trim_start().len();
        if depth <= 2 {
            inside = line == "  Blockers:";
        }
        if inside {
            kept.push(line);
        }
    }
    let events: Vec<&str> = text.lines().skip_while(|l| !l.starts_with("Events:")).collect();
    let (head, rest) = events.split_at(events.len().min(3));
    kept.extend(head);
    kept.extend(&rest[rest.len().saturating_sub(EVENTS_SHOWN)..]);
    kept.join("\n")
}
