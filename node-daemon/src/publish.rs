//! Writes NodeOS.status: only what has changed, not more often than once a second, beside the main loop. A host goes on
//! without an API server; what could not be written is written when it is back.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
};
use osimage_crds::{NodeOS, NodeOSStatus, names};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::metrics::Metrics;

const BETWEEN_WRITES: Duration = Duration::from_secs(1);
const WRITE_LIMIT: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The NodeOS as last seen, by the watch or in the reply to a write.
#[derive(Clone, Default)]
pub struct Known(Arc<Mutex<Option<NodeOS>>>);

impl Known {
    /// Takes what is newer.
    pub fn offer(&self, new: NodeOS) {
        let mut known = self.lock();
        if known.as_ref().is_none_or(|old| !is_older(&new, old)) {
            *known = Some(new);
        }
    }

    pub fn clear(&self) {
        *self.lock() = None;
    }

    /// The status that stands in the API. `None` when there is no object to write to.
    pub fn status(&self) -> Option<NodeOSStatus> {
        self.lock().as_ref().map(|node_os| node_os.status.clone().unwrap_or_default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<NodeOS>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A watch may tell late of what a write has answered already.
pub fn is_older(new: &NodeOS, old: &NodeOS) -> bool {
    let version = |o: &NodeOS| o.resource_version()?.parse::<u64>().ok();
    new.uid() == old.uid() && version(new).zip(version(old)).is_some_and(|(new, old)| new < old)
}

/// Takes what is to be written.
pub struct Publisher {
    drafts: watch::Sender<Draft>,
    written: watch::Receiver<u64>,
}

#[derive(Clone, Default)]
struct Draft {
    number: u64,
    status: Option<NodeOSStatus>,
}

impl Publisher {
    /// Starts the task that writes. It ends with the publisher.
    pub fn start(client: Client, node: String, known: Known, metrics: Metrics) -> Publisher {
        let (drafts, drafts_in) = watch::channel(Draft::default());
        let (written_out, written) = watch::channel(0);
        let writer = Writer { api: Api::all(client), node, known, metrics, drafts: drafts_in, written: written_out };
        tokio::spawn(writer.run());
        Publisher { drafts, written }
    }

    /// Hands over what the status shall be. It replaces what has not been written yet.
    pub fn publish(&self, status: Option<NodeOSStatus>) {
        self.drafts.send_if_modified(|draft| {
            let new = draft.status != status;
            if new {
                *draft = Draft { number: draft.number.wrapping_add(1), status };
            }
            new
        });
    }

    /// Waits until all has been written, but not for long.
    pub async fn flush(&self, limit: Duration) {
        let number = self.drafts.borrow().number;
        let mut written = self.written.clone();
        // Best effort: without an API server the host goes on.
        let _ = timeout(limit, written.wait_for(|n| *n == number)).await;
    }
}

struct Writer {
    api: Api<NodeOS>,
    node: String,
    known: Known,
    metrics: Metrics,
    drafts: watch::Receiver<Draft>,
    written: watch::Sender<u64>,
}

impl Writer {
    async fn run(mut self) {
        let mut pause = BETWEEN_WRITES;
        loop {
            let Draft { number, status } = self.drafts.borrow_and_update().clone();
            let due = status.filter(|status| self.known.status().is_some_and(|there| there != *status));
            let wrote = match due {
                None => None,
                Some(status) => Some(self.write(&status).await),
            };
            match wrote {
                Some(false) => {
                    sleep(pause).await;
                    pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
                    continue;
                }
                Some(true) | None => pause = BETWEEN_WRITES,
            }
            self.written.send_replace(number);
            if wrote.is_some() {
                sleep(BETWEEN_WRITES).await;
            }
            if self.drafts.changed().await.is_err() {
                return;
            }
        }
    }

    async fn write(&self, status: &NodeOSStatus) -> bool {
        let object = json!({
            "apiVersion": format!("{}/{}", names::GROUP, names::VERSION),
            "kind": "NodeOS",
            "metadata": {"name": self.node},
            "status": status,
        });
        let params = PatchParams::apply(names::DAEMON_MANAGER).force();
        let patch = Patch::Apply(&object);
        match timeout(WRITE_LIMIT, self.api.patch_status(&self.node, &params, &patch)).await {
            Ok(Ok(node_os)) => {
                self.metrics.status_written();
                self.known.offer(node_os);
                true
            }
            // The watch will tell as well.
            Ok(Err(kube::Error::Api(reply))) if reply.code == 404 => true,
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot write NodeOS.status");
                false
            }
            Err(_) => {
                tracing::warn!("cannot write NodeOS.status: no answer within {} s", WRITE_LIMIT.as_secs());
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_write_answered_is_not_undone_by_a_late_watch() {
        let object = |uid: &str, version: &str| -> NodeOS {
            serde_json::from_value(json!({
                "apiVersion": "osimage.dev/v1alpha1",
                "kind": "NodeOS",
                "metadata": {"name": "n", "uid": uid, "resourceVersion": version},
                "spec": {"osImage": {"name": "fleet", "uid": "u"}},
            }))
            .unwrap()
        };
        let known = Known::default();
        let version = || known.lock().as_ref().and_then(ResourceExt::resource_version);
        for (uid, offered, then) in [
            ("a", "9", "9"),
            ("a", "10", "10"),
            ("a", "9", "10"),
            ("a", "10", "10"),
            ("b", "7", "7"),
            ("b", "opaque", "opaque"),
        ] {
            known.offer(object(uid, offered));
            assert_eq!(version().as_deref(), Some(then), "{uid} {offered}");
        }
        known.clear();
        assert_eq!(known.status(), None);
    }
}
