//! `rollout.windows`: a node is started only when its worst case ends inside a maintenance window.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::whole;
use crate::{
    fleet::Fleet,
    plan::{Hold, HoldReason},
    window::{Verdict, Windows},
};

/// How long a node may take at its worst: from its cordon until it is verified or back.
pub fn worst_case(fleet: &Fleet) -> Duration {
    let spec = &fleet.image.spec;
    let drain = if spec.drain.skip { Duration::ZERO } else { spec.drain.timeout.get() };
    drain.saturating_add(spec.reboot.timeout.get()).saturating_add(spec.health.deadline.get())
}

/// Holds every start while no window is open that is long enough. With the hold: when that changes by itself.
pub fn check(fleet: &Fleet, now: Timestamp) -> Option<(Hold, Option<Timestamp>)> {
    let worst = worst_case(fleet);
    let invalid = |message: String| Some((whole(HoldReason::InvalidSpec, format!("spec.{message}")), None));
    let windows = match Windows::parse(&fleet.image.spec.rollout.windows) {
        Ok(windows) => windows,
        Err(error) => return invalid(error.to_string()),
    };
    let takes =
        format!("a node may take {} s (drain.timeout, reboot.timeout and health.deadline together)", worst.as_secs());
    match windows.fits(now, worst) {
        Verdict::Fits => None,
        Verdict::Waits { until } => {
            let message = format!("waits for the maintenance window of {until}: {takes}, and nodes in flight finish");
            Some((whole(HoldReason::WindowClosed, message), Some(until)))
        }
        Verdict::NeverFits { longest } => invalid(format!(
            "rollout.windows: {takes}, and no window is longer than {} s: lengthen a window or shorten the timeouts",
            longest.as_secs()
        )),
    }
}
