//! Finds the programs of the bed, and says in one line what to do when one is missing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

/// The folder with kube-apiserver, kube-controller-manager, kube-scheduler, kubectl and etcd.
///
/// `OSIMAGE_TOOLS`, else `KUBEBUILDER_ASSETS`, else what `tools/build.sh` builds (once; minutes).
pub fn kubernetes() -> Result<PathBuf> {
    static FOUND: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    FOUND.get_or_init(|| find_kubernetes().map_err(|e| format!("{e:#}"))).clone().map_err(|e| anyhow!(e))
}

fn find_kubernetes() -> Result<PathBuf> {
    for variable in ["OSIMAGE_TOOLS", "KUBEBUILDER_ASSETS"] {
        if let Some(dir) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
            let dir = PathBuf::from(dir);
            if dir.join("kube-apiserver").is_file() {
                return Ok(dir);
            }
            bail!("{variable}={} holds no kube-apiserver", dir.display());
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/build.sh");
    let out = Command::new(&script)
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("run {}", script.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    match text.lines().last() {
        Some(dir) if out.status.success() => Ok(PathBuf::from(dir)),
        _ => bail!("{} failed ({}): run `make setup`", script.display(), out.status),
    }
}

/// One of our own programs: from `OSIMAGE_BIN_DIR`, else from the folder cargo built this test into.
pub fn shipped(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("OSIMAGE_BIN_DIR").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => profile_dir()?,
    };
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is missing: build it with `cargo build --workspace --bins`, or set OSIMAGE_BIN_DIR", path.display());
    }
    path.canonicalize().with_context(|| format!("resolve {}", path.display()))
}

fn profile_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("find the running program")?;
    let dir = exe.parent().ok_or_else(|| anyhow!("{} has no folder", exe.display()))?;
    let is_inner = dir.file_name().is_some_and(|n| n == "deps" || n == "examples");
    let profile = if is_inner { dir.parent().unwrap_or(dir) } else { dir };
    Ok(profile.to_owned())
}

/// The test bed's own helper program (init of the fake hosts). Always from where cargo built us.
pub fn helper() -> Result<PathBuf> {
    let path = profile_dir()?.join("testbed");
    if path.is_file() { Ok(path) } else { shipped("testbed") }
}

/// Checks what a fake booted host needs, and names what is missing and why.
pub fn require_host_support() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a fake booted host makes mount and PID namespaces: run as root");
    }
    for program in ["ostree", "gpg", "setpriv", "unshare", "nsenter"] {
        if !on_path(program) {
            bail!("`{program}` is not installed: run `make setup` (kind-tests/packages.txt lists the packages)");
        }
    }
    crate::process::run("unshare", &["--mount", "--pid", "--fork", "true"])
        .context("this machine does not let root make mount and PID namespaces (a container needs CAP_SYS_ADMIN)")?;
    Ok(())
}

/// Whether a missing requirement may skip a test: only when somebody said so.
pub fn may_skip() -> bool {
    std::env::var_os("OSIMAGE_TEST_ALLOW_SKIP").is_some_and(|v| v == "1")
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
