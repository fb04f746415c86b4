//! `osimage-node-daemon`: observes one host, asks the planner, carries out one step.
//!
//! The same binary is also the worker that it runs on the host, one short process per operation (see `enter` and
//! `worker`), and the boot guard's way back.

mod args;
mod checks;
mod enter;
mod execute;
mod guard;
mod host_commands;
mod host_files;
mod metrics;
mod observe;
mod protocol;
mod publish;
mod pull;
mod report;
mod run;
mod trouble;
mod worker;
mod worker_client;

use clap::Parser;

/// A worker must enter the host's namespaces before there is a second thread: no runtime is started here.
fn main() -> std::process::ExitCode {
    match args::Cli::parse() {
        args::Cli { command: Some(args::Command::Worker(how)), .. } => enter::enter(&how),
        args::Cli { command: Some(args::Command::WorkerInside), .. } => worker::serve(),
        args::Cli { command: Some(args::Command::GuardRollback { commit }), .. } => worker::guard_rollback(commit),
        args::Cli { command: None, daemon } => run::main(daemon),
    }
}
