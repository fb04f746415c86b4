//! `make demo`: a real rollout on real parts, to look at. A good commit reaches four hosts one by one; a bad one
//! costs one of them half a minute and goes no further. The demo checks what it shows.
//!
//! | module | does |
//! |---|---|
//! | [`script`] | what happens, in order |
//! | [`example`] | the files that are applied |
//! | [`follow`], [`fleet`] | what is known of the cluster, from watches |
//! | [`live`], [`console`] | what is shown |
//! | [`verdict`] | what is asserted, and the table at the end |
//!
//! Called by the program `demo` alone.

#![allow(clippy::print_stdout)]

mod console;
mod example;
mod fleet;
mod follow;
mod live;
mod script;
mod verdict;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::daemon::descendants;
use crate::scratch::{self, Scratch, is_zombie};
use crate::tools;
use console::{Console, Paint};

/// Ctrl-C reaches our children as well: what they say must not win over the clean-up.
const SIGNAL_ARRIVES: Duration = Duration::from_millis(300);
/// Killed children are collected in this time.
const ALL_GONE: Duration = Duration::from_secs(5);

/// A real rollout on real parts: a good update of four hosts, then one that rolls itself back.
///
/// A real control plane, four hosts driven by real libostree that run a real Debian, the shipped operator and daemons.
/// Takes about a minute and a half; the first time longer, because the Debian image is built. Leaves nothing behind but
/// that image in the cache, also after Ctrl-C. Needs root, and OSIMAGE_TOOLS or what `make demo` sets up.
#[derive(Parser)]
#[command(version, about, long_about)]
struct Arguments {
    /// Lines instead of a live view, as when the output is not a terminal. NO_COLOR is respected.
    #[arg(long)]
    plain: bool,
}

/// Runs the demo; 0 when all that it promises was seen, 1 when not, 128 + n after signal n.
pub fn main() -> ExitCode {
    let Arguments { plain } = Arguments::parse();
    let console = Arc::new(Console::new(plain));
    let played = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(play(&console)));
    let result = played.and_then(|()| nothing_left_behind());
    if result.is_err() {
        std::thread::sleep(SIGNAL_ARRIVES);
    }
    scratch::leave_to_signal();
    match result {
        Ok(()) => {
            console.result(Paint::Good, "DEMO PASSED");
            ExitCode::SUCCESS
        }
        Err(error) => {
            console.result(Paint::Bad, &format!("DEMO FAILED: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn play(console: &Arc<Console>) -> Result<()> {
    // First of all: from here on a signal ends in a clean-up.
    let files = Scratch::new("demo")?;
    tools::require_host_support()?;
    tools::kubernetes().context("run `make demo`, which builds it")?;
    for program in ["osimage-operator", "osimage-node-daemon"] {
        tools::shipped(program)?;
    }
    script::run(console, &files).await
}

/// Looks for what should have ended with us: children, mounts, folders.
fn nothing_left_behind() -> Result<()> {
    let begin = Instant::now();
    let us = i32::try_from(std::process::id())?;
    loop {
        let children: Vec<i32> = descendants(us).into_iter().filter(|pid| !is_zombie(*pid)).collect();
        if children.is_empty() {
            break;
        }
        if begin.elapsed() > ALL_GONE {
            bail!("processes are left: {children:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let folders = scratch::ours();
    if !folders.is_empty() {
        bail!("folders are left: {folders:?}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    match mounts.lines().find(|l| l.contains(&format!("/osimage-testbed/{us}-"))) {
        Some(mount) => bail!("a mount is left: {mount}"),
        None => Ok(()),
    }
}
