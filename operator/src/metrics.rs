//! What Prometheus is told. Labels come from enums; the only free one is the name of an OSImage, and what is
//! said of an OSImage disappears with it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use osimage_crds::osimage::Counts;
use osimage_planner::Plan;
use prometheus::{
    Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::error::Class;

/// Where a node stands.
#[derive(Clone, Copy)]
enum NodeState {
    Selected,
    Updated,
    Pulled,
    Updating,
    Failed,
    Unavailable,
}

impl NodeState {
    const fn as_str(self) -> &'static str {
        match self {
            NodeState::Selected => "selected",
            NodeState::Updated => "updated",
            NodeState::Pulled => "pulled",
            NodeState::Updating => "updating",
            NodeState::Failed => "failed",
            NodeState::Unavailable => "unavailable",
        }
    }

    fn all(counts: &Counts) -> [(NodeState, i32); 6] {
        let Counts { selected, updated, pulled, updating, failed, unavailable } = counts;
        [
            (NodeState::Selected, *selected),
            (NodeState::Updated, *updated),
            (NodeState::Pulled, *pulled),
            (NodeState::Updating, *updating),
            (NodeState::Failed, *failed),
            (NodeState::Unavailable, *unavailable),
        ]
    }
}

/// The metrics of an operator; clones speak of the same.
#[derive(Clone)]
pub struct Metrics {
    /// How long passes take.
    pub duration: Histogram,
    failures: IntCounterVec,
    leader: IntGauge,
    rollouts: Rollouts,
}

impl Metrics {
    /// Makes and registers them.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let duration = Histogram::with_opts(
            HistogramOpts::new("osimage_reconcile_duration_seconds", "How long a pass over an OSImage takes")
                .buckets(vec![0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0]),
        )?;
        let failures = IntCounterVec::new(
            Opts::new("osimage_reconcile_failures_total", "Passes that ended in an error, by what the error means"),
            &["class"],
        )?;
        for class in Class::ALL {
            failures.with_label_values(&[class.as_str()]);
        }
        let leader = IntGauge::new("osimage_leader", "1 while this operator is the one that acts")?;
        let rollouts = Rollouts::new()?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(failures.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(rollouts.clone()))?;
        Ok(Metrics { duration, failures, leader, rollouts })
    }

    /// A pass ended in an error.
    pub fn failed(&self, class: Class) {
        self.failures.with_label_values(&[class.as_str()]).inc();
    }

    /// Whether this operator is the one that acts. One that does not act says nothing about rollouts.
    pub fn leading(&self, leads: bool) {
        self.leader.set(leads.into());
        if !leads {
            self.rollouts.seen().clear();
        }
    }

    /// A pass decided this about an OSImage.
    pub fn decided(&self, image: &str, plan: &Plan) {
        if self.leader.get() == 0 {
            return; // a pass that was under way when the lease was lost
        }
        let mut holds = BTreeMap::new();
        for hold in &plan.holds {
            *holds.entry(hold.reason.as_str()).or_insert(0) += 1;
        }
        let rollout = Rollout {
            counts: plan.status.counts.clone(),
            slots: plan.status.slots.len(),
            rejected: plan.status.rejected.len(),
            holds,
        };
        self.rollouts.seen().insert(image.to_owned(), rollout);
    }

    /// An OSImage is gone.
    pub fn forget(&self, image: &str) {
        self.rollouts.seen().remove(image);
    }
}

/// What is said of one OSImage.
struct Rollout {
    counts: Counts,
    slots: usize,
    rejected: usize,
    holds: BTreeMap<&'static str, i64>,
}

/// Builds the series of all OSImages when they are asked for, from what is known of them then: so no series
/// outlives its OSImage or its hold.
#[derive(Clone)]
struct Rollouts {
    seen: Arc<Mutex<BTreeMap<String, Rollout>>>,
    descriptions: Arc<Vec<Desc>>,
}

/// One set of series.
struct Series {
    nodes: IntGaugeVec,
    slots: IntGaugeVec,
    holds: IntGaugeVec,
    rejected: IntGaugeVec,
}

impl Series {
    fn new() -> Result<Self, prometheus::Error> {
        Ok(Series {
            nodes: IntGaugeVec::new(
                Opts::new(
                    "osimage_nodes",
                    "Nodes of an OSImage, by where they stand; a node can stand in several states",
                ),
                &["osimage", "state"],
            )?,
            slots: IntGaugeVec::new(
                Opts::new("osimage_slots", "Nodes that may be disrupted now, or are given back"),
                &["osimage"],
            )?,
            holds: IntGaugeVec::new(
                Opts::new("osimage_holds", "Reasons for which nodes or the rollout wait, by reason"),
                &["osimage", "reason"],
            )?,
            rejected: IntGaugeVec::new(
                Opts::new("osimage_rejected_commits", "Commits that failed too often and are not tried again"),
                &["osimage"],
            )?,
        })
    }

    fn all(&self) -> [&IntGaugeVec; 4] {
        let Series { nodes, slots, holds, rejected } = self;
        [nodes, slots, holds, rejected]
    }

    fn fill(&self, image: &str, rollout: &Rollout) {
        let Rollout { counts, slots, rejected, holds } = rollout;
        for (state, count) in NodeState::all(counts) {
            self.nodes.with_label_values(&[image, state.as_str()]).set(count.into());
        }
        self.slots.with_label_values(&[image]).set(i64::try_from(*slots).unwrap_or(i64::MAX));
        self.rejected.with_label_values(&[image]).set(i64::try_from(*rejected).unwrap_or(i64::MAX));
        for (reason, count) in holds {
            self.holds.with_label_values(&[image, reason]).set(*count);
        }
    }
}

impl Rollouts {
    fn new() -> Result<Self, prometheus::Error> {
        let descriptions = Series::new()?.all().iter().flat_map(|gauge| gauge.desc()).cloned().collect();
        Ok(Rollouts { seen: Arc::default(), descriptions: Arc::new(descriptions) })
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Rollout>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Rollouts {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // The same call succeeded when this collector was made.
        let Ok(series) = Series::new() else { return vec![] };
        for (image, rollout) in self.seen().iter() {
            series.fill(image, rollout);
        }
        series.all().iter().flat_map(|gauge| gauge.collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use osimage_crds::OSImageStatus;
    use osimage_planner::{Hold, HoldReason};

    use super::*;

    fn text(registry: &Registry) -> String {
        prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
    }

    fn plan(reasons: &[HoldReason]) -> Plan {
        let hold = |reason: &HoldReason| Hold { node: None, reason: *reason, object: None, message: String::new() };
        let counts = Counts { selected: 5, updated: 2, ..Counts::default() };
        let status = OSImageStatus { counts, ..OSImageStatus::default() };
        Plan { status, steps: vec![], holds: reasons.iter().map(hold).collect(), wake: None }
    }

    #[test]
    fn series_come_and_go_with_what_they_speak_of() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        metrics.leading(true);
        metrics.decided("web", &plan(&[HoldReason::Paused, HoldReason::DrainBlocked, HoldReason::DrainBlocked]));
        let before = text(&registry);
        for line in [
            r#"osimage_nodes{osimage="web",state="selected"} 5"#,
            r#"osimage_nodes{osimage="web",state="failed"} 0"#,
            r#"osimage_holds{osimage="web",reason="DrainBlocked"} 2"#,
            r#"osimage_slots{osimage="web"} 0"#,
            r#"osimage_reconcile_failures_total{class="bug"} 0"#,
            "osimage_leader 1",
        ] {
            assert!(before.contains(line), "{line} is missing from\n{before}");
        }
        metrics.decided("web", &plan(&[]));
        assert!(!text(&registry).contains("osimage_holds{"), "the hold is over");
        metrics.forget("web");
        assert!(!text(&registry).contains("web"), "the OSImage is gone");
        metrics.decided("web", &plan(&[]));
        metrics.leading(false);
        let after = text(&registry);
        assert!(!after.contains("web") && after.contains("osimage_leader 0"), "others speak of it now");
    }
}
