//! The watches that fill a [`Fleet`]. They end with the value.

use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::events::v1::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use osimage_crds::{NodeOS, OSImage};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fleet::{Fleet, PodChange};

/// Follows a cluster.
pub struct Follower {
    fleet: Arc<watch::Sender<Fleet>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Follower {
    /// Follows the OSImage of this name, all nodes, and the pods that `workload` selects. `start` is the demo's.
    pub fn start(client: &Client, name: &str, workload: &str, start: Instant) -> Self {
        let fleet = Arc::new(watch::Sender::new(Fleet::default()));
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let images = watcher(Api::<OSImage>::all(client.clone()), only).default_backoff().applied_objects();
        let node_oses = objects(Api::<NodeOS>::all(client.clone()));
        let nodes = objects(Api::<Node>::all(client.clone()));
        // Events of cluster-scoped objects are in the namespace `default`.
        let events = objects(Api::<Event>::namespaced(client.clone(), "default"));
        let pods =
            watcher(Api::<Pod>::namespaced(client.clone(), "default"), watcher::Config::default().labels(workload));
        let tasks = vec![
            each(&fleet, images, |fleet, image| fleet.image = Some(image)),
            each(&fleet, node_oses, |fleet, node_os| fleet.note_node_os(node_os)),
            each(&fleet, nodes, |fleet, node| fleet.note_node(node, Instant::now())),
            each(&fleet, events, move |fleet, event| fleet.note_event(&event, start.elapsed())),
            each(&fleet, pods.default_backoff(), |fleet, event| fleet.workload.note(change(event))),
        ];
        Self { fleet, tasks }
    }

    /// Asks what is known now.
    pub fn look<T>(&self, question: impl FnOnce(&Fleet) -> T) -> T {
        question(&self.fleet.borrow())
    }

    /// Changes what is counted.
    pub fn edit(&self, change: impl FnOnce(&mut Fleet)) {
        self.fleet.send_modify(change);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn objects<K>(api: Api<K>) -> impl Stream<Item = Result<K, watcher::Error>> + Send + 'static
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    watcher(api, watcher::Config::default()).default_backoff().applied_objects()
}

fn each<T: Send + 'static>(
    fleet: &Arc<watch::Sender<Fleet>>,
    stream: impl Stream<Item = Result<T, watcher::Error>> + Send + 'static,
    note: impl Fn(&mut Fleet, T) + Send + 'static,
) -> JoinHandle<()> {
    let fleet = Arc::clone(fleet);
    tokio::spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(item) = stream.next().await {
            // The stream goes on by itself after an error.
            if let Ok(item) = item {
                fleet.send_modify(|fleet| note(fleet, item));
            }
        }
    })
}

fn change(event: watcher::Event<Pod>) -> PodChange {
    match event {
        watcher::Event::Init => PodChange::ListBegins,
        watcher::Event::InitApply(pod) => PodChange::Listed(Box::new(pod)),
        watcher::Event::InitDone => PodChange::ListEnds,
        watcher::Event::Apply(pod) => PodChange::Changed(Box::new(pod)),
        watcher::Event::Delete(pod) => PodChange::Gone(Box::new(pod)),
    }
}
