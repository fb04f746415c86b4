//! Conditions, after kstatus, so that `kubectl wait`, Argo CD and Flux understand both kinds.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// The condition types of both kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// True when nothing is left to do.
    Ready,
    /// True while work is being done or waited for.
    Progressing,
    /// True when something needs a person.
    Degraded,
    /// True while a maintenance window is open that is long enough for a node; absent without windows (OSImage only).
    WindowOpen,
    /// True while `rollout.paused` stops new starts (OSImage only).
    Paused,
}

impl ConditionType {
    /// As it stands in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            ConditionType::Ready => "Ready",
            ConditionType::Progressing => "Progressing",
            ConditionType::Degraded => "Degraded",
            ConditionType::WindowOpen => "WindowOpen",
            ConditionType::Paused => "Paused",
        }
    }
}

/// A list of conditions, one per type.
pub type Conditions = Vec<Condition>;

/// What a condition says, without the times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// True or false.
    pub holds: bool,
    /// One word for machines; from an enum of ours.
    pub reason: &'a str,
    /// One or two sentences for people.
    pub message: String,
}

/// Sets one condition. The transition time changes only when true turns false or back, as the API
/// conventions ask. Messages longer than the API allows are cut.
pub fn set(
    conditions: &mut Conditions,
    kind: ConditionType,
    verdict: Verdict<'_>,
    generation: Option<i64>,
    now: Timestamp,
) {
    const MAX_MESSAGE: usize = 1024;
    let status = if verdict.holds { "True" } else { "False" };
    let previous = conditions.iter().position(|c| c.type_ == kind.as_str());
    let since = previous
        .and_then(|at| conditions.get(at))
        .filter(|c| c.status == status)
        .map_or(Time(now), |c| c.last_transition_time.clone());
    let condition = Condition {
        type_: kind.as_str().into(),
        status: status.into(),
        reason: verdict.reason.into(),
        message: bounded(&verdict.message, MAX_MESSAGE),
        observed_generation: generation,
        last_transition_time: since,
    };
    match previous.and_then(|at| conditions.get_mut(at)) {
        Some(slot) => *slot = condition,
        None => conditions.push(condition),
    }
}

/// Whether a condition of this type is true.
pub fn is_true(conditions: &[Condition], kind: ConditionType) -> bool {
    find(conditions, kind).is_some_and(|c| c.status == "True")
}

/// The condition of this type.
pub fn find(conditions: &[Condition], kind: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == kind.as_str())
}

/// Cuts a text to at most `max` bytes at a character border, with an ellipsis where something is missing.
pub fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let mut end = max.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(holds: bool, message: &str) -> Verdict<'static> {
        Verdict { holds, reason: "Because", message: message.into() }
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let mut conditions = vec![];
        set(&mut conditions, ConditionType::Ready, verdict(false, "a"), None, at(1));
        set(&mut conditions, ConditionType::Ready, verdict(false, "b"), None, at(2));
        assert_eq!(find(&conditions, ConditionType::Ready).unwrap().last_transition_time.0, at(1));
        assert_eq!(conditions[0].message, "b");
        set(&mut conditions, ConditionType::Ready, verdict(true, "c"), None, at(3));
        assert_eq!(conditions[0].last_transition_time.0, at(3));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        assert_eq!(bounded("abc", 3), "abc");
        assert_eq!(bounded("ééééé", 7), "éé…");
        assert!(bounded(&"é".repeat(1000), 1024).len() <= 1024);
    }
}
