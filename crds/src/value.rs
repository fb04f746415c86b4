//! Values that are checked once, where they enter: inside, a commit is a commit.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use k8s_openapi::jiff::SignedDuration;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// An OSTree commit checksum: 64 lower-case hexadecimal digits (SHA-256 of the commit object).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Commit(String);

impl Commit {
    /// The whole checksum.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, for messages that people read.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

/// What is wrong with a text that was to be a [`Commit`] or a [`Period`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError(String);

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseError {}

impl FromStr for Commit {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Commit::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Commit {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 64 && text.bytes().all(hex) {
            Ok(Commit(text))
        } else {
            Err(ParseError(format!("{text:?} is not an OSTree commit: 64 lower-case hexadecimal digits")))
        }
    }
}

impl From<Commit> for String {
    fn from(commit: Commit) -> String {
        commit.0
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

impl JsonSchema for Commit {
    fn schema_name() -> Cow<'static, str> {
        "Commit".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^[0-9a-f]{64}$"})
    }
}

/// The schema of a [`Commit`] that a person writes: a rule that says what is wrong and where to get it, instead of a
/// pattern. (A pattern is checked first, and would hide the rule. In lists, rules would exceed the API server's budget.)
pub fn written_commit(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 256,
        "x-kubernetes-validations": [{
            "rule": "self.matches('^[0-9a-f]{64}$')",
            "message": "must be an OSTree commit checksum: 64 lower-case hexadecimal digits (see `ostree rev-parse REF`)"
        }]
    })
}

/// Names one attempt to move one node; never used twice. Made by the operator from the UID of the OSImage
/// and a counter in its status.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct AttemptId(pub String);

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A positive span of time, written as in the rest of Kubernetes: `90s`, `10m`, `1h30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Period(Duration);

impl Period {
    /// A span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Period(Duration::from_secs(seconds))
    }

    /// As a standard duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl TryFrom<String> for Period {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        let bad = || ParseError(format!("{text:?} is not a duration like 90s, 10m or 1h30m"));
        let signed: SignedDuration = text.parse().map_err(|_| bad())?;
        Duration::try_from(signed).map(Period).map_err(|_| bad())
    }
}

impl From<Period> for String {
    fn from(period: Period) -> String {
        let seconds = period.0.as_secs();
        let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let millis = period.0.subsec_millis();
        let mut text = String::new();
        for (n, unit) in [(h, "h"), (m, "m"), (s, "s"), (u64::from(millis), "ms")] {
            if n > 0 {
                text.push_str(&format!("{n}{unit}"));
            }
        }
        if text.is_empty() { "0s".into() } else { text }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(*self))
    }
}

impl JsonSchema for Period {
    fn schema_name() -> Cow<'static, str> {
        "Period".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 32,
            "x-kubernetes-validations": [{
                "rule": "self.size() > 0 && self.matches('^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?([0-9]{1,6}ms)?$')",
                "message": "must be a duration like 90s, 10m or 1h30m"
            }]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_64_lower_case_hex_digits_and_nothing_else() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(good.parse::<Commit>().unwrap().as_str(), good);
        for bad in
            ["", "abc", &good[1..], &format!("{good}0"), &good.to_uppercase(), &good.replace('a', "g"), &"é".repeat(32)]
        {
            assert!(bad.parse::<Commit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn periods_read_and_print_as_people_write_them() {
        for (text, seconds, printed) in
            [("90s", 90, "1m30s"), ("10m", 600, "10m"), ("1h30m", 5400, "1h30m"), ("0s", 0, "0s"), ("1h", 3600, "1h")]
        {
            let period = Period::try_from(text.to_owned()).unwrap();
            assert_eq!(period.get().as_secs(), seconds, "{text}");
            assert_eq!(period.to_string(), printed);
        }
        // What admission lets through, in every shape, can be read.
        for text in ["999999h", "1h1m1s1ms", "5ms", "999999s999999ms", "1m999999s"] {
            assert!(Period::try_from(text.to_owned()).is_ok(), "{text}");
        }
        for bad in ["", "ten", "-5m", "5", "m"] {
            assert!(Period::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
