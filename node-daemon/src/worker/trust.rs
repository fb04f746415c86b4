//! Whether a commit is signed by one of the given keys, and bound to the given ref.
//!
//! The download goes through a remote that exists in this file's private folder under /run only: before the permit,
//! nothing of the host's own configuration is touched. The visible remote is written when a deployment is.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use osimage_crds::{Commit, nodeos::ProblemReason};
use ostree::{ObjectType, Repo, RepoRemoteChange, gio, glib};

use super::{
    Outcome, RUN, STATE,
    classify::{Doing, REF_MISMATCH, failure},
    host_error,
    sysroot::NEVER,
};
use crate::protocol::{Failure, Source};

/// Name of the private remote.
pub const PRIVATE_REMOTE: &str = "osimage.pull";

/// The repository of the host, with the private remote for a source.
pub struct Trusted<'a> {
    pub repo: Repo,
    pub source: &'a Source,
    fingerprints: BTreeSet<String>,
}

/// Reads the keys and opens the repository. The sysroot must have been made writable.
pub fn open(source: &Source) -> Outcome<Trusted<'_>> {
    let folder = Path::new(RUN).join("remotes.d");
    make_folder(&folder)?;
    let keys = match &source.gpg_keys {
        Some(keys) => Some(write_keys(keys, &folder.join("keys.asc"))?),
        None => None,
    };
    let fingerprints = match &keys {
        Some(file) => read_fingerprints(file)?,
        None => BTreeSet::new(),
    };
    let config = glib::KeyFile::new();
    let group = format!("remote \"{PRIVATE_REMOTE}\"");
    config.set_string(&group, "url", &source.url);
    for (key, value) in options(keys.as_deref()) {
        config.set_string(&group, key, &value);
    }
    let file = folder.join("pull.conf");
    fs::write(&file, config.to_data().as_bytes()).map_err(|e| host_error("write", &file, e))?;

    let repo: Repo = glib::Object::builder()
        .property("path", gio::File::for_path("/ostree/repo"))
        .property("remotes-config-dir", folder.to_string_lossy().into_owned())
        .build();
    repo.open(NEVER).map_err(|e| failure(Doing::Look, &e))?;
    Ok(Trusted { repo, source, fingerprints })
}

impl Trusted<'_> {
    /// The commit object is there: is it signed as it must be, and bound to the ref?
    pub fn check(&self) -> Outcome<()> {
        self.check_signature()?;
        self.check_binding()
    }

    fn check_signature(&self) -> Outcome<()> {
        if self.source.gpg_keys.is_none() {
            return Ok(());
        }
        let commit = self.source.commit.as_str();
        let result = self
            .repo
            .verify_commit_for_remote(commit, PRIVATE_REMOTE, NEVER)
            .map_err(|e| failure(Doing::Verify, &e))?;
        result.require_valid_signature().map_err(|e| failure(Doing::Verify, &e))?;
        // libostree also trusts the host's global keyring where a remote has none of its own.
        let by_given_key = (0..result.count_all()).any(|i| self.is_ours(&result.all(i)));
        by_given_key.then_some(()).ok_or_else(|| {
            Failure::permanent(
                ProblemReason::SignatureInvalid,
                format!(
                    "commit {} is signed by a key that the host trusts, but by none of \
                     spec.image.ostree.verification.gpg.keys; sign it with one of them, or add the key",
                    self.source.commit.short()
                ),
            )
        })
    }

    /// One signature: valid, and by a given key or a subkey of one.
    fn is_ours(&self, signature: &glib::Variant) -> bool {
        const VALID: usize = 0;
        const FINGERPRINT: usize = 5;
        const PRIMARY_FINGERPRINT: usize = 12;
        let valid = signature.try_child_value(VALID).and_then(|v| v.get::<bool>()).unwrap_or(false);
        let by = |at| {
            signature
                .try_child_value(at)
                .and_then(|v| v.get::<String>())
                .is_some_and(|print| self.fingerprints.contains(&print))
        };
        valid && (by(FINGERPRINT) || by(PRIMARY_FINGERPRINT))
    }

    /// As libostree checks it when a ref is pulled: a commit that names refs must name this one.
    fn check_binding(&self) -> Outcome<()> {
        let Some(wanted) = &self.source.ref_ else { return Ok(()) };
        let commit = self
            .repo
            .load_variant(ObjectType::Commit, self.source.commit.as_str())
            .map_err(|e| failure(Doing::Verify, &e))?;
        let metadata = glib::VariantDict::new(commit.try_child_value(0).as_ref());
        let bound = metadata.lookup::<Vec<String>>("ostree.ref-binding").ok().flatten();
        match bound {
            Some(refs) if !refs.contains(wanted) => {
                let (reason, _, advice) = REF_MISMATCH;
                let refs = if refs.is_empty() { "no ref".to_owned() } else { refs.join(", ") };
                Err(Failure::permanent(
                    reason,
                    format!("commit {} was built for {refs}, not for {wanted}; {advice}", self.source.commit.short()),
                ))
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Makes the remote that the origin of a deployment names visible on the host, in /etc/ostree/remotes.d, so that
/// `ostree admin status` and a person find it.
pub fn publish_remote(repo: &Repo, source: &Source) -> Outcome<()> {
    let keys = match &source.gpg_keys {
        Some(keys) => {
            let folder = Path::new(STATE).join("keys");
            make_folder(&folder)?;
            Some(write_keys(keys, &folder.join(format!("{}.asc", source.remote)))?)
        }
        None => None,
    };
    let wanted = options(keys.as_deref());
    let option = |key: &str| repo.remote_option(&source.remote, key, None).ok().flatten();
    let same = remote_url(repo, &source.remote).is_some_and(|url| url == source.url)
        && wanted.iter().all(|(key, value)| option(key).is_some_and(|v| v == value.as_str()))
        && (keys.is_some() || option("gpgkeypath").is_none());
    if same {
        return Ok(());
    }
    let dict = glib::VariantDict::new(None);
    for (key, value) in &wanted {
        dict.insert(key, value.as_str());
    }
    repo.remote_change(
        None::<&gio::File>,
        RepoRemoteChange::Replace,
        &source.remote,
        Some(&source.url),
        Some(&dict.end()),
        NEVER,
    )
    .map_err(|e| failure(Doing::Stage, &e))
}

/// `None` when there is no such remote.
fn remote_url(repo: &Repo, name: &str) -> Option<String> {
    let known = repo.remote_list().iter().any(|remote| remote == name);
    known.then(|| repo.remote_get_url(name).ok().map(Into::into)).flatten()
}

fn options(keys: Option<&Path>) -> Vec<(&'static str, String)> {
    let verify = keys.is_some().to_string();
    let mut options = vec![("gpg-verify", verify), ("gpg-verify-summary", "false".to_owned())];
    if let Some(file) = keys {
        options.push(("gpgkeypath", file.to_string_lossy().into_owned()));
    }
    options
}

fn make_folder(path: &Path) -> Outcome<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(|e| host_error("create", path, e))
}

fn write_keys(keys: &str, file: &Path) -> Outcome<PathBuf> {
    if fs::read(file).is_ok_and(|old| old == keys.as_bytes()) {
        return Ok(file.to_owned());
    }
    let new = file.with_extension("new");
    fs::write(&new, keys)
        .and_then(|()| fs::File::open(&new)?.sync_all())
        .and_then(|()| fs::rename(&new, file))
        .map_err(|e| host_error("write", file, e))?;
    Ok(file.to_owned())
}

/// The fingerprints of all keys and subkeys in a file.
fn read_fingerprints(file: &Path) -> Outcome<BTreeSet<String>> {
    let home = Path::new(RUN).join("gnupg");
    make_folder(&home)?;
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).map_err(|e| host_error("protect", &home, e))?;
    let output = Command::new("gpg")
        .args(["--batch", "--no-options", "--with-colons", "--show-keys", "--homedir"])
        .arg(&home)
        .arg("--")
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Failure::permanent(
                ProblemReason::HostError,
                format!("cannot run gpg on the host: {e}; install it (gnupg2), libostree verifies with it"),
            )
        })?;
    let found = fingerprints(&String::from_utf8_lossy(&output.stdout));
    if found.is_empty() {
        return Err(Failure::permanent(
            ProblemReason::KeysInvalid,
            format!(
                "spec.image.ostree.verification.gpg.keys holds no key that gpg can read ({}); \
                 paste the output of gpg --export --armor KEY",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        ));
    }
    Ok(found)
}

/// Field 10 of the `fpr` records of gpg's colon format.
fn fingerprints(listing: &str) -> BTreeSet<String> {
    const FIELD: usize = 9;
    listing
        .lines()
        .filter(|line| line.starts_with("fpr:"))
        .filter_map(|line| line.split(':').nth(FIELD))
        .filter(|print| !print.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Removes the commit object that a failed check leaves: nothing refers to it.
pub fn forget(repo: &Repo, commit: &Commit) {
    // It stays unused when this fails, until the next prune.
    let _ = repo.delete_object(ObjectType::Commit, commit.as_str(), NEVER);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_of_keys_and_subkeys_are_found() {
        let listing = "pub:-:256:22:25C28B2B4F1C4EC4:1700000000:::-:::scSC::::::23::0:\n\
                       fpr:::::::::0B9E9E0E8F1C4EC425C28B2B4F1C4EC40B9E9E0E:\n\
                       uid:-::::1700000000::AA::Test <t@example.org>::::::::::0:\n\
                       sub:-:256:18:1:1:::::e::::::23:\n\
                       fpr:::::::::1111111111111111111111111111111111111111:\n\
                       fpr:\n";
        let found = fingerprints(listing);
        assert_eq!(found.len(), 2);
        assert!(found.contains("0B9E9E0E8F1C4EC425C28B2B4F1C4EC40B9E9E0E"));
    }
}
