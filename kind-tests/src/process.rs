//! Child processes that cannot outlive the test.
//!
//! Each child leads its own process group, writes to its own log, and dies with us in every case: on drop and on panic
//! (the destructor kills and reaps), on Ctrl-C (`scratch` kills all that are registered), on `kill -9` of the test
//! (the kernel delivers the parent-death signal). That signal fires when the spawning *thread* ends, so all children
//! are spawned from one thread that never does.
//!
//! Never ends a process by name: only by the id of a child that has not been reaped yet.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper,
    waitid, waitpgid,
};
use tokio::sync::watch;

/// How long the killed rest of a process group is waited for.
const GROUP_END: Duration = Duration::from_secs(3);

/// What to start.
#[derive(Clone, Debug)]
pub struct Cmd {
    /// A short name for messages and for the log file.
    pub name: String,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    clear_env: bool,
    cwd: Option<PathBuf>,
    piped: bool,
}

impl Cmd {
    /// A command that will log under `name`.
    pub fn new(name: impl Into<String>, program: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.into(),
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            clear_env: false,
            cwd: None,
            piped: false,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets one environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts with an empty environment but for what [`Cmd::env`] sets.
    #[must_use]
    pub fn clear_env(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Keeps stdin and stdout as pipes for [`Process::take_pipes`]; only stderr goes to the log.
    #[must_use]
    pub fn piped(mut self) -> Self {
        self.piped = true;
        self
    }
}

/// A running or finished child.
pub struct Process {
    /// As given in [`Cmd::name`].
    pub name: String,
    log: PathBuf,
    shared: Arc<Shared>,
    pipes: Option<(ChildStdin, ChildStdout)>,
}

struct Shared {
    pid: Pid,
    /// `Some` until reaped. While it is `Some` the process id, and so the group id, cannot be used by anybody else.
    child: Mutex<Option<Child>>,
    exit: watch::Sender<Option<ExitStatus>>,
}

impl Process {
    /// Starts `cmd`, appending its output to `log`.
    pub fn spawn(cmd: Cmd, log: &Path) -> Result<Self> {
        let name = cmd.name.clone();
        let mut child = spawn_on_keeper(cmd, log.to_owned()).with_context(|| format!("start {name}"))?;
        let pipes = match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Some((stdin, stdout)),
            _ => None,
        };
        let pid = Pid::from_child(&child);
        let shared = Arc::new(Shared { pid, child: Mutex::new(Some(child)), exit: watch::Sender::new(None) });
        lock(registry()).push(Arc::downgrade(&shared));
        let waiter = Arc::clone(&shared);
        thread::Builder::new()
            .name(format!("wait {name}"))
            .spawn(move || waiter.reap_when_done())
            .context("start the waiting thread")?;
        Ok(Self { name, log: log.to_owned(), shared, pipes })
    }

    /// The process id of the group's leader.
    pub fn pid(&self) -> i32 {
        self.shared.pid.as_raw_nonzero().get()
    }

    /// The log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// stdin and stdout, once, if asked for with [`Cmd::piped`].
    pub fn take_pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        self.pipes.take()
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<ExitStatus> {
        *self.shared.exit.borrow()
    }

    /// Waits for the end of the process; cancel-safe.
    pub async fn wait(&self) -> ExitStatus {
        let mut exit = self.shared.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => ExitStatus::from_raw(0),
        }
    }

    /// A handle to wait with while the process itself is owned elsewhere.
    pub fn exit_watch(&self) -> watch::Receiver<Option<ExitStatus>> {
        self.shared.exit.subscribe()
    }

    /// Signals the leader only.
    pub fn signal(&self, signal: Signal) {
        self.shared.signal(|pid| kill_process(pid, signal));
    }

    /// Signals the whole process group.
    pub fn signal_group(&self, signal: Signal) {
        self.shared.signal(|pid| kill_process_group(pid, signal));
    }

    /// Kills the group and returns when the leader has been reaped.
    pub fn kill(&self) {
        self.shared.kill();
    }

    /// The last `lines` of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.shared.kill();
    }
}

impl Shared {
    fn signal(&self, send: impl FnOnce(Pid) -> rustix::io::Result<()>) {
        let child = lock(&self.child);
        if child.is_some() {
            // The only error left is "no such process" for a zombie's empty group.
            let _ = send(self.pid);
        }
    }

    fn kill(&self) {
        self.signal(|pid| kill_process_group(pid, Signal::KILL));
        let mut exit = self.exit.subscribe();
        // A killed process can linger in the kernel for a moment; the waiter publishes the end.
        while exit.borrow_and_update().is_none() {
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn reap_when_done(&self) {
        // Without reaping, so that the group id stays ours until the leftovers of the group are killed too.
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        {}
        let mut child = lock(&self.child);
        let _ = kill_process_group(self.pid, Signal::KILL);
        let status = child.take().and_then(|mut c| c.wait().ok()).unwrap_or_default();
        drop(child);
        // The rest of the group was killed too. We are its reaper (see `spawn_on_keeper`): process 1 of a container may
        // take seconds. A PID namespace in the group is empty when its init has been reaped.
        let start = Instant::now();
        while start.elapsed() < GROUP_END {
            match waitpgid(self.pid, WaitOptions::NOHANG) {
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => thread::sleep(Duration::from_millis(1)),
                Err(_) => break,
            }
        }
        self.exit.send_replace(Some(status));
    }
}

/// Set on the way out: no more children.
static CLOSING: AtomicBool = AtomicBool::new(false);

/// Kills and reaps every child that is still running, and lets no new one start. For the way out on a signal.
pub(crate) fn kill_all() {
    CLOSING.store(true, Ordering::SeqCst);
    let all: Vec<_> = lock(registry()).drain(..).filter_map(|weak| weak.upgrade()).collect();
    for shared in &all {
        shared.signal(|pid| kill_process_group(pid, Signal::KILL));
    }
    for shared in &all {
        shared.kill();
    }
}

/// Runs a program to its end with the same guarantees; its output is in the error when it fails.
pub fn run(program: impl AsRef<OsStr>, args: &[&str]) -> Result<String> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&program).args(args).stdin(Stdio::null());
    output(command, &format!("{} {}", program.as_ref().to_string_lossy(), args.join(" ")))
}

/// Runs `command` to its end and returns stdout; stderr and stdout are in the error when it fails.
pub fn output(mut command: Command, printable: &str) -> Result<String> {
    let out = command.output().with_context(|| format!("run `{printable}`: is the program installed?"))?;
    if !out.status.success() {
        bail!(
            "`{printable}` failed ({}): {}{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim(),
            String::from_utf8_lossy(&out.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The last `lines` of a text file; says so if it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    match fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let mut kept = VecDeque::new();
            for line in text.lines() {
                if kept.len() == lines {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            kept.into_iter().collect::<Vec<_>>().join("\n")
        }
        Err(error) => format!("(no log at {}: {error})", path.display()),
    }
}

/// Locks a mutex whose data stays valid across a panic of another test.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn registry() -> &'static Mutex<Vec<Weak<Shared>>> {
    static REGISTRY: OnceLock<Mutex<Vec<Weak<Shared>>>> = OnceLock::new();
    REGISTRY.get_or_init(Mutex::default)
}

type Job = (Cmd, PathBuf, Sender<io::Result<Child>>);

fn spawn_on_keeper(cmd: Cmd, log: PathBuf) -> Result<Child> {
    static KEEPER: OnceLock<Sender<Job>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        // What a killed child leaves comes to us to be reaped, and so is gone when we say so.
        let _ = set_child_subreaper(Some(getpid()));
        thread::spawn(move || {
            // `jobs` lives in a static, so this loop ends with the process and not before.
            for (cmd, log, reply) in inbox {
                let _ = reply.send(spawn_here(&cmd, &log));
            }
        });
        jobs
    });
    let (reply, answer) = channel();
    keeper.send((cmd, log, reply)).map_err(|_| anyhow!("the spawning thread is gone"))?;
    Ok(answer.recv().context("the spawning thread is gone")??)
}

fn spawn_here(cmd: &Cmd, log: &Path) -> io::Result<Child> {
    if CLOSING.load(Ordering::SeqCst) {
        return Err(io::Error::other("interrupted"));
    }
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir)?;
    }
    let out: File = OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&cmd.program).args(&cmd.args);
    if cmd.clear_env {
        command.env_clear();
    }
    command.envs(cmd.env.iter().map(|(k, v)| (k, v)));
    if let Some(dir) = &cmd.cwd {
        command.current_dir(dir);
    }
    if cmd.piped {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    } else {
        command.stdin(Stdio::null()).stdout(out.try_clone()?);
    }
    command.stderr(out).process_group(0).spawn()
}
