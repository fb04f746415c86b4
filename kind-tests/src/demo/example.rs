//! The files in `examples/demo`, and what the demo fills in: where its repository is, what to run, whom to trust.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const KEY_BEGINS: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const KEY_ENDS: &str = "-----END PGP PUBLIC KEY BLOCK-----";

/// A file of the examples, as a user of the repository names it.
pub fn path(name: &str) -> String {
    format!("examples/demo/{name}")
}

/// Reads one.
pub fn read(name: &str) -> Result<String> {
    let file = full_path(name);
    fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

/// Where it is.
pub fn full_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path(name))
}

/// The OSImage of the examples with another url, commit and key; all other lines stay as they are.
pub fn fill(example: &str, url: &str, commit: &str, key: &str) -> Result<String> {
    let mut lines = Vec::new();
    let mut filled = [false; 3];
    let mut in_key = false;
    for line in example.lines() {
        let text = line.trim_start();
        let indent = &line[..line.len() - text.len()];
        match text {
            KEY_BEGINS => {
                in_key = true;
                filled[2] = true;
                lines.extend(key.trim().lines().map(|l| format!("{indent}{l}").trim_end().to_owned()));
            }
            KEY_ENDS => in_key = false,
            _ if in_key => {}
            _ if text.starts_with("url: http") => {
                filled[0] = true;
                lines.push(format!("{indent}url: {url}"));
            }
            _ if text.starts_with("commit: ") => {
                filled[1] = true;
                lines.push(format!("{indent}commit: {commit}"));
            }
            _ => lines.push(line.to_owned()),
        }
    }
    if filled != [true; 3] {
        bail!("{} has no place for url, commit or key any more", path("osimage.yaml"));
    }
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use osimage_crds::OSImage;

    use super::*;

    #[test]
    fn the_example_is_valid_and_only_three_things_are_filled_in() {
        let example = read("osimage.yaml").unwrap();
        let before: OSImage = serde_saphyr::from_str(&example).unwrap();
        let key = format!("{KEY_BEGINS}\n\nmDME\n=x\n{KEY_ENDS}\n");
        let commit = "ab".repeat(32);
        let filled = fill(&example, "http://127.0.0.1:1", &commit, &key).unwrap();
        let mut after: OSImage = serde_saphyr::from_str(&filled).unwrap();
        let image = after.spec.image.ostree.clone();
        assert_eq!((image.url.as_str(), image.commit.as_str()), ("http://127.0.0.1:1", commit.as_str()));
        assert_eq!(image.verification.gpg.unwrap().keys, key);
        after.spec.image = before.spec.image.clone();
        assert_eq!(after, before);
        assert!(fill("kind: OSImage\n", "u", "c", "k").is_err());
    }
}
