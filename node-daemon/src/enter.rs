//! Brings a worker onto the host: joins the host's mount namespace and root, then executes the same binary again by
//! its open file, so that the host's loader gives it the host's libostree.
//!
//! ```text
//!  worker (container's libraries)            worker-inside (host's libraries)
//!    dies with the daemon                      reads the request on stdin
//!    open own file, namespace, root            reports on what was stdout
//!    setns, fchdir, chroot, chdir
//!    unshare, make mounts slaves  ──exec────►  may remount /sysroot and /boot for itself alone
//!                                 ──exec────►  or: a program of the host, in the host's own namespace
//! ```
//!
//! Called by `main` before there is a second thread: joining a mount namespace is refused to a process with more
//! than one. It never returns to the container.
//!
//! The order matters. A namespace that is unshared before the chroot leaves a root that belongs to the other one, and
//! libostree then cannot remount /sysroot.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Command, ExitCode},
};

use anyhow::Context;
use rustix::{
    fs::{Mode, OFlags},
    mount::MountPropagationFlags,
    process::Signal,
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::args;

/// The search path on a host, as systemd has it.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Exit code of a worker that could not enter, or not execute its program.
const CANNOT_ENTER: u8 = 125;

/// Enters the host and becomes the worker, or a program of the host. Returns only when that failed.
pub fn enter(args: &args::Worker) -> ExitCode {
    let error = match try_enter(args) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    complain(&format!("{error:#}"));
    ExitCode::from(CANNOT_ENTER)
}

fn try_enter(args: &args::Worker) -> anyhow::Result<std::convert::Infallible> {
    die_with(args.parent)?;
    let exe = File::open("/proc/self/exe").context("open the daemon's own program")?;
    let namespace = File::open(&args.host.host_mount_namespace).with_context(|| {
        format!("open {} (hostPID and a privileged container are needed)", args.host.host_mount_namespace.display())
    })?;
    let root =
        rustix::fs::open(&args.host.host_root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("open {}", args.host.host_root.display()))?;
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Mount))
        .context("join the host's mount namespace")?;
    rustix::process::fchdir(&root).context("go to the host's root")?;
    rustix::process::chroot(".").context("change to the host's root")?;
    rustix::process::chdir("/").context("go to the host's root")?;

    let mut command = match args.program.split_first() {
        Some((program, rest)) => {
            let mut command = Command::new(program);
            command.args(rest);
            command
        }
        None => {
            own_mounts()?;
            // Resolved at once by the kernel; the descriptor itself is closed by the exec.
            let mut command = Command::new(format!("/proc/self/fd/{}", exe.as_raw_fd()));
            command.arg0("osimage-node-daemon").arg("worker-inside");
            command
        }
    };
    let error = command.env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").env("HOME", "/root").exec();
    Err(error).with_context(|| format!("execute {} on the host", args.program.first().map_or("the worker", |p| p)))
}

/// A private copy of the host's mounts: what is mounted on the host later still appears, what is remounted here does
/// not leave.
pub fn own_mounts() -> anyhow::Result<()> {
    // SAFETY: of the flags of unshare(2), only CLONE_FILES and the like can make a descriptor or address that another
    // thread still uses invalid; a new mount namespace changes what paths mean, and this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.context("unshare the mount namespace")?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("make the mounts slaves of the host's")
}

/// Killed with the thread that started it; checked once more for the case that it ended before that was arranged.
fn die_with(parent: Option<i32>) -> anyhow::Result<()> {
    let Some(parent) = parent else { return Ok(()) };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("bind to the daemon")?;
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    anyhow::ensure!(now == Some(parent), "the daemon has ended");
    Ok(())
}

fn complain(message: &str) {
    use io::Write;
    // Nobody to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "osimage-node-daemon: {message}");
}
