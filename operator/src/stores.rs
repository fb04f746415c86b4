//! What the watches saw, and which OSImages have to look again because of it.
//!
//! One watch per kind fills a store; a change that could matter to a decision wakes the OSImages it could
//! matter to, after the store knows of it. The heartbeats of kubelets and the progress of downloads wake
//! nobody. Wake-ups are gathered for a moment, so that a burst costs one pass.
//!
//! Why not `kube::runtime::Controller`: its watches of other kinds keep no store, so each kind would be watched
//! twice, and a pass could run before the store knows what woke it; and its debounce starts again with every
//! event, so that a fleet that reports all the time would never be looked at.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream};
use k8s_openapi::api::{core::v1::Node, policy::v1::PodDisruptionBudget};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::{self, Event, watcher},
    },
};
use osimage_crds::{NodeOS, NodeOSStatus, OSImage};
use osimage_planner::NodeView;
use serde::de::DeserializeOwned;
use tokio::{
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender},
        watch,
    },
    time::{sleep, timeout},
};
use tracing::warn;

use crate::observe;

/// An object that may be malformed: one that is must not stop the watch of the others.
pub type Guarded<K> = DeserializeGuard<K>;

/// How long wake-ups are gathered. Counted from the first one, so that none waits longer.
const GATHER: Duration = Duration::from_millis(300);

/// The stores. Each may be a moment behind the API server; every write that is decided on them carries the
/// version it was decided on.
#[derive(Clone)]
pub struct Stores {
    /// OSImages, to know which exist; a pass reads its own from the API server.
    pub images: Store<Guarded<OSImage>>,
    /// NodeOS objects.
    pub node_oses: Store<Guarded<NodeOS>>,
    /// Nodes, without what nobody reads.
    pub nodes: Store<Node>,
    /// PodDisruptionBudgets.
    pub budgets: Store<PodDisruptionBudget>,
    /// How many of the stores have been filled.
    filled: watch::Receiver<usize>,
}

/// Stores that there are.
const KINDS: usize = 4;

/// Who has to look again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// This OSImage.
    One(String),
    /// Those that drain a node, or wait to.
    Draining,
    /// All of them.
    All,
}

impl Stores {
    /// Makes the stores, and what fills them: a future that runs until it is dropped. `wake` is told who has to
    /// look again, `gone` which OSImages were deleted.
    pub fn new(
        client: &Client,
        wake: UnboundedSender<Wake>,
        gone: impl Fn(&str) + Send + 'static,
    ) -> (Stores, BoxFuture<'static, ()>) {
        let (images, image_writer) = reflector::store();
        let (node_oses, node_os_writer) = reflector::store();
        let (nodes, node_writer) = reflector::store();
        let (budgets, budget_writer) = reflector::store();

        let (filling, filled) = watch::channel(0);
        let source = Source { client: client.clone(), wake, filled: filling };
        let follow_images =
            follow(source.clone(), image_writer, trim_any, version, move |name, change| match change.new {
                Some(_) => vec![Wake::One(name.to_owned())],
                None => {
                    gone(name);
                    vec![Wake::All]
                }
            });
        let follow_node_oses =
            follow(source.clone(), node_os_writer, trim_any, node_os_digest, |_, change| node_os_wakes(change));
        let follow_nodes = follow(source.clone(), node_writer, trim_node, node_digest, |_, _| vec![Wake::All]);
        let follow_budgets = follow(source, budget_writer, trim_any, budget_digest, |_, _| vec![Wake::Draining]);
        let all = async move {
            futures::join!(follow_images, follow_node_oses, follow_nodes, follow_budgets);
        };
        (Stores { images, node_oses, nodes, budgets, filled }, all.boxed())
    }

    /// Stores that hold just this.
    #[cfg(test)]
    pub fn holding(nodes: Vec<Node>, node_oses: Vec<Guarded<NodeOS>>) -> Stores {
        fn store<K: Resource<DynamicType = ()> + Clone + 'static>(objects: Vec<K>) -> Store<K> {
            let (reader, mut writer) = reflector::store();
            objects.into_iter().for_each(|object| writer.apply_watcher_event(&Event::Apply(object)));
            reader
        }
        let (_, filled) = watch::channel(KINDS);
        Stores {
            images: store(vec![]),
            node_oses: store(node_oses),
            nodes: store(nodes),
            budgets: store(vec![]),
            filled,
        }
    }

    /// Waits until every store has been filled once. Nothing may be decided before: a node that is not there yet
    /// would count as gone.
    ///
    /// Not by `Store::wait_until_ready`: in kube 5.0, of several tasks that wait for one store only the last wakes.
    pub async fn ready(&self) {
        // An error means that what fills the stores has ended, and so has everything.
        let _ = self.filled.clone().wait_for(|n| *n == KINDS).await;
    }

    /// Whether every store has been filled once.
    pub fn is_ready(&self) -> bool {
        *self.filled.borrow() == KINDS
    }

    /// Turns wake-ups into OSImages to look at.
    pub fn queue(&self, wakes: UnboundedReceiver<Wake>) -> impl Stream<Item = ObjectRef<Guarded<OSImage>>> + use<> {
        let images = self.images.clone();
        stream::unfold(wakes, |mut wakes| async move {
            let mut gathered = BTreeSet::from([wakes.recv().await?]);
            // The store of OSImages may be behind the wake-up by as much as the gathering takes; one that is new
            // wakes itself.
            let _ = timeout(GATHER, async {
                while let Some(wake) = wakes.recv().await {
                    gathered.insert(wake);
                }
                sleep(GATHER).await;
            })
            .await;
            Some((gathered, wakes))
        })
        .flat_map(move |gathered| stream::iter(resolve(&gathered, &images.state())))
    }
}

/// Which of the OSImages are meant.
fn resolve(wakes: &BTreeSet<Wake>, images: &[std::sync::Arc<Guarded<OSImage>>]) -> Vec<ObjectRef<Guarded<OSImage>>> {
    let meant = |image: &Guarded<OSImage>| {
        wakes.iter().any(|wake| match wake {
            Wake::One(name) => *name == image.name_any(),
            Wake::Draining => image.0.as_ref().is_ok_and(drains),
            Wake::All => true,
        })
    };
    images.iter().filter(|image| meant(image)).map(|image| ObjectRef::from_obj(image.as_ref())).collect()
}

/// Whether a PodDisruptionBudget can matter to it now.
fn drains(image: &OSImage) -> bool {
    image.status.as_ref().is_some_and(|status| {
        !status.blockers.is_empty() || status.slots.iter().any(|s| s.permitted.is_none() && s.outcome.is_none())
    })
}

// ---- following a kind -------------------------------------------------------------------------------------

/// How an object changed, by its digest: what it was, what it is.
struct Change<'a, D> {
    old: Option<&'a D>,
    new: Option<&'a D>,
}

/// What following a kind needs, whatever the kind.
#[derive(Clone)]
struct Source {
    client: Client,
    /// Told who has to look again. A receiver that is gone means that the process is ending.
    wake: UnboundedSender<Wake>,
    /// Counts the stores that have been filled.
    filled: watch::Sender<usize>,
}

/// Keeps the store of one kind, for ever. `digest` reduces an object to what decisions can depend on; when that is
/// another than before, and after the store knows of it, those are woken whom it `affects`.
async fn follow<K, D>(
    source: Source,
    mut store: Writer<K>,
    trim: fn(&mut K),
    digest: fn(&K) -> D,
    affects: impl Fn(&str, Change<'_, D>) -> Vec<Wake>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    D: PartialEq,
{
    let Source { client, wake, filled } = source;
    let changed = move |name: &str, change: Change<'_, D>| {
        affects(name, change).into_iter().for_each(|who| drop(wake.send(who)));
    };
    let mut events = watcher(Api::all(client), watcher::Config::default()).default_backoff().modify(trim).boxed();
    let mut first = true;
    let mut known: HashMap<ObjectRef<K>, D> = HashMap::new();
    let mut fresh: HashMap<ObjectRef<K>, D> = HashMap::new();
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                let error = crate::error::chain(&error);
                warn!(kind = %K::kind(&()), error, "a watch failed; trying again");
                continue;
            }
        };
        store.apply_watcher_event(&event);
        match event {
            Event::Init => fresh.clear(),
            Event::InitApply(object) => {
                fresh.insert(ObjectRef::from_obj(&object), digest(&object));
            }
            Event::InitDone => {
                if std::mem::take(&mut first) {
                    filled.send_modify(|n| *n += 1);
                }
                let before = std::mem::replace(&mut known, std::mem::take(&mut fresh));
                for (key, old) in before.iter().filter(|(key, _)| !known.contains_key(key)) {
                    changed(&key.name, Change { old: Some(old), new: None });
                }
                for (key, new) in &known {
                    let old = before.get(key);
                    if old != Some(new) {
                        changed(&key.name, Change { old, new: Some(new) });
                    }
                }
            }
            Event::Apply(object) => {
                let key = ObjectRef::from_obj(&object);
                let new = digest(&object);
                let old = known.get(&key);
                if old != Some(&new) {
                    changed(&key.name, Change { old, new: Some(&new) });
                    known.insert(key, new);
                }
            }
            Event::Delete(object) => {
                let key = ObjectRef::from_obj(&object);
                let old = known.remove(&key);
                changed(&key.name, Change { old: old.as_ref(), new: None });
            }
        }
    }
}

// ---- what matters of each kind ----------------------------------------------------------------------------

fn trim_any<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

fn trim_node(node: &mut Node) {
    trim_any(node);
    if let Some(status) = &mut node.status {
        status.images = None;
        status.volumes_attached = None;
        status.volumes_in_use = None;
    }
}

fn version<K: Resource>(object: &K) -> Option<String> {
    object.meta().resource_version.clone()
}

/// What decisions read of a Node.
type NodeDigest = (NodeView, BTreeMap<String, String>);

fn node_digest(node: &Node) -> NodeDigest {
    (NodeView { resource_version: String::new(), ..observe::node_view(node) }, node.labels().clone())
}

fn budget_digest(budget: &PodDisruptionBudget) -> (Option<String>, i32) {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    (selector.map(|selector| format!("{selector:?}")), observe::disruptions_allowed(budget))
}

/// What decisions read of a NodeOS, and whose it is.
#[derive(Debug, PartialEq)]
struct NodeOSDigest {
    owner: Option<String>,
    content: u64,
}

/// Leaves out how far a download is, and the line for people that repeats it.
fn node_os_digest(object: &Guarded<NodeOS>) -> NodeOSDigest {
    let mut hasher = DefaultHasher::new();
    match &object.0 {
        Ok(node_os) => {
            let status = node_os.status.clone().map(|s| NodeOSStatus { pull: None, message: String::new(), ..s });
            let meta = &node_os.metadata;
            let content =
                serde_json::to_string(&(&node_os.spec, status, &meta.uid, &meta.generation, &meta.deletion_timestamp));
            content.unwrap_or_default().hash(&mut hasher);
            NodeOSDigest { owner: Some(node_os.spec.os_image.name.clone()), content: hasher.finish() }
        }
        Err(invalid) => {
            warn!(node = ?invalid.metadata.name, error = invalid.error, "a NodeOS cannot be read; its node is left alone");
            invalid.error.hash(&mut hasher);
            NodeOSDigest { owner: None, content: hasher.finish() }
        }
    }
}

/// A change concerns the OSImage that owns the NodeOS, before and after; a node that becomes free, or whose
/// NodeOS cannot be read, may concern any.
fn node_os_wakes(change: Change<'_, NodeOSDigest>) -> Vec<Wake> {
    let owner = |digest: Option<&NodeOSDigest>| digest.and_then(|d| d.owner.clone());
    match (owner(change.old), owner(change.new)) {
        (_, None) => vec![Wake::All],
        (Some(old), Some(new)) if old != new => vec![Wake::One(old), Wake::One(new)],
        (_, Some(new)) => vec![Wake::One(new)],
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::{NodeCondition, NodeStatus},
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
        jiff::Timestamp,
    };
    use osimage_crds::{
        NodeOSSpec,
        nodeos::{OSImageRef, Pull},
    };

    use super::*;

    fn node(ready: &str, beat: i64) -> Node {
        let condition = NodeCondition {
            type_: "Ready".into(),
            status: ready.into(),
            last_heartbeat_time: Some(Time(Timestamp::from_second(beat).unwrap())),
            ..NodeCondition::default()
        };
        let status = NodeStatus { conditions: Some(vec![condition]), ..NodeStatus::default() };
        Node { status: Some(status), ..Node::default() }
    }

    #[test]
    fn a_heartbeat_is_no_change_of_a_node() {
        assert!(node_digest(&node("True", 1)) == node_digest(&node("True", 2)));
        assert!(node_digest(&node("True", 1)) != node_digest(&node("False", 1)));
        let mut labelled = node("True", 1);
        labelled.metadata.labels = Some(BTreeMap::from([("pool".into(), "a".into())]));
        assert!(node_digest(&node("True", 1)) != node_digest(&labelled));
    }

    fn node_os(owner: &str, status: NodeOSStatus) -> NodeOSDigest {
        let spec = NodeOSSpec {
            os_image: OSImageRef { name: owner.into(), uid: "u".into() },
            image: None,
            may_pull: false,
            health: Default::default(),
            retry: None,
            permit: None,
            released: None,
        };
        let object = NodeOS { metadata: ObjectMeta::default(), spec, status: Some(status) };
        node_os_digest(&DeserializeGuard(Ok(object)))
    }

    #[test]
    fn progress_of_a_download_is_no_change_of_a_nodeos() {
        let at = |bytes| NodeOSStatus {
            pull: Some(Pull { bytes, ..Pull::default() }),
            message: format!("{bytes} bytes"),
            ..NodeOSStatus::default()
        };
        assert_eq!(node_os("a", at(1)), node_os("a", at(2)));
        let booted = NodeOSStatus { boot_id: Some("b".into()), ..at(1) };
        assert_ne!(node_os("a", at(1)), node_os("a", booted));
    }

    #[test]
    fn a_nodeos_wakes_its_owners_and_a_free_node_wakes_all() {
        let (a, b) = (node_os("a", NodeOSStatus::default()), node_os("b", NodeOSStatus::default()));
        let wakes = |old, new| node_os_wakes(Change { old, new });
        assert_eq!(wakes(None, Some(&a)), [Wake::One("a".into())]);
        assert_eq!(wakes(Some(&a), Some(&b)), [Wake::One("a".into()), Wake::One("b".into())]);
        assert_eq!(wakes(Some(&a), None), [Wake::All]);
    }
}
