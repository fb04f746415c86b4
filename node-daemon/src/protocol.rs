//! What daemon and worker say to each other: one request as JSON on standard input, then JSON lines back.

use osimage_crds::{
    Commit,
    nodeos::{Problem, ProblemReason},
    osimage::Image,
};
use serde::{Deserialize, Serialize};

/// What a worker shall do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase")]
pub enum Request {
    /// Tell what the host is. Changes nothing.
    Status,
    /// Download the commit, verify it, hold it by a ref.
    Pull { source: Source },
    /// Drop every hold but those named, and the staged deployment of a commit whose hold is dropped.
    Release { keep: Vec<Commit> },
    /// Verify again, and write the deployment that the next shutdown completes.
    Stage { source: Source },
    /// Drop the staged deployment, if it is of this commit.
    Unstage { commit: Commit },
    /// Make the deployment of this commit the default, and drop a staged one.
    SetDefault { commit: Commit },
    /// Keep the running deployment until it is unpinned.
    Pin,
    /// Undo [`Request::Pin`]: what somebody else pinned stays pinned.
    Unpin,
}

/// Where a commit comes from, and how it is trusted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Name of the remote on the host.
    pub remote: String,
    /// URL of the repository.
    pub url: String,
    /// The branch that the commit must be bound to.
    #[serde(rename = "ref")]
    pub ref_: Option<String>,
    /// The commit.
    pub commit: Commit,
    /// ASCII-armored keys, one of which must have signed. `None`: the user chose not to verify.
    pub gpg_keys: Option<String>,
}

impl Source {
    /// The remote is kept apart from those of the distribution by its prefix.
    pub fn new(image: &Image, os_image: &str) -> Source {
        let image = &image.ostree;
        Source {
            remote: format!("osimage-{}", image.remote.as_deref().unwrap_or(os_image)),
            url: image.url.clone(),
            ref_: image.ref_.clone(),
            commit: image.commit.clone(),
            gpg_keys: image.verification.gpg.as_ref().map(|gpg| gpg.keys.clone()),
        }
    }
}

/// One line of a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    /// A download goes on.
    Progress(Progress),
    /// Done; nothing follows.
    Done(Answer),
    /// Not done; nothing follows.
    Failed(Failure),
}

/// What a worker found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// The operation has been carried out.
    Nothing,
    /// What the host is.
    Facts(Facts),
}

/// How far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Bytes received.
    pub bytes: u64,
    /// Bytes to receive, where the commit tells its sizes.
    pub total_bytes: Option<u64>,
    /// Objects received.
    pub objects: u64,
    /// Objects asked for so far.
    pub total_objects: u64,
    /// Requests that have no answer yet.
    pub outstanding: u64,
}

/// What the host is, as its own libostree sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Why the host must not be touched, if so.
    pub unsupported: Option<String>,
    /// The deployments, default first.
    pub deployments: Vec<DeploymentFacts>,
    /// Commits that a ref of ours holds and that are complete.
    pub held: Vec<Commit>,
    /// Version of the host's libostree.
    pub ostree_version: String,
}

/// One deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentFacts {
    pub commit: Commit,
    pub serial: i32,
    pub booted: bool,
    pub staged: bool,
    pub pinned: bool,
    /// Version from the commit's metadata.
    pub version: Option<String>,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    pub reason: ProblemReason,
    /// Whether the same might succeed later.
    pub transient: bool,
    /// What happened and what to do.
    pub message: String,
}

impl Failure {
    pub fn transient(reason: ProblemReason, message: impl Into<String>) -> Failure {
        Failure { reason, transient: true, message: message.into() }
    }

    pub fn permanent(reason: ProblemReason, message: impl Into<String>) -> Failure {
        Failure { reason, transient: false, message: message.into() }
    }

    pub fn problem(&self) -> Problem {
        // What does not pass by itself is not tried again by itself: say how to ask for it.
        let again = if self.transient {
            ""
        } else {
            ". When that is done, set the annotation osimage.dev/retry on the OSImage to a new value"
        };
        let message = format!("{}{again}", self.message.trim_end_matches('.'));
        Problem { reason: self.reason, message, retrying: self.transient }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.message)
    }
}

impl std::error::Error for Failure {}
