//! The test bed proves itself: each part is shown to behave like the thing it stands for.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{EvictParams, ListParams};
use kube::{Api, ResourceExt};
use osimage_kind_tests::bed::{BedOptions, DaemonPods, TestBed};
use osimage_kind_tests::cluster::{ControlPlane, Options, Outage};
use osimage_kind_tests::daemon::{Container, Daemon};
use osimage_kind_tests::debian::DebianOs;
use osimage_kind_tests::host::init::Next;
use osimage_kind_tests::host::sysroot::Template;
use osimage_kind_tests::host::{FakeHost, HostEvent, HostOptions, Power};
use osimage_kind_tests::kubelet::{FakeKubelet, KubeletOptions, SystemInfo};
use osimage_kind_tests::repo::{Images, SELF_TEST_UNIT};
use osimage_kind_tests::server::{Fault, RepoServer};
use osimage_kind_tests::tools;
use osimage_kind_tests::wait::until;

const LONG: Duration = Duration::from_secs(60);

/// Says why a machine cannot run a test; skipping must be allowed explicitly.
fn hosts_possible() -> bool {
    match tools::require_host_support() {
        Ok(()) => true,
        Err(error) if tools::may_skip() => {
            eprintln!("SKIPPED: {error:#}");
            false
        }
        Err(error) => panic!("{error:#} (OSIMAGE_TEST_ALLOW_SKIP=1 skips such tests)"),
    }
}

struct Disk {
    images: Images,
    template: Template,
    server: RepoServer,
}

impl Disk {
    fn synthetic() -> Self {
        let images = Images::synthetic().unwrap();
        let server = RepoServer::start(&images.repo.path()).unwrap();
        let template = Template::synthetic(&images.repo.path(), &images.v1).unwrap();
        Self { images, template, server }
    }

    async fn host(&self, name: &str) -> FakeHost {
        let host = FakeHost::create(HostOptions::new(name), &self.template).await.unwrap();
        host.boot().await.unwrap();
        host
    }

    /// Pulls and stages with the host's own command line.
    async fn stage(&self, host: &FakeHost, commit: &str) -> Result<String> {
        host.sh(&format!(
            "ostree admin status > /dev/null
             unshare -m sh -euc 'mount -o remount,bind,rw /sysroot
               ostree remote add --if-not-exists --no-gpg-verify test {}
               ostree pull --disable-fsync test {commit}' 2>&1
             ostree admin deploy --stage {commit} 2>&1",
            self.server.url()
        ))
        .await
    }
}

/// Runs a command that ends the host, and so perhaps its own shell before it can say that all is well.
async fn ask(host: &FakeHost, command: &str) {
    host.exec(&["sh", "-c", command]).await.unwrap();
}

// ---- hosts ----

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_finalizes_merges_etc_and_gives_a_new_boot_id() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    let mut events = host.events();
    let first = host.boot_now().unwrap();
    assert_eq!(first.commit, disk.images.v1.checksum);
    assert_eq!(first.os_image, "OSImage Test OS 1");
    assert_eq!(host.sh("cat /proc/sys/kernel/random/boot_id").await.unwrap().trim(), first.id);
    assert_eq!(host.sh("hostname").await.unwrap().trim(), "node-a");
    let uptime = host.sh("cut -d. -f1 /proc/uptime").await.unwrap();
    assert!(uptime.trim().parse::<u64>().unwrap() < 60, "uptime starts at boot: {uptime}");
    assert!(host.sh("touch /sysroot/x").await.is_err(), "/sysroot is read-only as on a real host");
    assert!(host.sh("touch /boot/x").await.is_err(), "so is /boot");
    assert!(host.sh("touch /usr/x").await.is_err(), "so is /usr");
    host.sh("echo mine > /etc/local.conf; echo kept > /var/lib/kept; echo gone > /run/gone").await.unwrap();

    disk.stage(&host, &disk.images.v2.checksum).await.unwrap();
    assert!(host.sh("ostree admin status").await.unwrap().contains("(staged)"));
    assert_eq!(host.boot_entries().unwrap().len(), 1, "staging leaves the boot menu alone");
    // The host reboots itself, as a daemon would do it.
    ask(&host, "systemctl reboot").await;
    let second = host.wait_boot_after(first.number, LONG).await.unwrap();

    assert_eq!(second.commit, disk.images.v2.checksum);
    assert_ne!(second.id, first.id);
    assert_eq!(second.os_image, "OSImage Test OS 2");
    let after = host.sh("cat /etc/local.conf /var/lib/kept /etc/osimage-test.conf; test ! -e /run/gone").await.unwrap();
    assert_eq!(after, "mine\nkept\nversion=2\n");
    let entries = host.boot_entries().unwrap();
    assert_eq!(entries.len(), 2, "the old deployment stays");
    assert_eq!(entries[1].commit, disk.images.v1.checksum);
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        seen.push(event);
    }
    assert_eq!(
        seen,
        [
            HostEvent::ShutdownRequested(Next::Reboot),
            HostEvent::Finalized { ok: true },
            HostEvent::Down { orderly: true },
            HostEvent::Up(second)
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_before_finalization_boots_the_old_tree() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    disk.stage(&host, &disk.images.v2.checksum).await.unwrap();
    let boot = host.power_cycle().await.unwrap();
    assert_eq!(boot.commit, disk.images.v1.checksum);
    assert!(!host.sh("ostree admin status").await.unwrap().contains("(staged)"), "/run is lost");

    // Neither does a forced reboot finalize, as with systemd.
    disk.stage(&host, &disk.images.v2.checksum).await.unwrap();
    ask(&host, "systemctl reboot --force").await;
    let boot = host.wait_boot_after(boot.number, LONG).await.unwrap();
    assert_eq!(boot.commit, disk.images.v1.checksum);

    // Nor a shutdown whose finalization fails.
    host.faults(|f| f.skip_finalization = true);
    host.power_cycle().await.unwrap();
    disk.stage(&host, &disk.images.v2.checksum).await.unwrap();
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v1.checksum);
    disk.stage(&host, &disk.images.v2.checksum).await.unwrap();
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v2.checksum, "the fault applied once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_boot_loader_obeys_the_menu_and_falls_back_on_demand() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    disk.stage(&host, &disk.images.v3.checksum).await.unwrap();
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v3.checksum);
    host.faults(|f| f.fall_back = true);
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v1.checksum, "the loader fell back");
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v3.checksum, "the menu was not changed by that");

    // Going back by writing the menu anew: the old commit is deployed again on top.
    host.sh(&format!("ostree admin deploy {} 2>&1", disk.images.v1.checksum)).await.unwrap();
    let entries = host.boot_entries().unwrap();
    assert_eq!(entries[0].commit, disk.images.v1.checksum);
    assert!(entries[0].options.contains("root=LABEL=sysroot rw console=ttyS0 quiet"), "{}", entries[0].options);
    assert_eq!(host.reboot().await.unwrap().commit, disk.images.v1.checksum);

    host.faults(|f| f.stay_off = true);
    ask(&host, "systemctl reboot").await;
    host.wait_off(LONG).await.unwrap();
    host.boot().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn units_of_the_booted_tree_run_and_their_states_are_told() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    let active = |unit: &'static str| {
        let host = host.clone();
        async move { host.sh(&format!("systemctl is-active {unit} || true")).await.map(|s| s.trim().to_owned()) }
    };
    until("the self test to pass", LONG, || async {
        match active(SELF_TEST_UNIT).await?.as_str() {
            "active" => Ok(()),
            other => bail!("{other}"),
        }
    })
    .await
    .unwrap();
    assert_eq!(active("no-such.service").await.unwrap(), "inactive");
    host.set_unit_state("kubelet.service", "active").unwrap();
    assert_eq!(active("kubelet.service").await.unwrap(), "active");
    assert_eq!(
        host.sh("systemctl show -p LoadState,ActiveState kubelet.service").await.unwrap(),
        "LoadState=loaded\nActiveState=active\n"
    );

    // A guard as a daemon writes it: enabled in /etc, waits for a file, then goes back.
    host.sh("printf '%s\\n' '[Unit]' 'ConditionPathExists=/var/lib/osimage/pending' '[Service]' 'Type=simple' \\
           \"ExecStart=/bin/sh -c 'echo guarding on \\$(hostname); rm /var/lib/osimage/pending; systemctl reboot'\" \\
           '[Install]' 'WantedBy=sysinit.target' > /etc/systemd/system/osimage-guard.service
         mkdir -p /var/lib/osimage; systemctl daemon-reload; systemctl enable osimage-guard.service
         test -L /etc/systemd/system/sysinit.target.wants/osimage-guard.service")
        .await
        .unwrap();
    disk.stage(&host, &disk.images.v3.checksum).await.unwrap();
    host.sh("touch /var/lib/osimage/pending").await.unwrap();
    ask(&host, "systemctl reboot").await;
    // The second boot is ended by the guard, the third has nothing to guard.
    let third = host.wait_boot_after(2, LONG).await.unwrap();
    assert_eq!(third.commit, disk.images.v3.checksum);
    assert!(host.journal(2, "osimage-guard.service").contains("guarding on node-a"));
    until("the guard to be skipped", LONG, || async {
        let journal = host.journal(3, "osimage-guard.service");
        if journal.contains("condition /var/lib/osimage/pending is not met") { Ok(()) } else { bail!("{journal}") }
    })
    .await
    .unwrap();
    until("the self test to fail on v3", LONG, || async {
        match active(SELF_TEST_UNIT).await?.as_str() {
            "failed" => Ok(()),
            other => bail!("{other}"),
        }
    })
    .await
    .unwrap();
    assert_eq!(host.sh("journalctl -b -1 -u osimage-guard -n 5 | head -1").await.unwrap(), "guarding on node-a\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_and_the_disk_fail_on_demand() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    let v2 = &disk.images.v2.checksum;
    for (fault, expected) in [(Fault::Status(404), "404"), (Fault::FlipByte, "orrupt"), (Fault::Truncate, "[18]")] {
        disk.server.inject("*.filez", fault.clone());
        let error = format!("{:#}", disk.stage(&host, v2).await.unwrap_err());
        let known = error.contains(expected) || (fault == Fault::FlipByte && error.contains("Invalid compressed data"));
        assert!(known, "{fault:?}: {error}");
        disk.server.clear();
    }
    disk.server.down();
    assert!(format!("{:#}", disk.stage(&host, v2).await.unwrap_err()).contains("connect"));
    disk.server.up().unwrap();
    host.no_space(true).unwrap();
    let error = format!("{:#}", disk.stage(&host, v2).await.unwrap_err());
    assert!(error.contains("min-free-space"), "{error}");
    host.no_space(false).unwrap();
    disk.stage(&host, v2).await.unwrap();
    assert!(disk.server.requests_for(v2.get(2..).unwrap()) >= 1);

    // A signature is checked by the host's own libostree and gpg.
    fs::write(host.var().join("key.asc"), &disk.images.key.public_armored).unwrap();
    let url = disk.server.url();
    let pull = |commit: &str| {
        let script = format!(
            "unshare -m sh -euc 'mount -o remount,bind,rw /sysroot
               ostree remote add --if-not-exists --set=gpg-verify=true --gpg-import=/var/key.asc signed {url}
               ostree pull --commit-metadata-only signed {commit}' 2>&1"
        );
        let host = host.clone();
        async move { host.sh(&script).await }
    };
    pull(&disk.images.v4.checksum).await.unwrap();
    for (commit, expected) in
        [(&disk.images.unsigned, "no signatures found"), (&disk.images.foreign, "public key not found")]
    {
        let error = format!("{:#}", pull(&commit.checksum).await.unwrap_err());
        assert!(error.contains(expected), "{}: {error}", commit.version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_sees_its_host_and_comes_back_after_kills_and_boots() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let host = disk.host("node-a").await;
    let log = host.dir().join("daemon.log");
    let daemon = Daemon::start(
        &host,
        &log,
        Arc::new(|boot| {
            Box::pin(async move {
                let script = "echo start $N pid $$ of $(hostname) on $(cat /proc/1/root/usr/lib/osimage-test/version) \
                              id $(cat /proc/sys/kernel/random/boot_id); test -x /usr/bin/systemctl; \
                              grep -q 'Stands for' /usr/bin/systemctl && echo 'my root is the host'; \
                              sleep 600 & echo child $!; wait";
                Ok(Container {
                    program: "/bin/sh".into(),
                    args: vec!["-c".into(), script.into()],
                    env: vec![("N".into(), boot.number.to_string())],
                })
            })
        }),
    );
    let says = |text: String| {
        let log = log.clone();
        async move {
            until(&text.clone(), LONG, || async {
                let seen = fs::read_to_string(&log)?;
                if seen.contains(&text) { Ok(seen) } else { bail!("{seen}") }
            })
            .await
        }
    };
    let first = host.boot_now().unwrap();
    let text = says(format!("of node-a on 1 id {}\nchild", first.id)).await.unwrap();
    assert!(!text.contains("my root is the host"), "the container has its own root");
    let pid = daemon.main_pid().unwrap();
    assert!(
        fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains("\nNSpid:"),
        "a process of a namespace"
    );

    let starts = daemon.starts();
    daemon.kill();
    daemon.wait_started_after(starts, LONG).await.unwrap();
    let starts = daemon.starts();
    daemon.kill_main();
    daemon.wait_started_after(starts, LONG).await.unwrap();

    let second = host.reboot().await.unwrap();
    says(format!("start {} ", second.number)).await.unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    daemon.stop();
    let starts = daemon.starts();
    host.power_cycle().await.unwrap();
    assert_eq!(daemon.starts(), starts, "a stopped daemon stays away over boots");
    daemon.resume();
    daemon.wait_started_after(starts, LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_debian_updates_itself_with_its_own_libostree() {
    if !hosts_possible() {
        return;
    }
    let begin = Instant::now();
    let os =
        tokio::task::spawn_blocking(|| DebianOs::build_or_reuse(&|what| eprintln!("{what}"))).await.unwrap().unwrap();
    eprintln!("Debian ready after {:.1} s", begin.elapsed().as_secs_f64());
    let images = os.images().unwrap();
    let server = RepoServer::start(&images.repo.path()).unwrap();
    let host = FakeHost::create(HostOptions::new("node-d"), &os.template()).await.unwrap();
    host.boot().await.unwrap();
    eprintln!("Debian booted after {:.1} s", begin.elapsed().as_secs_f64());
    assert!(host.sh("ostree --version").await.unwrap().contains("2025."), "trixie's libostree, not the machine's");
    assert!(host.sh("jq --version").await.is_err());
    fs::write(host.var().join("key.asc"), &images.key.public_armored).unwrap();
    let pull = Instant::now();
    host.sh(&format!(
        "unshare -m sh -euc 'mount -o remount,bind,rw /sysroot
           ostree remote add --set=gpg-verify=true --gpg-import=/var/key.asc release {}
           ostree pull release {}' 2>&1
         ostree admin deploy --stage {} 2>&1",
        server.url(),
        images.v2.checksum,
        images.v2.checksum
    ))
    .await
    .unwrap();
    eprintln!("pulled and staged v2 in {:.1} s: {:?}", pull.elapsed().as_secs_f64(), server.stats());
    let boot = host.reboot().await.unwrap();
    assert_eq!(boot.commit, images.v2.checksum);
    assert_eq!(boot.os_image, "Debian OSTree Demo 2");
    assert!(host.sh("jq --version").await.unwrap().starts_with("jq-"));
    eprintln!("done after {:.1} s", begin.elapsed().as_secs_f64());
}

// ---- control plane ----

const DEMO: &str = "
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: default, labels: {app: demo}}
spec: {nodeName: n1, containers: [{name: c, image: none}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: demo, namespace: default}
spec: {minAvailable: 1, selector: {matchLabels: {app: demo}}}
";

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_holds_an_eviction_and_an_api_server_comes_back_with_its_state() {
    let begin = Instant::now();
    let plane = ControlPlane::start(Options::default()).await.unwrap();
    eprintln!("control plane ready after {:.1} s", begin.elapsed().as_secs_f64());
    let kubelet_client = plane.client_for(&plane.kubeconfig("kubelet")).await.unwrap();
    let kubelet = FakeKubelet::new(kubelet_client, KubeletOptions::new("n1", 1));
    kubelet.up(SystemInfo { boot_id: "b1".into(), os_image: "Demo 1".into() });
    plane.apply_yaml(DEMO).await.unwrap();

    let pods: Api<Pod> = Api::namespaced(plane.client(), "default");
    until("the budget to know its pod", LONG, || async {
        let pdb = plane.kubectl(&["get", "pdb", "demo", "-o", "jsonpath={.status.currentHealthy}"], None).await?;
        if pdb == "1" { Ok(()) } else { bail!("currentHealthy: {pdb}") }
    })
    .await
    .unwrap();
    match pods.evict("a", &EvictParams::default()).await {
        Err(kube::Error::Api(status)) => {
            assert_eq!(status.code, 429, "{status:?}");
            assert!(status.message.contains("disruption budget"), "{}", status.message);
        }
        other => panic!("the budget did not hold: {other:?}"),
    }

    // The API server dies and comes back; the kubelet survives that.
    plane.stop_api_server(Outage::Kill);
    assert!(pods.list(&ListParams::default()).await.is_err());
    plane.start_api_server().await.unwrap();
    assert_eq!(pods.get("a").await.unwrap().name_any(), "a");
    plane.stop_api_server(Outage::Freeze);
    assert!(tokio::time::timeout(Duration::from_secs(1), pods.list(&ListParams::default())).await.is_err());
    plane.start_api_server().await.unwrap();

    let mark = plane.audit_mark().unwrap();
    plane.apply_yaml(&DEMO.replace("minAvailable: 1", "minAvailable: 0")).await.unwrap();
    until("the eviction to be allowed and the pod to be gone", LONG, || async {
        match pods.evict("a", &EvictParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => bail!("{other:?}"),
        }
    })
    .await
    .unwrap();
    let writes = plane.writes_since(mark).unwrap();
    let by = |user: &str, resource: &str, sub: &str| {
        writes.iter().any(|w| w.user == user && w.resource == resource && w.subresource == sub)
    };
    assert!(by("testbed-admin", "pods", "eviction"), "{writes:#?}");
    assert!(by("testbed-kubelet", "pods", ""), "{writes:#?}");
    assert!(writes.iter().all(|w| w.verb != "get" && w.verb != "watch"));

    let nodes: Api<Node> = Api::all(plane.client());
    kubelet.up(SystemInfo { boot_id: "b2".into(), os_image: "Demo 2".into() });
    until("the new boot to be seen", LONG, || async {
        let info = nodes.get("n1").await?.status.and_then(|s| s.node_info).ok_or_else(|| anyhow!("no info"))?;
        if (info.boot_id.as_str(), info.os_image.as_str()) == ("b2", "Demo 2") { Ok(()) } else { bail!("{info:?}") }
    })
    .await
    .unwrap();
    kubelet.down();
    until("the dead node to be tainted by the real controller", LONG, || async {
        let taints = nodes.get("n1").await?.spec.and_then(|s| s.taints).unwrap_or_default();
        if taints.iter().any(|t| t.key == "node.kubernetes.io/unreachable") { Ok(()) } else { bail!("{taints:?}") }
    })
    .await
    .unwrap();
}

// ---- all of it ----

const DAEMON_SET: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: sys}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: agent, namespace: sys}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: sys}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      serviceAccountName: agent
      tolerations: [{operator: Exists}]
      containers: [{name: agent, image: none}]
";

#[tokio::test(flavor = "multi_thread")]
async fn a_bed_ties_hosts_nodes_and_daemons_together_and_leaves_nothing_behind() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let begin = Instant::now();
    let bed = TestBed::start(BedOptions::new(4), &disk.template).await.unwrap();
    eprintln!("4 nodes Ready after {:.1} s", begin.elapsed().as_secs_f64());
    bed.plane.apply_yaml(DAEMON_SET).await.unwrap();
    let pods = DaemonPods { namespace: "sys".into(), daemon_set: "agent".into(), service_account: "agent".into() };
    let kubectl = tools::kubernetes().unwrap().join("kubectl");
    bed.start_daemons(
        &pods,
        Arc::new(move |ctx| {
            let script = format!(
                "{} --kubeconfig {} auth whoami -o jsonpath='{{.status.userInfo.extra}}'; echo; exec sleep 600",
                kubectl.display(),
                ctx.kubeconfig.display()
            );
            Ok(Container { program: "/bin/sh".into(), args: vec!["-c".into(), script], env: Vec::new() })
        }),
    )
    .await
    .unwrap();
    for node in &bed.nodes {
        let daemon = bed.daemon(&node.name).unwrap();
        let claim = format!("\"authentication.kubernetes.io/node-name\":[\"{}\"]", node.name);
        bed.until("the daemon to have a token bound to its node", LONG, || async {
            let log = daemon.log_tail(50);
            if log.contains(&claim) { Ok(()) } else { bail!("{log}") }
        })
        .await
        .unwrap();
    }
    eprintln!("daemons have tokens after {:.1} s", begin.elapsed().as_secs_f64());

    let node = bed.node("node-2").unwrap();
    let before = node.host.boot_now().unwrap();
    let starts = bed.daemon("node-2").unwrap().starts();
    disk.stage(&node.host, &disk.images.v2.checksum).await.unwrap();
    node.host.faults(|f| f.boot_delay = Some(Duration::from_millis(700)));
    ask(&node.host, "systemctl reboot").await;
    let nodes: Api<Node> = Api::all(bed.client());
    let ready = |node: Node| {
        let conditions = node.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
        conditions.into_iter().find(|c| c.type_ == "Ready").map(|c| c.status).unwrap_or_default()
    };
    bed.until("the node to be seen down", LONG, || async {
        match ready(nodes.get("node-2").await?).as_str() {
            "True" => bail!("still Ready"),
            _ => Ok(()),
        }
    })
    .await
    .unwrap();
    bed.until("the node to be back with the new tree", LONG, || async {
        let seen = nodes.get("node-2").await?;
        let info = seen.status.as_ref().and_then(|s| s.node_info.clone()).ok_or_else(|| anyhow!("no info"))?;
        if ready(seen) == "True" && info.os_image == "OSImage Test OS 2" && info.boot_id != before.id {
            Ok(())
        } else {
            bail!("{info:?}")
        }
    })
    .await
    .unwrap();
    bed.daemon("node-2").unwrap().wait_started_after(starts, LONG).await.unwrap();
    assert!(bed.report().await.contains("==== host node-2"));

    // What the bed made is gone afterwards: processes, mounts, folders.
    let pids: Vec<i32> = bed
        .nodes
        .iter()
        .filter_map(|n| n.host.pid1().ok())
        .chain(bed.nodes.iter().filter_map(|n| bed.daemon(&n.name).ok()?.main_pid()))
        .collect();
    assert_eq!(pids.len(), 8);
    let dirs: Vec<_> = bed.nodes.iter().map(|n| n.host.dir().to_owned()).chain([bed.plane.dir().to_owned()]).collect();
    let ends = Instant::now();
    drop(bed);
    eprintln!("gone after {:.2} s", ends.elapsed().as_secs_f64());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for dir in &dirs {
        assert!(!dir.exists(), "{} is still there", dir.display());
        assert!(!mounts.contains(&*dir.to_string_lossy()), "something is mounted in {}", dir.display());
        assert_eq!(processes_naming(dir), Vec::<String>::new(), "a process of {} lives", dir.display());
    }
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} lives");
    }
}

/// A separate program with a bed is ended in both ways that leave no time for destructors.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlives_an_interrupt_or_a_kill() {
    use std::io::BufRead;
    use std::process::{Command, Stdio};
    if !hosts_possible() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let here = base.path().to_owned();
    let begin = || {
        let mut child = Command::new(env!("CARGO_BIN_EXE_testbed"))
            .args(["up", "--nodes", "1"])
            .env("OSIMAGE_TEST_TMP", &here)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let ready = out.lines().map_while(std::io::Result::ok).any(|line| line.starts_with("ready"));
        assert!(ready, "the bed did not come up");
        assert!(processes_naming(&here).len() >= 4);
        child
    };
    let gone = || async {
        match processes_naming(&here) {
            left if left.is_empty() => Ok(()),
            left => bail!("{left:#?}"),
        }
    };
    let folders = || fs::read_dir(here.join("osimage-testbed")).map_or(0, Iterator::count);

    let mut child = begin();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    until("all processes to be gone after an interrupt", LONG, gone).await.unwrap();
    assert_eq!(folders(), 0);

    let mut child = begin();
    child.kill().unwrap();
    child.wait().unwrap();
    until("all processes to be gone after a kill -9", LONG, gone).await.unwrap();
    assert!(folders() > 0, "nobody could remove them");
    let stale = fs::read_dir(here.join("osimage-testbed")).unwrap().flatten().map(|e| e.path()).collect::<Vec<_>>();

    let mut child = begin();
    assert!(stale.iter().all(|dir| !dir.exists()), "the next start removes what a killed one left");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    child.wait().unwrap();
    assert_eq!(folders(), 0);
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*here.to_string_lossy()));
}

/// Command lines of processes that mention a folder.
fn processes_naming(dir: &Path) -> Vec<String> {
    let needle = dir.to_string_lossy().into_owned();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| fs::read(e.path().join("cmdline")).ok())
        .map(|c| String::from_utf8_lossy(&c).replace('\0', " "))
        .filter(|c| c.contains(&needle))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn twelve_hosts_side_by_side() {
    if !hosts_possible() {
        return;
    }
    let disk = Disk::synthetic();
    let begin = Instant::now();
    let hosts = futures::future::join_all((0..12).map(|n| {
        let disk = &disk;
        async move { disk.host(&format!("node-{n}")).await }
    }))
    .await;
    eprintln!("12 hosts up after {:.2} s", begin.elapsed().as_secs_f64());
    futures::future::join_all(hosts.iter().map(|h| async { disk.stage(h, &disk.images.v2.checksum).await.unwrap() }))
        .await;
    eprintln!("12 hosts staged after {:.2} s", begin.elapsed().as_secs_f64());
    let boots = futures::future::join_all(hosts.iter().map(|h| async { h.reboot().await.unwrap() })).await;
    eprintln!("12 hosts rebooted after {:.2} s", begin.elapsed().as_secs_f64());
    for (host, boot) in hosts.iter().zip(&boots) {
        let log = host.journal(1, "ostree-finalize-staged.service");
        assert_eq!(boot.commit, disk.images.v2.checksum, "{}: {log}", host.name());
    }
    // Hosts do not share what they change.
    hosts[0].sh("echo only-here >> /etc/osimage-test.conf").await.unwrap();
    assert_eq!(hosts[1].sh("cat /etc/osimage-test.conf").await.unwrap(), "version=2\n");
    assert!(hosts.iter().all(|h| matches!(h.power(), Power::Up(_))));
}
