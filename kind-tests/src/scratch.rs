//! Temporary folders that do not stay.
//!
//! All of them live under one base folder, named after the process (id and start time) that made them. They are removed
//! on drop and on SIGINT, SIGTERM and SIGHUP. After a `kill -9` the files stay, and the next test that starts removes
//! the folders whose process is gone.
//!
//! Only files and folders below the base are ever removed, never across a mount or through a symbolic link.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use std::thread;

use anyhow::{Context, Result};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use tokio::signal::unix::{SignalKind, signal};

use crate::process::{kill_all, lock};

/// Keeps the folders of failed tests for inspection when set.
const KEEP: &str = "OSIMAGE_TEST_KEEP";

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
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&base)
            .with_context(|| format!("create {}", base.display()))?;
        SWEEP.call_once(|| sweep(&base));
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{pid}-{started}-{n}-{what}"));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        lock(live()).push(path.clone());
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        lock(live()).retain(|path| path != &self.path);
        if std::env::var_os(KEEP).is_some() && thread::panicking() {
            eprintln!("kept {}", self.path.display());
            return;
        }
        if let Err(error) = remove_tree(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Removes a folder, also when OSTree made deployments in it immutable.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    // More than once: a process that was just killed may have been adding a file.
    const ATTEMPTS: u32 = 5;
    for attempt in 1.. {
        match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return Ok(()),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(_) => {}
        }
        if let Ok(meta) = fs::symlink_metadata(path) {
            // A file that vanishes meanwhile is no reason to stop.
            let _ = make_mutable(path, meta.dev());
        }
    }
    Ok(())
}

/// Clears the immutable flag of folders. OSTree sets it on deployment roots, a few levels down.
fn make_mutable(dir: &Path, device: u64) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.dev() != device {
        return Ok(());
    }
    let file = File::open(dir)?;
    if let Ok(flags) = ioctl_getflags(&file)
        && flags.contains(IFlags::IMMUTABLE)
    {
        ioctl_setflags(&file, flags - IFlags::IMMUTABLE)?;
        // Nothing below a deployment root is immutable.
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_mutable(&entry.path(), device)?;
        }
    }
    Ok(())
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
            eprintln!("could not remove the stale {}: {error}", entry.path().display());
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
                eprintln!("interrupted: cleaning up");
                kill_all();
                for path in lock(live()).drain(..) {
                    let _ = remove_tree(&path);
                }
                // A process started while we were killing would die with us (parent-death signal).
                std::process::exit(code);
            }
        });
        let _ = wait.recv();
    });
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
