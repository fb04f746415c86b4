//! Runs workers: one short process per operation on the host, bound to this daemon's life, ended at its deadline.
//!
//! | call | for |
//! |---|---|
//! | [`Workers::ask`] | one operation, one answer |
//! | [`Workers::pull`] | a download: reports progress, ended when nothing moves any more |
//! | [`Workers::program`] | a program of the host, in the host's own mount namespace |
//!
//! Dropping the future kills the process. Nothing a dead worker said before is believed: the host is looked at anew.

use std::{
    io,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use osimage_crds::nodeos::ProblemReason;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    args,
    protocol::{Answer, Failure, Line, Progress, Request, Source},
};

/// A download is ended when requests are open and nothing has arrived for this long.
const SILENT_SERVER: Duration = Duration::from_secs(60);
/// A download is ended when nothing at all has happened for this long: slow disks take their time to sync.
const SILENT_WORKER: Duration = Duration::from_secs(300);
/// How much of a program's output is kept, from its end.
const OUTPUT_KEPT: usize = 2048;
/// How long output is waited for after its process has ended: something it started may keep the pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

/// Starts workers.
#[derive(Clone)]
pub struct Workers {
    host: args::Host,
    jobs: mpsc::Sender<Job>,
}

struct Job {
    command: Command,
    reply: oneshot::Sender<io::Result<Child>>,
}

/// How a program of the host ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// The end of its standard output.
    pub stdout: String,
    /// The end of its standard error.
    pub stderr: String,
}

impl Workers {
    /// Called within the runtime. All processes are started by one thread that lives as long as the daemon: a worker
    /// asks the kernel to be killed together with the thread that started it.
    pub fn new(host: args::Host) -> io::Result<Workers> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let runtime = tokio::runtime::Handle::current();
        thread::Builder::new().name("worker-starter".into()).spawn(move || {
            let _runtime = runtime.enter();
            while let Ok(Job { mut command, reply }) = todo.recv() {
                // Not waited for any more when this fails; the child is killed as it is dropped.
                let _ = reply.send(command.spawn());
            }
        })?;
        Ok(Workers { host, jobs })
    }

    /// One operation.
    pub async fn ask(&self, request: &Request, limit: Duration) -> Result<Answer, Failure> {
        match timeout(limit, self.converse(request, |_| {}, None)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::transient(
                ProblemReason::HostError,
                format!("the host did not finish the operation within {} s", limit.as_secs()),
            )),
        }
    }

    /// A download.
    pub async fn pull(&self, source: Source, progress: watch::Sender<Progress>) -> Result<(), Failure> {
        let movement = Mutex::new(Movement { at: Instant::now(), last: Progress::default() });
        let movement = || movement.lock().unwrap_or_else(PoisonError::into_inner);
        let request = Request::Pull { source };
        let note = |now: Progress| {
            movement().note(now, Instant::now());
            progress.send_replace(now);
        };
        let silent = || movement().is_over(Instant::now());
        self.converse(&request, note, Some(&silent)).await.map(|_| ())
    }

    /// A program of the host.
    pub async fn program(&self, program: &[String], limit: Duration) -> io::Result<Ended> {
        let mut command = self.command();
        command.arg("--").args(program).stdin(Stdio::null());
        let (mut child, group) = self.start(command).await?;
        let stdout = Tail::read(child.stdout.take());
        let stderr = Tail::read(child.stderr.take());
        let status = timeout(limit, child.wait()).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("not finished within {} s", limit.as_secs_f32()))
        })??;
        group.ended();
        Ok(Ended { status, stdout: stdout.text().await, stderr: stderr.text().await })
    }

    async fn converse(
        &self,
        request: &Request,
        mut progress: impl FnMut(Progress),
        silent: Option<&(dyn Fn() -> bool + Sync)>,
    ) -> Result<Answer, Failure> {
        const LOOK: Duration = Duration::from_secs(1);
        let broken =
            |error: io::Error| Failure::transient(ProblemReason::HostError, format!("cannot run a worker: {error}"));
        let mut command = self.command();
        command.stdin(Stdio::piped());
        let (mut child, group) = self.start(command).await.map_err(broken)?;
        let stderr = Tail::read(child.stderr.take());
        if let Some(mut stdin) = child.stdin.take() {
            let text = serde_json::to_vec(request).map_err(|e| broken(e.into()))?;
            // A worker that could not enter the host has closed it; its exit says why.
            let _ = stdin.write_all(&text).await;
        }
        let mut lines = child.stdout.take().map(|out| BufReader::new(out).lines());
        let mut last = None;
        while let Some(reader) = lines.as_mut() {
            let line = tokio::select! {
                line = reader.next_line() => line.map_err(broken)?,
                () = tokio::time::sleep(LOOK), if silent.is_some() => {
                    if silent.is_some_and(|silent| silent()) {
                        return Err(Failure::transient(
                            ProblemReason::RepoUnreachable,
                            format!("the download did not get on for {} s or more; trying again", SILENT_SERVER.as_secs()),
                        ));
                    }
                    continue;
                }
            };
            match line.as_deref().map(serde_json::from_str::<Line>) {
                None => break,
                Some(Ok(Line::Progress(now))) => progress(now),
                Some(Ok(Line::Done(answer))) => last = Some(Ok(answer)),
                Some(Ok(Line::Failed(failure))) => last = Some(Err(failure)),
                Some(Err(error)) => return Err(broken(error.into())),
            }
        }
        let status = child.wait().await.map_err(broken)?;
        group.ended();
        match last {
            Some(result) => result,
            None => Err(died(status, &stderr.text().await)),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("worker")
            .args(["--parent", &std::process::id().to_string(), "--host-root"])
            .arg(&self.host.host_root)
            .arg("--host-mount-namespace")
            .arg(&self.host.host_mount_namespace)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        command
    }

    async fn start(&self, command: Command) -> io::Result<(Child, Group)> {
        let (reply, started) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts workers has ended");
        self.jobs.send(Job { command, reply }).map_err(|_| gone())?;
        let child = started.await.map_err(|_| gone())??;
        let group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
        Ok((child, group))
    }
}

/// When a download last got on.
struct Movement {
    at: Instant,
    last: Progress,
}

impl Movement {
    fn note(&mut self, progress: Progress, now: Instant) {
        let moving = |p: &Progress| (p.bytes, p.objects, p.total_objects, p.outstanding == 0);
        if moving(&self.last) != moving(&progress) {
            self.at = now;
        }
        self.last = progress;
    }

    fn is_over(&self, now: Instant) -> bool {
        let limit = if self.last.outstanding > 0 { SILENT_SERVER } else { SILENT_WORKER };
        now.saturating_duration_since(self.at) >= limit
    }
}

/// The processes that a child started. Killed with it, unless it ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // Gone already when this fails.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// The end of an output.
struct Tail {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Tail {
    fn read(from: Option<impl AsyncRead + Unpin + Send + 'static>) -> Tail {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = kept.clone();
        let reader = tokio::spawn(async move {
            let Some(mut from) = from else { return };
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer).await {
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(buffer.get(..n).unwrap_or_default());
                let surplus = kept.len().saturating_sub(OUTPUT_KEPT);
                kept.drain(..surplus);
            }
        });
        Tail { kept, reader }
    }

    async fn text(mut self) -> String {
        if timeout(OUTPUT_GRACE, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).trim().to_owned()
    }
}

/// Why a worker ended without an answer.
fn died(status: ExitStatus, stderr: &str) -> Failure {
    if stderr.contains("error while loading shared libraries") && stderr.contains("ostree") {
        return Failure::permanent(
            ProblemReason::UnsupportedHost,
            format!("the host has no libostree, so it is not an OSTree host ({stderr})"),
        );
    }
    if stderr.contains("error while loading shared libraries") || stderr.contains("GLIBC_") {
        return Failure::permanent(
            ProblemReason::UnsupportedHost,
            format!("the host's libraries are too old or too few for this daemon ({stderr})"),
        );
    }
    let said = if stderr.is_empty() { String::new() } else { format!(": {stderr}") };
    Failure::transient(ProblemReason::HostError, format!("the worker on the host ended with {status}{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_server_is_given_up_sooner_than_a_slow_disk() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let progress = |bytes, outstanding| Progress { bytes, outstanding, ..Progress::default() };
        let mut movement = Movement { at: start, last: Progress::default() };
        assert!(!movement.is_over(at(299)));
        assert!(movement.is_over(at(300)));
        movement.note(progress(0, 2), at(100));
        for second in [120, 150] {
            movement.note(progress(0, 2), at(second));
        }
        assert!(!movement.is_over(at(159)) && movement.is_over(at(160)), "reports without movement do not count");
        movement.note(progress(10, 2), at(159));
        assert!(!movement.is_over(at(218)));
        movement.note(progress(10, 0), at(200));
        assert!(!movement.is_over(at(499)) && movement.is_over(at(500)), "all is here, the disk takes its time");
    }

    #[test]
    fn a_worker_that_the_host_cannot_load_means_an_unsupported_host() {
        let status = ExitStatus::default();
        for (stderr, reason) in [
            (
                "osimage-node-daemon: error while loading shared libraries: libostree-1.so.1: cannot open shared object \
                 file: No such file or directory",
                ProblemReason::UnsupportedHost,
            ),
            (
                "osimage-node-daemon: /lib64/libc.so.6: version `GLIBC_2.34' not found (required by osimage-node-daemon)",
                ProblemReason::UnsupportedHost,
            ),
            ("osimage-node-daemon: join the host's mount namespace: EPERM", ProblemReason::HostError),
            ("", ProblemReason::HostError),
        ] {
            assert_eq!(died(status, stderr).reason, reason, "{stderr}");
        }
    }
}
