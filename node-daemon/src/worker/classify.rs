//! From an error of libostree to a reason, and to what a person should do.
//!
//! The domain is looked at first, then the words: the codes of IO errors differ between versions of the library.

use osimage_crds::nodeos::ProblemReason;
use ostree::glib;

use crate::protocol::Failure;

/// What was being done when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Look,
    Lock,
    FetchCommit,
    FetchContent,
    Verify,
    Hold,
    Stage,
    SetDefault,
    Pin,
    Clean,
}

impl Doing {
    fn as_str(self) -> &'static str {
        match self {
            Doing::Look => "cannot read the system's deployments",
            Doing::Lock => "cannot lock the system",
            Doing::FetchCommit => "cannot download the commit",
            Doing::FetchContent => "cannot download the content of the commit",
            Doing::Verify => "cannot verify the commit",
            Doing::Hold => "cannot hold the commit",
            Doing::Stage => "cannot write the new deployment",
            Doing::SetDefault => "cannot make the deployment the default",
            Doing::Pin => "cannot pin the deployment",
            Doing::Clean => "cannot clean up",
        }
    }
}

/// What an error means.
pub fn failure(doing: Doing, error: &glib::Error) -> Failure {
    let (reason, transient, advice) = classify(doing, error.domain().as_str(), error.message());
    let separator = if advice.is_empty() { "" } else { "; " };
    let message = format!("{}: {}{separator}{advice}", doing.as_str(), error.message().trim());
    Failure { reason, transient, message }
}

/// Whether a failed download is worth another try without static deltas.
pub fn is_delta_error(error: &glib::Error) -> bool {
    let message = error.message().to_lowercase();
    ["delta", "superblock", "bspatch"].iter().any(|word| message.contains(word))
}

type Meaning = (ProblemReason, bool, &'static str);

fn classify(doing: Doing, domain: &str, message: &str) -> Meaning {
    // What a URL contains is the user's, and says nothing.
    let text = message.split(' ').filter(|word| !word.contains("://")).collect::<Vec<_>>().join(" ").to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if domain.to_lowercase().contains("gpg") || has(&["gpg", "no signatures found", "can't check signature"]) {
        return match has(&["failed to execute", "unsupported protocol", "invalid crypto engine", "gpgme engine"]) {
            true => (ProblemReason::HostError, false, "install gpg (gnupg2) on the host"),
            false => (
                ProblemReason::SignatureInvalid,
                false,
                "sign the commit with one of the keys in spec.image.ostree.verification.gpg.keys, or correct the keys",
            ),
        };
    }
    if has(&["ref binding", "ref-binding"]) {
        return REF_MISMATCH;
    }
    if has(&["min-free-space", "no space left", "free space", "disk quota"]) {
        return (ProblemReason::NoSpace, true, "free space on the file system of /sysroot or /boot");
    }
    if has(&["corrupted", "invalid compressed data", "need more input", "not normal form", "invalid checksum"]) {
        return (
            ProblemReason::ObjectCorrupted,
            true,
            "trying again; if it lasts, run `ostree fsck` on the repository",
        );
    }
    let network = domain.contains("resolver")
        || has(&[
            "http ",
            "while fetching",
            "timed out",
            "timeout",
            "connection",
            "couldn't connect",
            "couldn't resolve",
        ])
        || curl_code(&text);
    match doing {
        Doing::FetchCommit if has(&["http 404", "http 410", "no such file", "no such metadata", "no such branch"]) => (
            ProblemReason::CommitNotFound,
            false,
            "check spec.image.ostree.commit and url, and that the repository was published completely",
        ),
        Doing::FetchContent if has(&["http 404", "http 410"]) => (
            ProblemReason::RepoUnreachable,
            true,
            "the repository lacks an object of the commit; publish it completely",
        ),
        Doing::FetchCommit | Doing::FetchContent if network => {
            (ProblemReason::RepoUnreachable, true, "check that nodes reach the URL of the repository")
        }
        Doing::Look | Doing::Lock | Doing::Verify | Doing::Hold | Doing::Pin | Doing::Clean => {
            (ProblemReason::HostError, true, "")
        }
        Doing::FetchCommit | Doing::FetchContent => (ProblemReason::HostError, true, ""),
        Doing::Stage => (ProblemReason::StageFailed, true, ""),
        Doing::SetDefault => (ProblemReason::RollbackFailed, true, ""),
    }
}

pub const REF_MISMATCH: Meaning = (
    ProblemReason::RefMismatch,
    false,
    "name the ref that the commit was built for in spec.image.ostree.ref, or leave ref out",
);

/// libostree passes curl's errors on as `[7] Couldn't connect to server`.
fn curl_code(text: &str) -> bool {
    let inside = |part: &str| part.split_once(']').is_some_and(|(code, _)| code.parse::<u8>().is_ok());
    text.split('[').skip(1).any(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IO: &str = "g-io-error-quark";
    const GPG: &str = "OstreeGpgError";

    /// Messages as captured from libostree 2022.7, 2025.2 and 2026.4.
    #[test]
    fn errors_get_their_reason() {
        use Doing::*;
        use ProblemReason::*;
        let rows: &[(Doing, &str, &str, ProblemReason, bool)] = &[
            (FetchCommit, IO, "Server returned HTTP 404", CommitNotFound, false),
            (
                FetchCommit,
                IO,
                "While fetching http://x/objects/aa/b.commit: Server returned HTTP 404",
                CommitNotFound,
                false,
            ),
            (FetchContent, IO, "Server returned HTTP 404", RepoUnreachable, true),
            (FetchCommit, IO, "Server returned HTTP 403", RepoUnreachable, true),
            (FetchContent, IO, "Server returned HTTP 503", RepoUnreachable, true),
            (
                FetchContent,
                IO,
                "While fetching http://127.0.0.1:1/x: [7] Couldn't connect to server",
                RepoUnreachable,
                true,
            ),
            (FetchCommit, IO, "[6] Couldn't resolve host name", RepoUnreachable, true),
            (FetchContent, IO, "[18] Transferred a partial file", RepoUnreachable, true),
            (FetchContent, IO, "[52] Server returned nothing (no headers, no data)", RepoUnreachable, true),
            (FetchContent, IO, "Corrupted file object; checksum expected='aa' actual='bb'", ObjectCorrupted, true),
            (
                FetchCommit,
                IO,
                "While fetching http://gpg.example.org/corrupted/config: [7] Couldn't connect to server",
                RepoUnreachable,
                true,
            ),
            (FetchContent, IO, "Invalid compressed data", ObjectCorrupted, true),
            (FetchContent, IO, "Need more input", ObjectCorrupted, true),
            (FetchContent, IO, "Invalid checksum for static delta 12-34", ObjectCorrupted, true),
            (
                FetchCommit,
                GPG,
                "Commit 12: Signature made Tue using EDDSA key ID 12\nCan't check signature: public key not found",
                SignatureInvalid,
                false,
            ),
            (
                FetchCommit,
                GPG,
                "GPG verification enabled, but no signatures found (use gpg-verify=false in remote config to disable)",
                SignatureInvalid,
                false,
            ),
            (FetchCommit, IO, "GPG verification enabled, but no signatures found", SignatureInvalid, false),
            (
                FetchContent,
                IO,
                "Commit has no requested ref ‘other’ in ref binding metadata (‘stable’)",
                RefMismatch,
                false,
            ),
            (
                FetchContent,
                IO,
                "Writing content object: min-free-space-percent '3%' would be exceeded, at least 4.1 kB requested",
                NoSpace,
                true,
            ),
            (FetchContent, IO, "Delta requires 309.2 MB free space, but only 62.9 MB available", NoSpace, true),
            (Stage, IO, "Copying /etc: write: No space left on device", NoSpace, true),
            (Stage, IO, "Checking out deployment tree: fchown: Operation not permitted", StageFailed, true),
            (SetDefault, IO, "Remounting /sysroot read-write: Invalid argument", RollbackFailed, true),
            (Lock, IO, "open(/ostree/lock): Read-only file system", HostError, true),
            (FetchCommit, IO, "opening repo: openat(repo): No such file or directory", CommitNotFound, false),
        ];
        for (doing, domain, message, reason, transient) in rows {
            let (got, again, _) = classify(*doing, domain, message);
            assert_eq!((got, again), (*reason, *transient), "{doing:?} {message}");
        }
    }

    #[test]
    fn curl_codes_are_numbers_in_brackets() {
        assert!(curl_code("[56] recv failure"));
        assert!(!curl_code("[origin] refspec"));
        assert!(!curl_code("no brackets"));
    }
}
