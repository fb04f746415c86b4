//! Waiting for a condition: polls until a deadline, never sleeps to be lucky, and says what it saw last.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Polls `look` until it returns `Ok(value)`; at the deadline fails with the last reason.
pub async fn until<T, F, Fut>(what: &str, timeout: Duration, mut look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let start = Instant::now();
    loop {
        let last = match look().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() >= timeout {
            bail!("timed out after {:.1} s waiting for {what}; last seen: {last:#}", start.elapsed().as_secs_f64());
        }
        tokio::time::sleep(POLL).await;
    }
}
