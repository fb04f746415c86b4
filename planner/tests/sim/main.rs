//! A deterministic simulator: both halves of the planner drive made-up nodes through made-up faults, and the
//! invariants of the protocol are checked after every single write and every single act on a host.
//!
//! A seed decides everything. `SIM_SEEDS=10000 SIM_FIRST=1 cargo test -p osimage-planner --test sim` runs more;
//! a failing seed prints its trace, and `SIM_FIRST=<seed> SIM_SEEDS=1` plays it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods)]

mod api;
mod host;
mod world;

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
    run("everything", |seed| Faults {
        operators: 1 + seed as usize % 2,
        crashes: true,
        stale: true,
        lost_writes: true,
        boot_faults: true,
        partitions: true,
        edits: true,
        bad_commit: seed % 4 == 0,
    });
}
