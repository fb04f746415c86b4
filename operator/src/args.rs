//! What the operator is told when it starts: flags, each with an environment variable.

use clap::{ArgAction, Parser};
use osimage_crds::Period;
use osimage_runtime::logging::LogFormat;

/// Updates the operating systems of nodes atomically with OSTree.
#[derive(Debug, Parser)]
#[command(name = "osimage-operator", version)]
pub struct Args {
    /// Where to serve /metrics, /healthz and /readyz. Empty: nowhere.
    #[arg(long, env = "METRICS_ADDRESS", default_value = "0.0.0.0:8080")]
    pub metrics_address: String,

    /// How log lines are written; what is logged follows RUST_LOG.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// Act only while holding the lease. Two operators without it are safe, but get in each other's way.
    #[arg(long, env = "LEADER_ELECT", action = ArgAction::Set, default_value_t = true)]
    pub leader_elect: bool,

    /// Namespace of the lease. Defaults to that of the kubeconfig's context or of the service account.
    #[arg(long, env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,

    /// Name of the lease.
    #[arg(long, env = "LEASE_NAME", default_value = "osimage-operator")]
    pub lease_name: String,

    /// How long the lease lasts after its last renewal: how long a successor waits for an operator that was killed.
    /// At least 3s.
    #[arg(long, env = "LEASE_DURATION", default_value = "15s", value_parser = lease_duration)]
    pub lease_duration: Period,

    /// The node that this operator runs on; it is updated last.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,

    /// Who this operator is in the lease and in events; must differ between operators. Defaults to host name and
    /// process id.
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
}

fn lease_duration(text: &str) -> Result<Period, String> {
    let period = Period::try_from(text.to_owned()).map_err(|error| error.to_string())?;
    if period < Period::seconds(3) {
        return Err("must be at least 3s".into());
    }
    Ok(period)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_sound() {
        Args::command().debug_assert();
        let args = Args::parse_from(["x", "--leader-elect=false", "--lease-duration=30s"]);
        assert!(!args.leader_elect);
        assert_eq!(args.lease_duration, Period::seconds(30));
        assert!(Args::try_parse_from(["x", "--lease-duration=1s"]).is_err());
    }
}
