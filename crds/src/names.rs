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
/// On an OSImage: holds its deletion until its nodes are left as they were found.
pub const FINALIZER: &str = "osimage.dev/unwind";
/// On a NodeOS: the name of the OSImage it was made for.
pub const OSIMAGE_LABEL: &str = "osimage.dev/osimage";

/// Field manager of everything the operator writes.
pub const OPERATOR_MANAGER: &str = "osimage-operator";
/// Field manager of everything a node daemon writes.
pub const DAEMON_MANAGER: &str = "osimage-node-daemon";
