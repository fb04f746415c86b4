//! The test bed proves itself: each part is shown to behave like the thing it stands for.

use std::time::Duration;

use osimage_kind_tests::cluster::{ControlPlane, Options, Outage};
use osimage_kind_tests::host::sysroot::Template;
use osimage_kind_tests::host::{FakeHost, HostOptions};
use osimage_kind_tests::repo::Images;
use osimage_kind_tests::server::RepoServer;

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_host_stages_reboots_merges_etc_and_goes_back() {
    let images = Images::synthetic().unwrap();
    let server = RepoServer::start(&images.repo.path()).unwrap();
    let template = Template::synthetic(&images.repo.path(), &images.v1).unwrap();
    let t = std::time::Instant::now();
    let host = FakeHost::create(HostOptions::new("node-a"), &template).await.unwrap();
    let first = host.boot().await.unwrap();
    eprintln!("create and boot: {:?}", t.elapsed());
    assert_eq!(first.commit, images.v1.checksum);
    assert_eq!(first.os_image, "OSImage Test OS 1");
    eprintln!("{}", host.sh("ostree admin status; cat /proc/uptime /proc/cmdline /proc/sys/kernel/random/boot_id; grep -E '/sysroot|/boot' /proc/self/mountinfo").await.unwrap());
    host.sh("echo local > /etc/local.conf").await.unwrap();

    host.sh(&format!(
        "unshare -m sh -euc 'mount -o remount,bind,rw /sysroot; ostree remote add --no-gpg-verify origin {}'; ostree admin status; \
         unshare -m sh -euc 'mount -o remount,bind,rw /sysroot; ostree pull origin {}'; ostree admin deploy --stage {}",
        server.url(), images.v2.checksum, images.v2.checksum
    ))
    .await
    .unwrap();
    eprintln!("{}", host.sh("ostree admin status").await.unwrap());
    let t = std::time::Instant::now();
    let second = host.reboot().await.unwrap();
    eprintln!("reboot: {:?}", t.elapsed());
    eprintln!("{}", host.sh("ostree admin status").await.unwrap());
    assert_eq!(second.commit, images.v2.checksum);
    assert_ne!(second.id, first.id);
    assert_eq!(host.sh("cat /etc/local.conf").await.unwrap(), "local\n");
    let _ = (MINUTE, Outage::Kill);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane() {
    let t = std::time::Instant::now();
    let plane = ControlPlane::start(Options::default()).await.unwrap();
    eprintln!("plane: {:?}", t.elapsed());
    eprintln!("{}", plane.kubectl(&["get", "ns"], None).await.unwrap());
}
