//! The operations on the host, one short process each, with the host's own libostree.
//!
//! Why a process of its own: some failures of the library end the process, a download from a silent server can only
//! be ended by a kill, /sysroot is writable in a private mount namespace only, and the library has to be the host's.
//! Killing a worker at any moment is safe: libostree's state survives it, and the daemon looks again.
//!
//! Nothing here decides. One thread, no runtime, and libostree's standard output is not the protocol's.

mod channel;
mod classify;
mod deploy;
mod kernel;
mod pull;
mod repair;
mod space;
mod status;
mod sysroot;
mod trust;

use std::{io::Read, path::Path, process::ExitCode};

use osimage_crds::{Commit, nodeos::ProblemReason};

use crate::{
    enter,
    protocol::{Answer, Failure, Line, Request},
};
use channel::Channel;

/// Ref that holds a commit.
const HOLD: &str = "osimage/hold";
/// What we keep on the host, as a worker sees it.
const STATE: &str = "/var/lib/osimage";
/// What we keep until the next boot.
const RUN: &str = "/run/osimage";

type Outcome<T> = Result<T, Failure>;

/// Serves one request.
pub fn serve() -> ExitCode {
    let channel = match Channel::take() {
        Ok(channel) => channel,
        Err(_) => return ExitCode::FAILURE,
    };
    let mut text = String::new();
    let request = std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_str::<Request>(&text).map_err(|e| e.to_string()));
    let result = match request {
        Ok(request) => carry_out(request, &channel),
        Err(error) => Err(Failure::permanent(ProblemReason::HostError, format!("the request is unreadable: {error}"))),
    };
    match result {
        Ok(answer) => channel.send(&Line::Done(answer)),
        Err(failure) => channel.send(&Line::Failed(failure)),
    }
    ExitCode::SUCCESS
}

fn carry_out(request: Request, channel: &Channel) -> Outcome<Answer> {
    rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
    match request {
        Request::Status => return status::look().map(Answer::Facts),
        Request::Pull { source } => pull::pull(&source, channel)?,
        Request::Release { keep } => pull::release(&keep)?,
        Request::Stage { source } => deploy::stage(&source)?,
        Request::Unstage { commit } => deploy::unstage(&commit)?,
        Request::SetDefault { commit } => deploy::set_default(&commit)?,
        Request::Pin => deploy::pin()?,
        Request::Unpin => deploy::unpin()?,
    }
    Ok(Answer::Nothing)
}

/// The boot guard's way back: run on the host itself, without a daemon.
pub fn guard_rollback(commit: Commit) -> ExitCode {
    let result = enter::own_mounts()
        .map_err(|e| Failure::permanent(ProblemReason::HostError, format!("{e:#}")))
        .and_then(|()| deploy::set_default(&commit));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            use std::io::Write;
            // The guard captures this for its result; without standard error it has the exit code.
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::FAILURE
        }
    }
}

fn host_error(doing: &str, path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::transient(ProblemReason::HostError, format!("cannot {doing} {}: {error}", path.display()))
}
