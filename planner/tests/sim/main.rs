//! A deterministic simulator: both halves of the planner drive made-up nodes through made-up faults, and the
//! invariants of the protocol are checked after every single write and every single act on a host.
//!
//! A seed decides everything. `make sim` runs many, `SIM_SEEDS=1000 SIM_FIRST=1 cargo test -p osimage-planner --test sim`
//! as many as asked; a failing seed prints its trace, and `SIM_FIRST=<seed> SIM_SEEDS=1` with the name of the test
//! plays it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods)]

mod api;
mod host;
mod mutant;
mod world;

use mutant::Mutant;
use world::{Faults, World};

/// Seeds of each kind of fault, where nothing else is asked.
const SEEDS: u64 = 50;
/// Of so many seeds, one is run with a large fleet as well.
const LARGE_EVERY: u64 = 40;

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str, or: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let first = number("SIM_FIRST", 1);
    first..first + number("SIM_SEEDS", SEEDS)
}

/// Runs seeds, prints what they found, and the trace of the first violation.
fn run_these(name: &str, seeds: impl Iterator<Item = u64>, faults: fn(u64) -> Faults) {
    let (mut steps, mut runs, mut violations) = (0, 0, vec![]);
    for seed in seeds {
        let mut world = World::new(seed, faults(seed));
        if let Err(violation) = world.run() {
            if violations.is_empty() {
                println!("{name}: seed {seed}: {violation}\n{}", world.trace());
            }
            violations.push((seed, violation.lines().next().unwrap_or_default().to_owned()));
        }
        steps += world.steps();
        runs += 1;
    }
    println!("{name}: {steps} steps, {runs} seeds, {} violations", violations.len());
    assert!(violations.is_empty(), "{name}: {violations:#?}");
}

fn run(name: &str, faults: fn(u64) -> Faults) {
    run_these(name, seeds(), faults);
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
        outages: true,
        clock_jumps: true,
        churn: true,
        nodes: (1, 6),
        bad_commit: seed.is_multiple_of(4),
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
    run("hosts", |seed| Faults {
        boot_faults: true,
        stale: true,
        bad_commit: seed.is_multiple_of(3),
        ..Faults::none()
    });
}

#[test]
fn everything_at_once_breaks_nothing() {
    run("everything", everything);
}

#[test]
fn outages_clock_jumps_and_nodes_that_come_and_go_break_nothing() {
    run("outages", |seed| Faults {
        operators: 1 + seed as usize % 2,
        outages: true,
        clock_jumps: true,
        churn: true,
        ..Faults::none()
    });
}

#[test]
fn a_large_fleet_breaks_nothing() {
    let seeds = seeds().filter(|seed| seed % LARGE_EVERY == 1);
    run_these("large fleet", seeds, |seed| Faults { nodes: (50, 200), ..everything(seed) });
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
