//! Reads the API server's audit log: who asked for what. The test of "at rest nothing is written".

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A place in the audit log; requests after it are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub(crate) u64);

/// One finished request (or, for a watch, one that has started).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Kubernetes user name.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: String,
    /// Plural resource name; empty for a path that is no resource.
    pub resource: String,
    /// `status`, `eviction`, `token`…, or empty.
    pub subresource: String,
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// Empty for lists and collections; generated names are not known to the log.
    pub name: String,
    /// HTTP status.
    pub code: u16,
    /// Program name and version as the client gave it.
    pub user_agent: String,
    /// Path and query.
    pub uri: String,
    /// When the request arrived, RFC 3339.
    pub time: String,
}

impl Request {
    /// Whether it asks for a change.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch" | "head" | "options")
    }

    /// Whether it only keeps a lease alive.
    pub fn is_lease(&self) -> bool {
        self.resource == "leases"
    }
}

/// The policy: metadata of all requests, once, but for the noise of the control plane's own readers.
pub(crate) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: ['system:apiserver', 'system:kube-scheduler', 'system:kube-controller-manager']
  verbs: [get, list, watch]
- level: None
  userGroups: ['system:serviceaccounts:kube-system']
  verbs: [get, list, watch]
- level: None
  nonResourceURLs: ['/readyz*', '/healthz*', '/livez*', '/openapi*', '/version', '/api', '/api/*', '/apis', '/apis/*']
- level: Metadata
";

/// The current end of the log.
pub(crate) fn mark(log: &Path) -> Result<Mark> {
    match std::fs::metadata(log) {
        Ok(meta) => Ok(Mark(meta.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Mark(0)),
        Err(error) => Err(error).with_context(|| format!("read {}", log.display())),
    }
}

/// All requests after `mark`.
pub(crate) fn requests_since(log: &Path, mark: Mark) -> Result<Vec<Request>> {
    let mut file = File::open(log).with_context(|| format!("open {}", log.display()))?;
    file.seek(SeekFrom::Start(mark.0))?;
    let mut requests = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line?;
        // The last line may be half written, and after a kill -9 of the server one in the middle may be cut.
        let Ok(event) = serde_json::from_str::<Event>(&line) else { continue };
        // A watch is logged at its start and at its end.
        if event.verb == "watch" && event.stage == "ResponseComplete" {
            continue;
        }
        let object = event.object_ref.unwrap_or_default();
        requests.push(Request {
            user: event.user.username,
            verb: event.verb,
            resource: object.resource,
            subresource: object.subresource,
            namespace: object.namespace,
            name: object.name,
            code: event.response_status.unwrap_or_default().code,
            user_agent: event.user_agent,
            uri: event.request_uri,
            time: event.request_received_timestamp,
        });
    }
    Ok(requests)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    stage: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    #[serde(default)]
    user_agent: String,
    object_ref: Option<ObjectRef>,
    response_status: Option<ResponseStatus>,
    #[serde(default)]
    request_received_timestamp: String,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ObjectRef {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ResponseStatus {
    code: u16,
}
