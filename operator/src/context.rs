//! What a pass needs besides its OSImage. Nothing here is a memory between passes except what the API
//! server last said to refused evictions, and that only for messages, and what gates said in the last seconds.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use kube::Client;
use tokio::sync::watch;

use crate::{events::Teller, gates::Gates, metrics::Metrics, stores::Stores};

pub struct Context {
    /// Client without hidden retries; see [`crate::run::client`].
    pub client: Client,
    /// What the watches saw.
    pub stores: Stores,
    /// Where events go.
    pub teller: Teller,
    /// What Prometheus is told.
    pub metrics: Metrics,
    /// What the API server last said to evictions that it refused.
    pub refusals: Refusals,
    /// What is asked before a node is started.
    pub gates: Gates,
    /// Which pod this is.
    pub own: Own,
    /// Whether this process is the one that acts.
    pub leading: watch::Receiver<bool>,
}

/// The operator's own pod, as far as it knows: its node goes last, and it is not evicted where it could go nowhere.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// The node it runs on.
    pub node: Option<String>,
    /// Its namespace and name.
    pub pod: Option<(String, String)>,
}

impl Context {
    /// Whether this process is the one that acts, now. Asked again before every step; an answer that is out
    /// of date does no harm, because every write carries the version that it was decided on.
    pub fn leads(&self) -> bool {
        *self.leading.borrow()
    }
}

/// Refusals by OSImage and pod UID.
#[derive(Default)]
pub struct Refusals(Mutex<BTreeMap<String, BTreeMap<String, String>>>);

impl Refusals {
    /// The refusals for pods that are still there; the others are forgotten.
    pub fn of(&self, image: &str, pods: &BTreeSet<&str>) -> BTreeMap<String, String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(refusals) = all.get_mut(image) else { return BTreeMap::new() };
        refusals.retain(|uid, _| pods.contains(uid.as_str()));
        let left = refusals.clone();
        if left.is_empty() {
            all.remove(image);
        }
        left
    }

    /// Remembers what was said about one pod; `None` when its eviction was accepted.
    pub fn note(&self, image: &str, uid: &str, refusal: Option<String>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match refusal {
            Some(message) => {
                all.entry(image.to_owned()).or_default().insert(uid.to_owned(), message);
            }
            None => {
                if let Some(refusals) = all.get_mut(image) {
                    refusals.remove(uid);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_lasts_as_long_as_its_pod_or_until_it_is_taken_back() {
        let refusals = Refusals::default();
        refusals.note("a", "1", Some("no".into()));
        refusals.note("a", "2", Some("no".into()));
        refusals.note("b", "3", Some("no".into()));
        refusals.note("a", "2", None);
        assert_eq!(refusals.of("a", &BTreeSet::from(["1", "2"])), BTreeMap::from([("1".into(), "no".into())]));
        assert!(refusals.of("a", &BTreeSet::new()).is_empty(), "the pod is gone");
        assert!(refusals.of("a", &BTreeSet::from(["1"])).is_empty(), "and so is the memory of it");
        assert_eq!(refusals.of("b", &BTreeSet::from(["3"])).len(), 1);
    }
}
