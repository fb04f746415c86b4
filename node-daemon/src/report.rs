//! From what a host is and what is planned to NodeOS.status. Pure; writing it is `publish`'s.

use k8s_openapi::jiff::Timestamp;
use osimage_crds::{
    ConditionType, Conditions, NodeOSStatus,
    condition::{self, Verdict, bounded},
    nodeos::{Attempt, CheckStatus, Deployment, Host, NodePhase, Problem, Pull},
};
use osimage_planner::host::Report;

use crate::{
    observe::Observation,
    protocol::{DeploymentFacts, Facts},
};

const MAX_MESSAGE: usize = 1024;

/// Everything that the status is made of.
pub struct Sources<'a> {
    pub seen: &'a Observation,
    pub report: Report,
    pub pull: Option<Pull>,
    /// Generation of the spec that the plan was made with.
    pub generation: Option<i64>,
}

/// The status. `conditions` are those that stand in the API: their times are kept while they do not turn.
pub fn status(sources: Sources<'_>, conditions: &Conditions, now: Timestamp) -> NodeOSStatus {
    let Sources { seen, report, pull, generation } = sources;
    let Report { phase, message, problem, pulled, attempt } = report;
    let problem = problem.or_else(|| seen.stale.as_ref().map(|failure| failure.problem()));
    let problem = problem.map(|p| Problem { message: bounded(&p.message, MAX_MESSAGE), ..p });
    let attempt = attempt.map(|a| Attempt { message: bounded(&a.message, MAX_MESSAGE), ..a });
    let mut status = NodeOSStatus {
        observed_generation: generation,
        conditions: conditions.clone(),
        phase: Some(phase),
        message: bounded(&message, MAX_MESSAGE),
        boot_id: Some(seen.state.boot_id.clone()).filter(|id| !id.is_empty()),
        booted: find(&seen.facts, |d| d.booted),
        staged: find(&seen.facts, |d| d.staged),
        rollback: find(&seen.facts, |d| !d.booted && !d.staged),
        pulled,
        pull,
        problem,
        checks: seen.state.checks.iter().map(check).collect(),
        last_attempt: attempt,
        host: Some(Host { os: seen.os.clone(), ostree_version: seen.facts.ostree_version.clone() }),
    };
    set_conditions(&mut status, phase, now);
    status
}

fn set_conditions(status: &mut NodeOSStatus, phase: NodePhase, now: Timestamp) {
    let problem = status.problem.as_ref();
    let degraded = problem.is_some() || phase == NodePhase::Failed;
    let why = problem.map_or(status.message.as_str(), |p| p.message.as_str());
    let verdicts = [
        (ConditionType::Ready, phase == NodePhase::Idle && !degraded, phase.as_str(), status.message.clone()),
        (ConditionType::Progressing, progressing(phase), phase.as_str(), status.message.clone()),
        (
            ConditionType::Degraded,
            degraded,
            match (problem, &status.last_attempt) {
                (Some(problem), _) => problem.reason.as_str(),
                (None, Some(Attempt { outcome: Some(outcome), .. })) if degraded => outcome.as_str(),
                (None, _) if degraded => phase.as_str(),
                (None, _) => "AsExpected",
            },
            if degraded { why.to_owned() } else { String::new() },
        ),
    ];
    for (kind, holds, reason, message) in verdicts {
        let verdict = Verdict { holds, reason, message };
        condition::set(&mut status.conditions, kind, verdict, status.observed_generation, now);
    }
}

/// Whether something is being done or waited for.
fn progressing(phase: NodePhase) -> bool {
    match phase {
        NodePhase::Idle | NodePhase::Failed => false,
        NodePhase::Waiting
        | NodePhase::Pulling
        | NodePhase::Pulled
        | NodePhase::Staging
        | NodePhase::Rebooting
        | NodePhase::Verifying
        | NodePhase::Healthy
        | NodePhase::RollingBack => true,
    }
}

fn find(facts: &Facts, which: impl Fn(&DeploymentFacts) -> bool) -> Option<Deployment> {
    let DeploymentFacts { commit, version, pinned, .. } = facts.deployments.iter().find(|d| which(d))?;
    Some(Deployment { commit: commit.clone(), version: version.clone(), pinned: *pinned })
}

fn check(check: &CheckStatus) -> CheckStatus {
    CheckStatus { message: bounded(&check.message, MAX_MESSAGE), ..check.clone() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use osimage_crds::nodeos::ProblemReason;
    use osimage_planner::host::HostState;

    use super::*;

    fn seen() -> Observation {
        let deployment = |letter: &str, booted| DeploymentFacts {
            commit: letter.repeat(64).parse().unwrap(),
            serial: 0,
            booted,
            staged: false,
            pinned: booted,
            version: Some(format!("v{letter}")),
        };
        Observation {
            state: HostState {
                unreadable: None,
                armed: None,
                trial_boots: 0,
                boot_id: "boot".into(),
                unsupported: None,
                deployments: vec![],
                held: vec![],
                record: None,
                guard: None,
                since_boot: Duration::ZERO,
                checks: vec![],
                healthy_for: None,
                trouble: None,
            },
            facts: Facts {
                deployments: vec![deployment("a", true), deployment("b", false)],
                ostree_version: "2022.7".into(),
                ..Facts::default()
            },
            os: "Test OS".into(),
            stale: None,
        }
    }

    fn report(phase: NodePhase, problem: Option<Problem>) -> Report {
        Report { phase, message: "m".into(), problem, pulled: None, attempt: None }
    }

    fn told(report: Report, conditions: &Conditions, second: i64) -> NodeOSStatus {
        let sources = Sources { seen: &seen(), report, pull: None, generation: Some(3) };
        status(sources, conditions, Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn the_same_said_later_is_the_same() {
        let first = told(report(NodePhase::Idle, None), &vec![], 1);
        let again = told(report(NodePhase::Idle, None), &first.conditions, 2);
        assert_eq!(first, again);
        assert_eq!(first.booted.unwrap().version.as_deref(), Some("va"));
        assert_eq!(first.rollback.unwrap().version.as_deref(), Some("vb"));
    }

    #[test]
    fn conditions_follow_phase_and_problem() {
        let problem = || Problem { reason: ProblemReason::NoSpace, message: "full".into(), retrying: true };
        let rows = [
            (NodePhase::Idle, None, "True", "False", "AsExpected"),
            (NodePhase::Idle, Some(problem()), "False", "False", "NoSpace"),
            (NodePhase::Pulling, None, "False", "True", "AsExpected"),
            (NodePhase::Pulling, Some(problem()), "False", "True", "NoSpace"),
            (NodePhase::Failed, None, "False", "False", "Failed"),
        ];
        for (phase, problem, ready, progressing, degraded) in rows {
            let status = told(report(phase, problem), &vec![], 1);
            let get = |kind| condition::find(&status.conditions, kind).unwrap();
            assert_eq!(get(ConditionType::Ready).status, ready, "{phase:?}");
            assert_eq!(get(ConditionType::Progressing).status, progressing, "{phase:?}");
            assert_eq!(get(ConditionType::Degraded).reason, degraded, "{phase:?}");
            assert_eq!(get(ConditionType::Degraded).status == "True", degraded != "AsExpected");
        }
    }
}
