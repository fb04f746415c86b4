//! The test bed: real control planes, real OSTree hosts, and the shipped binaries between them.
//!
//! Everything here is a means for black-box tests and for the demo. Nothing here knows the planner, the operator or
//! the node daemon as a library: they are started as the programs that a user installs.
//!
//! | module | stands for |
//! |---|---|
//! | [`cluster`] | etcd, kube-apiserver, kube-controller-manager, kube-scheduler, as processes |
//! | [`kubelet`] | the kubelet of one node, as far as the API server can see it |
//! | [`repo`], [`debian`] | OSTree repositories with bootable, signed commits |
//! | [`server`] | the HTTP server in front of a repository, with faults on demand |
//! | [`host`] | a machine booted from an OSTree deployment: boot loader, init, shutdown, power cut |
//! | [`daemon`] | the node daemon's container on such a host |
//! | [`bed`] | all of it, wired together |
//! | [`product`] | the chart and the shipped binaries on a bed |
//! | [`witness`] | remembers the worst it saw |
//! | [`demo`] | `make demo` |
//! | [`process`], [`scratch`], [`remove`] | nothing outlives the test |

#![allow(clippy::print_stderr)]

pub mod audit;
pub mod bed;
pub mod cluster;
pub mod daemon;
pub mod debian;
pub mod demo;
pub mod host;
pub mod kubelet;
pub mod pki;
pub mod process;
pub mod product;
pub mod remove;
pub mod repo;
pub mod scratch;
pub mod server;
pub mod tools;
pub mod wait;
pub mod witness;
