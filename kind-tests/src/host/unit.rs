//! The part of systemd's unit files that a boot guard or a self test uses.
//!
//! Read: `ConditionPathExists=`, `Type=`, `ExecStartPre=`, `ExecStart=`, `Environment=`, `Restart=`, `RestartSec=`,
//! `RemainAfterExit=`. Everything else (ordering above all) is not looked at.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

const FOLDERS: [&str; 3] = ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system"];
/// systemd's own default.
const RESTART_DELAY: Duration = Duration::from_millis(100);

/// A parsed unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    /// `ExecStartPre=` and `ExecStart=`, in order, split into words.
    pub commands: Vec<Vec<String>>,
    /// `Environment=`.
    pub environment: Vec<(String, String)>,
    /// `Type=oneshot`.
    pub oneshot: bool,
    /// `RemainAfterExit=`.
    pub remain_after_exit: bool,
    /// `Restart=`.
    pub restart: Restart,
    /// `RestartSec=`.
    pub restart_delay: Duration,
    conditions: Vec<String>,
}

/// When a unit is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it ended badly.
    OnFailure,
    /// Always.
    Always,
}

impl Unit {
    /// Names of the units that some target wants and that start with one of `prefixes`.
    pub fn enabled(prefixes: &[String]) -> Vec<String> {
        let mut names = BTreeSet::new();
        for folder in FOLDERS {
            for wants in fs::read_dir(folder).into_iter().flatten().flatten() {
                if !wants.file_name().to_string_lossy().ends_with(".wants") {
                    continue;
                }
                for link in fs::read_dir(wants.path()).into_iter().flatten().flatten() {
                    let name = link.file_name().to_string_lossy().into_owned();
                    if name.ends_with(".service") && prefixes.iter().any(|p| name.starts_with(p.as_str())) {
                        names.insert(name);
                    }
                }
            }
        }
        names.into_iter().collect()
    }

    /// Finds and parses a unit.
    pub fn load(name: &str) -> Result<Self> {
        for folder in FOLDERS {
            if let Ok(text) = fs::read_to_string(Path::new(folder).join(name)) {
                return Ok(Self::parse(&text));
            }
        }
        bail!("no unit file {name}")
    }

    /// Parses a unit file.
    pub fn parse(text: &str) -> Self {
        let mut unit = Self { restart_delay: RESTART_DELAY, ..Self::default() };
        let joined = text.replace("\\\n", " ");
        for line in joined.lines().map(str::trim) {
            let Some((key, value)) = line.split_once('=') else { continue };
            let (key, value) = (key.trim(), value.trim());
            match key {
                "ConditionPathExists" => unit.conditions.push(value.to_owned()),
                "ExecStartPre" | "ExecStart" => {
                    let command = words(value.trim_start_matches(['-', '@', '!', '+', ':']));
                    if !command.is_empty() {
                        unit.commands.push(command);
                    }
                }
                "Environment" => unit.environment.extend(
                    words(value).iter().filter_map(|w| w.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())),
                ),
                "Type" => unit.oneshot = value == "oneshot",
                "RemainAfterExit" => unit.remain_after_exit = matches!(value, "yes" | "true" | "on" | "1"),
                "Restart" => {
                    unit.restart = match value {
                        "always" => Restart::Always,
                        "on-failure" | "on-abnormal" | "on-abort" => Restart::OnFailure,
                        _ => Restart::No,
                    }
                }
                "RestartSec" => unit.restart_delay = seconds(value).unwrap_or(RESTART_DELAY),
                _ => {}
            }
        }
        unit
    }

    /// The first condition that does not hold. `|` makes conditions alternatives, `!` negates.
    pub fn unmet_condition(&self) -> Option<&str> {
        let holds = |condition: &str| {
            let path = condition.trim_start_matches(['|', '!']);
            Path::new(path).exists() != condition.trim_start_matches('|').starts_with('!')
        };
        let (any, all): (Vec<_>, Vec<_>) = self.conditions.iter().map(String::as_str).partition(|c| c.starts_with('|'));
        let unmet = all.into_iter().find(|c| !holds(c));
        unmet.or_else(|| if any.iter().any(|c| holds(c)) { None } else { any.first().copied() })
    }
}

/// Splits a command line as systemd does, as far as quotes go; `%%` and `$$` are escapes.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (q, Some(open)) if q == open => quote = None,
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('\\', _) if chars.peek().is_some_and(|n| matches!(n, '\\' | '"' | '\'' | ' ')) => {
                word.get_or_insert_default().extend(chars.next());
            }
            ('%' | '$', _) if chars.peek() == Some(&c) => {
                chars.next();
                word.get_or_insert_default().push(c);
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

fn seconds(value: &str) -> Option<Duration> {
    let (number, unit) = match value.strip_suffix("ms") {
        Some(n) => (n, 0.001),
        None => match value.strip_suffix("min") {
            Some(n) => (n, 60.0),
            None => (value.strip_suffix('s').unwrap_or(value), 1.0),
        },
    };
    number.trim().parse::<f64>().ok().map(|n| Duration::from_secs_f64((n * unit).max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_unit() {
        let unit = Unit::parse(
            "[Unit]\nConditionPathExists=/etc\nConditionPathExists=!/no/such\n[Service]\nType=simple\n\
             Environment=A=1 \"B=two words\"\nExecStart=/bin/sh -c 'echo \"a b\" %% $$x'\nRestart=on-failure\nRestartSec=500ms\n",
        );
        assert_eq!(unit.commands, [["/bin/sh", "-c", "echo \"a b\" % $x"]]);
        assert_eq!(unit.environment, [("A".into(), "1".into()), ("B".into(), "two words".into())]);
        assert_eq!(unit.restart, Restart::OnFailure);
        assert_eq!(unit.restart_delay, Duration::from_millis(500));
        assert_eq!(unit.unmet_condition(), None);
    }

    #[test]
    fn conditions() {
        for (text, unmet, fact) in [
            ("ConditionPathExists=/no/such", Some("/no/such"), "a missing path"),
            ("ConditionPathExists=|/no/such\nConditionPathExists=|/etc", None, "one of two alternatives holds"),
            ("ConditionPathExists=|/no/such", Some("|/no/such"), "no alternative holds"),
            ("ConditionPathExists=!/etc", Some("!/etc"), "a path that must not be"),
        ] {
            assert_eq!(Unit::parse(text).unmet_condition(), unmet, "{fact}");
        }
    }
}
