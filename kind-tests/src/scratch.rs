//! Temporary folders that do not stay.
//!
//! All of them live under one base folder, named after the process (id and start time) that made them. They are removed
//! on drop and on SIGINT, SIGTERM and SIGHUP. After a `kill -9` the files stay, and the next test that starts removes
//! the folders whose process is gone.
//!
//! Only files and folders below the base are ever removed, never across a mount or through a symbolic link.

use std::collections::HashSet;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use crate::daemon::descendants;
use crate::process::{kill_all, lock};
use crate::remove::remove_tree;

/// Keeps the folders of failed tests for inspection when set.
const KEEP: &str = "OSIMAGE_TEST_KEEP";
/// How long the last children are waited for after a signal, before their folders are removed.
const CHILDREN_END: Duration = Duration::from_secs(3);
/// Between asking them to end and killing them.
const COURTESY: Duration = Duration::from_secs(1);

/// A folder that is removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a new empty folder; `what` becomes part of its name.
    pub fn new(what: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        handle_signals();
        let base = base();
        SWEEP.call_once(|| sweep(&base));
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{pid}-{started}-{n}-{what}"));
        // Under the lock, so that the clean-up after a signal knows of it, or we of the signal.
        let mut live = lock(live());
        if interrupted() {
            bail!("interrupted");
        }
        make(&base, &path).with_context(|| format!("create {}", path.display()))?;
        live.push(path.clone());
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os(KEEP).is_some() && thread::panicking() {
            say(&format!("kept {}", self.path.display()));
        } else if let Err(error) = remove_tree(&self.path) {
            say(&format!("could not remove {}: {error}", self.path.display()));
        }
        // Only now: a signal in the middle of the removal finishes it.
        lock(live()).retain(|path| path != &self.path);
        // Works when it is empty.
        let _ = fs::remove_dir(base());
    }
}

/// Something half-made elsewhere: removed on a signal, left alone on drop.
pub(crate) struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    /// Begins to watch over `path`, which need not exist.
    pub(crate) fn new(path: &Path) -> Self {
        handle_signals();
        lock(live()).push(path.to_owned());
        Self { path: path.to_owned() }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        lock(live()).retain(|path| path != &self.path);
    }
}

/// Whether a signal has come and everything is being removed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Never returns when a signal has come: its clean-up ends the process.
pub fn leave_to_signal() {
    while interrupted() {
        thread::park();
    }
}

/// Folders of this process that are still there.
pub fn ours() -> Vec<PathBuf> {
    let prefix = format!("{}-{}-", std::process::id(), start_time(std::process::id()).unwrap_or(0));
    let entries = fs::read_dir(base()).into_iter().flatten().flatten();
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)).map(|e| e.path()).collect()
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Two levels; another process may remove the upper one, when it is empty, at any moment.
fn make(base: &Path, path: &Path) -> io::Result<()> {
    const ATTEMPTS: u32 = 50;
    for _ in 0..ATTEMPTS {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(base)?;
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
    }
    fs::create_dir(path)
}

/// A terminal that hung up takes no message, and that is no reason to stop cleaning.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The folder that holds all scratch folders: `OSIMAGE_TEST_TMP`, else the system's temporary folder.
fn base() -> PathBuf {
    std::env::var_os("OSIMAGE_TEST_TMP").map_or_else(std::env::temp_dir, PathBuf::from).join("osimage-testbed")
}

fn live() -> &'static Mutex<Vec<PathBuf>> {
    static LIVE: OnceLock<Mutex<Vec<PathBuf>>> = OnceLock::new();
    LIVE.get_or_init(Mutex::default)
}

/// Removes what killed tests left behind.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let mut parts = name.to_string_lossy().splitn(3, '-').map(str::to_owned).collect::<Vec<_>>();
        parts.truncate(2);
        let owner = match parts.as_slice() {
            [pid, started] => pid.parse::<u32>().ok().zip(started.parse::<u64>().ok()),
            _ => None,
        };
        let Some((pid, started)) = owner else { continue };
        if start_time(pid) != Some(started)
            && let Err(error) = remove_tree(&entry.path())
        {
            say(&format!("could not remove the stale {}: {error}", entry.path().display()));
        }
    }
}

/// Start time of a process in clock ticks since boot: with the id it names a process for good.
fn start_time(pid: u32) -> Option<u64> {
    const FIELDS_AFTER_COMMAND: usize = 19; // starttime is field 22, the command (field 2) may hold spaces
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.rsplit_once(')')?.1;
    rest.split_whitespace().nth(FIELDS_AFTER_COMMAND)?.parse().ok()
}

/// Cleans up on the signals that end a process from a terminal or a CI runner.
fn handle_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let (ready, wait) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            let code = runtime.block_on(async {
                let (Ok(mut int), Ok(mut term), Ok(mut hup)) =
                    (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
                else {
                    return None;
                };
                let _ = ready.send(());
                tokio::select! {
                    _ = int.recv() => Some(130),
                    _ = term.recv() => Some(143),
                    _ = hup.recv() => Some(129),
                }
            });
            if let Some(code) = code {
                INTERRUPTED.store(true, Ordering::SeqCst);
                // The terminal has written ^C there.
                let lead = if io::stderr().is_terminal() { "\n" } else { "" };
                say(&format!("{lead}interrupted: cleaning up"));
                clean_up();
                std::process::exit(code);
            }
        });
        let _ = wait.recv();
    });
}

fn clean_up() {
    kill_all();
    kill_the_rest();
    let paths = std::mem::take(&mut *lock(live()));
    // Twice: another thread of ours may have been making a file. No folder is made any more.
    for _ in 0..2 {
        thread::scope(|scope| {
            for path in &paths {
                scope.spawn(|| {
                    if let Err(error) = remove_tree(path) {
                        say(&format!("could not remove {}: {error}", path.display()));
                    }
                });
            }
        });
    }
    let _ = fs::remove_dir(base());
}

/// Children that were started to be waited for at once (ostree, kubectl, mmdebstrap, go…), and what they started. They
/// get a moment to remove their own temporary files.
fn kill_the_rest() {
    let begin = Instant::now();
    let Ok(us) = i32::try_from(std::process::id()) else { return };
    let mut asked = HashSet::new();
    loop {
        let alive: Vec<i32> = descendants(us).into_iter().filter(|pid| !is_zombie(*pid)).collect();
        if alive.is_empty() || begin.elapsed() > CHILDREN_END {
            return;
        }
        for pid in alive {
            let late = begin.elapsed() > COURTESY;
            if let Some(process) = Pid::from_raw(pid).filter(|_| late || asked.insert(pid)) {
                let _ = kill_process(process, if late { Signal::KILL } else { Signal::INT });
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Gone, or waiting to be collected.
    stat.rsplit_once(')').is_none_or(|(_, rest)| matches!(rest.trim_start().chars().next(), None | Some('Z' | 'X')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_removed_on_drop_and_a_stale_one_by_the_next_start() {
        let scratch = Scratch::new("unit").unwrap();
        let path = scratch.path().to_owned();
        let stale = path.parent().unwrap().join("1-1-0-stale"); // process 1 did not start at tick 1
        fs::create_dir_all(stale.join("sub")).unwrap();
        sweep(path.parent().unwrap());
        assert!(!stale.exists());
        assert!(path.exists());
        drop(scratch);
        assert!(!path.exists());
    }
}
