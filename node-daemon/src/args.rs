//! Command line and environment.

use std::path::PathBuf;

use osimage_crds::Commit;
use osimage_runtime::logging::LogFormat;

/// Keeps one node on the OS commit that its NodeOS asks for.
#[derive(Debug, clap::Parser)]
#[command(
    name = "osimage-node-daemon",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub daemon: Daemon,
}

/// What the daemon runs itself as.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// One operation on the host. Reads a request on standard input, writes JSON lines on standard output.
    #[command(hide = true)]
    Worker(Worker),
    /// The worker after it has entered the host.
    #[command(hide = true)]
    WorkerInside,
    /// Makes the deployment of a commit the default. Run on the host by the boot guard.
    #[command(hide = true)]
    GuardRollback {
        /// The commit to go back to.
        #[arg(long)]
        commit: Commit,
    },
}

#[derive(Debug, clap::Args)]
pub struct Daemon {
    /// Name of the node.
    #[arg(long, env = "NODE_NAME", required = true)]
    pub node_name: Option<String>,
    #[command(flatten)]
    pub host: Host,
    /// Where to serve /metrics, /healthz and /readyz; empty for nowhere.
    #[arg(long, env = "METRICS_ADDRESS", default_value = "127.0.0.1:9410")]
    pub metrics_address: String,
    /// How log lines are written; `RUST_LOG` says which.
    #[arg(long, env = "LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Where the host is.
#[derive(Clone, Debug, clap::Args)]
pub struct Host {
    /// The root of the host, as this process sees it. All host files are read and written through it.
    #[arg(long, env = "HOST_ROOT", default_value = "/proc/1/root")]
    pub host_root: PathBuf,
    /// The mount namespace of the host.
    #[arg(long, env = "HOST_MOUNT_NAMESPACE", default_value = "/proc/1/ns/mnt")]
    pub host_mount_namespace: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct Worker {
    #[command(flatten)]
    pub host: Host,
    /// The daemon's process: the worker dies with it.
    #[arg(long)]
    pub parent: Option<i32>,
    /// Run this program on the host instead of an operation.
    #[arg(last = true)]
    pub program: Vec<String>,
}
