//! A deterministic simulator: both halves of the planner drive made-up nodes through made-up faults, and the
//! invariants of the protocol are checked after every single write and every single act on a host.
//!
//! A seed decides everything. `SIM_SEEDS=10000 SIM_FIRST=1 cargo test -p osimage-planner --test sim` runs more;
//! a failing seed prints its trace, and `SIM_FIRST=<seed> SIM_SEEDS=1` plays it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods)]

mod api;
mod host;
mod mutant;
mod world;

use mutant::Mutant;
use world::{Faults, World};

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str, or: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let first = number("SIM_FIRST", 1);
    first..first + number("SIM_SEEDS", 300)
}

/// Runs every seed; on the first violation prints the trace of that seed and fails.
fn run(name: &str, faults: fn(u64) -> Faults) {
    let (mut steps, mut runs) = (0, 0);
    for seed in seeds() {
        let mut world = World::new(seed, faults(seed));
        if let Err(violation) = world.run() {
            panic!("{name}: seed {seed}: {violation}\n{}", world.trace());
        }
        steps += world.steps();
        runs += 1;
    }
    println!("{name}: {steps} steps, {runs} seeds, 0 violations");
}

/// Every kind of fault.
fn everything(seed: u64) -> Faults {
    Faults {
        operators: 1 + seed as usize % 2,
        crashes: true,
        stale: true,
        lost_writes: true,
        boot_faults: true,
        partitions: true,
        edits: true,
        bad_commit: seed % 4 == 0,
        broken: None,
    }
}

#[test]
fn a_good_commit_reaches_every_node_without_faults() {
    run("good commit", |_| Faults::none());
}

#[test]
fn a_bad_commit_costs_one_node_and_goes_no_further() {
    run("bad commit", |_| Faults { bad_commit: true, ..Faults::none() });
}

#[test]
fn crashes_lost_writes_and_stale_caches_break_nothing() {
    run("crashes", |_| Faults { crashes: true, stale: true, lost_writes: true, ..Faults::none() });
}

#[test]
fn two_operators_at_once_break_nothing() {
    run("two operators", |_| Faults { operators: 2, crashes: true, stale: true, lost_writes: true, ..Faults::none() });
}

#[test]
fn hosts_that_fall_back_hang_or_fall_silent_break_nothing() {
    run("hosts", |seed| Faults { boot_faults: true, stale: true, bad_commit: seed % 3 == 0, ..Faults::none() });
}

#[test]
fn everything_at_once_breaks_nothing() {
    run("everything", everything);
}

/// The first seed in which a broken rule violates this invariant.
fn found(broken: Mutant, invariant: &str) -> Option<(u64, String)> {
    const BUDGET: u64 = 300;
    (1..=BUDGET).find_map(|seed| {
        let mut world = World::new(seed, Faults { broken: Some(broken), ..everything(seed) });
        let violation = world.run().err().filter(|v| v.starts_with(invariant))?;
        Some((seed, violation.lines().next().unwrap_or_default().to_owned()))
    })
}

#[test]
fn rules_broken_on_purpose_are_found_and_named() {
    for (broken, invariant) in [
        (Mutant::BudgetForgetsOthers, "budget: "),
        (Mutant::BudgetOffByOne, "budget: "),
        (Mutant::PermitForAnyBoot, "permit: "),
        (Mutant::EveryCordonIsOurs, "cordon: "),
        (Mutant::NoTopology, "topology: "),
        (Mutant::NoSoak, "waves: "),
    ] {
        let (seed, line) = found(broken, invariant).unwrap_or_else(|| panic!("{broken:?} was not found"));
        println!("{broken:?}: found by seed {seed}: {line}");
    }
}
