//! Puts the process together: client, watches, controller, lease, admin endpoint; and takes it down in order.

use std::{convert::Infallible, future::pending, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::{FutureExt, StreamExt};
use kube::{
    Api, Client, Config,
    runtime::{applier, controller, reflector::ObjectRef},
};
use osimage_crds::OSImage;
use osimage_runtime::{admin, logging, shutdown};
use prometheus::Registry;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::{
    args::Args,
    context::{Context, Own, Refusals},
    events::Teller,
    gates::Gates,
    lease,
    metrics::Metrics,
    osimage_controller::{error_policy, reconcile},
    stores::{Guarded, Stores, Wake},
};

/// OSImages that are looked at at the same time. One is never looked at twice at once.
const PASSES_AT_ONCE: u16 = 4;
/// How long passes under way may take to end when the process is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT.
pub async fn run(args: Args) -> anyhow::Result<()> {
    logging::init(args.log_format);
    let identity = args.identity.clone().unwrap_or_else(default_identity);
    let config = Config::infer().await.context("no kubeconfig and no service account to reach a cluster with")?;
    let namespace = args.lease_namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = client(config).context("cannot make a client")?;
    let own = Own {
        node: args.node_name.clone().filter(|name| !name.is_empty()),
        pod: args.identity.clone().map(|pod| (namespace.clone(), pod)),
    };
    info!(version = env!("CARGO_PKG_VERSION"), identity, "starts");

    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    let (wake, wakes) = mpsc::unbounded_channel();
    let gone = metrics.clone();
    let (stores, following) = Stores::new(&client, wake.clone(), move |image| gone.forget(image));
    let following = tokio::spawn(following);
    let (lead, leading) = watch::channel(!args.leader_elect);
    let seen = stores.clone();
    let serving = admin::serve(&args.metrics_address, registry, move || seen.is_ready());
    let (controller_ended, ended) = oneshot::channel::<()>();
    let election = args.leader_elect.then(|| lease::Election {
        api: Api::namespaced(client.clone(), &namespace),
        name: args.lease_name.clone(),
        me: identity.clone(),
        duration: args.lease_duration.get(),
    });
    let electing = elect(election, lead, ended);
    let ctx = Arc::new(Context {
        teller: Teller::new(client.clone(), identity),
        client,
        stores: stores.clone(),
        metrics: metrics.clone(),
        refusals: Refusals::default(),
        gates: Gates::new(),
        own,
        leading: leading.clone(),
    });

    let outcome = tokio::select! {
        served = serving => served.with_context(|| format!("cannot serve on {}", args.metrics_address)),
        () = follow_lead(leading, metrics, wake) => Ok(()),
        () = control(ctx, stores, wakes) => Ok(()),
        // Stores that nobody fills would be decided on for ever.
        ended = following => Err(anyhow::anyhow!("the watches have ended: {ended:?}")),
    };
    // Only now: whoever gets the lease next must not meet a pass of ours.
    drop(controller_ended);
    electing.await.context("the election ended badly")?;
    outcome
}

/// A client without hidden retries: kube's default one answers a refused eviction (429) with minutes of silence.
/// Here every retry is a pass of its own, and a refusal is an answer that is told.
pub fn client(mut config: Config) -> Result<Client, kube::Error> {
    config.default_retry = false;
    Client::try_from(config)
}

/// Host name and process id: two processes never share it.
fn default_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}

/// Holds the lease until the controller has ended; without an election, only keeps the answer.
fn elect(election: Option<lease::Election>, lead: watch::Sender<bool>, ended: oneshot::Receiver<()>) -> JoinHandle<()> {
    let stop = ended.map(drop);
    tokio::spawn(async move {
        match election {
            Some(election) => lease::hold(election, lead, stop).await,
            None => {
                stop.await;
                drop(lead);
            }
        }
    })
}

/// Tells metrics who leads, and looks at everything when it is us.
async fn follow_lead(mut leading: watch::Receiver<bool>, metrics: Metrics, wake: mpsc::UnboundedSender<Wake>) {
    loop {
        let leads = *leading.borrow_and_update();
        metrics.leading(leads);
        if leads && wake.send(Wake::All).is_err() {
            return;
        }
        if leading.changed().await.is_err() {
            return pending().await;
        }
    }
}

/// Runs passes until the process is told to stop and those under way have ended.
async fn control(ctx: Arc<Context>, stores: Stores, wakes: mpsc::UnboundedReceiver<Wake>) {
    let (stopping, stopped) = watch::channel(false);
    let stopped = || {
        let mut stopped = stopped.clone();
        async move { drop(stopped.wait_for(|stopping| *stopping).await) }
    };
    let stop = async move {
        let signal = shutdown::signal().await;
        info!(signal, "stops");
        stopping.send_replace(true);
        sleep(STOP_PATIENCE).await;
        warn!("a pass did not end in time");
    };
    let queue = stores.queue(wakes).map(Ok::<ObjectRef<Guarded<OSImage>>, Infallible>).take_until(stopped());
    let filled = stores.clone();
    let passes = applier(
        |seen, ctx| reconcile(seen, ctx).boxed(),
        error_policy,
        ctx,
        stores.images,
        queue.boxed(),
        controller::Config::default().concurrency(PASSES_AT_ONCE),
    )
    .for_each(|result| async {
        if let Err(controller::Error::ObjectNotFound(object)) = result {
            debug!(%object, "is gone");
        }
    });
    let until_stopped = stopped();
    let act = async move {
        tokio::select! {
            () = filled.ready() => info!("has seen the cluster"),
            () = until_stopped => return,
        }
        passes.await;
    };
    tokio::select! {
        () = act => {}
        () = stop => {}
    }
}
