//! The test bed's helper program. `host-init` is PID 1 of a fake booted host; nobody calls it by hand.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;

use clap::Parser;

#[derive(Parser)]
enum Command {
    /// Runs as PID 1 of a fake booted host.
    #[command(hide = true)]
    HostInit {
        /// The host's description, JSON.
        spec: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::HostInit { spec } => osimage_kind_tests::host::init::main(&spec),
    }
}
