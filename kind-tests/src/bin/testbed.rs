//! The test bed by hand: `testbed up` starts a control plane and booted hosts and keeps them until Ctrl-C.
//!
//! `host-init` is PID 1 of a fake booted host; nobody calls it by hand.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use osimage_kind_tests::bed::{BedOptions, TestBed};
use osimage_kind_tests::debian::DebianOs;
use osimage_kind_tests::host;
use osimage_kind_tests::host::sysroot::Template;
use osimage_kind_tests::repo::Images;
use osimage_kind_tests::server::RepoServer;

#[derive(Parser)]
enum Command {
    /// Starts a bed and says how to reach it; Ctrl-C removes it.
    Up {
        /// Number of hosts.
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Real Debian trees (built once) instead of synthetic ones.
        #[arg(long)]
        debian: bool,
    },
    /// Builds the Debian image into the cache, if it is not there.
    BuildDebian,
    /// Runs as PID 1 of a fake booted host.
    #[command(hide = true)]
    HostInit {
        /// The host's description, JSON.
        spec: PathBuf,
    },
}

fn main() -> Result<()> {
    match Command::parse() {
        // Not inside a runtime: PID 1 has one thread.
        Command::HostInit { spec } => host::init::main(&spec),
        Command::BuildDebian => DebianOs::build_or_reuse(&|what| eprintln!("{what}")).map(drop),
        Command::Up { nodes, debian } => up(nodes, debian),
    }
}

#[tokio::main]
async fn up(nodes: usize, debian: bool) -> Result<()> {
    let (images, template) = if debian {
        let os = DebianOs::build_or_reuse(&|what| eprintln!("{what}"))?;
        (os.images()?, os.template())
    } else {
        let images = Images::synthetic()?;
        let template = Template::synthetic(&images.repo.path(), &images.v1)?;
        (images, template)
    };
    let server = RepoServer::start(&images.repo.path())?;
    let bed = TestBed::start(BedOptions::new(nodes), &template).await?;
    println!("export KUBECONFIG={}", bed.plane.kubeconfig("admin").display());
    println!("repository {}", server.url());
    for commit in [&images.v1, &images.v2, &images.v3, &images.v4] {
        println!("version {} is {}", commit.version, commit.checksum);
    }
    for node in &bed.nodes {
        println!("{}: nsenter --target {} --mount --pid --uts --time sh", node.name, node.host.pid1()?);
    }
    println!("ready; Ctrl-C ends it");
    // Signals end the program after a clean-up (see `scratch`).
    std::future::pending::<()>().await;
    Ok(())
}
