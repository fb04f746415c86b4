//! `osimage-operator`: observes the cluster, asks the planner, carries out the steps.

mod args;
mod context;
mod error;
mod events;
mod evict;
mod execute;
mod gates;
mod lease;
mod metrics;
mod observe;
mod osimage_controller;
mod publish;
mod run;
mod stores;
#[cfg(test)]
mod testing;
mod volumes;

use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run::run(args::Args::parse()).await
}
