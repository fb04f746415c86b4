//! The disk of a fake host: a directory sysroot with one deployment, copied from a template, and the boot loader's view.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::repo::{OsCommit, run_ostree};
use crate::scratch::Scratch;

/// Name of the stateroot.
pub const STATEROOT: &str = "testos";
/// Kernel arguments of the first deployment: updates must keep them.
pub const KERNEL_ARGUMENTS: [&str; 4] = ["root=LABEL=sysroot", "rw", "console=ttyS0", "quiet"];

/// A sysroot with one deployment, to be copied for each host.
pub struct Template {
    path: PathBuf,
    /// What is deployed.
    pub commit: OsCommit,
    /// Whether the tree has no programs of its own and needs the machine's `/usr` below it.
    pub needs_machine_usr: bool,
    _scratch: Option<Scratch>,
}

impl Template {
    /// Deploys a commit of a synthetic tree.
    pub fn synthetic(repo: &Path, commit: &OsCommit) -> Result<Self> {
        let scratch = Scratch::new("template")?;
        let path = scratch.path().join("sysroot");
        deploy(repo, commit, &path)?;
        Ok(Self { path, commit: commit.clone(), needs_machine_usr: true, _scratch: Some(scratch) })
    }

    /// Uses a sysroot that was deployed before, with a complete `/usr`.
    pub fn existing(path: &Path, commit: &OsCommit) -> Self {
        Self { path: path.to_owned(), commit: commit.clone(), needs_machine_usr: false, _scratch: None }
    }

    /// Copies it to `to`. File contents that nobody changes in place are shared as hard links.
    pub fn clone_to(&self, to: &Path) -> Result<()> {
        clone_tree(&self.path, to, &|path| {
            if path.starts_with("ostree/repo/objects") {
                return true;
            }
            // ostree/deploy/OS/deploy/CHECKSUM.SERIAL/usr
            let mut parts = path.components().skip(2);
            parts.nth(1).is_some_and(|c| c.as_os_str() == "deploy")
                && parts.nth(1).is_some_and(|c| c.as_os_str() == "usr")
        })
    }
}

/// Makes a sysroot with `commit` deployed.
pub fn deploy(repo: &Path, commit: &OsCommit, sysroot: &Path) -> Result<()> {
    fs::create_dir_all(sysroot)?;
    let path = sysroot.display().to_string();
    let flag = format!("--sysroot={path}");
    let own_repo = format!("--repo={path}/ostree/repo");
    run_ostree(&["admin", "init-fs", "--modern", &path])?;
    run_ostree(&["admin", "os-init", &flag, STATEROOT])?;
    for (key, value) in [("sysroot.bootloader", "none"), ("sysroot.readonly", "true"), ("core.fsync", "false")] {
        run_ostree(&[&own_repo, "config", "set", key, value])?;
    }
    run_ostree(&[&own_repo, "pull-local", &repo.display().to_string(), &commit.checksum])?;
    run_ostree(&[&own_repo, "refs", "--create=os/installed", &commit.checksum])?;
    let os = format!("--os={STATEROOT}");
    let kargs = KERNEL_ARGUMENTS.map(|a| format!("--karg={a}"));
    let mut args = vec!["admin", "deploy", &flag, &os];
    args.extend(kargs.iter().map(String::as_str));
    args.push("os/installed");
    run_ostree(&args)?;
    // What systemd-tmpfiles makes on a real host.
    let var = sysroot.join("ostree/deploy").join(STATEROOT).join("var");
    for dir in ["home", "roothome", "srv", "mnt", "opt", "usrlocal/bin", "lib", "log", "cache", "tmp"] {
        fs::create_dir_all(var.join(dir))?;
    }
    Ok(())
}

/// One entry of the boot menu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// Sorts the menu: the highest is the default.
    pub version: u64,
    /// Kernel command line.
    pub options: String,
    /// The deployment's folder.
    pub deployment: PathBuf,
    /// The commit that it is a checkout of.
    pub commit: String,
    /// Tells deployments of the same commit apart.
    pub serial: u32,
}

/// The boot menu as a loader reads it, the default first.
pub fn boot_entries(sysroot: &Path) -> Result<Vec<BootEntry>> {
    let dir = sysroot.join("boot/loader/entries");
    let mut entries = Vec::new();
    for file in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let path = file?.path();
        if path.extension().is_some_and(|e| e == "conf") {
            entries.push(boot_entry(sysroot, &path)?);
        }
    }
    entries.sort_by_key(|e| std::cmp::Reverse(e.version));
    if entries.is_empty() {
        bail!("no boot entry in {}", dir.display());
    }
    Ok(entries)
}

fn boot_entry(sysroot: &Path, path: &Path) -> Result<BootEntry> {
    let text = fs::read_to_string(path)?;
    let field =
        |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')).map(|v| v.trim().to_owned());
    let options = field("options").ok_or_else(|| anyhow!("{} has no options", path.display()))?;
    let link = options
        .split_whitespace()
        .find_map(|o| o.strip_prefix("ostree="))
        .ok_or_else(|| anyhow!("{} has no ostree= argument", path.display()))?;
    // /boot holds the kernel: a loader would stop here if it were not there.
    for key in ["linux", "initrd"] {
        let file = field(key).unwrap_or_default();
        let file = file.trim_start_matches('/');
        if !sysroot.join(file).exists() && !sysroot.join("boot").join(file).exists() {
            bail!("{}: {key} {file} does not exist", path.display());
        }
    }
    let deployment = fs::canonicalize(sysroot.join(link.trim_start_matches('/')))
        .with_context(|| format!("{}: follow {link}", path.display()))?;
    let name = deployment.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let (commit, serial) = name.split_once('.').ok_or_else(|| anyhow!("{name} is no deployment"))?;
    Ok(BootEntry {
        version: field("version").and_then(|v| v.parse().ok()).unwrap_or(0),
        options,
        commit: commit.to_owned(),
        serial: serial.parse().unwrap_or(0),
        deployment,
    })
}

/// Copies a folder with owners, modes, times of folders left aside. `share` (relative path) chooses hard links.
pub fn clone_tree(from: &Path, to: &Path, share: &dyn Fn(&Path) -> bool) -> Result<()> {
    copy_dir(from, to, Path::new(""), share).with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

fn copy_dir(from: &Path, to: &Path, relative: &Path, share: &dyn Fn(&Path) -> bool) -> io::Result<()> {
    let meta = fs::symlink_metadata(from)?;
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        // What we make is being removed.
        if crate::scratch::interrupted() {
            return Err(io::Error::other("interrupted"));
        }
        let (source, target, path) = (entry.path(), to.join(entry.file_name()), relative.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&source, &target, &path, share)?;
            continue;
        }
        if kind.is_symlink() {
            let meta = entry.metadata()?;
            symlink(fs::read_link(&source)?, &target)?;
            if (meta.uid(), meta.gid()) != (0, 0) {
                lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
            }
        } else if kind.is_file() && !(share(&path) && fs::hard_link(&source, &target).is_ok()) {
            let meta = entry.metadata()?;
            fs::copy(&source, &target)?;
            if (meta.uid(), meta.gid()) != (0, 0) {
                lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
                fs::set_permissions(&target, meta.permissions())?;
            }
            // libostree's checkouts have time 0; a different time would make a file look changed.
            fs::File::options().write(true).open(&target)?.set_modified(meta.modified()?)?;
        }
    }
    if (meta.uid(), meta.gid()) != (0, 0) {
        lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    }
    fs::set_permissions(to, meta.permissions())
}
