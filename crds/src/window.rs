//! `Window`: when nodes may be taken down.

use kube::{KubeSchema, core::Rule};
use serde::{Deserialize, Serialize};

use crate::Period;

/// A recurring span of time in which updates of nodes may be started. A node is started only when its worst case
/// (drain, reboot and health deadline) ends inside the window. Windows that overlap or touch count as one.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("duration(self.duration) >= duration('1m') && duration(self.duration) <= duration('168h')").message("duration must be from 1m to 168h (7 days)").field_path(".duration"))]
pub struct Window {
    /// When the window opens, in local time of `timeZone`: the five fields of cron (minute, hour, day of month,
    /// month, day of week), such as `0 22 * * MON-FRI`, or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.
    /// When day of month and day of week are both restricted, a day that matches either of them counts.
    /// With a fixed hour it opens once a day also when clocks change: a time that is skipped counts from before
    /// the change (02:30 is 03:30), one that is repeated counts the first time. With an hour of `*` it opens
    /// whenever the clock shows the time.
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::new(SHAPE).message("schedule must have five fields, separated by spaces: minute, hour, day of month, month, day of week, such as 0 22 * * MON-FRI; or be one of @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually"))]
    #[x_kube(validation = field(0, MINUTE, "field 1 of schedule (minute) must be *, numbers from 0 to 59, ranges or steps, such as 0, 0,30 or */15"))]
    #[x_kube(validation = field(1, HOUR, "field 2 of schedule (hour) must be *, numbers from 0 to 23, ranges or steps, such as 22, 0-4 or */6"))]
    #[x_kube(validation = field(2, DAY, "field 3 of schedule (day of month) must be *, numbers from 1 to 31, ranges or steps, such as 1, 1-7 or 1,15"))]
    #[x_kube(validation = field(3, MONTH, "field 4 of schedule (month) must be *, numbers from 1 to 12, names from JAN to DEC, ranges or steps, such as 1-11 or JAN,JUL"))]
    #[x_kube(validation = field(4, WEEKDAY, "field 5 of schedule (day of week) must be *, numbers from 0 to 7 (0 and 7 are Sunday), names from SUN to SAT, ranges or steps, such as MON-FRI"))]
    pub schedule: String,
    /// How long the window stays open, in elapsed time: from `1m` to `168h`. It is not longer or shorter when
    /// clocks change meanwhile.
    pub duration: Period,
    /// The time zone of `schedule`, by its name in the IANA Time Zone Database, such as `Europe/Berlin`.
    #[serde(default = "utc")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*$') && self != 'Local'").message("timeZone must be a name of the IANA Time Zone Database, such as UTC or Europe/Berlin"))]
    #[x_kube(validation = Rule::new("!self.matches('^[A-Za-z]') || timestamp('2026-01-01T00:00:00Z').getFullYear(self) > 0").message("timeZone must be a name of the IANA Time Zone Database, such as UTC or Europe/Berlin"))]
    pub time_zone: String,
}

fn utc() -> String {
    "UTC".into()
}

const SHAPE: &str =
    "self.matches('^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[^@ ][^ ]*( +[^ ]+){4})$')";
const MINUTE: &str = "[0-5]?[0-9]";
const HOUR: &str = "([01]?[0-9]|2[0-3])";
const DAY: &str = "(0?[1-9]|[12][0-9]|3[01])";
const MONTH: &str = "(0?[1-9]|1[0-2]|JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)";
const WEEKDAY: &str = "([0-7]|SUN|MON|TUE|WED|THU|FRI|SAT)";

/// The rule of one field of a schedule. It says nothing of a schedule that has not got five fields: another does.
/// What it cannot see, as ranges that go down or 30 February, the planner reports.
fn field(position: usize, value: &str, message: &str) -> Rule {
    let item = format!("([*](/[1-9][0-9]?)?|{value}(-{value}(/[1-9][0-9]?)?)?)");
    let before = format!("([^ ]+ +){{{position}}}");
    let rule = format!(
        "self.startsWith('@') || !self.matches('^[^ ]+( +[^ ]+){{4}}$') || self.matches('(?i)^{before}{item}(,{item})*( |$)')"
    );
    Rule::new(&rule).message(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_zone_is_utc_unless_said() {
        let window: Window = serde_json::from_str(r#"{"schedule": "0 2 * * *", "duration": "4h"}"#).unwrap();
        assert_eq!(window.time_zone, "UTC");
    }
}
