//! The daemon: look, plan, tell, do one step, wait; over and over.
//!
//! ```text
//!   watch of the NodeOS ─┐
//!   a download moved ────┤            ┌► publish (own task, when something changed)
//!   a round of checks ───┼─► look ─► plan
//!   the plan's own time ─┘            └► one step ─► look again
//! ```
//! Everything goes on while the API server is away, and starts when it is away: until its first answer nothing is
//! taken up and nothing dropped, but an update on trial is verified, and sent back at its deadline.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use futures::{Stream, StreamExt};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use osimage_crds::{
    Commit, NodeOS,
    nodeos::{NodePhase, Permit, ProblemReason},
    osimage::Image,
};
use osimage_planner::host::{self, HostPlan, HostStep, Stage, Wanted};
use osimage_runtime::{admin, logging, shutdown};

use crate::{
    args,
    checks::Checks,
    execute::{Executor, step_name},
    host_files::HostFiles,
    metrics::Metrics,
    observe::{Observation, Observer, record_on_trial},
    protocol::Failure,
    publish::{self, Known, Publisher},
    pull::{Ended, Pulls},
    report,
    trouble::{LONGEST_PAUSE, Trouble},
    worker_client::Workers,
};

/// The host is looked at this often, also when nothing calls for it: others change it too.
const LOOK_AT_LEAST: Duration = Duration::from_secs(60);
/// After a look that failed, or a step that succeeded and left everything as it was.
const LOOK_SOON: Duration = Duration::from_secs(5);
/// How long a read of the NodeOS may take.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// How long a reboot waits for the status to be written.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// The way back and what closes an attempt is not put off for longer.
const LONGEST_PAUSE_ON_TRIAL: Duration = Duration::from_secs(10);

/// Runs until it is told to stop.
pub fn main(args: args::Daemon) -> ExitCode {
    logging::init(args.log_format);
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(run(args)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: args::Daemon) -> anyhow::Result<()> {
    let node = args.node_name.filter(|name| !name.is_empty()).context("set --node-name or NODE_NAME")?;
    let client = Client::try_default().await.context("find the API server (in the cluster, or by KUBECONFIG)")?;
    let metrics = Metrics::new().context("register metrics")?;
    let ready = Arc::new(AtomicBool::new(false));
    let workers = Workers::new(args.host.clone()).context("start the thread that starts workers")?;
    let daemon = Daemon::new(client.clone(), &node, workers, HostFiles::new(&args.host.host_root), &metrics, &ready);
    let watch = watcher(Api::all(client), watcher::Config::default().fields(&format!("metadata.name={node}")));
    tracing::info!(node, "watches over this node");
    tokio::select! {
        () = daemon.run(watch.default_backoff()) => Ok(()),
        () = serve_admin(args.metrics_address, metrics, ready) => Ok(()),
        signal = shutdown::signal() => {
            tracing::info!(node, signal, "stops");
            Ok(())
        }
    }
}

/// A host on trial needs its daemon more than its metrics: an endpoint that fails is told, not died of.
async fn serve_admin(address: String, metrics: Metrics, ready: Arc<AtomicBool>) {
    let is_ready = move || ready.load(Ordering::Relaxed);
    if let Err(error) = admin::serve(&address, metrics.registry, is_ready).await {
        tracing::error!(address, %error, "cannot serve metrics");
    }
    std::future::pending().await
}

/// What is known of the NodeOS.
enum Asked {
    Unknown,
    Nothing,
    Object(Box<NodeOS>),
}

impl Asked {
    fn wanted(&self) -> Wanted<'_> {
        match self {
            Asked::Unknown => Wanted::Unknown,
            Asked::Nothing => Wanted::Nothing,
            Asked::Object(object) => Wanted::Spec(&object.spec),
        }
    }

    fn object(&self) -> Option<&NodeOS> {
        match self {
            Asked::Object(object) => Some(object),
            Asked::Unknown | Asked::Nothing => None,
        }
    }

    fn os_image(&self) -> String {
        self.object().map(|o| o.spec.os_image.name.clone()).unwrap_or_default()
    }
}

struct Daemon {
    node: String,
    api: Api<NodeOS>,
    workers: Workers,
    observer: Observer,
    executor: Executor,
    checks: Checks,
    pulls: Pulls,
    trouble: Trouble,
    asked: Asked,
    seen_in_list: Option<Box<NodeOS>>,
    known: Known,
    publisher: Publisher,
    metrics: Metrics,
    ready: Arc<AtomicBool>,
    last: Last,
}

/// What was last done or said, so that it is neither done in a circle nor said twice.
#[derive(Default)]
struct Last {
    told: Option<(NodePhase, String)>,
    /// A step that is not taken again before this time.
    not_before: Option<(HostStep, Instant)>,
    /// What trouble is remembered for.
    spec: Option<(Option<Image>, Option<Permit>, Option<String>)>,
}

impl Daemon {
    fn new(
        client: Client,
        node: &str,
        workers: Workers,
        host: HostFiles,
        metrics: &Metrics,
        ready: &Arc<AtomicBool>,
    ) -> Daemon {
        let known = Known::default();
        Daemon {
            node: node.to_owned(),
            observer: Observer::new(workers.clone(), host.clone()),
            executor: Executor::new(workers.clone(), host),
            checks: Checks::default(),
            pulls: Pulls::default(),
            trouble: Trouble::default(),
            asked: Asked::Unknown,
            seen_in_list: None,
            api: Api::all(client.clone()),
            publisher: Publisher::start(client, node.to_owned(), known.clone(), metrics.clone()),
            known,
            metrics: metrics.clone(),
            ready: ready.clone(),
            last: Last::default(),
            workers,
        }
    }

    async fn run(mut self, watch: impl Stream<Item = watcher::Result<watcher::Event<NodeOS>>>) {
        let mut watch = std::pin::pin!(watch);
        loop {
            let seen = self.observer.look(&self.checks, &self.trouble).await;
            self.ready.store(seen.stale.is_none(), Ordering::Relaxed);
            self.checks.follow(record_on_trial(&seen.state), &self.workers);
            let HostPlan { step, report, wake } = host::plan(&seen.state, self.asked.wanted());
            let pull = match &step {
                Some(HostStep::Pull(image)) => Some(image.as_ref()),
                Some(_) | None => None,
            };
            self.pulls.follow(pull, &self.asked.os_image(), &self.workers);
            self.tell(&seen, report);
            let mut wake = wake.unwrap_or(LOOK_AT_LEAST).min(LOOK_AT_LEAST);
            if seen.stale.is_some() {
                wake = wake.min(LOOK_SOON);
            }
            if let Some(step) = step.filter(|step| !matches!(step, HostStep::Pull(_))) {
                match self.hold_back(&step) {
                    Some(pause) => wake = wake.min(pause),
                    None => {
                        if self.may_still(&step, &seen).await {
                            self.carry_out(step, &seen).await;
                        }
                        continue;
                    }
                }
            }
            tokio::select! {
                Some(event) = watch.next() => self.heard(event),
                ended = self.pulls.changed() => self.pull_moved(ended),
                () = self.checks.round_ended() => {}
                () = tokio::time::sleep(wake) => {}
            }
        }
    }

    /// How long a step has still to wait.
    fn hold_back(&self, step: &HostStep) -> Option<Duration> {
        let again = self.last.not_before.as_ref().filter(|(last, _)| last == step);
        let again = again.map(|(_, at)| at.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero());
        match step {
            HostStep::Reboot => again.max(self.executor.reboot_pause()),
            _ => again,
        }
    }

    /// A watch may be behind, and a permit may have been withdrawn meanwhile: it is read once more before it is used
    /// up. The way back needs no permit, and asks nobody.
    async fn may_still(&mut self, step: &HostStep, seen: &Observation) -> bool {
        let forward = seen.state.record.as_ref().is_some_and(|r| r.stage == Stage::Underway);
        if !matches!(step, HostStep::Reboot) || !forward {
            return true;
        }
        let unanswered = match tokio::time::timeout(READ_LIMIT, self.api.get_opt(&self.node)).await {
            Ok(Ok(object)) => {
                self.ask(object.map_or(Asked::Nothing, |object| Asked::Object(Box::new(object))));
                return host::plan(&seen.state, self.asked.wanted()).step.as_ref() == Some(step);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", READ_LIMIT.as_secs()),
        };
        let message = format!("waits for the API server to say that the permit to reboot still stands: {unanswered}");
        tracing::warn!(node = self.node, "{message}");
        let failure = Failure::transient(ProblemReason::RebootFailed, message);
        self.failed(self.commit_of(step, seen).as_ref(), failure, LONGEST_PAUSE_ON_TRIAL);
        false
    }

    async fn carry_out(&mut self, step: HostStep, seen: &Observation) {
        let (name, commit) = (step_name(&step), self.commit_of(&step, seen));
        let short = commit.as_ref().map(Commit::short).unwrap_or_default().to_owned();
        let attempt = seen.state.record.as_ref().map(|r| r.attempt.0.clone()).unwrap_or_default();
        tracing::info!(node = self.node, step = name, commit = short, attempt, "takes a step");
        if matches!(step, HostStep::Reboot) {
            self.publisher.flush(LAST_WORDS).await;
        }
        let os_image = self.asked.os_image();
        let result = self.executor.run(&step, &seen.state, &os_image).await;
        self.observer.forget();
        self.metrics.step(&step, result.as_ref().err().map(|f| f.reason));
        match result {
            Ok(()) => {
                self.trouble.clear();
                self.last.not_before = Some((step, Instant::now() + LOOK_SOON));
            }
            Err(failure) => {
                tracing::error!(node = self.node, step = name, commit = short, attempt, %failure, "a step failed");
                let longest = match step {
                    HostStep::Release { .. }
                    | HostStep::Disarm
                    | HostStep::Arm(_)
                    | HostStep::Stage(_)
                    | HostStep::Pull(_) => LONGEST_PAUSE,
                    HostStep::Reboot | HostStep::Confirm(_) | HostStep::Close(_) | HostStep::RollBack(_) => {
                        LONGEST_PAUSE_ON_TRIAL
                    }
                };
                self.failed(commit.as_ref(), failure, longest);
                let retry = self.trouble.as_seen(Instant::now()).and_then(|t| t.retry_in).unwrap_or(LOOK_SOON);
                self.last.not_before = Some((step, Instant::now() + retry));
            }
        }
    }

    fn failed(&mut self, commit: Option<&Commit>, failure: Failure, longest: Duration) {
        if let Some(commit) = commit {
            self.trouble.failed(commit, failure, longest, fastrand::f64());
        }
    }

    /// The commit that a step is about; the planner looks trouble up by it.
    fn commit_of(&self, step: &HostStep, seen: &Observation) -> Option<Commit> {
        match step {
            HostStep::Pull(image) | HostStep::Stage(image) => Some(image.ostree.commit.clone()),
            HostStep::Arm(record)
            | HostStep::Confirm(record)
            | HostStep::Close(record)
            | HostStep::RollBack(record) => Some(record.commit.clone()),
            HostStep::Reboot | HostStep::Disarm => seen.state.record.as_ref().map(|r| r.commit.clone()),
            HostStep::Release { .. } => {
                let image = self.asked.object().and_then(|o| o.spec.image.as_ref());
                image.map(|i| i.ostree.commit.clone())
            }
        }
    }

    fn pull_moved(&mut self, ended: Option<Ended>) {
        let Some(Ended { commit, result, bytes }) = ended else { return };
        self.observer.forget();
        self.metrics.pulled(bytes, result.as_ref().err().map(|f| f.reason));
        match result {
            Ok(()) => {
                tracing::info!(node = self.node, %commit, bytes, "downloaded, verified and held");
                self.trouble.clear();
            }
            Err(failure) => {
                tracing::warn!(node = self.node, %commit, bytes, %failure, "the download failed");
                if bytes > 0 {
                    self.trouble.moved_on();
                }
                self.failed(Some(&commit), failure, LONGEST_PAUSE);
            }
        }
    }

    /// Something about the NodeOS.
    fn heard(&mut self, event: watcher::Result<watcher::Event<NodeOS>>) {
        match event {
            Ok(watcher::Event::Apply(object)) => self.ask(Asked::Object(Box::new(object))),
            Ok(watcher::Event::Delete(_)) => self.ask(Asked::Nothing),
            Ok(watcher::Event::Init) => self.seen_in_list = None,
            Ok(watcher::Event::InitApply(object)) => self.seen_in_list = Some(Box::new(object)),
            Ok(watcher::Event::InitDone) => {
                let asked = self.seen_in_list.take().map_or(Asked::Nothing, Asked::Object);
                self.ask(asked);
            }
            Err(error) => tracing::warn!(node = self.node, %error, "cannot watch the NodeOS"),
        }
    }

    fn ask(&mut self, asked: Asked) {
        // A watch that is behind must not bring back what was read past it.
        if let (Some(new), Some(old)) = (asked.object(), self.asked.object())
            && publish::is_older(new, old)
        {
            return;
        }
        match asked.object() {
            Some(object) => self.known.offer(object.clone()),
            None => self.known.clear(),
        }
        let spec = asked.object().map(|o| (o.spec.image.clone(), o.spec.permit.clone(), o.spec.retry.clone()));
        if spec != self.last.spec {
            self.trouble.clear();
            self.last.not_before = None;
            self.last.spec = spec;
        }
        self.asked = asked;
    }

    fn tell(&mut self, seen: &Observation, report: host::Report) {
        let said = (report.phase, report.message.clone());
        self.metrics.phase(report.phase);
        if self.last.told.as_ref() != Some(&said) {
            let attempt = report.attempt.as_ref().map(|a| a.attempt.0.as_str()).unwrap_or_default();
            tracing::info!(node = self.node, phase = said.0.as_str(), attempt, "{}", said.1);
            self.last.told = Some(said);
        }
        if let Some(failure) = &seen.stale {
            tracing::warn!(node = self.node, %failure, "cannot look at the host");
        }
        let status = self.known.status().map(|there| {
            let now = Timestamp::now();
            let sources = report::Sources {
                seen,
                report,
                pull: self.pulls.report(Instant::now()),
                generation: self.asked.object().and_then(|o| o.metadata.generation),
            };
            let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
            report::status(sources, &there.conditions, whole)
        });
        self.publisher.publish(status);
    }
}
