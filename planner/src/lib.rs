//! Every decision of the operator and of the node daemon, as pure functions: values in, values out.
//!
//! ```text
//!  operator:  observe the cluster ─► Fleet ─► rollout::plan ─► Plan { status, steps, wake }
//!                                                 │               1. status is written, with the
//!                                                 │                  resourceVersion it was read at
//!                                                 │               2. then the steps are carried out
//!  daemon:    observe the host ────► HostState ─► host::plan ─► HostPlan { step, report, wake }
//! ```
//!
//! | module | decides |
//! |---|---|
//! | [`rollout`] | which node may be disrupted now, and what comes next for those that are |
//! | [`gate`] | what may hold a node back, one file per reason |
//! | [`checks`] | which health checks that only the cluster can make do not hold |
//! | [`drain`] | which pods of a node to evict, and what blocks |
//! | [`window`] | whether a maintenance window is open, and long enough |
//! | [`status`] | what the OSImage says of all this |
//! | [`host`] | the one next step of a host |
//!
//! Nothing here knows a clock, a network, a file or a thread. Time is an argument.
#![deny(missing_docs)]

pub mod checks;
pub mod drain;
pub mod fleet;
pub mod gate;
pub mod host;
pub mod plan;
pub mod rollout;
pub mod status;
pub mod window;

pub use fleet::{Fleet, NodeView};
pub use plan::{Hold, HoldReason, Plan, Step};
