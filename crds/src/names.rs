//! Names shared between components. Nothing else spells them out.

/// API group of both kinds.
pub const GROUP: &str = "osimage.dev";
/// API version of both kinds.
pub const VERSION: &str = "v1alpha1";

/// On a Node: the OSImage that cordoned it, as `name@uid`. Written together with the cordon itself, so
/// that we uncordon exactly what we cordoned.
pub const CORDONED_BY: &str = "osimage.dev/cordoned-by";
/// On an OSImage: any new value asks to try the rejected commits and failed nodes again.
pub const RETRY: &str = "osimage.dev/retry";
/// Prefix of annotations on an OSImage that approve a wave: `approve.osimage.dev/WAVE: COMMIT`. The commit may be
/// shortened to at least 12 digits. An approval is for one commit only.
pub const APPROVE_PREFIX: &str = "approve.osimage.dev/";
/// On a Node: annotations for autoscalers that were added with the cordon, separated by commas; they go with it.
pub const ADDED: &str = "osimage.dev/added-annotations";
/// Annotations that keep autoscalers away from a node in a slot (Cluster Autoscaler, Karpenter).
pub const KEEP_AUTOSCALERS_AWAY: [&str; 2] =
    ["cluster-autoscaler.kubernetes.io/scale-down-disabled", "karpenter.sh/do-not-disrupt"];
/// Label of control plane nodes.
pub const CONTROL_PLANE_LABEL: &str = "node-role.kubernetes.io/control-plane";
/// On an OSImage: holds its deletion until its nodes are left as they were found.
pub const FINALIZER: &str = "osimage.dev/unwind";
/// On a NodeOS: the name of the OSImage it was made for.
pub const OSIMAGE_LABEL: &str = "osimage.dev/osimage";

/// Field manager of everything the operator writes.
pub const OPERATOR_MANAGER: &str = "osimage-operator";
/// Field manager of everything a node daemon writes.
pub const DAEMON_MANAGER: &str = "osimage-node-daemon";
