//! A pulling worker of the node daemon against `ostree pull` of the same commit, in turn, on the same host: the ratio
//! of wall times and the peak memory of each. The tree is the real Debian one; nothing of it is on the host before.
#![allow(clippy::print_stdout)]

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use osimage_kind_tests::{
    debian::DebianOs,
    host::{FakeHost, HostOptions, init::PATH, sysroot::Template},
    repo::Images,
    server::RepoServer,
    tools,
};
use serde_json::json;
use tokio::{io::AsyncWriteExt, process::Command};

const ROUNDS: usize = 5;
/// How often the memory of the processes is read; the kernel keeps the peak of each.
const SAMPLE: Duration = Duration::from_millis(5);

/// One run.
struct Run {
    wall: Duration,
    peak_kib: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    tools::require_host_support()?;
    let debian = DebianOs::build_or_reuse(&|step| println!("{step}"))?;
    let images = debian.images()?;
    let server = RepoServer::start(&images.repo.path())?;
    let small = Images::synthetic()?;
    let template = Template::synthetic(&small.repo.path(), &small.v1)?;
    let host = FakeHost::create(HostOptions::new("bench"), &template).await?;
    host.boot().await?;
    let daemon = host.var().join("bench-node-daemon");
    fs::copy(tools::shipped("osimage-node-daemon")?, &daemon).context("copy the daemon to the host")?;
    fs::write(host.var().join("bench.asc"), &images.key.public_armored)?;

    let commit = &images.v2.checksum;
    let url = server.url();
    let cli = format!(
        "mount -o remount,bind,rw /sysroot
         ostree remote add --if-not-exists --gpg-import=/var/bench.asc bench {url} > /dev/null
         exec ostree pull bench {commit}"
    );
    let request = json!({"op": "pull", "source": {
        "remote": "osimage-bench", "url": url, "ref": null, "commit": commit, "gpgKeys": images.key.public_armored,
    }});

    println!("pulls of {} ({}), {ROUNDS} in turn", images.v2.version, &commit[..12]);
    let (mut ours, mut theirs) = (vec![], vec![]);
    for round in 0..=ROUNDS {
        let worker = run(&host, &["/var/bench-node-daemon", "worker"], Some(&request.to_string())).await?;
        forget(&host).await?;
        let ostree = run(&host, &["unshare", "-m", "sh", "-euc", &cli], None).await?;
        forget(&host).await?;
        if round == 0 {
            continue; // the first of each warms the page cache
        }
        println!(
            "  worker {:6.2} s {:5.1} MiB    ostree pull {:6.2} s {:5.1} MiB    ratio {:.3}",
            worker.wall.as_secs_f64(),
            mib(worker.peak_kib),
            ostree.wall.as_secs_f64(),
            mib(ostree.peak_kib),
            worker.wall.as_secs_f64() / ostree.wall.as_secs_f64(),
        );
        ours.push(worker);
        theirs.push(ostree);
    }
    let ratio = median(ours.iter().zip(&theirs).map(|(a, b)| a.wall.as_secs_f64() / b.wall.as_secs_f64()).collect());
    let peak = ours.iter().map(|r| r.peak_kib).max().unwrap_or(0);
    println!(
        "median ratio of wall times {ratio:.3} (wanted: at most 1.15); worker's peak memory {:.1} MiB (wanted: under 64)",
        mib(peak)
    );
    Ok(())
}

/// Runs a program on the host; its processes are watched from outside.
async fn run(host: &FakeHost, command: &[&str], input: Option<&str>) -> Result<Run> {
    let pid1 = host.pid1()?.to_string();
    let started = Instant::now();
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "nsenter", "--target", &pid1, "--mount", "--pid", "--uts", "--"])
        .args(["env", "-i", &format!("PATH={PATH}"), "LC_ALL=C.UTF-8"])
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start nsenter")?;
    let root = child.id().context("the child is gone")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(input.unwrap_or_default().as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output();
    tokio::pin!(output);
    let mut peak_kib = 0;
    let mut tick = tokio::time::interval(SAMPLE);
    let output = loop {
        tokio::select! {
            output = &mut output => break output?,
            _ = tick.tick() => peak_kib = peak_kib.max(peak_below(root)),
        }
    };
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || said.contains("\"failed\"") {
        bail!("{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(Run { wall: started.elapsed(), peak_kib })
}

/// The largest peak of resident memory (VmHWM) among the descendants of a process.
fn peak_below(root: u32) -> u64 {
    let mut peak = 0;
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        open.extend(children.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim).unwrap_or_default();
        let kib = field("VmHWM:").trim_end_matches(" kB").parse().unwrap_or(0);
        peak = peak.max(kib);
    }
    peak
}

/// Takes the commit off the host again.
async fn forget(host: &FakeHost) -> Result<()> {
    let script = "mount -o remount,bind,rw /sysroot; for r in $(ostree refs | grep -v '^ostree/'); do ostree refs --delete $r; done; \
         ostree prune --refs-only > /dev/null; sync -f /sysroot";
    host.exec_ok(&["unshare", "-m", "sh", "-euc", script]).await?;
    let left = fs::read_dir(Path::new(&host.sysroot()).join("ostree/repo/objects"))?.count();
    if left == 0 {
        bail!("the host has lost its own deployment");
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
