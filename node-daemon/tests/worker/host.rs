//! A small fake booted host: a mount and a PID namespace whose root is an OSTree deployment, so that libostree takes it
//! for booted. Real staging, real finalization; the reboot is leaving it and entering what the boot loader would take.
//! Needs root, unshare, nsenter, ostree and gpg.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use serde_json::{Value, json};
use tempfile::TempDir;

pub const REF: &str = "stable/node";
const DAEMON: &str = env!("CARGO_BIN_EXE_osimage-node-daemon");

/// Whether this machine can have such hosts. Says so when it cannot.
pub fn possible() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    let missing: Vec<&str> = ["ostree", "gpg", "unshare", "nsenter"].into_iter().filter(|p| !has(p)).collect();
    let root = rustix::process::geteuid().is_root();
    if !root || !missing.is_empty() {
        println!("SKIPPED: needs root and ostree, gpg, util-linux (missing: {missing:?}, root: {root})");
    }
    root && missing.is_empty()
}

pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

fn text(output: Output) -> String {
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Commits, keys and a server for them.
pub struct Publisher {
    dir: TempDir,
    pub server: Server,
}

impl Publisher {
    pub fn new() -> Publisher {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        run(Command::new("ostree").args(["init", "--mode=archive", "--repo"]).arg(&repo));
        Publisher { server: Server::start(repo), dir }
    }

    pub fn repo(&self) -> PathBuf {
        self.dir.path().join("repo")
    }

    fn gpg(&self, name: &str) -> Command {
        let home = self.dir.path().join(name);
        let mut command = Command::new("gpg");
        command.args(["--batch", "--quiet", "--homedir"]).arg(home);
        command
    }

    /// A new key; returns it armored.
    pub fn key(&self, name: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let home = self.dir.path().join(name);
        fs::create_dir(&home).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        let user = format!("{name}@example.org");
        run(self.gpg(name).args(["--passphrase", "", "--quick-gen-key", &user, "ed25519", "sign", "never"]));
        text(run(self.gpg(name).args(["--export", "--armor", &user])))
    }

    /// A commit of a small bootable tree; `bulk` bytes that no other version has. Signed by `key`, if any.
    pub fn commit(&self, version: &str, bulk: usize, key: Option<&str>) -> String {
        let tree = self.dir.path().join(format!("tree-{version}"));
        for folder in ["boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "var", "usr/etc", "usr/lib/modules/6.1"] {
            fs::create_dir_all(tree.join(folder)).unwrap();
        }
        for (link, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
            ("ostree", "sysroot/ostree"),
        ] {
            symlink(target, tree.join(link)).unwrap();
        }
        let write = |path: &str, content: &[u8]| fs::write(tree.join(path), content).unwrap();
        write("usr/etc/passwd", b"root:x:0:0::/root:/bin/sh\n");
        write("usr/lib/os-release", format!("PRETTY_NAME=\"Test {version}\"\n").as_bytes());
        write("usr/lib/modules/6.1/vmlinuz", format!("kernel {version}").as_bytes());
        write("usr/lib/modules/6.1/initramfs.img", b"initramfs");
        let mut seed = version.bytes().fold(7_u64, |a, b| a * 31 + u64::from(b));
        for (number, size) in std::iter::repeat_n(256 << 10, bulk >> 18).chain([bulk & 0x3ffff]).enumerate() {
            let noise: Vec<u8> = std::iter::repeat_with(|| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) as u8
            })
            .take(size)
            .collect();
            write(&format!("usr/lib/bulk-{number}"), &noise);
        }
        let mut commit = Command::new("ostree");
        commit
            .args(["commit", "--owner-uid=0", "--owner-gid=0", "--generate-sizes", "--bootable", "--branch", REF])
            .arg("--repo")
            .arg(self.repo())
            .arg(format!("--tree=dir={}", tree.display()))
            .arg(format!("--add-metadata-string=version={version}"));
        if let Some(key) = key {
            commit.arg(format!("--gpg-sign={key}@example.org"));
            commit.arg("--gpg-homedir").arg(self.dir.path().join(key));
        }
        text(run(&mut commit))
    }

    pub fn source(&self, commit: &str, keys: Option<&str>) -> Value {
        json!({"remote": "osimage-test", "url": self.server.url(), "ref": REF, "commit": commit, "gpgKeys": keys})
    }

    /// The file of a content object that only this commit has.
    pub fn bulk_object(&self, commit: &str) -> PathBuf {
        let listing = text(run(Command::new("ostree")
            .args(["ls", "-C", "--repo"])
            .arg(self.repo())
            .args([commit, "/usr/lib/bulk-0"])));
        let sum = listing.split_whitespace().find(|word| word.len() == 64).unwrap();
        self.repo().join("objects").join(&sum[..2]).join(format!("{}.filez", &sum[2..]))
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        for home in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if home.path().join("pubring.kbx").exists() {
                let _ = Command::new("gpgconf").arg("--homedir").arg(home.path()).args(["--kill", "all"]).output();
            }
        }
    }
}

/// A static file server that can be told to fail.
pub struct Server {
    port: u16,
    /// Status for everything below `/objects`, 0 for what is right.
    pub fail_with: Arc<AtomicU32>,
}

impl Server {
    fn start(root: PathBuf) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let fail_with: Arc<AtomicU32> = Arc::default();
        let fail = fail_with.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (root, fail) = (root.clone(), fail.clone());
                thread::spawn(move || serve(stream, &root, &fail));
            }
        });
        Server { port, fail_with }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

fn serve(stream: TcpStream, root: &Path, fail: &AtomicU32) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut out = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request).ok()? == 0 {
            return None;
        }
        let mut header = String::new();
        while reader.read_line(&mut header).ok()? > 2 {
            header.clear();
        }
        let path = request.split(' ').nth(1)?.trim_start_matches('/').to_owned();
        let code = fail.load(Ordering::Relaxed);
        let body = match code {
            0 => fs::read(root.join(&path)).ok(),
            _ if path.ends_with(".filez") => None,
            _ => fs::read(root.join(&path)).ok(),
        };
        let status = if body.is_some() { 200 } else { code.max(404) };
        let body = body.unwrap_or_default();
        write!(out, "HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
        out.write_all(&body).ok()?;
    }
}

/// A booted host. Ends when dropped.
pub struct Host {
    dir: TempDir,
    init: Option<Child>,
    pid: u32,
    boots: u32,
}

impl Host {
    /// Installs a commit and boots it.
    pub fn boot(publisher: &Publisher, commit: &str) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host { dir, init: None, pid: 0, boots: 0 };
        let sysroot = host.path("sysroot");
        for folder in ["sysroot", "run", "root", "sbin"] {
            fs::create_dir(host.path(folder)).unwrap();
        }
        let admin = || {
            let mut command = Command::new("ostree");
            command.env("OSTREE_SYSROOT_DEBUG", "mutable-deployments").env("OSTREE_SYSROOT", &sysroot).arg("admin");
            command
        };
        run(Command::new("ostree").args(["admin", "init-fs", "--modern"]).arg(&sysroot));
        run(admin().args(["os-init", "testos"]));
        let config = ["config", "--repo"];
        let repo = sysroot.join("ostree/repo");
        run(Command::new("ostree").args(config).arg(&repo).args(["set", "sysroot.bootloader", "none"]));
        run(Command::new("ostree").args(["pull-local", "--repo"]).arg(&repo).arg(publisher.repo()).arg(commit));
        let kernel_arguments = ["--karg=root=LABEL=test", "--karg=rw", "--karg=quiet"];
        run(admin().args(["deploy", "--os=testos"]).args(kernel_arguments).arg(commit));
        // Says what it was asked; reboots nothing.
        let stub = "#!/bin/sh\necho \"$*\" >> /run/systemctl.log\ncase $* in *is-active*) echo active;; esac\n";
        fs::write(host.path("sbin/systemctl"), stub).unwrap();
        run(Command::new("chmod").arg("+x").arg(host.path("sbin/systemctl")));
        host.enter();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of the running host.
    pub fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// What the boot loader takes: the entry with the highest version.
    fn entry(&self) -> String {
        let entries = fs::read_dir(self.path("sysroot/boot/loader/entries")).unwrap().flatten();
        let version = |text: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix("version "));
            line.and_then(|v| v.trim().parse::<u32>().ok()).unwrap_or(0)
        };
        entries.map(|e| fs::read_to_string(e.path()).unwrap()).max_by_key(|text| version(text)).unwrap()
    }

    /// Kernel arguments of the next boot.
    pub fn next_arguments(&self) -> String {
        self.entry().lines().find_map(|l| l.strip_prefix("options ")).unwrap().to_owned()
    }

    fn enter(&mut self) {
        self.boots += 1;
        let arguments = self.next_arguments();
        let link = arguments.split(' ').find_map(|a| a.strip_prefix("ostree=")).unwrap().to_owned();
        let deployment = fs::canonicalize(self.path("sysroot").join(link.trim_start_matches('/'))).unwrap();
        fs::remove_dir_all(self.path("run")).unwrap();
        fs::create_dir(self.path("run")).unwrap();
        fs::write(self.path("run/ostree-booted"), "").unwrap();
        fs::write(self.path("boot-id"), format!("00000000-0000-0000-0000-{:012}\n", self.boots)).unwrap();
        let script = format!(
            "set -e; cd {dir}; mount --make-rprivate /
             mount --bind {deployment} root; cd root
             mount --rbind /usr usr; mount --bind ../sbin usr/local/sbin
             mount --bind ../sysroot sysroot; mount --bind ../sysroot/boot boot
             mount --bind ../sysroot/ostree/deploy/testos/var var
             mount --bind ../run run; mount --rbind /dev dev; mount -t proc proc proc; mount -t tmpfs tmpfs tmp
             mount --bind ../boot-id proc/sys/kernel/random/boot_id
             mount -o remount,bind,ro sysroot; mount -o remount,bind,ro boot
             mkdir run/up
             exec chroot . /bin/sleep 1000000",
            dir = self.dir.path().display(),
            deployment = deployment.display(),
        );
        let init = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", &script])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let up = self.path("run/up");
        let children = format!("/proc/{0}/task/{0}/children", init.id());
        self.init = Some(init);
        wait_for("the host to be up", || up.exists());
        wait_for("its init", || {
            let pid = fs::read_to_string(&children).unwrap_or_default().trim().parse().unwrap_or(0);
            self.pid = pid;
            fs::read_link(format!("/proc/{pid}/root")).is_ok_and(|root| root.ends_with("root"))
        });
    }

    /// Shuts down in order, and boots what is first then.
    pub fn reboot(&mut self) {
        let finalized = self.program(&["ostree", "admin", "finalize-staged"]);
        assert!(finalized.status.success() || !self.path("run/ostree/staged-deployment").exists(), "{finalized:?}");
        self.leave();
        self.enter();
    }

    fn leave(&mut self) {
        if let Some(mut init) = self.init.take() {
            let _ = init.kill();
            let _ = init.wait();
        }
    }

    /// The daemon's program in the host's PID namespace with mounts of its own, as a pod with hostPID has it.
    fn worker(&self) -> Command {
        let mut command = Command::new("nsenter");
        let own_proc = "mount --make-rprivate /; mount -t proc proc /proc; exec \"$@\"";
        command
            .args(["--target", &self.pid.to_string(), "--pid", "unshare", "--mount", "sh", "-c", own_proc, "sh"])
            .args([DAEMON, "worker"]);
        command
    }

    /// One operation; the lines that the worker wrote.
    pub fn ask(&self, request: &Value) -> Vec<Value> {
        let mut child =
            self.worker().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let lines = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(!lines.is_empty(), "{request}: {output:?}");
        lines.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
    }

    /// An operation that must succeed.
    #[track_caller]
    pub fn done(&self, request: &Value) -> Value {
        let last = self.ask(request).pop().unwrap();
        last.get("done").unwrap_or_else(|| panic!("{request}: {last}")).clone()
    }

    /// An operation that must fail: reason, whether it is worth another try, message.
    #[track_caller]
    pub fn fails(&self, request: &Value) -> (String, bool, String) {
        let last = self.ask(request).pop().unwrap();
        let failed = last.get("failed").unwrap_or_else(|| panic!("{request} succeeded: {last}"));
        let word = |key: &str| failed[key].as_str().unwrap().to_owned();
        (word("reason"), failed["transient"].as_bool().unwrap(), word("message"))
    }

    pub fn facts(&self) -> Value {
        self.done(&json!({"op": "status"}))["facts"].clone()
    }

    pub fn booted(&self) -> String {
        let facts = self.facts();
        let booted = facts["deployments"].as_array().unwrap().iter().find(|d| d["booted"] == true).unwrap();
        booted["commit"].as_str().unwrap().to_owned()
    }

    /// A program of the host.
    pub fn program(&self, program: &[&str]) -> Output {
        self.worker().arg("--").args(program).stdin(Stdio::null()).output().unwrap()
    }

    /// Something that stands for the daemon: a parent, which is returned, and a worker of it.
    pub fn start_daemon_with(&self, program: &str, argument: &str) -> Child {
        let mut command = Command::new("sh");
        let script =
            "\"$0\" worker --host-root $1/root --host-mount-namespace $1/ns/mnt --parent $$ -- \"$2\" \"$3\" & wait";
        command.args(["-c", script, DAEMON, &format!("/proc/{}", self.pid), program, argument]);
        command.stdin(Stdio::null()).spawn().unwrap()
    }

    /// A program of the host that goes on beside the test.
    pub fn start(&self, program: &[&str]) -> Running {
        let mut child =
            self.worker().arg("--").args(program).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let said: Arc<Mutex<String>> = Arc::default();
        let into = said.clone();
        thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(n @ 1..) = out.read(&mut buffer) {
                into.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        Running { child, said }
    }

    pub fn systemctl_log(&self) -> String {
        fs::read_to_string(self.path("run/systemctl.log")).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.leave();
        let _ = Command::new("chattr").args(["-R", "-f", "-i"]).arg(self.path("sysroot/ostree/deploy")).output();
    }
}

/// A program of the host beside the test. The end of the host is its end.
pub struct Running {
    pub child: Child,
    said: Arc<Mutex<String>>,
}

impl Running {
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }
}

pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1500 {
        if holds() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("waited in vain for {what}");
}
