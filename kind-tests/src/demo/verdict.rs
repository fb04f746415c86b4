//! What the demo asserts, and the table that it ends with.

use std::time::Duration;

use osimage_crds::nodeos::Outcome;

use super::console::{Console, Line, Paint, span};

/// One rollout, as one node saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experience {
    /// How its attempt on this rollout's commit ended; none when there was none.
    pub outcome: Option<Outcome>,
    /// How often it booted in the course of it.
    pub boots: u32,
    /// How long it was cordoned or not Ready.
    pub down: Duration,
}

/// One node at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Its name.
    pub node: String,
    /// What its host runs.
    pub commit: String,
    /// The version of that.
    pub version: String,
    /// The rollout of the good commit.
    pub good: Experience,
    /// The rollout of the bad one.
    pub bad: Experience,
}

/// Everything that the checks look at.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The nodes.
    pub nodes: Vec<Account>,
    /// The good commit.
    pub good: String,
    /// Nodes that ran the good commit after its rollout, as their hosts say.
    pub on_good_after_first: usize,
    /// What the OSImage said when the second rollout halted.
    pub halted_because: String,
    /// The fewest available replicas that were ever seen.
    pub lowest: usize,
    /// The fewest that the PodDisruptionBudget allows.
    pub least: usize,
    /// Nodes that are still cordoned.
    pub cordoned: Vec<String>,
}

/// One assertion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What should be.
    pub what: String,
    /// What was seen, when it is not.
    pub but: Option<String>,
}

/// All assertions of the demo.
pub fn checks(evidence: &Evidence) -> Vec<Check> {
    let Evidence { nodes, good, on_good_after_first, halted_because, lowest, least, cordoned } = evidence;
    let names = |which: &dyn Fn(&Account) -> bool| {
        nodes.iter().filter(|n| which(n)).map(|n| n.node.as_str()).collect::<Vec<_>>().join(", ")
    };
    let rolled_back = nodes.iter().filter(|n| n.bad.outcome == Some(Outcome::RolledBack)).count();
    let twice = |n: &Account| n.bad.outcome == Some(Outcome::RolledBack) && n.bad.boots != 2;
    let touched =
        |n: &Account| n.bad.outcome != Some(Outcome::RolledBack) && (n.bad.boots > 0 || n.bad.outcome.is_some());
    let strayed = |n: &Account| n.commit != *good;
    let check = |what: String, holds: bool, saw: String| Check { what, but: (!holds).then_some(saw) };
    let none = |what: String, names: String| check(what, names.is_empty(), names.clone());
    vec![
        check(
            format!("the good commit reached all {} nodes", nodes.len()),
            *on_good_after_first == nodes.len(),
            format!("{on_good_after_first} had it"),
        ),
        none(
            "each node rebooted once for it".into(),
            names(&|n| n.good.boots != 1 || n.good.outcome != Some(Outcome::Booted)),
        ),
        check(
            "exactly one node tried the bad commit and rolled back".into(),
            rolled_back == 1,
            format!("{rolled_back} did"),
        ),
        none("it booted twice: into the bad commit, and back".into(), names(&twice)),
        none("no other node rebooted for the bad commit".into(), names(&touched)),
        none("every node runs the good commit now".into(), names(&strayed)),
        check("the halted rollout says why".into(), !halted_because.is_empty(), "no message".into()),
        check(
            format!("the workload never had fewer than {least} replicas available"),
            lowest >= least,
            format!("{lowest} at one time"),
        ),
        check("no node is left cordoned".into(), cordoned.is_empty(), cordoned.join(", ")),
    ]
}

/// The table: one line per node.
pub fn table(nodes: &[Account]) -> Vec<Line> {
    let mut lines = vec![vec![span(
        Paint::Bold,
        format!("{:<8} {:<13} {:<8} {:<20}{:<20}", "NODE", "BOOTED", "VERSION", "GOOD UPDATE", "BAD UPDATE"),
    )]];
    for Account { node, commit, version, good, bad } in nodes {
        lines.push(vec![
            span(Paint::Plain, format!("{node:<8} {:<13} {version:<8} ", commit.get(..12).unwrap_or(commit))),
            cell(good),
            cell(bad),
        ]);
    }
    lines
}

fn cell(experience: &Experience) -> super::console::Span {
    let Experience { outcome, boots: _, down } = experience;
    let seconds = format!("{:>5.1} s", down.as_secs_f64());
    let (paint, word) = match outcome {
        Some(Outcome::Booted) => (Paint::Good, "Booted"),
        Some(outcome) => (Paint::Bad, outcome.as_str()),
        None => (Paint::Dim, "untouched"),
    };
    span(paint, format!("{:<20}", format!("{word:<11}{seconds}")))
}

/// Prints the checks; returns what does not hold.
pub fn print(console: &Console, checks: &[Check]) -> Vec<String> {
    for Check { what, but } in checks {
        match but {
            None => console.more(&format!("{}  {what}", console.paint(Paint::Good, "ok"))),
            Some(saw) => console.more(&format!("{}  {what}: {saw}", console.paint(Paint::Bad, "NO"))),
        }
    }
    checks.iter().filter_map(|c| c.but.as_ref().map(|saw| format!("not so: {}: {saw}", c.what))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experience(outcome: Option<Outcome>, boots: u32) -> Experience {
        Experience { outcome, boots, down: Duration::from_secs(3) }
    }

    fn account(node: &str, bad: Experience) -> Account {
        Account {
            node: node.into(),
            commit: "v2".into(),
            version: "2".into(),
            good: experience(Some(Outcome::Booted), 1),
            bad,
        }
    }

    fn as_planned() -> Evidence {
        Evidence {
            nodes: vec![account("a", experience(Some(Outcome::RolledBack), 2)), account("b", experience(None, 0))],
            good: "v2".into(),
            on_good_after_first: 2,
            halted_because: "RolledBack on node a".into(),
            lowest: 5,
            least: 5,
            cordoned: vec![],
        }
    }

    type Edit = fn(&mut Evidence);

    #[test]
    fn what_goes_wrong_is_named() {
        let failed = |edit: Edit| {
            let mut evidence = as_planned();
            edit(&mut evidence);
            let failed: Vec<String> = checks(&evidence).into_iter().filter_map(|c| c.but).collect();
            failed.join("; ")
        };
        let cases: [(Edit, &str); 9] = [
            (|_| {}, ""),
            (|e| e.on_good_after_first = 1, "1 had it"),
            (|e| e.nodes[1].good.boots = 2, "b"),
            (|e| e.nodes[0].bad = experience(None, 0), "0 did"),
            (|e| e.nodes[0].bad.boots = 4, "a"),
            (|e| e.nodes[1].bad.boots = 1, "b"),
            (|e| e.nodes[1].commit = "v3".into(), "b"),
            (|e| e.lowest = 4, "4 at one time"),
            (|e| e.cordoned = vec!["a".into()], "a"),
        ];
        for (edit, expected) in cases {
            assert_eq!(failed(edit), expected);
        }
    }

    #[test]
    fn the_table_fits_80_columns() {
        for line in table(&as_planned().nodes) {
            let width: usize = line.iter().map(|s| s.text.trim_end().chars().count()).sum();
            assert!(width <= 71, "{width}: {line:?}");
        }
    }
}
