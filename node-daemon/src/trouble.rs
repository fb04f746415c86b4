//! The last thing that went wrong, and when to try again. In memory only: a daemon that is started anew tries anew.

use std::time::{Duration, Instant};

use osimage_crds::Commit;
use osimage_planner::host;

use crate::protocol::Failure;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
pub const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What went wrong last.
#[derive(Debug, Default)]
pub struct Trouble(Option<Entry>);

#[derive(Debug)]
struct Entry {
    commit: Commit,
    failure: Failure,
    tries: u32,
    /// `None`: not before the spec changes.
    due: Option<Instant>,
}

impl Trouble {
    /// A step about this commit failed. It is tried again after `longest` at the latest. `luck` is a random number from 0 to 1; it spreads nodes apart.
    pub fn failed(&mut self, commit: &Commit, failure: Failure, longest: Duration, luck: f64) {
        self.note(commit, failure, longest, Instant::now(), luck);
    }

    fn note(&mut self, commit: &Commit, failure: Failure, longest: Duration, now: Instant, luck: f64) {
        let before = self.0.as_ref().filter(|e| e.commit == *commit && e.failure.reason == failure.reason);
        let tries = before.map_or(0, |e| e.tries).saturating_add(1);
        let due = failure.transient.then(|| now + pause(tries, luck).min(longest));
        self.0 = Some(Entry { commit: commit.clone(), failure, tries, due });
    }

    /// A step succeeded, or the spec changed.
    pub fn clear(&mut self) {
        self.0 = None;
    }

    /// A download got further than before it failed: the next pause is short again.
    pub fn moved_on(&mut self) {
        if let Some(entry) = &mut self.0 {
            entry.tries = 0;
        }
    }

    /// As the planner reads it.
    pub fn as_seen(&self, now: Instant) -> Option<host::Trouble> {
        let Entry { commit, failure, tries: _, due } = self.0.as_ref()?;
        Some(host::Trouble {
            commit: commit.clone(),
            problem: failure.problem(),
            retry_in: due.map(|due| due.saturating_duration_since(now)),
        })
    }
}

/// Doubles with each try; between half and all of that.
fn pause(tries: u32, luck: f64) -> Duration {
    const MOST_DOUBLINGS: u32 = 16;
    let full = FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(MOST_DOUBLINGS)).min(LONGEST_PAUSE);
    full.mul_f64(0.5 + luck.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use osimage_crds::nodeos::ProblemReason;

    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes() {
        for (tries, seconds) in [(1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (u32::MAX, 300)] {
            assert_eq!(pause(tries, 1.0).as_secs(), seconds, "{tries}");
            assert_eq!(pause(tries, 0.0), pause(tries, 1.0) / 2);
        }
    }

    #[test]
    fn permanent_failures_wait_for_the_spec_and_another_reason_begins_anew() {
        let commit: Commit = "a".repeat(64).parse().unwrap();
        let now = Instant::now();
        let mut trouble = Trouble::default();
        let busy = || Failure::transient(ProblemReason::HostBusy, "busy");
        for expected in [1, 2, 4] {
            trouble.note(&commit, busy(), LONGEST_PAUSE, now, 1.0);
            assert_eq!(trouble.as_seen(now).unwrap().retry_in, Some(Duration::from_secs(expected)));
        }
        trouble.note(&commit, Failure::transient(ProblemReason::NoSpace, "full"), LONGEST_PAUSE, now, 1.0);
        assert_eq!(trouble.as_seen(now).unwrap().retry_in, Some(Duration::from_secs(1)));
        trouble.note(&commit, Failure::permanent(ProblemReason::SignatureInvalid, "no"), LONGEST_PAUSE, now, 1.0);
        assert_eq!(trouble.as_seen(now).unwrap().retry_in, None);
        trouble.clear();
        assert_eq!(trouble.as_seen(now), None);
    }
}
