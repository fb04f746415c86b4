//! The boot guard: a unit and a script on the host that send it back when nobody confirms the new system. See
//! `guard/osimage-guard.sh`, which says what each file holds.
//!
//! Armed before anything else of an attempt is done, disarmed before the attempt is closed. The files in /etc are
//! carried into the new deployment by the merge at shutdown; what is under /var is shared by both. Everything here may
//! be repeated after a crash at any point.

use std::{collections::BTreeSet, fs::File, io, time::Duration};

use osimage_crds::{AttemptId, Period};
use osimage_planner::host::{GuardResult, Record};

use crate::host_files::{HostFiles, value};

const UNIT: &str = include_str!("../guard/osimage-guard.service");
const SCRIPT: &str = include_str!("../guard/osimage-guard.sh");

const UNIT_FILE: &str = "/etc/systemd/system/osimage-guard.service";
const WANTS_LINK: &str = "/etc/systemd/system/sysinit.target.wants/osimage-guard.service";
const SCRIPT_FILE: &str = "/etc/osimage/guard.sh";
/// Our own program, as the script's best way back.
const PROGRAM: &str = "/var/lib/osimage/bin/osimage-node-daemon";
const PENDING: &str = "/var/lib/osimage/guard/pending";
const ACTING: &str = "/var/lib/osimage/guard/acting";
const TRIALS: &str = "/var/lib/osimage/guard/trials";
const RESULT: &str = "/var/lib/osimage/guard/result";
const CONFIRMED: &str = "/run/osimage/confirmed";
const BOOT_START: &str = "/run/osimage/boot-start";

/// Installs and arms the guard for an attempt.
pub fn arm(host: &HostFiles, record: &Record) -> io::Result<()> {
    host.copy(&mut File::open("/proc/self/exe")?, PROGRAM, 0o755)?;
    host.write(SCRIPT_FILE, SCRIPT.as_bytes(), 0o644)?;
    host.write(UNIT_FILE, UNIT.as_bytes(), 0o644)?;
    host.link("../osimage-guard.service", WANTS_LINK)?;
    host.remove(ACTING)?;
    host.remove(RESULT)?;
    host.remove(TRIALS)?;
    host.write(PENDING, pending(record).as_bytes(), 0o644)
}

/// Confirms the attempt to a guard that waits, and disarms it. Fails when the guard has begun to go back on this boot.
pub fn confirm(host: &HostFiles, attempt: &AttemptId, boot_id: &str) -> io::Result<()> {
    host.write(CONFIRMED, format!("{}\n", one_line(&attempt.0)).as_bytes(), 0o644)?;
    host.remove(PENDING)?;
    // One of an earlier boot was cut off before it had gone back, and is void.
    let now = |text: &str| value(text, "acted").is_none_or(|boot| boot == boot_id);
    let acting = host.read(ACTING)?.is_some_and(|t| value(&t, "attempt") == Some(&one_line(&attempt.0)) && now(&t));
    let gave_up = result(host).is_some_and(|r| r.attempt == *attempt && !r.rolled_back);
    if acting && !gave_up {
        return Err(io::Error::other("the boot guard is sending the host back; the confirmation came too late"));
    }
    remove_files(host)
}

/// Disarms the guard of an attempt that is over.
pub fn disarm(host: &HostFiles) -> io::Result<()> {
    host.remove(PENDING)?;
    remove_files(host)
}

fn remove_files(host: &HostFiles) -> io::Result<()> {
    [ACTING, TRIALS, WANTS_LINK, UNIT_FILE, SCRIPT_FILE, PROGRAM].into_iter().try_for_each(|file| host.remove(file))
}

/// What the guard did, of the attempt that it names. What cannot be read is nothing: it only tells a story better.
pub fn result(host: &HostFiles) -> Option<GuardResult> {
    host.read(RESULT).ok().flatten().as_deref().and_then(parse_result)
}

/// The attempt that the guard is armed for.
pub fn armed(host: &HostFiles) -> Option<AttemptId> {
    let text = host.read(PENDING).ok().flatten()?;
    value(&text, "attempt").map(|attempt| AttemptId(attempt.to_owned()))
}

/// How often the new system was booted without being confirmed, this boot included. The guard counts in the same file;
/// where that cannot be written, this boot is the first.
pub fn count_trials(host: &HostFiles, boot_id: &str) -> u32 {
    let text = host.read(TRIALS).ok().flatten().unwrap_or_default();
    let mut boots: BTreeSet<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    if boots.insert(boot_id) && host.write(TRIALS, format!("{text}{boot_id}\n").as_bytes(), 0o644).is_err() {
        return 1;
    }
    u32::try_from(boots.len()).unwrap_or(u32::MAX)
}

fn parse_result(text: &str) -> Option<GuardResult> {
    Some(GuardResult {
        attempt: AttemptId(value(text, "attempt")?.to_owned()),
        rolled_back: value(text, "result")? == "rolledback",
        message: value(text, "reason").unwrap_or_default().to_owned(),
    })
}

/// Time since this boot was first seen, by us or by the guard, whoever was first.
pub fn since_boot(host: &HostFiles, boot_id: &str) -> io::Result<Duration> {
    let uptime = uptime(host)?;
    let text = host.read(BOOT_START)?.unwrap_or_default();
    let start = (value(&text, "boot") == Some(boot_id))
        .then(|| value(&text, "uptime")?.parse::<u64>().ok())
        .flatten()
        .filter(|start| *start <= uptime);
    if let Some(start) = start {
        return Ok(Duration::from_secs(uptime.saturating_sub(start)));
    }
    match host.write(BOOT_START, format!("boot={boot_id}\nuptime={uptime}\n").as_bytes(), 0o644) {
        Ok(()) => Ok(Duration::ZERO),
        // /run is full: count from the start of the kernel, which is a little earlier.
        Err(_) => Ok(Duration::from_secs(uptime)),
    }
}

/// Whole seconds since the kernel started.
fn uptime(host: &HostFiles) -> io::Result<u64> {
    let text = host.read("/proc/uptime")?.unwrap_or_default();
    let seconds = text.split(['.', ' ']).next().and_then(|word| word.parse().ok());
    seconds.ok_or_else(|| io::Error::other("/proc/uptime of the host cannot be read"))
}

fn pending(record: &Record) -> String {
    let deadline = guard_deadline(record.health.deadline);
    format!(
        "attempt={}\ntarget={}\nprevious={}\ndeadline={}\nboot={}\n",
        one_line(&record.attempt.0),
        record.commit,
        record.previous,
        deadline.as_secs(),
        record.boot_id,
    )
}

/// Later than the daemon's own deadline: it explains better why it goes back, so it shall win.
fn guard_deadline(deadline: Period) -> Duration {
    const LEAST: Duration = Duration::from_secs(5);
    const MOST: Duration = Duration::from_secs(60);
    deadline.get().saturating_add((deadline.get() / 10).clamp(LEAST, MOST))
}

/// The files are read line by line.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use osimage_crds::osimage::Health;
    use osimage_planner::host::Stage;

    use super::*;

    fn record(attempt: &str, deadline: u64) -> Record {
        Record {
            attempt: AttemptId(attempt.into()),
            commit: "a".repeat(64).parse().unwrap(),
            previous: "b".repeat(64).parse().unwrap(),
            boot_id: "boot-1".into(),
            health: Health { deadline: Period::seconds(deadline), ..Health::default() },
            stage: Stage::Underway,
        }
    }

    fn host() -> (tempfile::TempDir, HostFiles) {
        let folder = tempfile::tempdir().unwrap();
        let host = HostFiles::new(folder.path());
        host.write("/proc/uptime", b"100.52 12.1\n", 0o644).unwrap();
        (folder, host)
    }

    #[test]
    fn the_daemons_deadline_comes_first() {
        for (deadline, guard) in [(5, 10), (20, 25), (100, 110), (600, 660), (3600, 3660)] {
            assert_eq!(guard_deadline(Period::seconds(deadline)).as_secs(), guard, "{deadline}");
        }
    }

    #[test]
    fn an_attempt_cannot_forge_a_line() {
        let text = pending(&record("a\ntarget=evil", 60));
        assert_eq!(value(&text, "attempt"), Some("a target=evil"));
        assert_eq!(value(&text, "target"), Some("a".repeat(64).as_str()));
    }

    #[test]
    fn armed_confirmed_and_nothing_left_in_etc() {
        let (_folder, host) = host();
        let record = record("a-1", 60);
        for _ in 0..2 {
            arm(&host, &record).unwrap();
        }
        assert!(host.read(PENDING).unwrap().is_some() && host.read(WANTS_LINK).unwrap().is_some());
        for _ in 0..2 {
            confirm(&host, &record.attempt, "boot-2").unwrap();
        }
        for file in [PENDING, UNIT_FILE, WANTS_LINK, SCRIPT_FILE, PROGRAM] {
            assert!(!host.path(file).exists(), "{file}");
        }
        assert_eq!(host.read(CONFIRMED).unwrap().as_deref(), Some("a-1\n"));
    }

    #[test]
    fn a_guard_that_acts_is_not_confirmed() {
        let (_folder, host) = host();
        let record = record("a-1", 60);
        arm(&host, &record).unwrap();
        std::fs::rename(host.path(PENDING), host.path(ACTING)).unwrap();
        assert!(confirm(&host, &record.attempt, "boot-2").is_err());
        host.write(RESULT, b"attempt=a-1\nresult=stuck\nreason=no way back\n", 0o644).unwrap();
        confirm(&host, &record.attempt, "boot-2").unwrap();
    }

    #[test]
    fn one_that_was_cut_off_on_an_earlier_boot_is_void() {
        let (_folder, host) = host();
        let record = record("a-1", 60);
        arm(&host, &record).unwrap();
        host.write(ACTING, format!("{}acted=boot-2\nreason=late\n", pending(&record)).as_bytes(), 0o644).unwrap();
        assert!(confirm(&host, &record.attempt, "boot-2").is_err());
        confirm(&host, &record.attempt, "boot-3").unwrap();
    }

    #[test]
    fn boots_of_the_new_system_are_counted_once_each() {
        let (_folder, host) = host();
        arm(&host, &record("a-1", 60)).unwrap();
        let counts: Vec<u32> = ["two", "two", "three", "two", "four"].map(|boot| count_trials(&host, boot)).to_vec();
        assert_eq!(counts, [1, 1, 2, 2, 3]);
        arm(&host, &record("a-2", 60)).unwrap();
        assert_eq!(count_trials(&host, "five"), 1, "another attempt counts anew");
    }

    #[test]
    fn results_are_read_and_nonsense_is_not() {
        let rolled = parse_result("attempt=a\nresult=rolledback\nreason=late\n").unwrap();
        assert!(rolled.rolled_back && rolled.message == "late" && rolled.attempt.0 == "a");
        assert!(!parse_result("attempt=a\nresult=fellback\n").unwrap().rolled_back);
        assert_eq!(parse_result("result=rolledback\n"), None);
        assert_eq!(parse_result(""), None);
    }

    #[test]
    fn a_boot_is_counted_from_when_it_was_first_seen() {
        let (_folder, host) = host();
        assert_eq!(since_boot(&host, "one").unwrap(), Duration::ZERO);
        host.write("/proc/uptime", b"107.0 1\n", 0o644).unwrap();
        assert_eq!(since_boot(&host, "one").unwrap(), Duration::from_secs(7));
        assert_eq!(since_boot(&host, "two").unwrap(), Duration::ZERO);
        host.write("/proc/uptime", b"3.0 1\n", 0o644).unwrap();
        assert_eq!(since_boot(&host, "two").unwrap(), Duration::ZERO, "a start in the future is none");
    }
}
