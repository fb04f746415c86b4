//! Watches a bed from outside and remembers the worst it saw: what the product promised is compared with it.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, future::Either, stream};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use osimage_crds::{NodeOS, OSImage};
use tokio::{sync::broadcast, task::JoinHandle};

use crate::{bed::TestBed, host::Power, process::lock};

/// How often hosts and nodes are compared.
const LOOK: Duration = Duration::from_millis(50);

/// Counts nodes that are down at once: cordoned, or with a host that is not up.
pub struct Witness {
    worst: Arc<Mutex<BTreeSet<String>>>,
    task: JoinHandle<()>,
}

impl Witness {
    /// Begins to watch.
    pub fn start(bed: &TestBed) -> Self {
        let worst = Arc::new(Mutex::new(BTreeSet::new()));
        let nodes: Api<Node> = Api::all(bed.client());
        let hosts: Vec<_> = bed.nodes.iter().map(|n| n.host.clone()).collect();
        let seen = Arc::clone(&worst);
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(LOOK);
            let mut cordoned = BTreeSet::new();
            loop {
                tick.tick().await;
                let mut down: BTreeSet<String> =
                    hosts.iter().filter(|h| !matches!(h.power(), Power::Up(_))).map(|h| h.name().to_owned()).collect();
                // While the API server is away, what it said last stands.
                if let Ok(Ok(list)) =
                    tokio::time::timeout(Duration::from_secs(1), nodes.list(&Default::default())).await
                {
                    let is = |n: &&Node| n.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
                    cordoned = list.items.iter().filter(is).map(ResourceExt::name_any).collect();
                }
                down.extend(cordoned.iter().cloned());
                let mut worst = lock(&seen);
                if down.len() > worst.len() {
                    *worst = down;
                }
            }
        });
        Witness { worst, task }
    }

    /// The largest set of nodes that were down at once.
    pub fn worst(&self) -> BTreeSet<String> {
        lock(&self.worst).clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One object as the API server announced it.
#[derive(Clone, Debug)]
pub enum Seen {
    /// An OSImage.
    Image(Box<OSImage>),
    /// A NodeOS.
    NodeOS(Box<NodeOS>),
    /// A Node.
    Node(Box<Node>),
}

/// Announces every version of our objects and of nodes, as watches do. Ends with the task that it returns.
pub fn announce(client: &Client) -> (broadcast::Receiver<Seen>, JoinHandle<()>) {
    let (sender, receiver) = broadcast::channel(4096);
    let config = watcher::Config::default;
    let images = watcher(Api::<OSImage>::all(client.clone()), config()).default_backoff().touched_objects();
    let node_oses = watcher(Api::<NodeOS>::all(client.clone()), config()).default_backoff().touched_objects();
    let nodes = watcher(Api::<Node>::all(client.clone()), config()).default_backoff().touched_objects();
    let images = images.filter_map(|i| async { i.ok().map(|i| Seen::Image(Box::new(i))) });
    let node_oses = node_oses.filter_map(|n| async { n.ok().map(|n| Seen::NodeOS(Box::new(n))) });
    let nodes = nodes.filter_map(|n| async { n.ok().map(|n| Seen::Node(Box::new(n))) });
    let ours = stream::select(images.map(Either::Left).boxed(), node_oses.map(Either::Right).boxed());
    let ours = ours.map(|either| match either {
        Either::Left(seen) | Either::Right(seen) => seen,
    });
    let task = tokio::spawn(async move {
        let mut all = stream::select(ours.boxed(), nodes.boxed());
        while let Some(seen) = all.next().await {
            // No listener at the moment is no error.
            let _ = sender.send(seen);
        }
    });
    (receiver, task)
}
