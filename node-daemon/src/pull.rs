//! The download that runs beside the loop: at most one, for the image that the plan asks for, killed when it asks for
//! another or for none.

use std::time::Instant;

use osimage_crds::{Commit, nodeos, osimage::Image};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    protocol::{Failure, Progress, Source},
    worker_client::Workers,
};

/// At most one download.
#[derive(Default)]
pub struct Pulls {
    running: Option<Running>,
}

struct Running {
    image: Image,
    task: JoinHandle<Result<(), Failure>>,
    progress: watch::Receiver<Progress>,
    rate: Rate,
}

/// A download that ended.
pub struct Ended {
    pub commit: Commit,
    pub result: Result<(), Failure>,
    /// Bytes that arrived.
    pub bytes: u64,
}

impl Pulls {
    /// Downloads this image, or nothing.
    pub fn follow(&mut self, wanted: Option<&Image>, os_image: &str, workers: &Workers) {
        if let Some(running) = self.running.take_if(|running| wanted != Some(&running.image)) {
            tracing::info!(commit = %running.image.ostree.commit, "download is no longer wanted");
            // The worker dies with the task.
            running.task.abort();
        }
        let (None, Some(image)) = (&self.running, wanted) else { return };
        let (sender, progress) = watch::channel(Progress::default());
        let source = Source::new(image, os_image);
        tracing::info!(commit = %source.commit, url = source.url, "downloads");
        let workers = workers.clone();
        let task = tokio::spawn(async move { workers.pull(source, sender).await });
        self.running = Some(Running { image: image.clone(), task, progress, rate: Rate::default() });
    }

    /// Resolves when the download has got on or ended; never when none runs. May be dropped and called again.
    pub async fn changed(&mut self) -> Option<Ended> {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = tokio::select! {
            result = &mut running.task => result,
            Ok(()) = running.progress.changed() => return None,
        };
        let bytes = running.progress.borrow().bytes;
        let commit = running.image.ostree.commit.clone();
        self.running = None;
        let lost = |e| Failure::transient(nodeos::ProblemReason::HostError, format!("the download was lost: {e}"));
        Some(Ended { commit, result: result.map_err(lost).flatten(), bytes })
    }

    /// The download as the status tells it.
    pub fn report(&mut self, now: Instant) -> Option<nodeos::Pull> {
        let running = self.running.as_mut()?;
        let progress = *running.progress.borrow();
        let bytes_per_second = running.rate.note(progress.bytes, now);
        Some(pull_status(progress, bytes_per_second))
    }
}

/// Bytes per second between reports.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    per_second: u64,
}

impl Rate {
    fn note(&mut self, bytes: u64, now: Instant) -> u64 {
        const LEAST_SPAN: f64 = 0.9;
        let Some((at, before)) = self.last else {
            self.last = Some((now, bytes));
            return 0;
        };
        let span = now.saturating_duration_since(at).as_secs_f64();
        if span >= LEAST_SPAN {
            self.per_second = (bytes.saturating_sub(before) as f64 / span) as u64;
            self.last = Some((now, bytes));
        }
        self.per_second
    }
}

fn pull_status(progress: Progress, bytes_per_second: u64) -> nodeos::Pull {
    let Progress { bytes, total_bytes, objects, total_objects, outstanding: _ } = progress;
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    nodeos::Pull {
        progress: percent(progress).map(|p| format!("{p}%")).unwrap_or_default(),
        bytes: number(bytes),
        total_bytes: total_bytes.map(number),
        objects: number(objects),
        total_objects: number(total_objects),
        bytes_per_second: number(bytes_per_second),
    }
}

/// Never 100: whether it is done is not told by counting.
fn percent(progress: Progress) -> Option<u64> {
    const MOST: u64 = 99;
    let (part, whole) = match progress.total_bytes {
        Some(total) if total > 0 => (progress.bytes, total),
        Some(_) | None => (progress.objects, progress.total_objects),
    };
    (whole > 0).then(|| (part.saturating_mul(100) / whole).min(MOST))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn progress_is_by_bytes_where_the_total_is_known() {
        let p = |bytes, total_bytes, objects, total_objects| {
            percent(Progress { bytes, total_bytes, objects, total_objects, outstanding: 0 })
        };
        for (got, expected) in [
            (p(50, Some(200), 9, 10), Some(25)),
            (p(300, Some(200), 0, 0), Some(99)),
            (p(5, None, 9, 10), Some(90)),
            (p(5, Some(0), 1, 4), Some(25)),
            (p(0, None, 0, 0), None),
            (p(u64::MAX, Some(1), 0, 0), Some(99)),
        ] {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn rates_are_over_about_a_second() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for (ms, bytes, expected) in
            [(0, 0, 0), (100, 500, 0), (1000, 1000, 1000), (1500, 9000, 1000), (2000, 3000, 2000)]
        {
            assert_eq!(rate.note(bytes, start + Duration::from_millis(ms)), expected, "at {ms}");
        }
    }
}
