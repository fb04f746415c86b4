//! Resolves when the process is asked to stop.

use std::io;

use tokio::signal::unix::{self, SignalKind};

/// Waits for SIGTERM or SIGINT and returns its name. Never resolves when the handlers cannot be installed, and
/// says so.
pub async fn signal() -> &'static str {
    match first_signal().await {
        Ok(name) => name,
        Err(error) => {
            tracing::error!(%error, "cannot catch SIGTERM; the process has to be killed to stop");
            std::future::pending().await
        }
    }
}

async fn first_signal() -> io::Result<&'static str> {
    let mut terminate = unix::signal(SignalKind::terminate())?;
    let mut interrupt = unix::signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    }
}
