//! `NodeOS`: one per node, same name. The operator writes the spec, the node's daemon the status.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    AttemptId, Commit, Conditions,
    osimage::{Health, Image},
};

/// NodeOS is the conversation between the operator and the daemon of one node. The spec says what the node
/// may do now; the status says what its daemon saw. It is made and removed by the operator.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "osimage.dev",
    version = "v1alpha1",
    kind = "NodeOS",
    plural = "nodeoses",
    singular = "nodeos",
    shortname = "nos",
    status = "NodeOSStatus",
    derive = "PartialEq",
    doc = "NodeOS is the conversation between the operator and the daemon of one node. The spec says what the node may do now; the status says what its daemon saw. It is made and removed by the operator.",
    printcolumn(name = "OSImage", type_ = "string", json_path = ".spec.osImage.name"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Version",
        type_ = "string",
        description = "Version of the booted deployment",
        json_path = ".status.booted.version"
    ),
    printcolumn(name = "Booted", type_ = "string", priority = 1, json_path = ".status.booted.commit"),
    printcolumn(name = "Target", type_ = "string", priority = 1, json_path = ".spec.image.ostree.commit"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.pull.progress"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message")
)]
#[serde(rename_all = "camelCase")]
pub struct NodeOSSpec {
    /// The OSImage that this node follows.
    pub os_image: OSImageRef,
    /// What the node shall hold ready. When absent, the node drops what it holds and stages nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// Whether the node may download now.
    #[serde(default)]
    pub may_pull: bool,
    /// When the node counts as healthy after its reboot.
    #[serde(default)]
    pub health: Health,
    /// The operator's single-use authorisation to reboot into the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permit: Option<Permit>,
    /// The value of `osimage.dev/retry` that the operator last obeyed: a new one asks the node to try again what it
    /// has given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<String>,
    /// The last attempt whose slot was given back. No permit is given for it any more; a stale writer that
    /// tries finds that the object has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released: Option<AttemptId>,
}

/// The OSImage that a node follows.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct OSImageRef {
    /// Its name.
    pub name: String,
    /// Its UID, so that a new OSImage of the same name is not mistaken for it.
    pub uid: String,
}

/// A single-use authorisation for one reboot: bound to node, commit, attempt and the boot it was given for.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Permit {
    /// Name of the attempt.
    pub attempt: AttemptId,
    /// The commit to boot.
    pub commit: Commit,
    /// The boot that may be ended. A permit for any other boot is refused.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// When it was given.
    pub issued: Time,
    /// When the operator will withdraw it. Nodes do not act on this: their clocks are not trusted.
    pub expires: Time,
    /// The operator has seen the node Ready and healthy on the commit: the node may keep it.
    #[serde(default)]
    pub acknowledged: bool,
}

/// What the node's daemon saw. Written by that daemon alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeOSStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing and Degraded.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Conditions,
    /// One word for people; nothing is decided by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<NodePhase>,
    /// What the node is doing or waiting for, in one line.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 4096))]
    pub message: String,
    /// The running boot, as the kernel names it.
    #[serde(rename = "bootID", skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// The deployment that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub booted: Option<Deployment>,
    /// The deployment that the next reboot will finish and boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged: Option<Deployment>,
    /// The deployment to go back to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Deployment>,
    /// The commit that is on disk completely, verified and held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pulled: Option<Commit>,
    /// A download under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull: Option<Pull>,
    /// Why the node cannot do what the spec asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// The health checks of the spec, during verification.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub checks: Vec<CheckStatus>,
    /// The attempt under way, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_attempt: Option<Attempt>,
    /// What the host is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
}

/// What a node is doing, in one word.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodePhase {
    /// Runs what it should, or nothing is asked of it.
    Idle,
    /// Waits until it may download.
    Waiting,
    /// Downloads and verifies.
    Pulling,
    /// Holds the commit and waits for its permit.
    Pulled,
    /// Writes the new deployment.
    Staging,
    /// Goes down.
    Rebooting,
    /// Runs the new deployment on trial.
    Verifying,
    /// Healthy; waits for the operator's acknowledgement.
    Healthy,
    /// Goes back to the previous deployment.
    RollingBack,
    /// Cannot do what is asked; see the problem or the last attempt.
    Failed,
}

impl NodePhase {
    /// As it stands in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            NodePhase::Idle => "Idle",
            NodePhase::Waiting => "Waiting",
            NodePhase::Pulling => "Pulling",
            NodePhase::Pulled => "Pulled",
            NodePhase::Staging => "Staging",
            NodePhase::Rebooting => "Rebooting",
            NodePhase::Verifying => "Verifying",
            NodePhase::Healthy => "Healthy",
            NodePhase::RollingBack => "RollingBack",
            NodePhase::Failed => "Failed",
        }
    }
}

/// One bootable deployment on the host.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Deployment {
    /// Its commit.
    pub commit: Commit,
    /// Version from the commit's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Whether it is kept until it is unpinned.
    #[serde(default)]
    pub pinned: bool,
}

/// A download under way.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Pull {
    /// Percent done, by bytes where the commit tells its sizes, else by objects: `42%`.
    pub progress: String,
    /// Bytes received.
    pub bytes: i64,
    /// Bytes to receive, where the commit tells its sizes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<i64>,
    /// Objects received.
    pub objects: i64,
    /// Objects known to be missing so far; grows while metadata is read.
    pub total_objects: i64,
    /// Bytes per second since the last report.
    pub bytes_per_second: i64,
}

/// Why the node cannot do what the spec asks.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// One word for machines.
    pub reason: ProblemReason,
    /// What happened and what to do.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// Whether the node tries again by itself.
    pub retrying: bool,
}

/// Why a node cannot do what is asked.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProblemReason {
    /// The host is not booted from an OSTree deployment, or in a way that we must not change.
    UnsupportedHost,
    /// The repository has no such commit.
    CommitNotFound,
    /// The commit is not signed, or not by one of the given keys.
    SignatureInvalid,
    /// The given keys cannot be read.
    KeysInvalid,
    /// The commit was built for another ref.
    RefMismatch,
    /// The repository cannot be reached, or answers with errors.
    RepoUnreachable,
    /// What arrived is not what its checksum says.
    ObjectCorrupted,
    /// There is not enough space on the file system of the repository or of /boot.
    NoSpace,
    /// Another program holds the lock of the sysroot.
    HostBusy,
    /// The new deployment could not be written.
    StageFailed,
    /// The host did not go down when told to.
    RebootFailed,
    /// The permit does not fit this boot, or this commit.
    PermitRefused,
    /// There is nothing to go back to.
    RollbackFailed,
    /// Anything else that went wrong on the host.
    HostError,
}

impl ProblemReason {
    /// As it stands in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            ProblemReason::UnsupportedHost => "UnsupportedHost",
            ProblemReason::CommitNotFound => "CommitNotFound",
            ProblemReason::SignatureInvalid => "SignatureInvalid",
            ProblemReason::KeysInvalid => "KeysInvalid",
            ProblemReason::RefMismatch => "RefMismatch",
            ProblemReason::RepoUnreachable => "RepoUnreachable",
            ProblemReason::ObjectCorrupted => "ObjectCorrupted",
            ProblemReason::NoSpace => "NoSpace",
            ProblemReason::HostBusy => "HostBusy",
            ProblemReason::StageFailed => "StageFailed",
            ProblemReason::RebootFailed => "RebootFailed",
            ProblemReason::PermitRefused => "PermitRefused",
            ProblemReason::RollbackFailed => "RollbackFailed",
            ProblemReason::HostError => "HostError",
        }
    }
}

/// One health check.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CheckStatus {
    /// Its name in the spec.
    pub name: String,
    /// Whether it held when last tried.
    pub passing: bool,
    /// What it said when it did not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 4096))]
    pub message: String,
}

/// One attempt to move this node, as its host recorded it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// Its name.
    pub attempt: AttemptId,
    /// The commit it was to boot.
    pub commit: Commit,
    /// The commit it came from, and goes back to.
    pub previous: Commit,
    /// The boot that it ended.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// Where it stands.
    pub state: AttemptState,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Why, in one or two sentences.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 4096))]
    pub message: String,
}

/// Where an attempt stands.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptState {
    /// The way back is prepared; the host has not gone down yet.
    Armed,
    /// The new deployment runs on trial.
    Verifying,
    /// All checks have held for the soak time.
    Healthy,
    /// The host goes back.
    RollingBack,
    /// It is over; see the outcome.
    Finished,
}

/// How an attempt ended. Told apart by boot ID and booted commit, never by the reply to the reboot call.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Verified on the new commit.
    Booted,
    /// The host never went down; the permit was withdrawn.
    NeverRebooted,
    /// The host rebooted, but the new deployment had not been completed.
    NotFinalized,
    /// The host booted its old deployment without being told to.
    FellBack,
    /// The host was sent back to its old deployment because verification failed.
    RolledBack,
    /// The node has been silent since its reboot.
    Lost,
}

impl Outcome {
    /// As it stands in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Booted => "Booted",
            Outcome::NeverRebooted => "NeverRebooted",
            Outcome::NotFinalized => "NotFinalized",
            Outcome::FellBack => "FellBack",
            Outcome::RolledBack => "RolledBack",
            Outcome::Lost => "Lost",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the host is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Host {
    /// PRETTY_NAME of the host's os-release.
    pub os: String,
    /// Version of the host's libostree.
    pub ostree_version: String,
}
