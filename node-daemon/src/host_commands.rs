//! The one way to run a program of the host: in the host's mount namespace, with a deadline, its complaint in the
//! error.

use std::{io, time::Duration};

use thiserror::Error;

use crate::worker_client::Workers;

/// systemctl answers at once, or the manager is in trouble.
const SYSTEMCTL_LIMIT: Duration = Duration::from_secs(30);

/// Why a program of the host did not succeed.
#[derive(Debug, Error)]
pub enum CommandError {
    #[error("{command}: {source}")]
    Run { command: String, source: io::Error },
    #[error("{command}: {status}{}", said(.output))]
    Failed { command: String, status: String, output: String },
}

fn said(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(": {output}") }
}

/// Runs a program that must end with exit code 0. Returns the end of its output.
pub async fn run(workers: &Workers, command: &[String], limit: Duration) -> Result<String, CommandError> {
    let printable = || command.join(" ");
    let ended =
        workers.program(command, limit).await.map_err(|source| CommandError::Run { command: printable(), source })?;
    if ended.status.success() {
        return Ok(ended.stdout);
    }
    let output = if ended.stderr.is_empty() { ended.stdout } else { ended.stderr };
    let status = match ended.status.code() {
        Some(code) => format!("exit code {code}"),
        None => ended.status.to_string(),
    };
    Err(CommandError::Failed { command: printable(), status, output })
}

/// The state of a unit, as `systemctl is-active` says it: `active`, `failed`, `activating`…
pub async fn unit_state(workers: &Workers, unit: &str) -> Result<String, CommandError> {
    let command = words(&["systemctl", "is-active", "--", unit]);
    let ended = workers
        .program(&command, SYSTEMCTL_LIMIT)
        .await
        .map_err(|source| CommandError::Run { command: command.join(" "), source })?;
    match ended.stdout.lines().next() {
        Some(state) => Ok(state.trim().to_owned()),
        None => Err(CommandError::Failed {
            command: command.join(" "),
            status: ended.status.to_string(),
            output: ended.stderr,
        }),
    }
}

/// Starts the service whose stop, at shutdown, completes a staged deployment. Newer versions of libostree do so
/// themselves; on others a path unit does, a moment later. Without it the reboot would be for nothing.
pub async fn start_finalizer(workers: &Workers) -> Result<(), CommandError> {
    let command = words(&["systemctl", "start", "--quiet", "ostree-finalize-staged.service"]);
    run(workers, &command, SYSTEMCTL_LIMIT).await.map(|_| ())
}

/// Asks the host to reboot, in order: through logind, so that what holds the shutdown up is waited for, and what
/// forbids it is obeyed.
pub async fn reboot(workers: &Workers) -> Result<(), CommandError> {
    let obeying = words(&["systemctl", "--check-inhibitors=yes", "reboot"]);
    match run(workers, &obeying, SYSTEMCTL_LIMIT).await {
        // systemd before 248 asks logind, but cannot be told to obey for root.
        Err(CommandError::Failed { output, .. }) if output.contains("unrecognized option") => {
            run(workers, &words(&["systemctl", "reboot"]), SYSTEMCTL_LIMIT).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}
