//! The worker's operations for real: the compiled daemon, libostree of this machine, and hosts that libostree takes for
//! booted. Skipped, with a word, where the machine cannot have such hosts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::{fs, sync::atomic::Ordering};

use host::{Host, Publisher, possible, wait_for};
use serde_json::{Value, json};

fn pull(source: &Value) -> Value {
    json!({"op": "pull", "source": source})
}

fn stage(source: &Value) -> Value {
    json!({"op": "stage", "source": source})
}

#[test]
fn an_update_there_and_back() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let keys = publisher.key("release");
    let v1 = publisher.commit("1", 1000, None);
    let v2 = publisher.commit("2", 3 << 20, Some("release"));
    let mut host = Host::boot(&publisher, &v1);
    assert_eq!(host.booted(), v1);
    let facts = host.facts();
    assert_eq!(facts["unsupported"], Value::Null);
    assert_eq!(facts["held"], json!([]));
    assert_eq!(facts["deployments"][0]["version"], "1");
    assert!(facts["ostreeVersion"].as_str().unwrap().starts_with("20"));

    let source = publisher.source(&v2, Some(&keys));
    let lines = host.ask(&pull(&source));
    assert_eq!(lines.last().unwrap()["done"], "nothing", "{lines:?}");
    assert!(lines.iter().any(|l| l["progress"]["totalBytes"].as_u64().is_some_and(|n| n > 3_000_000)), "{lines:?}");
    host.done(&pull(&source));
    assert_eq!(host.facts()["held"], json!([v2]));
    assert!(!host.file("/etc/ostree/remotes.d").exists(), "a download leaves /etc alone");

    host.done(&json!({"op": "pin"}));
    for _ in 0..2 {
        host.done(&stage(&source));
    }
    let facts = host.facts();
    assert_eq!((&facts["deployments"][0]["commit"], &facts["deployments"][0]["staged"]), (&json!(v2), &json!(true)));
    assert_eq!(facts["deployments"][1]["pinned"], true);
    let mounts = fs::read_to_string(host.file("/proc/1/mounts")).unwrap();
    assert!(mounts.lines().any(|l| l.contains(" /sysroot ") && l.contains(" ro,")), "the host's /sysroot stays ro");

    host.reboot();
    assert_eq!(host.booted(), v2);
    let arguments = host.next_arguments();
    for argument in ["root=LABEL=test", "rw", "quiet"] {
        assert!(arguments.split(' ').any(|a| a == argument), "{arguments}");
    }
    let origin = String::from_utf8(host.program(&["ostree", "admin", "status"]).stdout).unwrap();
    assert!(origin.contains("osimage-test:stable/node"), "{origin}");
    let remotes = host.program(&["ostree", "remote", "show-url", "osimage-test"]);
    assert_eq!(String::from_utf8(remotes.stdout).unwrap().trim(), publisher.server.url());

    host.done(&json!({"op": "setDefault", "commit": v1}));
    host.done(&json!({"op": "setDefault", "commit": v1}));
    host.reboot();
    assert_eq!(host.booted(), v1);
    host.done(&json!({"op": "unpin"}));
    host.done(&json!({"op": "unpin"}));
    host.done(&json!({"op": "release", "keep": []}));
    let facts = host.facts();
    assert_eq!(facts["held"], json!([]));
    assert!(facts["deployments"].as_array().unwrap().iter().all(|d| d["pinned"] == false));
}

#[test]
fn what_cannot_be_pulled_gets_its_reason_and_changes_nothing() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let keys = publisher.key("release");
    let other = publisher.key("other");
    let v1 = publisher.commit("1", 1000, None);
    let signed = publisher.commit("2", 100_000, Some("release"));
    let unsigned = publisher.commit("3", 100_000, None);
    let corrupt = publisher.commit("4", 100_000, Some("release"));
    let lacking = publisher.commit("5", 100_000, Some("release"));
    let object = publisher.bulk_object(&corrupt);
    let mut bytes = fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(&object, bytes).unwrap();
    fs::remove_file(publisher.bulk_object(&lacking)).unwrap();

    let host = Host::boot(&publisher, &v1);
    let before = (host.facts(), refs(&host), etc(&host));
    let with = |commit: &str, keys: &str| publisher.source(commit, Some(keys));
    let changed = |key: &str, value: &str| {
        let mut source = with(&signed, &keys);
        source[key] = json!(value);
        source
    };
    let missing = "d".repeat(64);
    let rows = [
        (with(&unsigned, &keys), "SignatureInvalid", false),
        (with(&signed, &other), "SignatureInvalid", false),
        (with(&signed, "no key at all"), "KeysInvalid", false),
        (with(&missing, &keys), "CommitNotFound", false),
        (changed("ref", "other/branch"), "RefMismatch", false),
        (changed("url", "http://127.0.0.1:1"), "RepoUnreachable", true),
        (changed("url", "http://nowhere.invalid"), "RepoUnreachable", true),
        (with(&corrupt, &keys), "ObjectCorrupted", true),
        (with(&lacking, &keys), "RepoUnreachable", true),
    ];
    for (source, reason, transient) in rows {
        let (got, again, message) = host.fails(&pull(&source));
        println!("{got}: {message}");
        assert_eq!((got.as_str(), again), (reason, transient), "{message}");
        assert_eq!((host.facts(), refs(&host), etc(&host)), before, "after {reason}");
    }

    publisher.server.fail_with.store(503, Ordering::Relaxed);
    let (reason, transient, message) = host.fails(&pull(&with(&signed, &keys)));
    assert_eq!((reason.as_str(), transient), ("RepoUnreachable", true), "{message}");
    publisher.server.fail_with.store(0, Ordering::Relaxed);

    let floor = |size: &str| {
        let repo = host.path("sysroot/ostree/repo");
        let mut config = std::process::Command::new("ostree");
        host::run(config.arg("config").arg("--repo").arg(repo).args(["set", "core.min-free-space-size", size]));
    };
    floor("900000GB");
    let (reason, transient, message) = host.fails(&pull(&with(&signed, &keys)));
    println!("{reason}: {message}");
    assert_eq!((reason.as_str(), transient), ("NoSpace", true), "{message}");
    floor("1MB");
    assert_eq!((host.facts(), refs(&host), etc(&host)), before);
    host.done(&pull(&with(&signed, &keys)));

    // Held without verification is not staged with it.
    let (reason, _, message) = host.fails(&stage(&with(&signed, &other)));
    assert_eq!(reason, "SignatureInvalid", "{message}");
    assert!(host.facts()["deployments"].as_array().unwrap().iter().all(|d| d["staged"] == false));
}

#[test]
fn a_repository_may_be_a_folder_of_the_host() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let keys = publisher.key("release");
    let v1 = publisher.commit("1", 1000, None);
    let v2 = publisher.commit("2", 1000, Some("release"));
    let unsigned = publisher.commit("3", 1000, None);
    let host = Host::boot(&publisher, &v1);
    host::run(std::process::Command::new("cp").arg("-a").arg(publisher.repo()).arg(host.file("/var/repo")));
    let rows = [(unsigned.as_str(), "SignatureInvalid"), (&"d".repeat(64), "CommitNotFound")];
    for (commit, reason) in rows {
        let mut source = publisher.source(commit, Some(&keys));
        source["url"] = json!("file:///var/repo");
        let (got, _, message) = host.fails(&pull(&source));
        println!("{got}: {message}");
        assert_eq!(got, reason, "{message}");
    }
    let mut source = publisher.source(&v2, Some(&keys));
    source["url"] = json!("file:///var/repo");
    host.done(&pull(&source));
    assert_eq!(host.facts()["held"], json!([v2]));
}

#[test]
fn what_rotted_on_the_disk_is_found_and_fetched_again() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let v2 = publisher.commit("2", 100_000, None);
    let host = Host::boot(&publisher, &v1);
    host.done(&pull(&publisher.source(&v2, None)));
    let tree = |commit: &str| {
        let show = ["ostree", "--repo=/ostree/repo", "ls", "-d", "-C", commit, "/"];
        let text = String::from_utf8(host.program(&show).stdout).unwrap();
        let sum = text.split_whitespace().find(|w| w.len() == 64).unwrap().to_owned();
        host.path("sysroot/ostree/repo/objects").join(&sum[..2]).join(format!("{}.dirtree", &sum[2..]))
    };
    let rotten = tree(&v2);
    fs::write(&rotten, b"rot").unwrap();
    let (reason, transient, message) = host.fails(&stage(&publisher.source(&v2, None)));
    assert_eq!((reason.as_str(), transient), ("ObjectCorrupted", true), "{message}");
    assert_eq!(host.facts()["held"], json!([]), "it is downloaded again");
    host.done(&pull(&publisher.source(&v2, None)));
    host.done(&stage(&publisher.source(&v2, None)));
}

fn refs(host: &Host) -> String {
    // Fails for as long as another host on the same file system has it frozen.
    let mut refs = None;
    wait_for("ostree refs", || {
        let output = host.program(&["ostree", "refs"]);
        refs = output.status.success().then(|| String::from_utf8(output.stdout).unwrap());
        refs.is_some()
    });
    refs.unwrap()
}

fn etc(host: &Host) -> String {
    String::from_utf8(host.program(&["find", "/etc", "-newer", "/etc/passwd"]).stdout).unwrap()
}

#[test]
fn hosts_that_must_not_be_touched_say_why() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let host = Host::boot(&publisher, &v1);
    let origin = fs::read_dir(host.path("sysroot/ostree/deploy/testos/deploy"))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "origin"))
        .unwrap();
    let plain = fs::read_to_string(&origin).unwrap();
    let rows = [
        ("[packages]\nrequested=vim;\n", "layered"),
        ("[origin]\nrefspec=x:y\ncontainer-image-reference=ostree-unverified-registry:quay.io/x\n", "container image"),
    ];
    for (text, _) in rows {
        fs::write(&origin, text).unwrap();
        let facts = host.facts();
        assert!(facts["unsupported"].is_string(), "{text}: {facts}");
        println!("{}", facts["unsupported"]);
    }
    fs::write(&origin, plain).unwrap();
    assert_eq!(host.facts()["unsupported"], Value::Null);
    fs::remove_file(host.path("run/ostree-booted")).unwrap();
    assert!(host.facts()["unsupported"].as_str().unwrap().contains("not booted"));
}

#[test]
fn a_lock_that_another_program_holds_is_waited_for_and_then_told() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let host = Host::boot(&publisher, &v1);
    let sysroot = ostree::Sysroot::new(Some(&ostree::gio::File::for_path(host.path("sysroot"))));
    sysroot.load(ostree::gio::Cancellable::NONE).unwrap();
    assert!(sysroot.try_lock().unwrap());
    assert_eq!(host.booted(), v1, "looking needs no lock");
    let (reason, transient, _) = host.fails(&json!({"op": "pin"}));
    assert_eq!((reason.as_str(), transient), ("HostBusy", true));
    sysroot.unlock();
    host.done(&json!({"op": "pin"}));
}

#[test]
fn programs_run_in_the_hosts_namespace_with_a_clean_environment() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let host = Host::boot(&publisher, &v1);
    let output = host.program(&["sh", "-c", "env | sort; readlink /proc/self/ns/mnt /proc/1/ns/mnt"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let namespaces: Vec<&str> = text.lines().filter(|l| l.starts_with("mnt:")).collect();
    assert_eq!(namespaces[0], namespaces[1]);
    assert!(text.contains("PATH=/usr/local/sbin:") && !text.contains("CARGO"), "{text}");
    let missing = host.program(&["no-such-program"]);
    assert_eq!(missing.status.code(), Some(125));
    assert!(String::from_utf8(missing.stderr).unwrap().contains("no-such-program"));
}

#[test]
fn a_worker_dies_with_its_daemon() {
    if !possible() {
        return;
    }
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let host = Host::boot(&publisher, &v1);
    // Nothing else has this argument.
    let argument = format!("{}.5", 400_000 + std::process::id());
    let running = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let commands = processes.filter_map(|p| fs::read_to_string(p.path().join("cmdline")).ok());
        commands.into_iter().any(|c| c == format!("sleep\0{argument}\0"))
    };
    let mut daemon = host.start_daemon_with("sleep", &argument);
    wait_for("the worker", running);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    wait_for("its death", || !running());
}

/// On v2, booted from v1, with the guard's files as the daemon writes them.
fn on_trial(deadline: u32) -> (Publisher, Host, String, String) {
    let publisher = Publisher::new();
    let v1 = publisher.commit("1", 1000, None);
    let v2 = publisher.commit("2", 1000, None);
    let mut host = Host::boot(&publisher, &v1);
    let source = publisher.source(&v2, None);
    host.done(&pull(&source));
    let write = |path: &str, content: &[u8]| {
        let file = host.file(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    };
    write("/etc/osimage/guard.sh", include_bytes!("../../guard/osimage-guard.sh"));
    let boot = fs::read_to_string(host.path("boot-id")).unwrap();
    let pending = format!("attempt=a-1\ntarget={v2}\nprevious={v1}\ndeadline={deadline}\nboot={}\n", boot.trim());
    write("/var/lib/osimage/guard/pending", pending.as_bytes());
    let program = host.file("/var/lib/osimage/bin/osimage-node-daemon");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_osimage-node-daemon"), program).unwrap();
    let same_boot = host.program(&["sh", "/etc/osimage/guard.sh"]);
    assert!(String::from_utf8(same_boot.stdout).unwrap().contains("armed for the next boot"));
    host.done(&stage(&source));
    host.reboot();
    assert_eq!(host.booted(), v2);
    (publisher, host, v1, v2)
}

fn result(host: &Host) -> String {
    fs::read_to_string(host.file("/var/lib/osimage/guard/result")).unwrap_or_default()
}

fn default(host: &Host) -> String {
    host.facts()["deployments"][0]["commit"].as_str().unwrap().to_owned()
}

#[test]
fn the_guard_sends_a_host_back_that_nobody_confirms() {
    if !possible() {
        return;
    }
    let (_publisher, mut host, v1, v2) = on_trial(2);
    let guard = host.start(&["sh", "/etc/osimage/guard.sh"]);
    wait_for("the reboot", || host.systemctl_log().contains("reboot"));
    println!("{}", guard.said());
    assert_eq!(default(&host), v1);
    assert!(result(&host).contains("attempt=a-1\nresult=rolledback\n"), "{}", result(&host));
    assert!(!host.file("/var/lib/osimage/guard/pending").exists());
    host.reboot();
    assert_eq!(host.booted(), v1);

    // At most once for an attempt: a host that boots the new system all the same stays up.
    host.done(&json!({"op": "setDefault", "commit": v2}));
    host.reboot();
    let again = host.program(&["sh", "/etc/osimage/guard.sh"]);
    assert!(String::from_utf8(again.stdout).unwrap().contains("it stays up"));
    assert!(result(&host).contains("result=stuck"), "{}", result(&host));
    assert_eq!(default(&host), v2);
}

#[test]
fn a_guard_that_was_cut_off_while_it_went_back_goes_on_at_the_next_boot() {
    if !possible() {
        return;
    }
    let (_publisher, host, v1, _) = on_trial(600);
    let folder = host.file("/var/lib/osimage/guard");
    let pending = fs::read_to_string(folder.join("pending")).unwrap();
    fs::write(folder.join("acting"), format!("{pending}acted=an-earlier-boot\nreason=late\n")).unwrap();
    fs::remove_file(folder.join("pending")).unwrap();
    let guard = host.start(&["sh", "/etc/osimage/guard.sh"]);
    wait_for("the reboot", || host.systemctl_log().contains("reboot"));
    println!("{}", guard.said());
    assert_eq!(default(&host), v1);
    assert!(result(&host).contains("result=rolledback\nreason=late"), "{}", result(&host));
}

#[test]
fn a_system_that_falls_over_before_its_deadline_is_left_at_its_third_boot() {
    if !possible() {
        return;
    }
    let (_publisher, mut host, v1, v2) = on_trial(600);
    for boot in 1..=2 {
        let guard = host.start(&["sh", "/etc/osimage/guard.sh"]);
        wait_for("the guard", || guard.said().contains(&format!("boot {boot} of it")));
        drop(guard);
        host.reboot();
        assert_eq!(host.booted(), v2);
    }
    let guard = host.start(&["sh", "/etc/osimage/guard.sh"]);
    wait_for("the reboot", || host.systemctl_log().contains("reboot"));
    println!("{}", guard.said());
    assert_eq!(default(&host), v1);
    assert!(result(&host).contains("reason=booted 3 times"), "{}", result(&host));
}

#[test]
fn the_guard_lets_a_confirmed_host_be() {
    if !possible() {
        return;
    }
    let (_publisher, host, _, v2) = on_trial(600);
    let mut guard = host.start(&["sh", "/etc/osimage/guard.sh"]);
    wait_for("the guard", || guard.said().contains("has to be confirmed"));
    fs::write(host.file("/run/osimage/confirmed"), "another\n").unwrap();
    fs::write(host.file("/run/osimage/confirmed"), "a-1\n").unwrap();
    assert!(guard.child.wait().unwrap().success());
    assert!(result(&host).contains("result=confirmed"));
    assert_eq!(default(&host), v2);
    assert!(!host.systemctl_log().contains("reboot"));
    let start = fs::read_to_string(host.file("/run/osimage/boot-start")).unwrap();
    assert!(start.starts_with("boot=00000000-"), "{start}");
}

#[test]
fn the_guard_notices_a_host_that_is_back_already_and_one_that_cannot_go_back() {
    if !possible() {
        return;
    }
    let (_publisher, mut host, v1, v2) = on_trial(1);
    host.done(&json!({"op": "setDefault", "commit": v1}));
    host.reboot();
    let guard = host.program(&["sh", "/etc/osimage/guard.sh"]);
    println!("{}", String::from_utf8_lossy(&guard.stdout));
    assert!(result(&host).contains("result=fellback"), "{}", result(&host));
    assert!(!host.file("/var/lib/osimage/guard/pending").exists());

    let nowhere = format!("attempt=a-2\ntarget={v1}\nprevious={}\ndeadline=1\nboot=x\n", "e".repeat(64));
    fs::write(host.file("/var/lib/osimage/guard/pending"), nowhere).unwrap();
    let guard = host.program(&["sh", "/etc/osimage/guard.sh"]);
    println!("{}", String::from_utf8_lossy(&guard.stdout));
    assert!(result(&host).contains("attempt=a-2\nresult=stuck"), "{}", result(&host));
    assert!(!host.systemctl_log().contains("reboot"), "nothing to go back to: it stays up");
    assert_eq!(host.booted(), v1);
    let _ = v2;
}

/// Prints the ratio to `ostree pull` and the worker's peak memory. Not an assertion: machines differ.
#[test]
#[ignore = "a measurement, for people: cargo test --test worker -- --ignored --nocapture"]
fn measure_a_download() {
    if !possible() {
        return;
    }
    const BULK: usize = 200 << 20;
    let publisher = Publisher::new();
    let keys = publisher.key("release");
    let v1 = publisher.commit("1", 1000, None);
    let v2 = publisher.commit("2", BULK, Some("release"));
    for round in 1..=3 {
        let host = Host::boot(&publisher, &v1);
        let done = std::sync::atomic::AtomicBool::new(false);
        let (ours, peak) = std::thread::scope(|scope| {
            let memory = scope.spawn(|| {
                let mut peak = 0;
                while !done.load(Ordering::Relaxed) {
                    peak = peak.max(worker_memory());
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                peak
            });
            let start = std::time::Instant::now();
            host.done(&pull(&publisher.source(&v2, Some(&keys))));
            done.store(true, Ordering::Relaxed);
            (start.elapsed(), memory.join().unwrap())
        });
        let other = Host::boot(&publisher, &v1);
        let add = ["ostree", "--repo=/ostree/repo", "remote", "add", "--no-gpg-verify", "x", &publisher.server.url()];
        let in_own_mounts = ["unshare", "--mount", "sh", "-c", "mount -o remount,bind,rw /sysroot; exec \"$@\"", "sh"];
        let cli = |arguments: &[&str]| {
            let output = other.program(&[&in_own_mounts, arguments].concat());
            assert!(output.status.success(), "{output:?}");
        };
        cli(&add);
        let start = std::time::Instant::now();
        cli(&["ostree", "--repo=/ostree/repo", "pull", "x", &v2]);
        let theirs = start.elapsed();
        println!(
            "round {round}: worker {ours:?}, peak {} MiB; ostree pull {theirs:?}; ratio {:.2}",
            peak / 1024,
            ours.as_secs_f64() / theirs.as_secs_f64()
        );
    }
}

/// KiB of the largest worker that runs.
fn worker_memory() -> u64 {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let workers = processes
        .filter(|p| fs::read(p.path().join("cmdline")).is_ok_and(|c| c.windows(13).any(|w| w == b"worker-inside")));
    workers
        .filter_map(|p| {
            let status = fs::read_to_string(p.path().join("status")).ok()?;
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.trim().to_owned();
            line.split(' ').next()?.parse().ok()
        })
        .max()
        .unwrap_or(0)
}
