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

/// Asks the host to reboot, in order: what delays the shutdown (the kubelet, while it stops pods) is waited for, what
/// forbids it is obeyed.
///
/// logind is asked itself where it can be: `systemctl --check-inhibitors=yes` would also refuse because somebody is
/// logged in, and without it, root is not refused at all.
pub async fn reboot(workers: &Workers) -> Result<(), CommandError> {
    /// SD_LOGIND_ROOT_CHECK_INHIBITORS, since systemd 246.
    const OBEY_INHIBITORS: &str = "1";
    const MANAGER: [&str; 3] = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
    let call =
        [&["busctl", "--system", "call"], MANAGER.as_slice(), &["RebootWithFlags", "t", OBEY_INHIBITORS]].concat();
    match run(workers, &words(&call), SYSTEMCTL_LIMIT).await {
        Ok(_) => Ok(()),
        Err(error) if forbids(&error) => Err(error),
        // No logind, no bus, or older ones: systemctl knows what there is.
        Err(_) => run(workers, &words(&["systemctl", "reboot"]), SYSTEMCTL_LIMIT).await.map(|_| ()),
    }
}

/// Whether logind understood and refused.
fn forbids(error: &CommandError) -> bool {
    match error {
        CommandError::Failed { output, .. } => output.to_lowercase().contains("inhibitor"),
        CommandError::Run { .. } => false,
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_from_a_bus_that_is_not_there() {
        for (output, refused) in [
            ("Call failed: Access denied to root due to active block inhibitor", true),
            ("Call failed: Operation denied due to active block inhibitor", true),
            ("Failed to connect to bus: No such file or directory", false),
            ("Call failed: Unknown method RebootWithFlags or interface org.freedesktop.login1.Manager.", false),
            ("execute busctl on the host: No such file or directory (os error 2)", false),
        ] {
            let error =
                CommandError::Failed { command: "busctl".into(), status: "exit code 1".into(), output: output.into() };
            assert_eq!(forbids(&error), refused, "{output}");
        }
    }
}
