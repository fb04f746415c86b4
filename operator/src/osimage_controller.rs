//! One pass over one OSImage, and what follows an error. Level-triggered: nothing is known here of why a pass
//! runs, and nothing is carried from one to the next.

use std::{sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt, runtime::controller::Action};
use osimage_crds::OSImage;
use osimage_planner::{Fleet, Plan, rollout};
use tracing::{debug, error, info, warn};

use crate::{
    context::Context,
    error::{Class, ObserveError, ReconcileError, chain},
    events, execute, observe, publish,
    stores::Guarded,
};

/// How long a pass may take. It can be cut anywhere: the next one goes on from what it finds.
const PASS_LIMIT: Duration = Duration::from_secs(120);
/// How long to rest when nothing is expected. Every change that matters wakes us; this is for the one we missed.
const RESYNC: Duration = Duration::from_secs(300);
/// After a failure that passes by itself.
const RETRY_SOON: Duration = Duration::from_secs(5);
/// After a failure that does not.
const RETRY_LATE: Duration = Duration::from_secs(60);
/// After a stale view: the watch needs a moment to catch up, and wakes us when it has.
const RETRY_CONFLICT: Duration = Duration::from_millis(500);

/// Observe, decide, reserve, do, tell.
pub async fn reconcile(seen: Arc<Guarded<OSImage>>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    if !ctx.leads() {
        return Ok(Action::await_change());
    }
    let _timer = ctx.metrics.duration.start_timer();
    tokio::time::timeout(PASS_LIMIT, pass(&seen.name_any(), &ctx)).await.unwrap_or(Err(ReconcileError::TookTooLong))
}

async fn pass(name: &str, ctx: &Context) -> Result<Action, ReconcileError> {
    let seen = observe::seen(ctx);
    let Some(image) = observe::image(ctx, name).await? else {
        ctx.metrics.forget(name);
        return Ok(Action::await_change());
    };
    let mut fleet = match observe::fleet(ctx, seen, image.clone()).await {
        Err(ObserveError::ParseSelector(error)) => {
            return refuse(ctx, &image, &ObserveError::ParseSelector(error)).await;
        }
        observed => observed?,
    };
    let inspected = rollout::inspect(&fleet);
    observe::pods(ctx, &mut fleet, inspected).await?;

    let plan = rollout::plan(&fleet, Timestamp::now());

    ctx.metrics.decided(name, &plan);
    let image = publish::status(ctx, &image, &plan.status).await?;
    let (deeds, outcome) = execute::steps(ctx, &image, &plan.steps).await;
    ctx.teller.tell(&image, events::story(&fleet.status(), &plan.status, &deeds)).await;
    outcome?;
    Ok(next(&fleet, &plan))
}

/// When to look again. A new slot book is looked at at once: what comes next depends on it.
fn next(fleet: &Fleet, plan: &Plan) -> Action {
    for hold in &plan.holds {
        debug!(node = hold.node, reason = hold.reason.as_str(), message = hold.message, "waits");
    }
    if plan.status.slots != fleet.status().slots {
        return Action::requeue(Duration::ZERO);
    }
    Action::requeue(plan.wake.map_or(RESYNC, |wake| wake.min(RESYNC)))
}

/// The spec passed admission and still cannot be understood: says so, and touches nothing.
async fn refuse(ctx: &Context, image: &OSImage, error: &ObserveError) -> Result<Action, ReconcileError> {
    let message = chain(error);
    let before = image.status.clone().unwrap_or_default();
    publish::status(ctx, image, &publish::invalid_spec(image, &message, Timestamp::now())).await?;
    ctx.teller.tell(image, events::invalid_spec(&before, &message)).await;
    Ok(Action::requeue(RESYNC))
}

/// What follows an error, by its class.
pub fn error_policy(seen: Arc<Guarded<OSImage>>, failure: &ReconcileError, ctx: Arc<Context>) -> Action {
    let (osimage, class, error) = (seen.name_any(), failure.class(), chain(failure));
    ctx.metrics.failed(class);
    match class {
        Class::Conflict => {
            info!(osimage, error, "somebody else wrote first; looking again");
            Action::requeue(RETRY_CONFLICT)
        }
        Class::Transient => {
            warn!(osimage, error, "trying again soon");
            Action::requeue(RETRY_SOON)
        }
        Class::Invalid => {
            warn!(osimage, error, "cannot be read; waiting for it to be changed");
            Action::requeue(RESYNC)
        }
        Class::Bug => {
            error!(osimage, error, "was refused; check the rights of the operator, and its version against the CRDs");
            Action::requeue(RETRY_LATE)
        }
    }
}
