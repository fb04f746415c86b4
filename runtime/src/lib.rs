//! What both binaries share as processes. It knows nothing of Kubernetes or of OSTree.
//!
//! | module | does |
//! |---|---|
//! | [`logging`] | sets up `tracing` once, as text or JSON |
//! | [`admin`] | serves `/metrics`, `/healthz` and `/readyz` |
//! | [`shutdown`] | resolves when the process is asked to stop |

pub mod admin;
pub mod logging;
pub mod shutdown;
