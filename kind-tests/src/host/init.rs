//! PID 1 of a fake booted host: `testbed host-init SPEC`.
//!
//! Runs in new mount, PID, UTS and time namespaces that `unshare` made. It mounts the booted deployment as `/` the way
//! ostree-prepare-root leaves it, then plays the parts of systemd that an OS update leans on: runs enabled units, stops
//! everything on shutdown, runs the real `ostree admin finalize-staged`, and ends. Commands come on stdin, one a line,
//! events go to stdout as JSON lines; the end of stdin is the end of the test, so it ends too.
//!
//! Single-threaded, and it never touches anything outside its own namespaces but the folders named in the spec.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, pivot_root, wait};
use serde::{Deserialize, Serialize};

use super::unit::{Restart, Unit};

/// What a host is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Empty folder where the root is put together.
    pub mount_point: PathBuf,
    /// The deployment that the boot loader chose.
    pub deployment: PathBuf,
    /// The physical root: holds `ostree/` and `boot/`.
    pub sysroot: PathBuf,
    /// `/var` of the stateroot.
    pub var: PathBuf,
    /// `/run`, emptied before each boot.
    pub run: PathBuf,
    /// Shared with the test bed: FIFO, unit states, journals. Appears as `/run/testbed`.
    pub control: PathBuf,
    /// Layers of `/usr`, top first.
    pub usr_layers: Vec<PathBuf>,
    /// An empty folder and a work folder, for the file system of `/boot`.
    pub boot_layers: (PathBuf, PathBuf),
    /// File that is bound over the kernel's boot id.
    pub boot_id: PathBuf,
    /// File that is bound over the kernel command line.
    pub cmdline: PathBuf,
    /// Host name.
    pub hostname: String,
    /// Number of this boot, for the journals.
    pub boot_number: u32,
    /// Units are run when their names start with one of these.
    pub unit_prefixes: Vec<String>,
    /// Time between SIGTERM and SIGKILL at shutdown.
    pub stop_timeout: Duration,
    /// Leave the staged deployment alone at shutdown, as when finalization fails.
    pub skip_finalization: bool,
}

/// What init tells the test bed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The root is there and units are being started; `pid` is PID 1 as the machine counts.
    Up {
        /// Process id outside.
        pid: i32,
    },
    /// Somebody asked for a shutdown.
    Shutdown {
        /// What comes after it.
        next: Next,
    },
    /// `ostree admin finalize-staged` has run.
    Finalized {
        /// Whether it succeeded.
        ok: bool,
        /// Its output.
        output: String,
    },
    /// A unit changed its state.
    Unit {
        /// Name with suffix.
        name: String,
        /// As `systemctl is-active` says it.
        state: String,
    },
    /// All is stopped; the process ends now.
    Halted {
        /// What comes after it.
        next: Next,
    },
    /// The host could not be brought up.
    Failed {
        /// Why.
        message: String,
    },
}

/// What happens after a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Next {
    /// The machine starts again.
    Reboot,
    /// It stays off.
    PowerOff,
}

/// The search path of a host.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// Between the order to shut down and the first signal: the caller of `systemctl` usually sees it return.
const COURTESY: Duration = Duration::from_millis(60);

/// Runs as PID 1 until the host is shut down.
pub fn main(spec_file: &Path) -> Result<()> {
    let spec: Spec = serde_json::from_slice(&fs::read(spec_file)?).context("read the spec")?;
    // Read before /proc is our own: this is our id as the machine counts.
    let pid = fs::read_link("/proc/self")?.to_string_lossy().parse().context("read our own process id")?;
    if let Err(error) = set_up(&spec) {
        emit(&Event::Failed { message: format!("{error:#}") });
        bail!(error);
    }
    let mut init = Init::new(spec)?;
    emit(&Event::Up { pid });
    init.start_enabled();
    init.serve()
}

fn emit(event: &Event) {
    if let Ok(line) = serde_json::to_string(event) {
        // Nobody listens any more when the test is gone; then stdin ends as well.
        let _ = writeln!(io::stdout(), "{line}");
        let _ = io::stdout().flush();
    }
}

// ---- the root ----

fn set_up(spec: &Spec) -> Result<()> {
    let root = &spec.mount_point;
    let at = |name: &str| root.join(name);
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).context("make mounts private")?;
    bind(&spec.deployment, root)?;

    let layers = spec.usr_layers.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(":");
    let options = std::ffi::CString::new(format!("lowerdir={layers}"))?;
    mount("usr", at("usr"), "overlay", MountFlags::RDONLY | MountFlags::NODEV, options.as_c_str())
        .with_context(|| format!("mount /usr from {layers}"))?;

    bind(&spec.sysroot, &at("sysroot"))?;
    mount_boot(spec, &at("boot"))?;
    for to in [at("sysroot"), at("boot")] {
        // With MS_BIND: only this mount becomes read-only. Without it, the machine's file system would.
        mount_remount(&to, MountFlags::BIND | MountFlags::RDONLY, c"")
            .with_context(|| format!("make {} read-only", to.display()))?;
    }
    bind(&spec.var, &at("var"))?;
    bind(&spec.run, &at("run"))?;
    fs::create_dir_all(at("run/ostree"))?;
    fs::write(at("run/ostree-booted"), "")?;
    fs::create_dir_all(at("run/testbed"))?;
    bind(&spec.control, &at("run/testbed"))?;
    mount("tmp", at("tmp"), "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=1777").context("mount /tmp")?;
    devices(&at("dev"))?;
    mount("proc", at("proc"), "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"")
        .context("mount /proc")?;
    bind(&spec.boot_id, &at("proc/sys/kernel/random/boot_id"))?;
    bind(&spec.cmdline, &at("proc/cmdline"))?;
    // A forced reboot must not reach the machine: a plain file takes the writes.
    let sink = spec.control.join("sysrq-trigger");
    fs::write(&sink, "")?;
    if at("proc/sysrq-trigger").exists() {
        bind(&sink, &at("proc/sysrq-trigger"))?;
    }

    std::env::set_current_dir(root)?;
    pivot_root(".", ".").context("enter the deployment")?;
    unmount(".", UnmountFlags::DETACH).context("leave the machine's root")?;
    std::env::set_current_dir("/")?;
    rustix::system::sethostname(spec.hostname.as_bytes()).context("set the host name")?;
    Ok(())
}

/// `/boot` is a file system of its own, as on most machines. It must be: libostree freezes it for a moment when it
/// writes the boot menu. Were it the machine's file system, all hosts and the machine would be frozen with it, and
/// another host's remount would fail with "resource busy". An overlay cannot be frozen.
fn mount_boot(spec: &Spec, to: &Path) -> Result<()> {
    let boot = spec.sysroot.join("boot");
    let (empty, work) = &spec.boot_layers;
    let options = std::ffi::CString::new(format!(
        "lowerdir={},upperdir={},workdir={},index=off",
        empty.display(),
        boot.display(),
        work.display()
    ))?;
    match mount("boot", to, "overlay", MountFlags::NODEV, options.as_c_str()) {
        Ok(()) => Ok(()),
        // Not possible on top of an overlay (a container's root), which cannot be frozen either.
        Err(_) => bind(&boot, to),
    }
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount_bind(from, to).with_context(|| format!("bind {} on {}", from.display(), to.display()))
}

fn devices(dev: &Path) -> Result<()> {
    mount("dev", dev, "tmpfs", MountFlags::NOSUID, c"mode=755").context("mount /dev")?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let node = dev.join(name);
        File::create(&node)?;
        bind(&Path::new("/dev").join(name), &node)?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlink(target, dev.join(link))?;
    }
    fs::create_dir(dev.join("shm"))?;
    fs::set_permissions(dev.join("shm"), fs::Permissions::from_mode(0o1777))?;
    Ok(())
}

// ---- units and shutdown ----

struct Init {
    spec: Spec,
    control: File,
    units: BTreeMap<String, Running>,
    stdin_rest: Vec<u8>,
    control_rest: Vec<u8>,
}

/// A unit that was started in this boot.
struct Running {
    unit: Unit,
    next_command: usize,
    pid: Option<Pid>,
    restart_at: Option<Instant>,
    stopping: bool,
}

enum Order {
    Shutdown { next: Next, finalize: bool },
}

impl Init {
    fn new(spec: Spec) -> Result<Self> {
        let base = Path::new("/run/testbed");
        let fifo = base.join("ctl");
        let _ = fs::remove_file(&fifo);
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).context("make the control FIFO")?;
        // Open for writing as well: it never reads as ended.
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(&fifo)
            .context("open the control FIFO")?;
        fs::create_dir_all(base.join("units"))?;
        let _ = fs::remove_dir_all(base.join("state"));
        fs::create_dir_all(base.join("state"))?;
        fs::create_dir_all(base.join(format!("journal/{}", spec.boot_number)))?;
        fs::write(base.join("boot-number"), format!("{}\n", spec.boot_number))?;
        Ok(Self { spec, control, units: BTreeMap::new(), stdin_rest: Vec::new(), control_rest: Vec::new() })
    }

    fn start_enabled(&mut self) {
        for name in Unit::enabled(&self.spec.unit_prefixes) {
            self.start(&name);
        }
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            for line in self.orders()? {
                if let Some(Order::Shutdown { next, finalize }) = self.obey(&line) {
                    self.shut_down(next, finalize);
                    return Ok(());
                }
            }
            self.reap();
            self.restart_due();
        }
    }

    /// Waits a moment for orders. The end of stdin is an error: the test bed is gone.
    fn orders(&mut self) -> Result<Vec<String>> {
        let stdin = io::stdin();
        let (from_bed, from_host) = {
            let mut fds =
                [PollFd::new(&stdin, PollFlags::IN), PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&TICK)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("wait for orders"),
            }
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        if from_bed {
            let n = rustix::io::read(&stdin, &mut buffer).context("read stdin")?;
            if n == 0 {
                bail!("the test bed is gone");
            }
            split_lines(&mut self.stdin_rest, &buffer[..n], &mut lines);
        }
        if from_host && let Ok(n) = self.control.read(&mut buffer) {
            split_lines(&mut self.control_rest, &buffer[..n], &mut lines);
        }
        Ok(lines)
    }

    fn obey(&mut self, line: &str) -> Option<Order> {
        let mut words = line.split_whitespace();
        let verb = words.next()?;
        let argument = words.next().unwrap_or_default();
        match verb {
            // As systemd: --force skips the stopping of units, and with it finalization.
            "reboot" | "kexec" | "soft-reboot" => {
                return Some(Order::Shutdown { next: Next::Reboot, finalize: matches!(argument, "" | "0") });
            }
            "poweroff" | "halt" => {
                return Some(Order::Shutdown { next: Next::PowerOff, finalize: matches!(argument, "" | "0") });
            }
            "start" => self.start(argument),
            "restart" => {
                self.stop(argument);
                self.units.remove(argument);
                self.start(argument);
            }
            "stop" => self.stop(argument),
            _ => {}
        }
        None
    }

    fn start(&mut self, name: &str) {
        if self.units.get(name).is_some_and(|r| r.pid.is_some()) {
            self.set_state(name, "active");
            return;
        }
        let unit = match Unit::load(name) {
            Ok(unit) => unit,
            Err(error) => {
                self.log(name, &format!("cannot load: {error:#}"));
                self.set_state(name, "failed");
                return;
            }
        };
        if let Some(condition) = unit.unmet_condition() {
            self.log(name, &format!("skipped: condition {condition} is not met"));
            self.set_state(name, "inactive");
            return;
        }
        let running = Running { unit, next_command: 0, pid: None, restart_at: None, stopping: false };
        self.units.insert(name.to_owned(), running);
        self.advance(name);
    }

    /// Starts the next command of a unit, or settles its state when there is none.
    fn advance(&mut self, name: &str) {
        let Some(running) = self.units.get_mut(name) else { return };
        let Some(command) = running.unit.commands.get(running.next_command) else {
            let state = if running.unit.remain_after_exit { "active" } else { "inactive" };
            self.set_state(name, state);
            return;
        };
        let spawned = spawn(command, &running.unit.environment, &journal(&self.spec, name));
        let command = command.join(" ");
        running.next_command += 1;
        let waits_for_end = running.unit.oneshot || running.next_command < running.unit.commands.len();
        running.pid = spawned.as_ref().ok().copied();
        match spawned {
            Ok(_) => {
                self.set_state(name, if waits_for_end { "activating" } else { "active" });
            }
            Err(error) => {
                self.log(name, &format!("cannot run `{command}`: {error}"));
                self.set_state(name, "failed");
            }
        }
    }

    fn stop(&mut self, name: &str) {
        if let Some(running) = self.units.get_mut(name) {
            running.stopping = true;
            running.restart_at = None;
            if let Some(pid) = running.pid {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        self.set_state(name, "inactive");
    }

    /// Reaps units and orphans alike.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let found = self.units.iter().find(|(_, r)| r.pid == Some(pid)).map(|(name, _)| name.clone());
            let Some(name) = found else { continue };
            let ok = status.exit_status() == Some(0);
            self.log(&name, &format!("(ended: {status:?})"));
            self.ended(&name, ok);
        }
    }

    fn ended(&mut self, name: &str, ok: bool) {
        let Some(running) = self.units.get_mut(name) else { return };
        running.pid = None;
        if running.stopping {
            self.set_state(name, "inactive");
            return;
        }
        let restart = match running.unit.restart {
            Restart::No => false,
            Restart::OnFailure => !ok,
            Restart::Always => true,
        };
        let more = running.next_command < running.unit.commands.len();
        if ok && more {
            self.advance(name);
        } else if restart && !running.unit.oneshot {
            running.restart_at = Some(Instant::now() + running.unit.restart_delay);
            self.set_state(name, "activating");
        } else if ok {
            self.advance(name);
        } else {
            self.set_state(name, "failed");
        }
    }

    fn restart_due(&mut self) {
        let now = Instant::now();
        let due: Vec<String> = self
            .units
            .iter()
            .filter(|(_, r)| r.restart_at.is_some_and(|at| at <= now))
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            self.units.remove(&name);
            self.start(&name);
        }
    }

    fn set_state(&self, name: &str, state: &str) {
        let dir = Path::new("/run/testbed/state");
        let written = fs::write(dir.join(format!(".{name}")), format!("{state}\n"))
            .and_then(|()| fs::rename(dir.join(format!(".{name}")), dir.join(name)));
        if let Err(error) = written {
            self.log(name, &format!("cannot write the state: {error}"));
        }
        emit(&Event::Unit { name: name.to_owned(), state: state.to_owned() });
    }

    fn log(&self, name: &str, text: &str) {
        if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(journal(&self.spec, name)) {
            let _ = writeln!(file, "init: {text}");
        }
    }

    fn shut_down(&mut self, next: Next, finalize: bool) {
        emit(&Event::Shutdown { next });
        for running in self.units.values_mut() {
            running.stopping = true;
            running.restart_at = None;
        }
        std::thread::sleep(COURTESY);
        if finalize {
            self.end_others(Signal::TERM, self.spec.stop_timeout);
            if !self.spec.skip_finalization && Path::new("/run/ostree/staged-deployment").exists() {
                let (ok, output) = finalize_staged();
                self.log("ostree-finalize-staged.service", &output);
                emit(&Event::Finalized { ok, output });
            }
        }
        self.end_others(Signal::KILL, Duration::from_secs(5));
        emit(&Event::Halted { next });
    }

    /// Signals every other process of the namespace and waits until they are gone or the time is up.
    fn end_others(&mut self, signal: Signal, limit: Duration) {
        let start = Instant::now();
        let mut first = true;
        loop {
            let others = other_processes();
            if others.is_empty() || start.elapsed() > limit {
                return;
            }
            if first || signal == Signal::KILL {
                for pid in &others {
                    let _ = kill_process(*pid, signal);
                }
                first = false;
            }
            self.reap();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn split_lines(rest: &mut Vec<u8>, bytes: &[u8], lines: &mut Vec<String>) {
    rest.extend_from_slice(bytes);
    while let Some(end) = rest.iter().position(|b| *b == b'\n') {
        let line: Vec<u8> = rest.drain(..=end).collect();
        lines.push(String::from_utf8_lossy(&line).trim().to_owned());
    }
}

fn journal(spec: &Spec, unit: &str) -> PathBuf {
    PathBuf::from(format!("/run/testbed/journal/{}/{unit}.log", spec.boot_number))
}

fn spawn(command: &[String], environment: &[(String, String)], log: &Path) -> io::Result<Pid> {
    let Some((program, args)) = command.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "empty command"));
    };
    let out = OpenOptions::new().create(true).append(true).open(log)?;
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .envs(environment.iter().map(|(k, v)| (k, v)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .process_group(0)
        .spawn()?;
    // Reaped by `reap` like every other child; the handle is not needed.
    Ok(Pid::from_child(&child))
}

/// Hosts of one bed share a disk, and libostree freezes the file system for a moment when it writes a boot menu: then the
/// remount of another host fails as busy. A real host has its disk for itself; here it is waited out.
fn finalize_staged() -> (bool, String) {
    const TRIES: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(250);
    let mut said = String::new();
    for _ in 0..TRIES {
        let (ok, text) = try_finalize();
        let busy = !ok && text.contains("busy");
        said = format!("{said}{text}\n");
        if !busy {
            return (ok, said.trim().to_owned());
        }
        std::thread::sleep(PAUSE);
    }
    (false, said.trim().to_owned())
}

fn try_finalize() -> (bool, String) {
    let out = Command::new("ostree")
        .args(["admin", "finalize-staged"])
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .output();
    match out {
        Ok(out) => {
            let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            (out.status.success(), text.trim().to_owned())
        }
        Err(error) => (false, format!("cannot run ostree: {error}")),
    }
}

/// All processes of this PID namespace but us and zombies.
fn other_processes() -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| *pid > 1 && !is_zombie(*pid))
        .filter_map(Pid::from_raw)
        .collect()
}

fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|s| s.rsplit_once(')').map(|(_, rest)| rest.trim_start().starts_with('Z')))
        .unwrap_or(true)
}
