//! The health checks of a record on trial, round after round, beside the main loop: a check that hangs must not keep
//! the host from going back in time.
//!
//! How long all have held is counted with the monotonic clock, from the end of the first good round to the end of the
//! last one. It is not kept over a restart of the daemon: the soak begins anew.

use std::time::{Duration, Instant};

use futures::future::join_all;
use http::Uri;
use osimage_crds::{
    AttemptId,
    condition::bounded,
    nodeos::CheckStatus,
    osimage::{Check, ExecCheck, HttpCheck, SystemdUnitCheck},
};
use osimage_planner::host::Record;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

use crate::{host_commands, worker_client::Workers};

/// From the end of a round to the begin of the next.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_MESSAGE: usize = 256;

/// The checks of at most one record.
#[derive(Default)]
pub struct Checks {
    trial: Option<Trial>,
}

struct Trial {
    attempt: AttemptId,
    results: Vec<CheckStatus>,
    good: Option<Good>,
    round: Option<JoinHandle<Vec<CheckStatus>>>,
    next: Instant,
}

/// All checks have held in every round between these times.
struct Good {
    since: Instant,
    until: Instant,
}

impl Checks {
    /// Runs the checks of this record from now on, or none.
    pub fn follow(&mut self, on_trial: Option<&Record>, workers: &Workers) {
        let Some(record) = on_trial else {
            if let Some(round) = self.trial.take().and_then(|trial| trial.round) {
                round.abort();
            }
            return;
        };
        if self.trial.as_ref().is_none_or(|trial| trial.attempt != record.attempt) {
            self.follow(None, workers);
        }
        let trial = self.trial.get_or_insert_with(|| Trial {
            attempt: record.attempt.clone(),
            results: vec![],
            good: None,
            round: None,
            next: Instant::now(),
        });
        if trial.round.is_none() && trial.next <= Instant::now() {
            let checks = record.health.checks.iter().filter(|c| !c.is_of_the_cluster()).cloned().collect();
            trial.round = Some(tokio::spawn(round(checks, workers.clone())));
        }
    }

    /// Resolves when a round has ended; never when none runs. May be dropped and called again.
    pub async fn round_ended(&mut self) {
        let Some((trial, round)) = self.trial.as_mut().and_then(|trial| {
            let round = trial.round.take()?;
            Some((trial, round))
        }) else {
            return std::future::pending().await;
        };
        let round = trial.round.insert(round);
        let results = round.await;
        trial.round = None;
        trial.next = Instant::now() + PAUSE;
        match results {
            Ok(results) => trial.note(results, Instant::now()),
            Err(error) => tracing::error!(%error, "a round of health checks was lost"),
        }
    }

    /// The checks as last run.
    pub fn results(&self) -> &[CheckStatus] {
        self.trial.as_ref().map_or(&[], |trial| &trial.results)
    }

    /// How long all have held without a break.
    pub fn healthy_for(&self) -> Option<Duration> {
        let good = self.trial.as_ref()?.good.as_ref()?;
        Some(good.until.saturating_duration_since(good.since))
    }
}

impl Trial {
    fn note(&mut self, results: Vec<CheckStatus>, now: Instant) {
        self.good = results
            .iter()
            .all(|c| c.passing)
            .then(|| Good { since: self.good.as_ref().map_or(now, |good| good.since), until: now });
        self.results = results;
    }
}

async fn round(checks: Vec<Check>, workers: Workers) -> Vec<CheckStatus> {
    join_all(checks.iter().map(async |check| {
        let result = run(check, &workers).await;
        let message = result.as_ref().err().map(|why| bounded(why, MAX_MESSAGE)).unwrap_or_default();
        CheckStatus { name: check.name.clone(), passing: result.is_ok(), message }
    }))
    .await
}

async fn run(check: &Check, workers: &Workers) -> Result<(), String> {
    match check {
        Check { exec: Some(exec), .. } => run_exec(exec, workers).await,
        Check { systemd_unit: Some(unit), .. } => run_unit(unit, workers).await,
        Check { http: Some(http), .. } => run_http(http).await,
        // The operator's checks do not come here; one that nobody knows must not pass.
        Check { exec: None, systemd_unit: None, http: None, .. } => Err("the check says nothing to do".into()),
    }
}

async fn run_exec(check: &ExecCheck, workers: &Workers) -> Result<(), String> {
    host_commands::run(workers, &check.command, check.timeout.get()).await.map(|_| ()).map_err(|e| e.to_string())
}

async fn run_unit(check: &SystemdUnitCheck, workers: &Workers) -> Result<(), String> {
    match host_commands::unit_state(workers, &check.unit).await {
        Ok(state) if state == "active" || state == "reloading" => Ok(()),
        Ok(state) => Err(format!("{} is {state}", check.unit)),
        Err(error) => Err(error.to_string()),
    }
}

async fn run_http(check: &HttpCheck) -> Result<(), String> {
    match timeout(check.timeout.get(), get(&check.url)).await {
        Ok(Ok(200..400)) => Ok(()),
        Ok(Ok(status)) => Err(format!("{} answered {status}", check.url)),
        Ok(Err(error)) => Err(format!("{}: {error}", check.url)),
        Err(_) => Err(format!("{} did not answer within {}", check.url, check.timeout)),
    }
}

/// The status of a plain GET. Redirects are answers, not followed.
async fn get(url: &str) -> Result<u16, String> {
    const PORT: u16 = 80;
    const STATUS_LINE: usize = "HTTP/1.1 200".len();
    let uri: Uri = url.parse().map_err(|e| format!("not a URL: {e}"))?;
    let host = uri.host().ok_or("the URL has no host")?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let authority = uri.authority().map_or(host, |a| a.as_str());
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut stream = TcpStream::connect((bare, uri.port_u16().unwrap_or(PORT))).await.map_err(|e| e.to_string())?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: osimage-node-daemon\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    let mut start = [0; STATUS_LINE];
    stream.read_exact(&mut start).await.map_err(|e| format!("no HTTP answer: {e}"))?;
    status(&start).ok_or_else(|| "no HTTP answer".into())
}

fn status(start: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(start).ok()?;
    text.starts_with("HTTP/1.").then(|| text.split(' ').nth(1)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn results(passing: &[bool]) -> Vec<CheckStatus> {
        passing.iter().map(|p| CheckStatus { name: "c".into(), passing: *p, message: String::new() }).collect()
    }

    #[test]
    fn the_soak_is_broken_by_one_failure() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut trial = Trial { attempt: AttemptId("a".into()), results: vec![], good: None, round: None, next: start };
        let held = |trial: &Trial| trial.good.as_ref().map(|g| (g.until - g.since).as_secs());
        let rows: &[(u64, &[bool], Option<u64>)] = &[
            (0, &[true, false], None),
            (1, &[true, true], Some(0)),
            (3, &[true, true], Some(2)),
            (4, &[false, true], None),
            (5, &[true, true], Some(0)),
            (9, &[true, true], Some(4)),
            (10, &[], Some(5)),
        ];
        for (second, passing, expected) in rows {
            trial.note(results(passing), at(*second));
            assert_eq!(held(&trial), *expected, "at {second}");
        }
    }

    #[test]
    fn status_lines() {
        for (start, expected) in
            [("HTTP/1.1 200", Some(200)), ("HTTP/1.0 503", Some(503)), ("HTTP/1.1 abc", None), ("SSH-2.0-OpenS", None)]
        {
            assert_eq!(status(start.as_bytes()), expected, "{start}");
        }
    }

    async fn serve(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/healthz?x=1", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            let n = stream.read(&mut request).await.unwrap();
            assert!(String::from_utf8_lossy(&request[..n]).starts_with("GET /healthz?x=1 HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        url
    }

    #[tokio::test]
    async fn an_url_must_answer_from_200_to_399() {
        let check = |url| HttpCheck { url, timeout: osimage_crds::Period::seconds(5) };
        assert_eq!(run_http(&check(serve("HTTP/1.1 204 No Content\r\n\r\n").await)).await, Ok(()));
        assert_eq!(run_http(&check(serve("HTTP/1.1 302 Found\r\n\r\n").await)).await, Ok(()));
        let bad = run_http(&check(serve("HTTP/1.1 500 No\r\n\r\n").await)).await.unwrap_err();
        assert!(bad.ends_with("answered 500"), "{bad}");
        assert!(run_http(&check("http://127.0.0.1:1/".into())).await.is_err());
        assert!(run_http(&check("nonsense".into())).await.is_err());
    }
}
