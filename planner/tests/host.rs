//! The host's half, row by row: what a host that looks like this does next.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use osimage_crds::{
    AttemptId, Commit, NodeOSSpec, Period,
    nodeos::{AttemptState, CheckStatus, NodePhase, OSImageRef, Outcome, Permit, Problem, ProblemReason},
    osimage::{Health, Image, OSTreeImage, Verification, whole_seconds},
};
use osimage_planner::host::{
    GuardResult, HostDeployment, HostPlan, HostState, HostStep, Record, Stage, Trouble, Wanted, plan,
};

fn commit(digit: char) -> Commit {
    digit.to_string().repeat(64).parse().unwrap()
}

fn old() -> Commit {
    commit('1')
}

fn new() -> Commit {
    commit('2')
}

fn deployment(commit: Commit, booted: bool) -> HostDeployment {
    HostDeployment { commit, serial: 0, booted, staged: false, pinned: false }
}

/// A host that runs the old commit, holds nothing, and has no history.
fn host() -> HostState {
    HostState {
        boot_id: "boot-1".into(),
        unsupported: None,
        unreadable: None,
        armed: None,
        trial_boots: 0,
        deployments: vec![deployment(old(), true)],
        held: vec![],
        record: None,
        guard: None,
        since_boot: Duration::from_secs(1000),
        checks: vec![],
        healthy_for: None,
        trouble: None,
    }
}

fn health() -> Health {
    Health { deadline: Period::seconds(20), soak: Period::seconds(3), checks: vec![] }
}

fn spec() -> NodeOSSpec {
    let verification = Verification { gpg: None, insecure_skip: Some(true) };
    let ostree = OSTreeImage { url: "http://repo".into(), remote: None, ref_: None, commit: new(), verification };
    NodeOSSpec {
        os_image: OSImageRef { name: "fleet".into(), uid: "uid".into() },
        image: Some(Image { ostree }),
        may_pull: true,
        health: health(),
        permit: None,
        retry: None,
        released: None,
    }
}

fn permit() -> Permit {
    let time = whole_seconds(k8s_openapi::jiff::Timestamp::UNIX_EPOCH);
    Permit {
        attempt: AttemptId("a-1".into()),
        commit: new(),
        boot_id: "boot-1".into(),
        issued: time.clone(),
        expires: time,
        acknowledged: false,
    }
}

fn permitted() -> NodeOSSpec {
    NodeOSSpec { permit: Some(permit()), ..spec() }
}

fn record() -> Record {
    let attempt = AttemptId("a-1".into());
    Record {
        attempt,
        commit: new(),
        previous: old(),
        boot_id: "boot-1".into(),
        health: health(),
        stage: Stage::Underway,
    }
}

/// The host after its reboot: the new deployment runs on trial, the old one is kept.
fn trial() -> HostState {
    HostState {
        boot_id: "boot-2".into(),
        deployments: vec![deployment(new(), true), HostDeployment { pinned: true, ..deployment(old(), false) }],
        held: vec![new()],
        record: Some(record()),
        since_boot: Duration::from_secs(5),
        ..host()
    }
}

/// The host after its reboot, on the old deployment.
fn back() -> HostState {
    HostState { deployments: vec![deployment(new(), false), deployment(old(), true)], ..trial() }
}

fn decide(state: &HostState, spec: &NodeOSSpec) -> HostPlan {
    plan(state, Wanted::Spec(spec))
}

fn finished(plan: &HostPlan) -> Outcome {
    match &plan.step {
        Some(HostStep::Close(record) | HostStep::Confirm(record)) => match &record.stage {
            Stage::Finished { outcome, .. } => *outcome,
            stage => panic!("{stage:?}"),
        },
        step => panic!("{step:?}"),
    }
}

// ---- before the permit ----

#[test]
fn downloads_when_it_may_and_not_before() {
    assert!(matches!(decide(&host(), &spec()).step, Some(HostStep::Pull(_))));
    let waits = decide(&host(), &NodeOSSpec { may_pull: false, ..spec() });
    assert_eq!((waits.step, waits.report.phase), (None, NodePhase::Waiting));
}

#[test]
fn what_it_holds_it_reports_and_stages_nothing() {
    let plan = decide(&HostState { held: vec![new()], ..host() }, &spec());
    assert_eq!((plan.step, plan.report.phase, plan.report.pulled), (None, NodePhase::Pulled, Some(new())));
}

#[test]
fn what_nobody_wants_is_dropped() {
    let holds = HostState { held: vec![new()], ..host() };
    let drop = Some(HostStep::Release { keep: vec![] });
    assert_eq!(plan(&holds, Wanted::Nothing).step, drop, "the NodeOS is gone");
    assert_eq!(decide(&holds, &NodeOSSpec { image: None, ..spec() }).step, drop, "the image is gone");
    assert_eq!(plan(&holds, Wanted::Unknown).step, None, "the API server has not answered");
    let two = HostState { held: vec![new(), commit('3')], ..host() };
    assert_eq!(decide(&two, &spec()).step, Some(HostStep::Release { keep: vec![new()] }));
}

#[test]
fn a_host_that_must_not_be_touched_does_nothing_and_says_why() {
    let state = HostState { unsupported: Some("layered packages: vim".into()), held: vec![new()], ..host() };
    let plan = decide(&state, &permitted());
    assert_eq!(plan.step, None);
    assert_eq!(plan.report.problem.unwrap().reason, ProblemReason::UnsupportedHost);
    let unbooted = HostState { deployments: vec![], ..host() };
    assert_eq!(decide(&unbooted, &permitted()).report.problem.unwrap().reason, ProblemReason::UnsupportedHost);
}

#[test]
fn a_failed_download_is_tried_again_when_that_may_help() {
    let trouble = |retry_in: Option<Duration>| {
        let problem =
            Problem { reason: ProblemReason::RepoUnreachable, message: "down".into(), retrying: retry_in.is_some() };
        HostState { trouble: Some(Trouble { commit: new(), problem, retry_in }), ..host() }
    };
    let later = decide(&trouble(Some(Duration::from_secs(9))), &spec());
    assert_eq!((later.step, later.wake), (None, Some(Duration::from_secs(9))));
    assert_eq!(later.report.problem.unwrap().message, "down");
    assert!(matches!(decide(&trouble(Some(Duration::ZERO)), &spec()).step, Some(HostStep::Pull(_))));
    let never = decide(&trouble(None), &spec());
    assert_eq!((never.step, never.wake, never.report.phase), (None, None, NodePhase::Failed));
}

// ---- the permit ----

#[test]
fn a_permit_leads_through_arm_and_stage_to_the_reboot() {
    let holds = HostState { held: vec![new()], ..host() };
    assert_eq!(decide(&holds, &permitted()).step, Some(HostStep::Arm(Box::new(record()))));
    let armed = HostState { record: Some(record()), ..holds };
    assert!(matches!(decide(&armed, &permitted()).step, Some(HostStep::Stage(_))));
    let rotten = HostState { held: vec![], ..armed.clone() };
    assert!(matches!(decide(&rotten, &permitted()).step, Some(HostStep::Pull(_))), "what is lost is downloaded again");
    let staged = HostDeployment { staged: true, ..deployment(new(), false) };
    let staged = HostState { deployments: vec![staged, deployment(old(), true)], ..armed };
    let plan = decide(&staged, &permitted());
    assert_eq!((plan.step, plan.report.attempt.unwrap().state), (Some(HostStep::Reboot), AttemptState::Armed));
}

#[test]
fn a_permit_that_does_not_fit_is_refused_and_reported() {
    let holds = HostState { held: vec![new()], ..host() };
    let other_boot = Permit { boot_id: "boot-0".into(), ..permit() };
    let other_commit = Permit { commit: commit('3'), ..permit() };
    for bad in [other_boot, other_commit] {
        let plan = decide(&holds, &NodeOSSpec { permit: Some(bad), ..spec() });
        assert_eq!(plan.step, None);
        assert_eq!(plan.report.problem.unwrap().reason, ProblemReason::PermitRefused);
    }
}

#[test]
fn a_permit_is_good_once() {
    let used = Record { stage: Stage::Finished { outcome: Outcome::RolledBack, message: "m".into() }, ..record() };
    let state = HostState { held: vec![new()], record: Some(used), ..host() };
    let plan = decide(&state, &permitted());
    assert_eq!((plan.step, plan.report.phase), (None, NodePhase::Failed));
    assert_eq!(plan.report.attempt.unwrap().outcome, Some(Outcome::RolledBack));
}

#[test]
fn a_withdrawn_permit_undoes_what_was_prepared() {
    let armed = HostState { held: vec![new()], record: Some(record()), ..host() };
    assert_eq!(finished(&decide(&armed, &spec())), Outcome::NeverRebooted);
    assert_eq!(finished(&plan(&armed, Wanted::Nothing)), Outcome::NeverRebooted);
    assert_eq!(plan(&armed, Wanted::Unknown).step, None, "without the API server the host does not go down either");
}

// ---- the trial ----

#[test]
fn on_trial_it_waits_for_health_then_for_the_acknowledgement() {
    let waits = decide(&trial(), &permitted());
    assert_eq!((waits.step, waits.report.phase), (None, NodePhase::Verifying));
    let healthy = HostState { healthy_for: Some(Duration::from_secs(3)), ..trial() };
    let ready = decide(&healthy, &permitted());
    assert_eq!((ready.step, ready.report.attempt.unwrap().state), (None, AttemptState::Healthy));
    let acknowledged = NodeOSSpec { permit: Some(Permit { acknowledged: true, ..permit() }), ..spec() };
    assert_eq!(finished(&decide(&healthy, &acknowledged)), Outcome::Booted);
}

#[test]
fn at_the_deadline_it_goes_back_whether_or_not_the_api_server_answers() {
    let failing = CheckStatus { name: "web".into(), passing: false, message: "exit code 1".into() };
    let late = HostState { since_boot: Duration::from_secs(20), checks: vec![failing], ..trial() };
    for wanted in [Wanted::Unknown, Wanted::Nothing, Wanted::Spec(&permitted())] {
        let plan = plan(&late, wanted);
        let Some(HostStep::RollBack(record)) = plan.step else { panic!("{:?}", plan.step) };
        assert!(matches!(&record.stage, Stage::RollingBack { boot_id, .. } if boot_id == "boot-2"));
        assert!(plan.report.message.contains("web: exit code 1"), "{}", plan.report.message);
    }
    let healthy = HostState { healthy_for: Some(Duration::from_secs(9)), checks: vec![], ..late };
    let plan = plan(&healthy, Wanted::Unknown);
    assert!(plan.report.message.contains("not acknowledged"), "{}", plan.report.message);
}

#[test]
fn it_goes_back_at_most_once_per_attempt() {
    let stage = Stage::RollingBack { boot_id: "boot-2".into(), message: "bad".into() };
    let rolling = HostState { record: Some(Record { stage, ..record() }), ..trial() };
    assert!(
        matches!(decide(&rolling, &spec()).step, Some(HostStep::RollBack(_))),
        "the default is not yet the old one"
    );
    let swapped = HostState { deployments: vec![deployment(old(), false), deployment(new(), true)], ..rolling.clone() };
    assert_eq!(decide(&swapped, &spec()).step, Some(HostStep::Reboot));
    let cut_off = HostState { boot_id: "boot-3".into(), ..rolling.clone() };
    assert!(matches!(decide(&cut_off, &spec()).step, Some(HostStep::RollBack(_))), "told, but never done");
    let again = HostState { boot_id: "boot-3".into(), ..swapped.clone() };
    let stuck = decide(&again, &spec());
    assert_eq!((stuck.step, stuck.report.problem.unwrap().reason), (None, ProblemReason::RollbackFailed));
    let returned = HostState { boot_id: "boot-3".into(), deployments: back().deployments, ..swapped };
    assert_eq!(finished(&decide(&returned, &spec())), Outcome::RolledBack);
}

#[test]
fn a_host_that_the_guard_sent_back_in_vain_is_not_tried_a_second_time() {
    let guard = Some(GuardResult { attempt: AttemptId("a-1".into()), rolled_back: true, message: "late".into() });
    let plan = decide(&HostState { guard, ..trial() }, &permitted());
    assert_eq!((plan.step, plan.report.problem.unwrap().reason), (None, ProblemReason::RollbackFailed));
}

#[test]
fn with_nothing_to_go_back_to_it_stays_up_and_says_so() {
    let alone =
        HostState { deployments: vec![deployment(new(), true)], since_boot: Duration::from_secs(99), ..trial() };
    let plan = decide(&alone, &permitted());
    assert_eq!((plan.step, plan.report.problem.unwrap().reason), (None, ProblemReason::RollbackFailed));
}

#[test]
fn a_system_that_falls_over_again_and_again_is_left_for_good() {
    let third = HostState { trial_boots: 3, ..trial() };
    assert!(matches!(decide(&third, &permitted()).step, Some(HostStep::RollBack(_))));
    let second = HostState { trial_boots: 2, ..trial() };
    assert_eq!(decide(&second, &permitted()).step, None);
    let acknowledged = NodeOSSpec { permit: Some(Permit { acknowledged: true, ..permit() }), ..spec() };
    assert_eq!(finished(&decide(&third, &acknowledged)), Outcome::Booted);
}

#[test]
fn a_record_that_cannot_be_written_does_not_keep_the_host_from_going_back() {
    let swapped = vec![deployment(old(), false), deployment(new(), true)];
    let full = HostState { since_boot: Duration::from_secs(99), deployments: swapped, ..trial() };
    assert_eq!(decide(&full, &permitted()).step, Some(HostStep::Reboot));
}

#[test]
fn a_guard_that_was_armed_for_nothing_is_disarmed() {
    let armed = HostState { armed: Some(AttemptId("a-0".into())), held: vec![new()], ..host() };
    assert_eq!(decide(&armed, &spec()).step, Some(HostStep::Disarm));
    assert_eq!(decide(&armed, &permitted()).step, Some(HostStep::Disarm), "it is for another attempt");
    let own = HostState { armed: Some(AttemptId("a-1".into())), ..armed };
    assert!(matches!(decide(&own, &permitted()).step, Some(HostStep::Arm(_))), "arming goes on after a crash");
    assert_eq!(plan(&own, Wanted::Unknown).step, None);
}

#[test]
fn a_host_that_cannot_be_read_now_is_not_called_unsupported() {
    let state = HostState { unreadable: Some("timed out".into()), record: Some(record()), ..host() };
    let problem = decide(&state, &permitted()).report.problem.unwrap();
    assert_eq!((problem.reason, problem.retrying), (ProblemReason::HostError, true));
}

// ---- back without being told ----

#[test]
fn how_it_came_back_is_told_apart() {
    let guard = |rolled_back| {
        Some(GuardResult { attempt: AttemptId("a-1".into()), rolled_back, message: "no confirmation".into() })
    };
    let rows = [
        ("the new deployment is there, but was not booted", back(), Outcome::FellBack),
        ("the guard found it so", HostState { guard: guard(false), ..back() }, Outcome::FellBack),
        ("the guard went back", HostState { guard: guard(true), ..back() }, Outcome::RolledBack),
        (
            "the shutdown did not finish",
            HostState { deployments: vec![deployment(old(), true)], ..back() },
            Outcome::NotFinalized,
        ),
    ];
    for (fact, state, outcome) in rows {
        assert_eq!(finished(&decide(&state, &permitted())), outcome, "{fact}");
    }
    let stale = GuardResult { attempt: AttemptId("a-0".into()), rolled_back: true, message: String::new() };
    let state = HostState { guard: Some(stale), ..back() };
    assert_eq!(finished(&decide(&state, &permitted())), Outcome::FellBack, "a result of another attempt says nothing");
}
