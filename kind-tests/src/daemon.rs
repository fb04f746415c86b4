//! The node daemon's container on a fake host: the shipped binary, unchanged.
//!
//! It gets what a privileged pod with `hostPID` and `hostNetwork` gets: the host's PID, UTS and time namespaces, a mount
//! namespace of its own with the machine's root (its "image"), and a fresh `/proc` in which process 1 is the host's
//! init, so that `/proc/1/root` is the host. As in a pod, `/proc` shows the host's boot id and command line.
//!
//! Like the kubelet it starts the container after each boot, and again when it ends, with a growing delay.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::host::{Boot, FakeHost, Power};
use crate::process::{Cmd, Process, lock};

/// First and longest delay before a container that ended is started again (the kubelet: 10 s and 5 minutes).
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// What runs in the container.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// The shipped binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, and nothing else but `PATH`.
    pub env: Vec<(String, String)>,
}

/// Decides what to run; asked before each start. It may wait (for the API server, for a token).
pub type Factory = Arc<dyn Fn(Boot) -> BoxFuture<'static, Result<Container>> + Send + Sync>;

/// A supervised container on a host. Killed when dropped.
pub struct Daemon {
    state: Arc<State>,
    supervisor: JoinHandle<()>,
}

struct State {
    host: FakeHost,
    factory: Factory,
    log: PathBuf,
    process: Mutex<Option<Arc<Process>>>,
    wanted: watch::Sender<bool>,
    starts: watch::Sender<u32>,
}

impl Daemon {
    /// Runs the container whenever the host is up.
    pub fn start(host: &FakeHost, log: &Path, factory: Factory) -> Self {
        let state = Arc::new(State {
            host: host.clone(),
            factory,
            log: log.to_owned(),
            process: Mutex::default(),
            wanted: watch::Sender::new(true),
            starts: watch::Sender::new(0),
        });
        let supervisor = tokio::spawn(supervise(Arc::clone(&state)));
        Self { state, supervisor }
    }

    /// How often the container has been started.
    pub fn starts(&self) -> u32 {
        *self.state.starts.borrow()
    }

    /// Waits until it has been started more than `count` times.
    pub async fn wait_started_after(&self, count: u32, timeout: Duration) -> Result<()> {
        let mut starts = self.state.starts.subscribe();
        tokio::time::timeout(timeout, starts.wait_for(|n| *n > count))
            .await
            .map_err(|_| {
                anyhow!("the daemon of {} was not started again:\n{}", self.state.host.name(), self.log_tail(20))
            })?
            .context("the supervisor is gone")?;
        Ok(())
    }

    /// Kills the container: the daemon and all that it started, at once. It is started again.
    pub fn kill(&self) {
        if let Some(process) = self.current() {
            for pid in descendants(process.pid()) {
                if let Some(pid) = Pid::from_raw(pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            process.kill();
        }
    }

    /// Kills only the daemon's own process (`kill -9`); what it started may live on. It is started again.
    pub fn kill_main(&self) {
        self.signal_main(Signal::KILL);
    }

    /// Asks the daemon to end (SIGTERM). It is started again.
    pub fn terminate(&self) {
        self.signal_main(Signal::TERM);
    }

    /// Freezes or thaws the daemon's own process.
    pub fn freeze(&self, on: bool) {
        self.signal_main(if on { Signal::STOP } else { Signal::CONT });
    }

    /// Kills the container and keeps it away, over reboots too.
    pub fn stop(&self) {
        self.state.wanted.send_replace(false);
        self.kill();
    }

    /// Lets it run again after [`Daemon::stop`].
    pub fn resume(&self) {
        self.state.wanted.send_replace(true);
    }

    /// The daemon's own process as the machine counts, while it runs.
    pub fn main_pid(&self) -> Option<i32> {
        let process = self.current()?;
        // The leader is nsenter, which forks once to enter the PID namespace.
        children(process.pid()).first().copied()
    }

    /// The log's end.
    pub fn log_tail(&self, lines: usize) -> String {
        crate::process::tail(&self.state.log, lines)
    }

    /// The log file, over all starts.
    pub fn log(&self) -> &Path {
        &self.state.log
    }

    fn current(&self) -> Option<Arc<Process>> {
        lock(&self.state.process).clone().filter(|p| p.exited().is_none())
    }

    fn signal_main(&self, signal: Signal) {
        // Just after a start there may be no second process yet.
        for _ in 0..500 {
            if let Some(pid) = self.main_pid().and_then(Pid::from_raw) {
                // It may have ended in between; a child's id is not reused before its parent has reaped it.
                let _ = kill_process(pid, signal);
                return;
            }
            if self.current().is_none() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.state.wanted.send_replace(false);
        self.supervisor.abort();
        self.kill();
    }
}

async fn supervise(state: Arc<State>) {
    let mut wanted = state.wanted.subscribe();
    let mut power = state.host.watch_power();
    let mut delay = BACKOFF.0;
    let mut last_boot = 0;
    loop {
        if wanted.wait_for(|w| *w).await.is_err() {
            return;
        }
        let boot = match power.wait_for(|p| matches!(p, Power::Up(_))).await.as_deref() {
            Ok(Power::Up(boot)) => boot.clone(),
            _ => return,
        };
        if boot.number != last_boot {
            last_boot = boot.number;
            delay = BACKOFF.0;
        }
        let begin = std::time::Instant::now();
        match start(&state, boot).await {
            Ok(process) => {
                process.wait().await;
            }
            Err(error) => note(&state.log, &format!("not started: {error:#}")),
        }
        if begin.elapsed() > Duration::from_secs(10) {
            delay = BACKOFF.0;
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(BACKOFF.1);
    }
}

async fn start(state: &State, boot: Boot) -> Result<Arc<Process>> {
    let container = (state.factory)(boot.clone()).await?;
    if state.host.power() != Power::Up(boot.clone()) || !*state.wanted.borrow() {
        return Err(anyhow!("the host went away meanwhile"));
    }
    let process = Arc::new(Process::spawn(command(&state.host, &boot, &container), &state.log)?);
    *lock(&state.process) = Some(Arc::clone(&process));
    state.starts.send_modify(|n| *n += 1);
    Ok(process)
}

fn command(host: &FakeHost, boot: &Boot, container: &Container) -> Cmd {
    // Quoted "$@" keeps the arguments as they are. The forced-reboot trigger of the machine stays out of reach.
    const ENTER: &str = "mount -t proc proc /proc
mount --bind \"$1/boot_id\" /proc/sys/kernel/random/boot_id
mount --bind \"$1/cmdline\" /proc/cmdline
[ ! -e /proc/sysrq-trigger ] || mount --bind \"$1/control/sysrq-trigger\" /proc/sysrq-trigger
shift
exec setpriv --pdeathsig KILL -- \"$@\"";
    let mut cmd = Cmd::new(format!("daemon of {}", host.name()), "nsenter")
        .clear_env()
        .env("PATH", crate::host::init::PATH)
        .arg(format!("--target={}", boot.pid1))
        .args(["--pid", "--uts", "--time", "--", "unshare", "--mount", "--propagation", "private", "--"])
        .args(["sh", "-euc", ENTER, "enter"])
        .arg(host.dir())
        .arg(&container.program)
        .args(&container.args);
    for (key, value) in &container.env {
        cmd = cmd.env(key, value);
    }
    cmd
}

fn note(log: &Path, text: &str) {
    use std::io::Write;
    if let Ok(mut file) = fs::OpenOptions::new().create(true).append(true).open(log) {
        let _ = writeln!(file, "testbed: {text}");
    }
}

/// Direct children of a process, as the machine counts.
fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    threads
        .flatten()
        .filter_map(|t| fs::read_to_string(t.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<i32>>())
        .collect()
}

/// Children and their children, as the machine counts.
pub(crate) fn descendants(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut queue = children(pid);
    while let Some(pid) = queue.pop() {
        if seen.insert(pid) {
            found.push(pid);
            queue.extend(children(pid));
        }
    }
    found
}
