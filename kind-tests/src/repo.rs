//! OS images: an OSTree archive repository, bootable commits, and the GPG keys that sign them.
//!
//! The synthetic trees are as small as libostree lets a bootable tree be; they take their `/usr` from the machine when
//! they are "booted" (see [`crate::host`]). [`crate::debian`] has the big one.
//!
//! `gpg` leaves an agent running. Each call that signs runs in a PID namespace of its own, so the agent ends with it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};

use crate::process::output;
use crate::scratch::Scratch;

/// The branch that all commits are bound to.
pub const BRANCH: &str = "os/stable";
/// Where a tree says that it is broken: health checks look at it.
pub const BROKEN: &str = "/usr/lib/osimage-test/broken";
/// A unit in every tree: succeeds unless the tree is broken.
pub const SELF_TEST_UNIT: &str = "osimage-selftest.service";
/// Commit times are fixed, so that equal trees give equal checksums, and grow with the version.
const EPOCH: u64 = 1_767_225_600; // 2026-01-01

/// A commit in a repository.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OsCommit {
    /// 64 hex digits.
    pub checksum: String,
    /// The commit's `version` metadata.
    pub version: String,
}

/// A key pair in a throw-away keyring.
pub struct SigningKey {
    home: Scratch,
    /// Fingerprint.
    pub id: String,
    /// The public key as an administrator would paste it.
    pub public_armored: String,
}

impl SigningKey {
    /// Makes an ed25519 key that signs and never expires.
    pub fn generate(name: &str) -> Result<Self> {
        let home = Scratch::new("gpg")?;
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700))?;
        let dir = home.path().display().to_string();
        let gpg = |args: &[&str]| {
            let mut all = vec!["--batch", "--homedir", &dir];
            all.extend_from_slice(args);
            confined("gpg", &all)
        };
        let user = format!("{name} <{name}@example.org>");
        gpg(&["--passphrase", "", "--quick-gen-key", &user, "ed25519", "sign", "never"])?;
        let listing = gpg(&["--list-keys", "--with-colons"])?;
        let id = listing
            .lines()
            .find_map(|line| line.strip_prefix("fpr:"))
            .and_then(|rest| rest.split(':').find(|f| !f.is_empty()))
            .ok_or_else(|| anyhow!("gpg lists no fingerprint:\n{listing}"))?
            .to_owned();
        let public_armored = gpg(&["--armor", "--export", &id])?;
        Ok(Self { home, id, public_armored })
    }
}

/// What a synthetic tree contains.
#[derive(Clone, Debug)]
pub struct Tree {
    /// In os-release, in the commit's metadata and in a changed file.
    pub version: String,
    /// Whether the self test fails after the boot.
    pub broken: bool,
    /// Number of further files of 4 KiB, different in each version, so that a pull takes some time.
    pub payload: u32,
    /// Further files: path below `/`, content. `/etc/…` goes to `usr/etc`.
    pub files: Vec<(String, String)>,
    /// Kernel version; the kernel's bytes depend on it.
    pub kernel: String,
}

impl Tree {
    /// A healthy tree.
    pub fn new(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            broken: false,
            payload: 16,
            files: Vec::new(),
            kernel: format!(
                "6.12.{}-osimage",
                version.chars().filter(char::is_ascii_digit).take(3).collect::<String>()
            ),
        }
    }

    /// A tree that boots and whose self test fails.
    pub fn broken(version: &str) -> Self {
        Self { broken: true, ..Self::new(version) }
    }

    fn write(&self, root: &Path) -> Result<()> {
        top_level(root)?;
        for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            symlink(target, root.join(link))?;
        }
        let v = &self.version;
        put(root, "usr/lib/os-release", &os_release("OSImage Test OS", "osimage-test", v))?;
        put(root, "usr/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")?;
        put(root, "usr/etc/group", "root:x:0:\n")?;
        put(root, "usr/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")?;
        put(root, "usr/etc/hosts", "127.0.0.1 localhost\n")?;
        put(root, "usr/etc/osimage-test.conf", &format!("version={v}\n"))?;
        symlink("../usr/lib/os-release", root.join("usr/etc/os-release"))?;
        // Some programs of the machine's /usr are reached through here.
        fs::create_dir_all(root.join("usr/etc/alternatives"))?;
        for name in ["awk", "nawk", "which"] {
            if let Ok(target) = fs::read_link(Path::new("/etc/alternatives").join(name)) {
                symlink(target, root.join("usr/etc/alternatives").join(name))?;
            }
        }
        put(root, &format!("usr/lib/modules/{}/vmlinuz", self.kernel), &format!("kernel {}\n", self.kernel))?;
        put(root, &format!("usr/lib/modules/{}/initramfs.img", self.kernel), &format!("initramfs {}\n", self.kernel))?;
        fs::create_dir_all(root.join("usr/etc/systemd/system"))?;
        mark(root, v, self.broken)?;
        for n in 0..self.payload {
            let mut bytes = Vec::with_capacity(4096);
            let mut state =
                u64::from(n) << 32 | v.bytes().fold(7, |h: u64, b| h.wrapping_mul(31).wrapping_add(b.into()));
            while bytes.len() < 4096 {
                // A small generator of bytes that do not compress; a third of the files is the same in every version.
                if n % 3 == 0 {
                    state &= !0xffff_ffff
                }
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(bytes.len() as u64 + u64::from(n));
                bytes.extend_from_slice(&state.to_le_bytes());
            }
            let path = root.join(format!("usr/lib/osimage-test/payload/{:02}/{n}", n % 64));
            fs::create_dir_all(path.parent().unwrap_or(root))?;
            fs::write(path, bytes)?;
        }
        for (path, content) in &self.files {
            let path = path.trim_start_matches('/');
            let path = path.strip_prefix("etc/").map_or(path.to_owned(), |rest| format!("usr/etc/{rest}"));
            put(root, &path, content)?;
        }
        Ok(())
    }
}

/// The folders and links at the top of every OSTree root.
pub(crate) fn top_level(root: &Path) -> Result<()> {
    for dir in ["boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "usr", "var"] {
        fs::create_dir_all(root.join(dir))?;
    }
    for (link, target) in [
        ("ostree", "sysroot/ostree"),
        ("home", "var/home"),
        ("root", "var/roothome"),
        ("srv", "var/srv"),
        ("mnt", "var/mnt"),
        ("opt", "var/opt"),
        ("media", "run/media"),
    ] {
        symlink(target, root.join(link)).with_context(|| format!("link /{link}"))?;
    }
    Ok(())
}

/// The marks that tests and health checks look for; `root` has `usr/lib`.
pub(crate) fn mark(root: &Path, version: &str, broken: bool) -> Result<()> {
    put(root, "usr/lib/osimage-test/version", &format!("{version}\n"))?;
    put(
        root,
        &format!("usr/lib/systemd/system/{SELF_TEST_UNIT}"),
        &format!(
            "[Unit]\nDescription=Self test of the OS\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
             ExecStart=/bin/sh -c 'if test -e {BROKEN}; then echo \"self test: {BROKEN} exists\"; exit 1; fi; echo \"self test: good\"'\n\
             [Install]\nWantedBy=multi-user.target\n"
        ),
    )?;
    let wants = root.join("usr/lib/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink(format!("../{SELF_TEST_UNIT}"), wants.join(SELF_TEST_UNIT))?;
    if broken {
        put(root, BROKEN.trim_start_matches('/'), "this version cannot do its work\n")?;
    }
    Ok(())
}

pub(crate) fn os_release(name: &str, id: &str, version: &str) -> String {
    format!("NAME=\"{name}\"\nID={id}\nVERSION=\"{version}\"\nVERSION_ID={version}\nPRETTY_NAME=\"{name} {version}\"\n")
}

pub(crate) fn put(root: &Path, path: &str, content: &str) -> Result<()> {
    let path = root.join(path);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&path, content).with_context(|| format!("write {}", path.display()))
}

/// An archive repository in a folder of its own.
pub struct OsRepo {
    scratch: Scratch,
    count: std::sync::atomic::AtomicU64,
}

impl OsRepo {
    /// Makes an empty repository.
    pub fn create() -> Result<Self> {
        let scratch = Scratch::new("repo")?;
        init_archive(&scratch.path().join("repo"))?;
        Ok(Self { scratch, count: 0.into() })
    }

    /// A copy of `repo` that may be changed; objects are hard links where the file system allows.
    pub fn copy_of(repo: &Path) -> Result<Self> {
        let scratch = Scratch::new("repo")?;
        let to = scratch.path().join("repo");
        crate::host::sysroot::clone_tree(repo, &to, &|path| path.starts_with("objects"))?;
        Ok(Self { scratch, count: 0.into() })
    }

    /// The folder to serve.
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("repo")
    }

    /// Commits a synthetic tree, signed when a key is given. Does not move [`BRANCH`]: see [`OsRepo::publish`].
    pub fn commit(&self, tree: &Tree, key: Option<&SigningKey>) -> Result<OsCommit> {
        let n = self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = self.scratch.path().join(format!("tree-{n}"));
        fs::create_dir(&dir)?;
        tree.write(&dir)?;
        let commit = commit_tree(&self.path(), &dir, &tree.version, EPOCH + n * 3600)?;
        fs::remove_dir_all(&dir)?;
        if let Some(key) = key {
            self.sign(&commit, key)?;
        }
        Ok(commit)
    }

    /// Adds a signature to a commit.
    pub fn sign(&self, commit: &OsCommit, key: &SigningKey) -> Result<()> {
        let home = key.home.path().display().to_string();
        let repo = format!("--repo={}", self.path().display());
        confined("ostree", &["gpg-sign", &repo, &format!("--gpg-homedir={home}"), &commit.checksum, &key.id])?;
        Ok(())
    }

    /// Lets [`BRANCH`] name this commit and writes the summary, as a release does.
    pub fn publish(&self, commit: &OsCommit) -> Result<()> {
        let repo = format!("--repo={}", self.path().display());
        run_ostree(&[&repo, "refs", "--force", "--create", BRANCH, &commit.checksum])?;
        run_ostree(&[&repo, "summary", "-u"])?;
        Ok(())
    }

    /// A file of an object: `OBJECT.filez`, `.commit`, `.dirtree`…
    pub fn object(&self, checksum: &str, kind: &str) -> PathBuf {
        let (head, rest) = checksum.split_at(2.min(checksum.len()));
        self.path().join("objects").join(head).join(format!("{rest}.{kind}"))
    }
}

/// The usual set of images for a test.
pub struct Images {
    /// Where they are.
    pub repo: OsRepo,
    /// The key that hosts trust.
    pub key: SigningKey,
    /// A key that they do not.
    pub foreign_key: SigningKey,
    /// What hosts run at the beginning.
    pub v1: OsCommit,
    /// A good update.
    pub v2: OsCommit,
    /// Boots, and its health checks fail.
    pub v3: OsCommit,
    /// A good update after v3.
    pub v4: OsCommit,
    /// Like v2, without a signature.
    pub unsigned: OsCommit,
    /// Like v2, signed by the foreign key.
    pub foreign: OsCommit,
}

impl Images {
    /// Synthetic trees, in about a second.
    pub fn synthetic() -> Result<Self> {
        Self::synthetic_with_payload(16)
    }

    /// Synthetic trees with `payload` further files of 4 KiB.
    pub fn synthetic_with_payload(payload: u32) -> Result<Self> {
        let repo = OsRepo::create()?;
        let (key, foreign_key) = (SigningKey::generate("release")?, SigningKey::generate("foreign")?);
        let good = |v: &str| Tree { payload, ..Tree::new(v) };
        let v1 = repo.commit(&good("1"), Some(&key))?;
        let v2 = repo.commit(&good("2"), Some(&key))?;
        let v3 = repo.commit(&Tree { broken: true, ..good("3") }, Some(&key))?;
        let v4 = repo.commit(&good("4"), Some(&key))?;
        let unsigned = repo.commit(&good("2.1-unsigned"), None)?;
        let foreign = repo.commit(&good("2.2-foreign"), Some(&foreign_key))?;
        repo.publish(&v2)?;
        Ok(Self { repo, key, foreign_key, v1, v2, v3, v4, unsigned, foreign })
    }
}

pub(crate) fn init_archive(repo: &Path) -> Result<()> {
    fs::create_dir_all(repo)?;
    let flag = format!("--repo={}", repo.display());
    run_ostree(&[&flag, "init", "--mode=archive"])?;
    // A throw-away repository: no need to wait for the disk.
    run_ostree(&[&flag, "config", "set", "core.fsync", "false"])?;
    Ok(())
}

/// Commits the folder `tree` under a ref of its own, bound to [`BRANCH`].
pub(crate) fn commit_tree(repo: &Path, tree: &Path, version: &str, time: u64) -> Result<OsCommit> {
    let checksum = run_ostree(&[
        &format!("--repo={}", repo.display()),
        "commit",
        &format!("--branch=variants/{version}"),
        &format!("--bind-ref={BRANCH}"),
        &format!("--tree=dir={}", tree.display()),
        &format!("--subject=Version {version}"),
        &format!("--add-metadata-string=version={version}"),
        &format!("--timestamp=@{time}"),
        "--bootable",
        "--generate-sizes",
        "--no-xattrs",
    ])?;
    Ok(OsCommit { checksum: checksum.trim().to_owned(), version: version.to_owned() })
}

pub(crate) fn run_ostree(args: &[&str]) -> Result<String> {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "ostree"])
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        // Deployments stay removable without clearing the immutable flag first.
        .env("OSTREE_SYSROOT_DEBUG", "mutable-deployments")
        // And the machine's file system is not frozen for a moment, which a deployment does to that of /boot.
        .env("OSTREE_SYSROOT_OPTS", "skip-sync")
        .stdin(Stdio::null());
    output(command, &format!("ostree {}", args.join(" ")))
}

/// Runs a program in a PID namespace of its own: what it leaves running ends with it.
fn confined(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child", "--", program])
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
    output(command, &format!("{program} {}", args.join(" ")))
}
