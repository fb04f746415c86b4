//! A real Debian as an OSTree image: built from packages once, kept in the cache, copied and signed for each run.
//!
//! Version 1 is a minimal trixie with systemd, ostree and gpg. Version 2 has one more real package (`jq`). Version 3 is
//! version 2 with a broken self test. There is no kernel (two small files stand for it) and so it boots on a fake host
//! only; it brings its own libostree, libc and gpg.
//!
//! The cache is `$XDG_CACHE_HOME/osimage-operator/os-<hash of the recipe>`, complete or absent: it is built beside its
//! place and renamed, under a lock.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{FlockOperation, flock};

use crate::host::sysroot::{Template, deploy};
use crate::process::output;
use crate::remove::remove_tree;
use crate::repo::{
    BRANCH, Images, OsCommit, OsRepo, SigningKey, commit_tree, init_archive, mark, os_release, put, run_ostree,
};
use crate::scratch::Unfinished;

const SUITE: &str = "trixie";
const PACKAGES: &str = "systemd,dbus,ostree,gpg,gpgconf,ca-certificates,e2fsprogs,procps";
/// The real change of version 2.
const ADDED_PACKAGE: &str = "jq";
const LEFT_OUT: [&str; 5] =
    ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/i18n/*"];
const NAME: &str = "Debian OSTree Demo";
/// Part of the recipe's hash: to be raised when the code below makes other trees.
const RECIPE: u32 = 1;
/// 2026-01-01: commit times are part of the checksum.
const EPOCH: u64 = 1_767_225_600;

/// The cached image set.
pub struct DebianOs {
    dir: PathBuf,
    commits: Commits,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Commits {
    v1: OsCommit,
    v2: OsCommit,
    v3: OsCommit,
    v4: OsCommit,
    unsigned: OsCommit,
    foreign: OsCommit,
}

impl DebianOs {
    /// Takes it from the cache, or builds it (under a minute with a near mirror). `say` hears what is being done.
    pub fn build_or_reuse(say: &dyn Fn(&str)) -> Result<Self> {
        let cache = cache_dir()?;
        fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
        let name = format!("os-{:016x}", recipe_hash());
        let dir = cache.join(&name);
        if let Some(found) = Self::load(&dir) {
            return Ok(found);
        }
        let lock = File::create(cache.join(format!("{name}.lock")))?;
        flock(&lock, FlockOperation::LockExclusive).context("wait for another build")?;
        if let Some(found) = Self::load(&dir) {
            return Ok(found);
        }
        // We hold the lock: whatever is there is what an interrupted build left.
        let building = cache.join(format!(".{name}.building"));
        remove_tree(&building)?;
        let _unfinished = Unfinished::new(&building);
        fs::create_dir_all(&building)?;
        let built = build(&building, say);
        if let Err(error) = built {
            remove_tree(&building)?;
            return Err(error);
        }
        fs::rename(&building, &dir)?;
        Self::load(&dir).ok_or_else(|| anyhow!("the image that was just built in {} is not complete", dir.display()))
    }

    fn load(dir: &Path) -> Option<Self> {
        let text = fs::read(dir.join("commits.json")).ok()?;
        Some(Self { dir: dir.to_owned(), commits: serde_json::from_slice(&text).ok()? })
    }

    /// A disk with version 1 installed.
    pub fn template(&self) -> Template {
        Template::existing(&self.dir.join("sysroot"), &self.commits.v1)
    }

    /// A repository of its own for this run, with new keys. The cache is not touched.
    pub fn images(&self) -> Result<Images> {
        let repo = OsRepo::copy_of(&self.dir.join("repo"))?;
        let (key, foreign_key) = (SigningKey::generate("release")?, SigningKey::generate("foreign")?);
        let Commits { v1, v2, v3, v4, unsigned, foreign } = &self.commits;
        for commit in [v1, v2, v3, v4] {
            repo.sign(commit, &key)?;
        }
        repo.sign(foreign, &foreign_key)?;
        repo.publish(v2)?;
        Ok(Images {
            repo,
            key,
            foreign_key,
            v1: v1.clone(),
            v2: v2.clone(),
            v3: v3.clone(),
            v4: v4.clone(),
            unsigned: unsigned.clone(),
            foreign: foreign.clone(),
        })
    }
}

fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").ok_or_else(|| anyhow!("HOME is not set"))?).join(".cache"),
    };
    Ok(base.join("osimage-operator"))
}

fn recipe_hash() -> u64 {
    let mut hasher = DefaultHasher::new();
    (RECIPE, SUITE, PACKAGES, ADDED_PACKAGE, LEFT_OUT, NAME).hash(&mut hasher);
    hasher.finish()
}

fn build(dir: &Path, say: &dyn Fn(&str)) -> Result<()> {
    say("building a Debian tree from packages (once; about a minute)");
    let (tree1, tree2, tmp) = (dir.join("tree1"), dir.join("tree2"), dir.join("tmp"));
    fs::create_dir(&tmp)?;
    install(&tree1, &tree2, &tmp)?;
    for (tree, version) in [(&tree1, "1"), (&tree2, "2")] {
        rearrange(tree, version).with_context(|| format!("rearrange {}", tree.display()))?;
    }
    say("committing it to an OSTree repository");
    let repo = dir.join("repo");
    init_archive(&repo)?;
    let v1 = commit_tree(&repo, &tree1, "1", EPOCH)?;
    let v2 = commit_tree(&repo, &tree2, "2", EPOCH + 3600)?;
    let v3 = variant(dir, &repo, "3", true, EPOCH + 7200)?;
    let v4 = variant(dir, &repo, "4", false, EPOCH + 10800)?;
    let unsigned = variant(dir, &repo, "2.1-unsigned", false, EPOCH + 14400)?;
    let foreign = variant(dir, &repo, "2.2-foreign", false, EPOCH + 18000)?;
    for done in [&tree1, &tree2, &tmp] {
        remove_tree(done)?;
    }
    say("installing version 1 on a disk to copy for each host");
    deploy(&repo, &v1, &dir.join("sysroot"))?;
    let commits = Commits { v1, v2, v3, v4, unsigned, foreign };
    fs::write(dir.join("commits.json"), serde_json::to_vec_pretty(&commits)?)?;
    Ok(())
}

/// Installs the packages; in the middle, before the added one, the tree is copied: that is version 1.
fn install(tree1: &Path, tree2: &Path, tmp: &Path) -> Result<()> {
    let mut command = Command::new("setpriv");
    // Namespaces of its own: mmdebstrap mounts things in the tree and starts processes there.
    command
        .args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation", "private", "--", "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"])
        .arg("--aptopt=Apt::Install-Recommends \"false\"")
        .args(LEFT_OUT.map(|pattern| format!("--dpkgopt=path-exclude={pattern}")))
        .arg(format!("--include={PACKAGES}"))
        .arg(format!("--customize-hook=cp -a --one-file-system \"$1\" '{}'", tree1.display()))
        .arg(format!(
            "--customize-hook=APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get --yes -oDPkg::Chroot-Directory=\"$1\" install {ADDED_PACKAGE}"
        ))
        .arg(SUITE)
        .arg(tree2)
        .env("LC_ALL", "C.UTF-8")
        // What it leaves there when it is interrupted goes with the rest.
        .env("TMPDIR", tmp)
        .stdin(Stdio::null());
    output(command, &format!("mmdebstrap {SUITE}")).context(
        "build the Debian tree: is mmdebstrap installed (`make setup`), and does apt know a Debian mirror on this machine?",
    )?;
    Ok(())
}

/// Turns an installed tree into an OSTree one: nothing in /var and /boot, /etc below /usr, links at the top.
fn rearrange(tree: &Path, version: &str) -> Result<()> {
    let dpkg = tree.join("usr/lib/sysimage");
    fs::create_dir_all(&dpkg)?;
    fs::rename(tree.join("var/lib/dpkg"), dpkg.join("dpkg")).context("keep the package list")?;
    for name in ["boot", "dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "var"] {
        remove_tree(&tree.join(name))?;
    }
    for name in fs::read_dir(tree)?.flatten() {
        let text = name.file_name().to_string_lossy().into_owned();
        if text.starts_with("vmlinuz") || text.starts_with("initrd") {
            fs::remove_file(name.path())?;
        }
    }
    remove_tree(&tree.join("usr/local"))?;
    symlink("../var/usrlocal", tree.join("usr/local"))?;
    crate::repo::top_level(tree)?;

    for name in ["etc/resolv.conf", "etc/hostname"] {
        let _ = fs::remove_file(tree.join(name));
    }
    put(tree, "etc/machine-id", "")?;
    put(tree, "etc/fstab", "")?;
    put(tree, "etc/hosts", "127.0.0.1 localhost\n")?;
    put(tree, "etc/osimage-test.conf", &format!("version={version}\n"))?;
    fs::rename(tree.join("etc"), tree.join("usr/etc"))?;

    put(tree, "usr/lib/ostree/prepare-root.conf", "[sysroot]\nreadonly=true\n")?;
    let kernel = format!("usr/lib/modules/6.12.{version}-osimage");
    put(tree, &format!("{kernel}/vmlinuz"), &format!("kernel {version}\n"))?;
    put(tree, &format!("{kernel}/initramfs.img"), &format!("initramfs {version}\n"))?;
    let _ = fs::remove_file(tree.join("usr/lib/os-release"));
    put(tree, "usr/lib/os-release", &os_release(NAME, "debian-ostree", version))?;
    mark(tree, version, false)
}

/// A commit that differs from version 2 in a few files.
fn variant(dir: &Path, repo: &Path, version: &str, broken: bool, time: u64) -> Result<OsCommit> {
    let delta = dir.join(format!("delta-{version}"));
    fs::create_dir_all(&delta)?;
    put(&delta, "usr/lib/os-release", &os_release(NAME, "debian-ostree", version))?;
    put(&delta, "usr/etc/osimage-test.conf", &format!("version={version}\n"))?;
    mark(&delta, version, broken)?;
    let checksum = run_ostree(&[
        &format!("--repo={}", repo.display()),
        "commit",
        &format!("--branch=variants/{version}"),
        &format!("--bind-ref={BRANCH}"),
        "--tree=ref=variants/2",
        &format!("--tree=dir={}", delta.display()),
        &format!("--subject=Version {version}"),
        &format!("--add-metadata-string=version={version}"),
        &format!("--timestamp=@{time}"),
        "--bootable",
        "--generate-sizes",
        "--no-xattrs",
    ])?;
    remove_tree(&delta)?;
    Ok(OsCommit { checksum: checksum.trim().to_owned(), version: version.to_owned() })
}
