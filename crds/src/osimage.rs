//! `OSImage`: what a person writes.

use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, Time},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{AttemptId, Commit, Conditions, Period, nodeos::Outcome, window::Window};

/// OSImage names one OSTree commit and the nodes that shall run it. The operator brings them there one
/// disruption budget at a time, and stops by itself when a node comes back on its old system.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "osimage.dev",
    version = "v1alpha1",
    kind = "OSImage",
    plural = "osimages",
    singular = "osimage",
    shortname = "osi",
    status = "OSImageStatus",
    derive = "PartialEq",
    doc = "OSImage names one OSTree commit and the nodes that shall run it. The operator brings them there one disruption budget at a time, and stops by itself when a node comes back on its old system.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Updated", type_ = "string", description = "Nodes verified on the commit, of all selected", json_path = ".status.progress"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.counts.failed"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Commit", type_ = "string", priority = 1, json_path = ".spec.image.ostree.commit"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message"),
    validation = Rule::new("self.metadata.name.size() <= 63").message("metadata.name must not be longer than 63 characters: it is used as a label value")
)]
#[serde(rename_all = "camelCase")]
pub struct OSImageSpec {
    /// The operating system to run.
    pub image: Image,
    /// The nodes to run it on, by their labels. `{}` selects every node; it has to be written on purpose.
    #[schemars(schema_with = "selector_schema")]
    pub node_selector: LabelSelector,
    /// How many nodes at once, and when to stop.
    #[serde(default)]
    pub rollout: Rollout,
    /// How a node is emptied before it reboots.
    #[serde(default)]
    pub drain: Drain,
    /// The reboot itself.
    #[serde(default)]
    pub reboot: Reboot,
    /// When a rebooted node counts as healthy. The node itself enforces it, also without the API server.
    #[serde(default)]
    pub health: Health,
}

/// The operating system to run.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// A commit in an OSTree repository.
    pub ostree: OSTreeImage,
}

/// A commit in an OSTree repository, and how to trust it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct OSTreeImage {
    /// URL of the repository, as the nodes reach it: http://, https:// or file://.
    #[x_kube(validation = Rule::new("!self.matches('^[a-z]+://[^/]*@')").message("must not hold a user or password: every node can read it"))]
    #[x_kube(validation = Rule::new("self.matches('^(https?|file)://[^ ]+$')").message("must be an http://, https:// or file:// URL of an OSTree repository"))]
    #[schemars(length(max = 2048))]
    pub url: String,
    /// Name of the remote in the origin of the deployment, as `ostree admin status` shows it. Defaults to
    /// the name of the OSImage. The node keeps this remote apart from those of the distribution.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9][A-Za-z0-9._-]*$')").message("must be letters, digits, '.', '_' and '-', beginning with a letter or a digit"))]
    #[schemars(length(max = 63))]
    pub remote: Option<String>,
    /// Branch of the commit, such as `stable/x86_64/node`. When set, the commit must have been built for
    /// it (OSTree's ref binding), and it is recorded as the origin of the deployment.
    #[serde(rename = "ref", default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$')").message("must be an OSTree ref such as stable/x86_64/node"))]
    #[schemars(length(max = 255))]
    pub ref_: Option<String>,
    /// Checksum of the commit to run: 64 lower-case hexadecimal digits, as `ostree rev-parse REF` prints it.
    #[schemars(schema_with = "crate::value::written_commit")]
    pub commit: Commit,
    /// How a node makes sure that the commit comes from you. Exactly one way has to be chosen.
    pub verification: Verification,
}

/// How a commit is verified, before any of its content is downloaded.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.gpg) != has(self.insecureSkip)").message("exactly one of gpg and insecureSkip must be set: there is no silent default")
)]
pub struct Verification {
    /// The commit must carry a valid signature by one of these keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpg: Option<GpgVerification>,
    /// No verification: whoever can change what the URL serves can choose the commit's content only if they
    /// break SHA-256, but nobody vouches for the commit itself. Must be `true` when set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self").message("insecureSkip can only be true; leave it out and set gpg to verify"))]
    pub insecure_skip: Option<bool>,
}

/// GPG verification by libostree.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GpgVerification {
    /// ASCII-armored public keys, as `gpg --export --armor` prints them.
    #[x_kube(validation = Rule::new("self.contains('-----BEGIN PGP PUBLIC KEY BLOCK-----')").message("must hold ASCII-armored public keys: gpg --export --armor KEY"))]
    #[schemars(length(max = 65536))]
    pub keys: String,
}

/// How many nodes at once, and when to stop.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Stops new starts. Nodes in flight finish.
    #[serde(default)]
    pub paused: bool,
    /// How many of the selected nodes may be unavailable at once: a number, or a percentage of the selected
    /// nodes (rounded down, at least 1). Nodes that are down for any other reason count too.
    #[serde(default = "one")]
    #[schemars(schema_with = "budget_schema")]
    pub max_unavailable: IntOrString,
    /// How many nodes may download at once.
    #[serde(default = "ten")]
    #[schemars(range(min = 1))]
    pub max_staging: i32,
    /// How many nodes may fail on a commit before it is rejected and the rollout halts: a number, or a
    /// percentage of the selected nodes (rounded down, at least 1).
    #[serde(default = "one")]
    #[schemars(schema_with = "budget_schema")]
    pub failure_budget: IntOrString,
    /// How long a node must be Ready and verified before its slot is freed for the next one. It is uncordoned
    /// at once.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub min_ready_seconds: i32,
    /// A node label such as `topology.kubernetes.io/zone`. Nodes of two different values are never down at once
    /// because of us: a node is started only while all others that are down, whatever the cause, have its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub topology_key: Option<String>,
    /// Groups of nodes that go one after another. Nodes in none of them come last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub waves: Vec<Wave>,
    /// When nodes may be started; always when there are none. Nodes in flight finish.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub windows: Vec<Window>,
    /// What must say yes before a node is started, all of them; asked only while a node could be started. One that
    /// cannot be asked holds the rollout too, and fails nothing. Nodes in flight finish.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub gates: Vec<Gate>,
}

/// A monitoring system that is asked before a node is started. The operator asks from its own pod, without
/// credentials and without a proxy, for at most 5 seconds, and at most every 15 seconds.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.prometheus) != has(self.alertmanager)").message("exactly one of prometheus and alertmanager must be set")
)]
pub struct Gate {
    /// Names the gate in status and events.
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')").message("must be lower-case letters, digits and '-'"))]
    #[schemars(length(max = 63))]
    pub name: String,
    /// Open while a query of Prometheus, or of anything with its API, returns nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<PrometheusGate>,
    /// Open while no alert fires in Alertmanager that these matchers match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alertmanager: Option<AlertmanagerGate>,
}

/// Open while a query returns nothing.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct PrometheusGate {
    /// Where Prometheus is, such as `http://prometheus.monitoring:9090`; `/api/v1/query` is added.
    #[x_kube(validation = Rule::new("!self.matches('^[a-z]+://[^/]*@')").message("must not hold a user or password"))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^ ?#]+$')").message("must be an http:// or https:// URL without a query, such as http://prometheus.monitoring:9090"))]
    #[schemars(length(max = 2048))]
    pub url: String,
    /// An instant query that returns an empty vector while nodes may be started. Write it so that it returns something
    /// when it is **not** safe, such as `ALERTS{alertstate="firing", severity="critical"}` or
    /// `sum(rate(http_errors_total[5m])) > 10`. Mind that a metric that is missing returns nothing, too:
    /// `... or absent(http_errors_total)` closes the gate then.
    #[schemars(length(min = 1, max = 4096))]
    pub query: String,
}

/// Open while no alert fires that these matchers match.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct AlertmanagerGate {
    /// Where Alertmanager is, such as `http://alertmanager.monitoring:9093`; `/api/v2/alerts` is added.
    #[x_kube(validation = Rule::new("!self.matches('^[a-z]+://[^/]*@')").message("must not hold a user or password"))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[^ ?#]+$')").message("must be an http:// or https:// URL without a query, such as http://alertmanager.monitoring:9093"))]
    #[schemars(length(max = 2048))]
    pub url: String,
    /// Matchers as Alertmanager has them, such as `severity="critical"` or `alertname!="Watchdog"`. An alert that all of
    /// them match, and that is neither silenced nor inhibited, closes the gate. Prometheus' usual rules have an alert
    /// `Watchdog` that always fires.
    #[schemars(length(min = 1, max = 16), inner(length(max = 512)))]
    #[x_kube(validation = Rule::new("self.all(matcher, matcher.matches('^[^=!~]+(=|!=|=~|!~)'))").message("each must be a matcher such as severity=\"critical\""))]
    pub matchers: Vec<String>,
}

/// A group of nodes, chosen by their labels or by number.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.nodeSelector) != has(self.size)").message("exactly one of nodeSelector and size must be set")
)]
pub struct Wave {
    /// Names the wave in status, events and approvals.
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')").message("must be lower-case letters, digits and '-'"))]
    #[schemars(length(max = 40))]
    pub name: String,
    /// The selected nodes with these labels. No node may be in two waves by their labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "selector_schema")]
    pub node_selector: Option<LabelSelector>,
    /// So many of the selected nodes that are in no other wave: a number, or a percentage of the selected nodes (rounded
    /// down, at least 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "budget_schema")]
    pub size: Option<IntOrString>,
    /// How long to wait after the last node of this wave before the next wave begins.
    #[serde(default = "no_time")]
    pub soak: Period,
    /// Whether the wave begins by itself, or waits for the annotation `approve.osimage.dev/NAME: COMMIT` on the OSImage.
    #[serde(default)]
    pub approval: Approval,
}

/// Whether a wave begins by itself.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Approval {
    /// It begins when the wave before it has soaked.
    #[default]
    Automatic,
    /// It waits for a person, too.
    Manual,
}

impl Default for Rollout {
    fn default() -> Self {
        Rollout {
            paused: false,
            max_unavailable: one(),
            max_staging: ten(),
            failure_budget: one(),
            min_ready_seconds: 0,
            topology_key: None,
            waves: vec![],
            windows: vec![],
            gates: vec![],
        }
    }
}

/// As Kubernetes has it, but checked: the API server checks selectors of its own kinds only, and one that cannot be
/// parsed would stop a rollout halfway.
fn selector_schema(_: &mut SchemaGenerator) -> Schema {
    let text = |max: u32| json_schema!({"type": "string", "maxLength": max});
    json_schema!({
        "type": "object",
        "description": "The nodes to run it on, by their labels. `{}` selects every node; it has to be written on purpose.",
        "properties": {
            "matchLabels": {
                "type": "object",
                "description": "Labels that a node must have.",
                "maxProperties": 32,
                "additionalProperties": text(63)
            },
            "matchExpressions": {
                "type": "array",
                "description": "Requirements that a node must meet, all of them.",
                "maxItems": 32,
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": text(317),
                        "operator": {"type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
                        "values": {"type": "array", "maxItems": 256, "items": text(63)}
                    },
                    "x-kubernetes-validations": [{
                        "rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
                        "message": "values must be set for In and NotIn, and must not be for Exists and DoesNotExist"
                    }]
                }
            }
        }
    })
}

fn pod_selector_schema(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = selector_schema(generator);
    schema.insert("description".into(), "The pods, by their labels. `{}` selects every pod.".into());
    schema
}

fn budget_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 4,
        "x-kubernetes-validations": [{
            "rule": "type(self) == int ? self >= 1 : string(self).matches('^([1-9][0-9]?|100)%$')",
            "message": "must be a number of at least 1 or a percentage from 1% to 100% (to stop a rollout, set rollout.paused)"
        }]
    })
}

/// How a node is emptied before it reboots.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("duration(self.timeout) >= duration('1s')").message("drain.timeout must be at least 1s"))]
pub struct Drain {
    /// How long a node may take to be emptied, from its cordon.
    #[serde(default = "ten_minutes")]
    pub timeout: Period,
    /// What to do then.
    #[serde(default)]
    pub on_timeout: OnDrainTimeout,
    /// Seconds that an evicted pod has to stop. Defaults to what the pod asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub grace_period_seconds: Option<i64>,
    /// Evict pods that use emptyDir volumes, whose content is lost. Otherwise such pods block the node.
    #[serde(default)]
    pub delete_empty_dir_data: bool,
    /// Evict pods that no controller will make again. Otherwise such pods block the node.
    #[serde(default)]
    pub delete_unmanaged_pods: bool,
    /// Evict only the pods with these labels; the others go down with the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "selector_schema")]
    pub pod_selector: Option<LabelSelector>,
    /// Evict nothing: nodes are cordoned and rebooted with all their pods.
    #[serde(default)]
    pub skip: bool,
}

impl Default for Drain {
    fn default() -> Self {
        Drain {
            timeout: ten_minutes(),
            on_timeout: OnDrainTimeout::default(),
            grace_period_seconds: None,
            delete_empty_dir_data: false,
            delete_unmanaged_pods: false,
            pod_selector: None,
            skip: false,
        }
    }
}

/// What to do with a node that was not emptied in time.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnDrainTimeout {
    /// Give it back and try another; come back to it later, after a pause that grows.
    #[default]
    Abort,
    /// Delete what is left, whatever PodDisruptionBudgets say.
    Force,
}

/// The reboot itself.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("duration(self.timeout) >= duration('1s')").message("reboot.timeout must be at least 1s"))]
pub struct Reboot {
    /// How long a node may take from its permit until it is seen with a new boot ID. After that the permit
    /// is withdrawn.
    #[serde(default = "ten_minutes")]
    pub timeout: Period,
}

impl Default for Reboot {
    fn default() -> Self {
        Reboot { timeout: ten_minutes() }
    }
}

/// When a rebooted node counts as healthy.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("duration(self.deadline) >= duration('5s')").message("health.deadline must be at least 5s"))]
#[x_kube(validation = Rule::new("duration(self.soak) < duration(self.deadline)").message("health.soak must be shorter than health.deadline"))]
pub struct Health {
    /// How long a node may take from its boot until it is healthy and the operator has acknowledged it.
    /// After that the node goes back to its previous system by itself.
    #[serde(default = "ten_minutes")]
    pub deadline: Period,
    /// How long all checks must hold without a break.
    #[serde(default = "one_minute")]
    pub soak: Period,
    /// What must hold on the node, besides Node Ready, for it to be healthy.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub checks: Vec<Check>,
}

impl Default for Health {
    fn default() -> Self {
        Health { deadline: ten_minutes(), soak: one_minute(), checks: vec![] }
    }
}

/// One check. `exec`, `systemdUnit` and `http` are run by the node daemon on the host, also without the API server.
/// `podsReady` and `nodeCondition` are made by the operator when those of the host have held for `soak`: until they hold,
/// the node is not acknowledged, and at its deadline it goes back to its previous system.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.exec), has(self.systemdUnit), has(self.http), has(self.podsReady), has(self.nodeCondition)].exists_one(set, set)").message("exactly one of exec, systemdUnit, http, podsReady and nodeCondition must be set")
)]
pub struct Check {
    /// Names the check in status and events.
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')").message("must be lower-case letters, digits and '-'"))]
    #[schemars(length(max = 63))]
    pub name: String,
    /// A command on the host that must end with exit code 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecCheck>,
    /// A systemd unit on the host that must be active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub systemd_unit: Option<SystemdUnitCheck>,
    /// A URL that must answer with a status from 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// Pods on the node that must be Ready, as the operator sees them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods_ready: Option<PodsReadyCheck>,
    /// A condition that the Node must have, as the operator sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_condition: Option<NodeConditionCheck>,
}

impl Check {
    /// Whether it is made by the operator. The host does not know of it.
    pub fn is_of_the_cluster(&self) -> bool {
        let Check { name: _, exec: _, systemd_unit: _, http: _, pods_ready, node_condition } = self;
        pods_ready.is_some() || node_condition.is_some()
    }
}

/// Every pod on the node that the selector matches is Ready, and there is at least one: a DaemonSet's pod that has not
/// been made yet holds the node as one that is not Ready does. Pods that have finished or are being deleted do not count.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PodsReadyCheck {
    /// Namespace of the pods; every namespace when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')").message("must be the name of a namespace"))]
    #[schemars(length(max = 63))]
    pub namespace: Option<String>,
    /// The pods, by their labels.
    #[schemars(schema_with = "pod_selector_schema")]
    pub selector: LabelSelector,
}

/// A condition that the Node must have. One that is absent does not hold, whatever the status asked for.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NodeConditionCheck {
    /// Type of the condition, such as `NetworkUnavailable` or one of node-problem-detector's.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 316))]
    pub type_: String,
    /// Its status.
    pub status: ConditionStatus,
}

/// Status of a condition.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows.
    Unknown,
}

impl ConditionStatus {
    /// As it stands in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            ConditionStatus::True => "True",
            ConditionStatus::False => "False",
            ConditionStatus::Unknown => "Unknown",
        }
    }
}

/// A command on the host that must end with exit code 0.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ExecCheck {
    /// Program and arguments; no shell is added.
    #[schemars(length(min = 1, max = 32), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// How long it may take, at most.
    #[serde(default = "check_timeout")]
    pub timeout: Period,
}

/// A systemd unit on the host that must be active.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SystemdUnitCheck {
    /// Name of the unit, such as `kubelet.service`.
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9:_.@][A-Za-z0-9:_.@-]*[.][a-z]+$')").message("must be a systemd unit name with its type, such as kubelet.service"))]
    #[schemars(length(max = 255))]
    pub unit: String,
}

/// A URL that must answer with a status from 200 to 399.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct HttpCheck {
    /// An http:// URL as reached from the node, such as `http://127.0.0.1:10248/healthz`.
    #[x_kube(validation = Rule::new("self.matches('^http://[^ ]+$')").message("must be an http:// URL such as http://127.0.0.1:10248/healthz"))]
    #[schemars(length(max = 2048))]
    pub url: String,
    /// How long it may take, at most.
    #[serde(default = "check_timeout")]
    pub timeout: Period,
}

fn one() -> IntOrString {
    IntOrString::Int(1)
}

fn ten() -> i32 {
    10
}

fn no_time() -> Period {
    Period::seconds(0)
}

fn ten_minutes() -> Period {
    Period::seconds(600)
}

fn one_minute() -> Period {
    Period::seconds(60)
}

fn check_timeout() -> Period {
    Period::seconds(10)
}

/// Where the rollout stands. Written by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct OSImageStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing, Degraded and Paused.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Conditions,
    /// One word for people; nothing is decided by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// How far, and what is wrong, in one line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Nodes verified on the commit, of all selected: `37/50`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub progress: String,
    /// Nodes by where they stand.
    pub counts: Counts,
    /// Attempts begun so far; the source of attempt names.
    pub attempts: i64,
    /// Nodes that may be disrupted now. A slot is written here before its node is touched, and removed after
    /// the node has been given back.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<Slot>,
    /// Nodes that failed on the current commit. They are not tried again by themselves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// Commits that failed on as many nodes as the failure budget allows. Not tried again until the annotation
    /// `osimage.dev/retry` gets a new value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<Rejected>,
    /// Nodes that could not be emptied, or did not go down, in time; they are come back to later.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deferred: Vec<Deferred>,
    /// The rollout of the current commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// Earlier rollouts, the newest first; at most 10.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<PastRollout>,
    /// The value of the annotation `osimage.dev/retry` that was last obeyed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_handled: Option<String>,
    /// What is waited for, most important first; at most 20.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<Blocker>,
}

/// Where a rollout stands, in one word.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nodes are being moved.
    Progressing,
    /// Something is waited for; see the blockers.
    Waiting,
    /// New starts are stopped by `rollout.paused`.
    Paused,
    /// The commit was rejected.
    Halted,
    /// Every selected node runs the commit.
    Updated,
    /// The OSImage is being deleted; its nodes are given back.
    Deleting,
}

/// Nodes by where they stand.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Counts {
    /// Nodes that the selector matches.
    pub selected: i32,
    /// Verified on the commit.
    pub updated: i32,
    /// Commit downloaded and verified, waiting for their turn.
    pub pulled: i32,
    /// In a slot: being drained, rebooted or verified.
    pub updating: i32,
    /// Failed on the commit.
    pub failed: i32,
    /// Selected nodes that are unavailable, for whatever cause.
    pub unavailable: i32,
}

/// One unit of the disruption budget, held from before the cordon until the node is given back.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// The node.
    pub node: String,
    /// Name of this attempt.
    pub attempt: AttemptId,
    /// The commit it shall boot.
    pub commit: Commit,
    /// The boot during which the slot was taken; a permit is good for this boot only.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// When the slot was taken.
    pub since: Time,
    /// When the node, drained, was allowed to reboot. Written before the permit is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permitted: Option<Time>,
    /// Why the permit is taken back. Written before it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdrawn: Option<String>,
    /// What keeps a node whose host is healthy from being acknowledged, as last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unproven: Option<String>,
    /// Set once the attempt is over; what is left is to give the node back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<SlotOutcome>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Time>,
}

/// How a slot ended.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotOutcome {
    /// The node is verified on the commit.
    Booted,
    /// The attempt failed; see `failures`.
    Failed,
    /// The attempt was called off before the node rebooted.
    Cancelled,
}

/// One node that failed on the current commit.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The node.
    pub node: String,
    /// The attempt.
    pub attempt: AttemptId,
    /// The commit.
    pub commit: Commit,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, in one or two sentences.
    pub message: String,
    /// When the operator learnt of it.
    pub time: Time,
}

/// A node that could not be emptied, or did not go down, in time.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Deferred {
    /// The node.
    pub node: String,
    /// How often in a row.
    pub times: i32,
    /// Not tried again before.
    pub until: Time,
    /// Why.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// How far the rollout of one commit is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// The commit.
    pub commit: Commit,
    /// When the OSImage began to ask for it.
    pub started: Time,
    /// When all selected nodes had it for the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// The waves, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waves: Vec<WaveStatus>,
}

/// How far one wave is.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WaveStatus {
    /// Its name.
    pub name: String,
    /// Nodes in it.
    pub nodes: i32,
    /// Of them, verified on the commit.
    pub updated: i32,
    /// When all of them were, for the first time; its soak counts from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed: Option<Time>,
}

/// How an earlier rollout ended.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PastRollout {
    /// The commit.
    pub commit: Commit,
    /// When the OSImage began to ask for it.
    pub started: Time,
    /// When all selected nodes had it for the first time; absent when another commit was asked for before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// When another commit was asked for.
    pub ended: Time,
    /// How it stood then.
    pub result: RolloutResult,
    /// Nodes verified on the commit then.
    pub updated: i32,
    /// Nodes that failed on it.
    pub failed: i32,
}

/// How a rollout stood when another commit was asked for.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolloutResult {
    /// Every selected node had the commit.
    Finished,
    /// The commit was rejected.
    Rejected,
    /// It was under way.
    Superseded,
}

/// A commit that is not tried again.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Rejected {
    /// The commit.
    pub commit: Commit,
    /// Which node failed on it, and how.
    pub message: String,
    /// When it was rejected.
    pub time: Time,
}

/// One thing that is waited for.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Blocker {
    /// The node that waits; empty when the whole rollout waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// One word for machines.
    pub reason: String,
    /// The object that blocks, as `Kind namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What is waited for, and what would end the waiting.
    pub message: String,
    /// Since when.
    pub since: Time,
}

impl Blocker {
    /// The same blocker, times aside.
    pub fn same(&self, other: &Blocker) -> bool {
        let Blocker { node, reason, object, message: _, since: _ } = self;
        *node == other.node && *reason == other.reason && *object == other.object
    }
}

/// A point in time as the API writes it: whole seconds, so that what is read back equals what was written.
pub fn whole_seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}
