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
    let seen = observe::slots(ctx, seen, &image).await?;
    let mut fleet = match observe::fleet(ctx, seen, image.clone()).await {
        Err(ObserveError::ParseSelector(error)) => {
            return refuse(ctx, &image, &ObserveError::ParseSelector(error)).await;
        }
        observed => observed?,
    };
    let now = Timestamp::now();
    let inspected = rollout::inspect(&fleet, now);
    observe::pods(ctx, &mut fleet, inspected).await?;
    if rollout::asks_gates(&fleet, now) {
        fleet.gates = ctx.gates.ask(&image.spec.rollout.gates).await;
    }

    let now = Timestamp::now();
    let plan = rollout::plan(&fleet, now);

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

#[cfg(test)]
mod tests {
    use http::Method;
    use k8s_openapi::api::core::v1::Node;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        stores::Stores,
        testing::{Exchange, image, on_the_wire_with},
    };

    const IMAGE: &str = "/apis/osimage.dev/v1alpha1/osimages/web";

    fn get(reply: Result<Value, u16>) -> Exchange {
        Exchange::new(Method::GET, IMAGE, Value::Null, reply)
    }

    async fn pass_with(nodes: Vec<Node>, exchanges: Vec<Exchange>) -> Result<Action, ReconcileError> {
        on_the_wire_with(Stores::holding(nodes, vec![]), exchanges, async |ctx| pass("web", &ctx).await).await
    }

    #[tokio::test]
    async fn an_osimage_that_is_gone_asks_for_nothing() {
        assert_eq!(pass_with(vec![], vec![get(Err(404))]).await.unwrap(), Action::await_change());
    }

    /// A node without a NodeOS: its plan is a status that counts it, and a NodeOS to make.
    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"pool": "a"}}})).unwrap()
    }

    fn put_status(reply: Result<Value, u16>) -> Exchange {
        let path = "/apis/osimage.dev/v1alpha1/osimages/web/status?&fieldManager=osimage-operator";
        Exchange::new(Method::PUT, path, Value::Null, reply).any_body()
    }

    #[tokio::test]
    async fn the_status_is_written_before_the_steps_are_carried_out() {
        let object = || Ok(serde_json::to_value(image()).unwrap());
        let path = "/apis/osimage.dev/v1alpha1/nodeoses?&fieldManager=osimage-operator";
        let make = serde_json::to_value(crate::testing::node_os("n1", None)).unwrap();
        let make = Exchange::new(Method::POST, path, Value::Null, Ok(make)).any_body();
        pass_with(vec![node()], vec![get(object()), put_status(object()), make]).await.unwrap();
    }

    #[tokio::test]
    async fn no_step_is_carried_out_when_somebody_else_wrote_the_status() {
        let object = serde_json::to_value(image()).unwrap();
        let outcome = pass_with(vec![node()], vec![get(Ok(object)), put_status(Err(409))]).await;
        assert_eq!(outcome.unwrap_err().class(), Class::Conflict);
    }

    #[tokio::test]
    async fn a_selector_that_cannot_be_understood_touches_no_node() {
        let mut object = serde_json::to_value(image()).unwrap();
        object["spec"]["nodeSelector"] = json!({"matchExpressions": [{"key": "a", "operator": "Like"}]});
        let event = json!({"metadata": {"name": "e"}, "eventTime": null});
        let event =
            Exchange::new(Method::POST, "/apis/events.k8s.io/v1/namespaces/default/events?", Value::Null, Ok(event));
        let exchanges = vec![get(Ok(object.clone())), put_status(Ok(object)), event.any_body()];
        pass_with(vec![node()], exchanges).await.unwrap();
    }
}
