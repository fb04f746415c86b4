//! The API of OSImage Operator: the two kinds, their rules, and every name that more than one
//! component must agree on.
//!
//! | module | holds |
//! |---|---|
//! | [`osimage`] | `OSImage`, which a person writes: what to run, where, how carefully |
//! | [`nodeos`] | `NodeOS`, one per node: spec = what the node may do now, status = what its daemon saw |
//! | [`window`] | when nodes may be taken down |
//! | [`value`] | checked values: commit checksums, attempt ids, durations |
//! | [`condition`] | condition types and the one function that sets them |
//! | [`names`] | labels, annotations, finalizers, field managers |
//!
//! No client and no runtime here: anything may depend on this crate.
#![deny(missing_docs)]
// Each printcolumn(...) of a kind names its keys again; the lint reads that as one attribute said twice.
#![allow(clippy::duplicated_attributes)]

pub mod condition;
pub mod names;
pub mod nodeos;
pub mod osimage;
pub mod value;
pub mod window;

pub use condition::{ConditionType, Conditions};
pub use nodeos::{NodeOS, NodeOSSpec, NodeOSStatus};
pub use osimage::{OSImage, OSImageSpec, OSImageStatus};
pub use value::{AttemptId, Commit, Period};
pub use window::Window;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// Every custom resource definition of this API, in the order in which they are installed.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![OSImage::crd(), NodeOS::crd()]
}
