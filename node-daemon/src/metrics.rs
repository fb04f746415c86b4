//! What the daemon counts. Labels are names from enums; the registry is its own.

use osimage_crds::nodeos::{NodePhase, ProblemReason};
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::execute::step_name;
use osimage_planner::host::HostStep;

const PHASES: [NodePhase; 10] = [
    NodePhase::Idle,
    NodePhase::Waiting,
    NodePhase::Pulling,
    NodePhase::Pulled,
    NodePhase::Staging,
    NodePhase::Rebooting,
    NodePhase::Verifying,
    NodePhase::Healthy,
    NodePhase::RollingBack,
    NodePhase::Failed,
];

/// All metrics of a daemon.
#[derive(Clone)]
pub struct Metrics {
    pub registry: Registry,
    phase: IntGaugeVec,
    pulled_bytes: IntCounter,
    steps: IntCounterVec,
    failures: IntCounterVec,
    status_writes: IntCounter,
}

impl Metrics {
    pub fn new() -> prometheus::Result<Metrics> {
        let registry = Registry::new();
        let metrics = Metrics {
            phase: IntGaugeVec::new(Opts::new("osimage_host_phase", "1 for the phase the host is in."), &["phase"])?,
            pulled_bytes: IntCounter::new("osimage_host_pulled_bytes_total", "Bytes of OS images downloaded.")?,
            steps: IntCounterVec::new(
                Opts::new("osimage_host_steps_total", "Steps carried out on the host."),
                &["step", "outcome"],
            )?,
            failures: IntCounterVec::new(
                Opts::new("osimage_host_failures_total", "Steps that failed, by reason."),
                &["reason"],
            )?,
            status_writes: IntCounter::new("osimage_host_status_writes_total", "Writes of NodeOS.status.")?,
            registry,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.phase.clone()))?;
        registry.register(Box::new(metrics.pulled_bytes.clone()))?;
        registry.register(Box::new(metrics.steps.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        registry.register(Box::new(metrics.status_writes.clone()))?;
        Ok(metrics)
    }

    pub fn phase(&self, now: NodePhase) {
        for phase in PHASES {
            self.phase.with_label_values(&[phase.as_str()]).set(i64::from(phase == now));
        }
    }

    pub fn step(&self, step: &HostStep, failed: Option<ProblemReason>) {
        self.count(step_name(step), failed);
    }

    pub fn pulled(&self, bytes: u64, failed: Option<ProblemReason>) {
        self.pulled_bytes.inc_by(bytes);
        self.count("Pull", failed);
    }

    pub fn status_written(&self) {
        self.status_writes.inc();
    }

    fn count(&self, step: &str, failed: Option<ProblemReason>) {
        let outcome = if failed.is_some() { "failed" } else { "done" };
        self.steps.with_label_values(&[step, outcome]).inc();
        if let Some(reason) = failed {
            self.failures.with_label_values(&[reason.as_str()]).inc();
        }
    }
}
