//! A fake booted host: a machine as far as libostree, a boot guard and a node daemon can tell, without a VM.
//!
//! Its root *is* an OSTree deployment, in namespaces of its own ([`init`] is its PID 1). A reboot is the real thing
//! minus the kernel: everything is stopped, the real `ostree admin finalize-staged` runs, the namespaces end, the boot
//! loader's default entry is read from disk as a loader would ([`sysroot`]), and the deployment it names becomes the
//! root of new namespaces with a new boot id, an empty `/run` and an uptime of zero.
//!
//! No kernel, initramfs, real systemd or network namespace: those need a VM. Nothing outlives the value: the whole host
//! is one process group with one folder.

pub mod init;
pub mod sysroot;
pub mod unit;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Output, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use futures::future::BoxFuture;
use tokio::sync::{broadcast, mpsc, watch};

use crate::process::{Cmd, Process, lock};
use crate::repo::run_ostree;
use crate::scratch::Scratch;
use crate::tools;
use init::{Event, Next, PATH, Spec};
use sysroot::{BootEntry, Template, boot_entries};

/// Between SIGTERM and SIGKILL at shutdown.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);
/// A boot takes 0.1 s on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Shutdown includes finalization.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(90);

/// Whether the machine runs, and what it booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Power {
    /// No process.
    Off,
    /// The loader has chosen; init has not reported yet.
    Booting,
    /// Units have been started.
    Up(Boot),
    /// Being shut down.
    ShuttingDown(Boot),
}

/// One boot of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Counts from 1.
    pub number: u32,
    /// As in `/proc/sys/kernel/random/boot_id`.
    pub id: String,
    /// PID 1 as the machine counts.
    pub pid1: i32,
    /// The booted commit.
    pub commit: String,
    /// `PRETTY_NAME` of the booted tree.
    pub os_image: String,
}

/// What happened to a host, for those who follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// It is up.
    Up(Boot),
    /// A shutdown has been requested inside or outside.
    ShutdownRequested(Next),
    /// Finalization has run at shutdown.
    Finalized {
        /// Whether it succeeded.
        ok: bool,
    },
    /// No process is left.
    Down {
        /// Whether it was shut down, not cut off.
        orderly: bool,
    },
    /// The machine could not boot.
    BootFailed(String),
}

/// How the next boots go; each applies once.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The boot loader takes the second entry, as boot counting does when the first has failed.
    pub fall_back: bool,
    /// Finalization does not happen at the next shutdown.
    pub skip_finalization: bool,
    /// The next reboot ends in darkness: the machine stays off.
    pub stay_off: bool,
    /// The machine needs this long from off to booting, as firmware does.
    pub boot_delay: Option<Duration>,
}

/// How to make a host.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Node and host name.
    pub name: String,
    /// Units of the tree that init runs: those whose names start with one of these.
    pub unit_prefixes: Vec<String>,
}

impl HostOptions {
    /// The usual options.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), unit_prefixes: vec!["osimage-".into()] }
    }
}

/// A fake booted host. Cheap to clone; the machine is gone when the last clone is dropped.
#[derive(Clone)]
pub struct FakeHost {
    inner: Arc<Inner>,
}

struct Inner {
    options: HostOptions,
    // Before the folder: the process must be gone first.
    machine: Mutex<Option<Machine>>,
    power: watch::Sender<Power>,
    events: broadcast::Sender<HostEvent>,
    faults: Mutex<Faults>,
    boots: Mutex<u32>,
    needs_machine_usr: bool,
    helper: PathBuf,
    scratch: Scratch,
}

struct Machine {
    process: Arc<Process>,
    orders: ChildStdin,
}

impl FakeHost {
    /// Makes the disk. The machine is off.
    pub async fn create(options: HostOptions, template: &Template) -> Result<Self> {
        tools::require_host_support()?;
        let scratch = Scratch::new(&format!("host-{}", options.name))?;
        let dir = scratch.path();
        template.clone_to(&dir.join("sysroot"))?;
        for name in ["root", "run", "control/units", "stubs/bin", "boot-empty", "boot-work"] {
            fs::create_dir_all(dir.join(name))?;
        }
        for (name, text) in [
            ("systemctl", include_str!("../../assets/systemctl.sh")),
            ("journalctl", include_str!("../../assets/journalctl.sh")),
            ("systemd-run", include_str!("../../assets/systemd-run.sh")),
        ] {
            let path = dir.join("stubs/bin").join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let host = Self {
            inner: Arc::new(Inner {
                machine: Mutex::default(),
                power: watch::Sender::new(Power::Off),
                events: broadcast::Sender::new(256),
                faults: Mutex::default(),
                boots: Mutex::new(0),
                needs_machine_usr: template.needs_machine_usr,
                helper: tools::helper()?,
                options,
                scratch,
            }),
        };
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
        fs::write(host.default_entry()?.deployment.join("etc/machine-id"), format!("{id}\n"))?;
        Ok(host)
    }

    /// Node and host name.
    pub fn name(&self) -> &str {
        &self.inner.options.name
    }

    /// The host's folder: `sysroot`, `run`, `control`, `host.log`.
    pub fn dir(&self) -> &Path {
        self.inner.scratch.path()
    }

    /// The physical root on the machine's side, writable also while the host sees it read-only.
    pub fn sysroot(&self) -> PathBuf {
        self.dir().join("sysroot")
    }

    /// `/var` of the host.
    pub fn var(&self) -> PathBuf {
        self.sysroot().join("ostree/deploy").join(sysroot::STATEROOT).join("var")
    }

    /// The current state.
    pub fn power(&self) -> Power {
        self.inner.power.borrow().clone()
    }

    /// Follows the state; the last value only.
    pub fn watch_power(&self) -> watch::Receiver<Power> {
        self.inner.power.subscribe()
    }

    /// Follows everything that happens from now on.
    pub fn events(&self) -> broadcast::Receiver<HostEvent> {
        self.inner.events.subscribe()
    }

    /// The running boot.
    pub fn boot_now(&self) -> Result<Boot> {
        match self.power() {
            Power::Up(boot) | Power::ShuttingDown(boot) => Ok(boot),
            Power::Off | Power::Booting => bail!("host {} is not up", self.name()),
        }
    }

    /// The booted commit.
    pub fn booted_commit(&self) -> Result<String> {
        Ok(self.boot_now()?.commit)
    }

    /// The boot id.
    pub fn boot_id(&self) -> Result<String> {
        Ok(self.boot_now()?.id)
    }

    /// PID 1 as the machine counts.
    pub fn pid1(&self) -> Result<i32> {
        Ok(self.boot_now()?.pid1)
    }

    /// The boot menu, the default first.
    pub fn boot_entries(&self) -> Result<Vec<BootEntry>> {
        boot_entries(&self.sysroot())
    }

    /// What a reboot without finalization would boot.
    pub fn default_entry(&self) -> Result<BootEntry> {
        self.boot_entries()?.into_iter().next().ok_or_else(|| anyhow!("no boot entry"))
    }

    /// Sets faults for the next boots and shutdowns.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.inner.faults));
    }

    /// Switches the machine on and waits until it is up.
    pub async fn boot(&self) -> Result<Boot> {
        if lock(&self.inner.machine).is_some() {
            bail!("host {} is on already", self.name());
        }
        Inner::start(&self.inner).await?;
        self.wait_up(BOOT_TIMEOUT).await
    }

    /// Waits until the host is up (a boot that is under way, or the one after a reboot).
    pub async fn wait_up(&self, timeout: Duration) -> Result<Boot> {
        self.wait_for("up", timeout, |power| match power {
            Power::Up(boot) => Some(boot.clone()),
            Power::Off | Power::Booting | Power::ShuttingDown(_) => None,
        })
        .await
    }

    /// Waits for a boot later than `number`.
    pub async fn wait_boot_after(&self, number: u32, timeout: Duration) -> Result<Boot> {
        self.wait_for("up again", timeout, |power| match power {
            Power::Up(boot) if boot.number > number => Some(boot.clone()),
            Power::Up(_) | Power::Off | Power::Booting | Power::ShuttingDown(_) => None,
        })
        .await
    }

    /// Waits until no process is left.
    pub async fn wait_off(&self, timeout: Duration) -> Result<()> {
        self.wait_for("off", timeout, |power| (*power == Power::Off).then_some(())).await
    }

    /// Orderly reboot, as `systemctl reboot` on the host; waits until it is up again.
    pub async fn reboot(&self) -> Result<Boot> {
        let before = self.boot_now()?.number;
        self.order("reboot")?;
        self.wait_boot_after(before, SHUTDOWN_TIMEOUT).await
    }

    /// Orderly shutdown; waits until it is off.
    pub async fn power_off(&self) -> Result<()> {
        self.order("poweroff")?;
        self.wait_off(SHUTDOWN_TIMEOUT).await
    }

    /// Pulls the plug: no finalization, `/run` is lost. The machine stays off.
    pub async fn power_cut(&self) -> Result<()> {
        let process = match lock(&self.inner.machine).as_ref() {
            Some(machine) => Arc::clone(&machine.process),
            None => return Ok(()),
        };
        tokio::task::spawn_blocking(move || process.kill()).await?;
        self.wait_off(BOOT_TIMEOUT).await
    }

    /// Pulls the plug and puts it back.
    pub async fn power_cycle(&self) -> Result<Boot> {
        self.power_cut().await?;
        self.boot().await
    }

    /// Runs a program inside, as root's shell would.
    pub async fn exec(&self, command: &[&str]) -> Result<Output> {
        let pid1 = self.pid1()?.to_string();
        let child = tokio::process::Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "--",
                "nsenter",
                "--target",
                &pid1,
                "--mount",
                "--pid",
                "--uts",
                "--time",
                "--",
            ])
            .args(["env", "-i", &format!("PATH={PATH}"), "HOME=/root", "LANG=C.UTF-8", "LC_ALL=C.UTF-8"])
            .args(command)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        child.await.with_context(|| format!("run {command:?} on {}", self.name()))
    }

    /// Runs a program inside and returns its stdout; fails when it fails.
    pub async fn exec_ok(&self, command: &[&str]) -> Result<String> {
        let out = self.exec(command).await?;
        if !out.status.success() {
            bail!(
                "`{}` on {} failed ({}): {}{}",
                command.join(" "),
                self.name(),
                out.status,
                String::from_utf8_lossy(&out.stderr),
                String::from_utf8_lossy(&out.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Runs a shell script inside.
    pub async fn sh(&self, script: &str) -> Result<String> {
        self.exec_ok(&["sh", "-euc", script]).await
    }

    /// What `systemctl is-active` says of a unit from now on: `active`, `failed`, `inactive`…
    pub fn set_unit_state(&self, unit: &str, state: &str) -> Result<()> {
        fs::write(self.dir().join("control/units").join(unit), format!("{state}\n"))?;
        Ok(())
    }

    /// Leaves a unit's state to init and the tree again.
    pub fn clear_unit_state(&self, unit: &str) {
        let _ = fs::remove_file(self.dir().join("control/units").join(unit));
    }

    /// What a unit printed in a boot.
    pub fn journal(&self, boot: u32, unit: &str) -> String {
        crate::process::tail(&self.dir().join(format!("control/journal/{boot}/{unit}.log")), 200)
    }

    /// Every call of `systemctl`, `reboot`… so far, one a line.
    pub fn systemctl_calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir().join("control/systemctl.log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Makes libostree believe that the disk is (or is no longer) full: it keeps a floor of free space that no disk has.
    pub fn no_space(&self, on: bool) -> Result<()> {
        let repo = format!("--repo={}", self.sysroot().join("ostree/repo").display());
        if on {
            run_ostree(&[&repo, "config", "set", "core.min-free-space-size", "900TB"])?;
        } else {
            run_ostree(&[&repo, "config", "unset", "core.min-free-space-size"])?;
        }
        Ok(())
    }

    /// Flips a byte of an object on the host's disk (`kind`: `file`, `dirtree`, `commit`…), as failing hardware does.
    pub fn corrupt_object(&self, checksum: &str, kind: &str) -> Result<()> {
        let (head, rest) = checksum.split_at(2.min(checksum.len()));
        let path = self.sysroot().join("ostree/repo/objects").join(head).join(format!("{rest}.{kind}"));
        let mut bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let middle = bytes.len() / 2;
        *bytes.get_mut(middle).ok_or_else(|| anyhow!("{} is empty", path.display()))? ^= 1;
        // A new file: hosts share unchanged objects by hard links.
        fs::remove_file(&path)?;
        fs::write(&path, bytes)?;
        Ok(())
    }

    /// Makes the host look as if it had not been booted from OSTree, until the next boot.
    pub async fn pretend_not_ostree(&self) -> Result<()> {
        self.exec_ok(&["rm", "-f", "/run/ostree-booted"]).await?;
        Ok(())
    }

    /// Init's messages and what went wrong at boot.
    pub fn log_tail(&self, lines: usize) -> String {
        crate::process::tail(&self.dir().join("host.log"), lines)
    }

    fn order(&self, order: &str) -> Result<()> {
        let mut slot = lock(&self.inner.machine);
        let machine = slot.as_mut().ok_or_else(|| anyhow!("host {} is off", self.name()))?;
        writeln!(machine.orders, "{order}").with_context(|| format!("tell {} to {order}", self.name()))
    }

    async fn wait_for<T>(&self, what: &str, timeout: Duration, look: impl Fn(&Power) -> Option<T>) -> Result<T> {
        let mut power = self.inner.power.subscribe();
        let deadline = Instant::now() + timeout;
        loop {
            let seen = power.borrow_and_update().clone();
            if let Some(value) = look(&seen) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if tokio::time::timeout(left, power.changed()).await.is_err() {
                bail!("host {} is not {what} after {timeout:?}: {seen:?}\n{}", self.name(), self.log_tail(20));
            }
        }
    }
}

impl Inner {
    /// The boot loader and everything after it, up to handing over to the follower task.
    fn start(inner: &Arc<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            inner.power.send_replace(Power::Booting);
            let started = Self::try_start(inner).await;
            if let Err(error) = &started {
                inner.power.send_replace(Power::Off);
                inner.tell(HostEvent::BootFailed(format!("{error:#}")));
            }
            started
        })
    }

    async fn try_start(inner: &Arc<Self>) -> Result<()> {
        let faults = {
            let mut faults = lock(&inner.faults);
            let now = faults.clone();
            // `stay_off` is taken at shutdown, these here.
            faults.fall_back = false;
            faults.skip_finalization = false;
            faults.boot_delay = None;
            now
        };
        if let Some(delay) = faults.boot_delay {
            tokio::time::sleep(delay).await;
        }
        let dir = inner.scratch.path();
        let mut entries = boot_entries(&dir.join("sysroot"))?.into_iter();
        let first = entries.next().ok_or_else(|| anyhow!("no boot entry"))?;
        let entry = match entries.next() {
            Some(second) if faults.fall_back => second,
            _ => first,
        };
        let number = {
            let mut boots = lock(&inner.boots);
            *boots += 1;
            *boots
        };
        let boot = Boot {
            number,
            id: fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned(),
            pid1: 0,
            commit: entry.commit.clone(),
            os_image: pretty_name(&entry.deployment),
        };
        let spec_file = inner.write_boot_files(&entry, &boot, faults.skip_finalization)?;

        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds = uptime.split('.').next().and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
        // With its own clocks the host's uptime starts at zero, as deadlines "since boot" expect.
        let cmd = Cmd::new(format!("host {}", inner.options.name), "unshare")
            .args(["--mount", "--pid", "--uts", "--time", "--fork", "--kill-child", "--propagation", "private"])
            .args([format!("--boottime=-{seconds}"), format!("--monotonic=-{seconds}")])
            .arg("--")
            .arg(&inner.helper)
            .arg("host-init")
            .arg(&spec_file)
            .piped();
        let mut process = Process::spawn(cmd, &dir.join("host.log"))?;
        let (orders, out) = process.take_pipes().ok_or_else(|| anyhow!("init has no pipes"))?;
        let process = Arc::new(process);
        *lock(&inner.machine) = Some(Machine { process: Arc::clone(&process), orders });

        let (lines, events) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                let Ok(event) = serde_json::from_str::<Event>(&line) else { continue };
                if lines.send(event).is_err() {
                    return;
                }
            }
        });
        tokio::spawn(follow(Arc::downgrade(inner), process.exit_watch(), boot, events));
        Ok(())
    }

    fn write_boot_files(&self, entry: &BootEntry, boot: &Boot, skip_finalization: bool) -> Result<PathBuf> {
        let dir = self.scratch.path();
        let run = dir.join("run");
        fs::remove_dir_all(&run).context("clear /run")?;
        fs::create_dir(&run)?;
        fs::write(dir.join("boot_id"), format!("{}\n", boot.id))?;
        fs::write(dir.join("cmdline"), format!("BOOT_IMAGE=/vmlinuz {}\n", entry.options))?;
        let mut usr_layers = vec![dir.join("stubs"), entry.deployment.join("usr")];
        if self.needs_machine_usr {
            usr_layers.push("/usr".into());
        }
        let sysroot = dir.join("sysroot");
        let spec = Spec {
            mount_point: dir.join("root"),
            deployment: entry.deployment.clone(),
            var: sysroot.join("ostree/deploy").join(sysroot::STATEROOT).join("var"),
            sysroot,
            run,
            control: dir.join("control"),
            usr_layers,
            boot_layers: (dir.join("boot-empty"), dir.join("boot-work")),
            boot_id: dir.join("boot_id"),
            cmdline: dir.join("cmdline"),
            hostname: self.options.name.clone(),
            boot_number: boot.number,
            unit_prefixes: self.options.unit_prefixes.clone(),
            stop_timeout: STOP_TIMEOUT,
            skip_finalization,
        };
        let file = dir.join("boot.json");
        fs::write(&file, serde_json::to_vec_pretty(&spec)?)?;
        Ok(file)
    }

    /// Both at once: who has seen the one finds the other done, whichever they follow.
    fn turn(&self, power: Power, event: HostEvent) {
        self.power.send_modify(|now| {
            *now = power;
            self.tell(event);
        });
    }

    fn tell(&self, event: HostEvent) {
        // Nobody may be listening.
        let _ = self.events.send(event);
    }
}

/// Follows one boot to its end, and starts the next one after a reboot. Holds no strong reference while it waits.
async fn follow(
    inner: Weak<Inner>,
    mut exit: watch::Receiver<Option<std::process::ExitStatus>>,
    mut boot: Boot,
    mut events: mpsc::UnboundedReceiver<Event>,
) {
    let mut halted = None;
    while let Some(event) = events.recv().await {
        let Some(inner) = inner.upgrade() else { return };
        match event {
            Event::Up { pid } => {
                boot.pid1 = pid;
                inner.turn(Power::Up(boot.clone()), HostEvent::Up(boot.clone()));
            }
            Event::Shutdown { next } => {
                inner.turn(Power::ShuttingDown(boot.clone()), HostEvent::ShutdownRequested(next));
            }
            Event::Finalized { ok, .. } => inner.tell(HostEvent::Finalized { ok }),
            Event::Halted { next } => halted = Some(next),
            Event::Failed { message } => inner.tell(HostEvent::BootFailed(message)),
            Event::Unit { .. } => {}
        }
    }
    // The pipe is closed: init is gone or going.
    let _ = exit.wait_for(Option::is_some).await;
    let Some(inner) = inner.upgrade() else { return };
    *lock(&inner.machine) = None;
    let stay_off = std::mem::take(&mut lock(&inner.faults).stay_off);
    inner.tell(HostEvent::Down { orderly: halted.is_some() });
    if halted == Some(Next::Reboot) && !stay_off {
        // An error is told as an event, and the machine is off.
        let _ = Inner::start(&inner).await;
    } else {
        inner.power.send_replace(Power::Off);
    }
}

/// `PRETTY_NAME` from the os-release of a deployment.
pub fn pretty_name(deployment: &Path) -> String {
    let text = fs::read_to_string(deployment.join("usr/lib/os-release")).unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "unknown".to_owned(), |v| v.trim_matches('"').to_owned())
}
