//! Carries out the steps of a plan, in order, until one fails. Each step is one write (or one round of
//! evictions) and can be repeated.
//!
//! Every write is conditional on the version of the object that it was decided on:
//! an operator that acts on an old view, because its cache is behind, because it was paused, or because another
//! one leads by now, is refused by the API server. That is the safety argument, so there is no forced
//! server-side apply here: it would let the stale one win.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::reflector::ObjectRef,
};
use osimage_crds::{NodeOS, OSImage, names};
use osimage_planner::{
    Step,
    plan::{Change, PodRef},
};
use serde_json::json;
use tracing::debug;

use crate::{context::Context, error::ExecuteError, evict};

/// What was done, for events and logs. A step that found everything as it shall be does nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Deed {
    Cordoned { node: String },
    Uncordoned { node: String },
    Evicted { node: String, pods: Vec<PodRef> },
    Deleted { node: String, pods: Vec<PodRef> },
    Changed { node: String, change: Change, commit: Option<String> },
    Made { node: String },
    Removed { node: String },
    Held,
    LetGo,
}

/// Carries out the steps until one fails or the lease is lost.
pub async fn steps(ctx: &Context, image: &OSImage, steps: &[Step]) -> (Vec<Deed>, Result<(), ExecuteError>) {
    let mut deeds = Vec::new();
    for step in steps {
        if !ctx.leads() {
            break;
        }
        match carry_out(ctx, image, step, &mut deeds).await {
            Ok(()) => {}
            Err(error) => return (deeds, Err(error)),
        }
    }
    (deeds, Ok(()))
}

async fn carry_out(ctx: &Context, image: &OSImage, step: &Step, deeds: &mut Vec<Deed>) -> Result<(), ExecuteError> {
    let deed = match step {
        Step::AddFinalizer => finalizer(ctx, image, true).await?,
        Step::RemoveFinalizer => finalizer(ctx, image, false).await?,
        Step::CreateNodeOS(object) => create(ctx, object).await?,
        Step::UpdateNodeOS { object, change } => replace(ctx, object, *change).await?,
        Step::DeleteNodeOS(object) => delete(ctx, object).await?,
        Step::Cordon { node, owner, annotate, resource_version } => {
            cordon(ctx, node, owner, annotate, resource_version).await?
        }
        Step::Uncordon { node, remove, resource_version } => uncordon(ctx, node, remove, resource_version).await?,
        Step::Delete { node, pods, grace_period_seconds } => {
            delete_pods(ctx, node, pods, *grace_period_seconds).await?
        }
        Step::Evict { node, pods, grace_period_seconds } => {
            let round = evict::round(&ctx.client, pods, *grace_period_seconds).await;
            for (uid, refusal) in evict::answers(&round) {
                ctx.refusals.note(&image.name_any(), uid, refusal.map(Into::into));
            }
            if !round.evicted.is_empty() {
                deeds.push(Deed::Evicted { node: node.clone(), pods: round.evicted });
            }
            return round.failed.map_or(Ok(()), Err);
        }
    };
    if let Some(deed) = deed {
        debug!(osimage = image.name_any(), ?deed, "done");
        deeds.push(deed);
    }
    Ok(())
}

fn post() -> PostParams {
    PostParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PostParams::default() }
}

fn patch() -> PatchParams {
    PatchParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PatchParams::default() }
}

async fn finalizer(ctx: &Context, image: &OSImage, wanted: bool) -> Result<Option<Deed>, ExecuteError> {
    let mut finalizers: Vec<&str> = image.finalizers().iter().map(String::as_str).collect();
    finalizers.retain(|f| *f != names::FINALIZER);
    if wanted {
        finalizers.push(names::FINALIZER);
    }
    let body = json!({"metadata": {"resourceVersion": image.resource_version(), "finalizers": finalizers}});
    let api: Api<OSImage> = Api::all(ctx.client.clone());
    match api.patch_metadata(&image.name_any(), &patch(), &Patch::Merge(body)).await {
        Ok(_) => Ok(Some(if wanted { Deed::Held } else { Deed::LetGo })),
        Err(kube::Error::Api(status)) if status.is_not_found() && !wanted => Ok(None),
        Err(error) => Err(ExecuteError::PatchFinalizer(error)),
    }
}

async fn create(ctx: &Context, object: &NodeOS) -> Result<Option<Deed>, ExecuteError> {
    let node = object.name_any();
    let api: Api<NodeOS> = Api::all(ctx.client.clone());
    match api.create(&post(), object).await {
        Ok(_) => Ok(Some(Deed::Made { node })),
        Err(source) => Err(match unreadable(ctx, &node) {
            Some(why) => ExecuteError::NodeOSUnreadable { node, why },
            None => ExecuteError::CreateNodeOS { node, source },
        }),
    }
}

/// Why a NodeOS that exists cannot be read: one made by another version of the operator, for instance.
fn unreadable(ctx: &Context, node: &str) -> Option<String> {
    let found = ctx.stores.node_oses.get(&ObjectRef::new(node))?;
    found.0.as_ref().err().map(|invalid| invalid.error.clone())
}

/// A PUT with the resourceVersion inside the object: the whole spec is the operator's, and the server refuses it
/// if anybody, the daemon with a report included, has written since it was read. So a permit can only ever be
/// given on the strength of the latest report. The status is a subresource and stays as it is.
async fn replace(ctx: &Context, object: &NodeOS, change: Change) -> Result<Option<Deed>, ExecuteError> {
    let node = object.name_any();
    if object.resource_version().is_none() {
        return Err(ExecuteError::VersionMissing);
    }
    let api: Api<NodeOS> = Api::all(ctx.client.clone());
    match api.replace(&node, &post(), object).await {
        Ok(written) => {
            let commit = written.spec.permit.map(|permit| permit.commit.short().to_owned());
            Ok(Some(Deed::Changed { node, change, commit }))
        }
        Err(source) => Err(ExecuteError::ReplaceNodeOS { node, source }),
    }
}

async fn delete(ctx: &Context, object: &NodeOS) -> Result<Option<Deed>, ExecuteError> {
    let node = object.name_any();
    let unchanged = Preconditions { uid: object.uid(), resource_version: object.resource_version() };
    let params = DeleteParams::default().preconditions(unchanged);
    let api: Api<NodeOS> = Api::all(ctx.client.clone());
    match api.delete(&node, &params).await {
        Ok(_) => Ok(Some(Deed::Removed { node })),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
        Err(source) => Err(ExecuteError::DeleteNodeOS { node, source }),
    }
}

/// Cordons and signs in one write: a cordon without a signature would never be taken away, a signature without a
/// cordon would take away somebody else's.
async fn cordon(
    ctx: &Context,
    name: &str,
    owner: &str,
    annotate: &BTreeSet<String>,
    version: &str,
) -> Result<Option<Deed>, ExecuteError> {
    let mut annotations: BTreeMap<&str, String> = annotate.iter().map(|a| (a.as_str(), "true".to_owned())).collect();
    annotations.insert(names::CORDONED_BY, owner.to_owned());
    annotations.insert(names::ADDED, annotate.iter().cloned().collect::<Vec<_>>().join(","));
    let body = json!({
        "metadata": {"resourceVersion": version, "annotations": annotations},
        "spec": {"unschedulable": true},
    });
    match write(ctx, name, &body).await {
        Ok(()) => Ok(Some(Deed::Cordoned { node: name.to_owned() })),
        Err(source) => Err(ExecuteError::CordonNode { node: name.to_owned(), source }),
    }
}

/// Takes away cordon and signature in one write. The planner has seen our signature at this version.
async fn uncordon(
    ctx: &Context,
    name: &str,
    remove: &BTreeSet<String>,
    version: &str,
) -> Result<Option<Deed>, ExecuteError> {
    let ours = [names::CORDONED_BY, names::ADDED].into_iter().chain(remove.iter().map(String::as_str));
    let annotations: BTreeMap<&str, Option<&str>> = ours.map(|name| (name, None)).collect();
    let body = json!({
        "metadata": {"resourceVersion": version, "annotations": annotations},
        "spec": {"unschedulable": null},
    });
    match write(ctx, name, &body).await {
        Ok(()) => Ok(Some(Deed::Uncordoned { node: name.to_owned() })),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
        Err(source) => Err(ExecuteError::UncordonNode { node: name.to_owned(), source }),
    }
}

/// Deletes what was not evicted in time. Only ever by `drain.onTimeout: Force`.
async fn delete_pods(
    ctx: &Context,
    node: &str,
    pods: &[PodRef],
    grace_period_seconds: Option<i64>,
) -> Result<Option<Deed>, ExecuteError> {
    for pod in pods {
        let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &pod.namespace);
        let params = DeleteParams {
            grace_period_seconds: grace_period_seconds.and_then(|s| u32::try_from(s).ok()),
            ..DeleteParams::default()
                .preconditions(Preconditions { uid: Some(pod.uid.clone()), resource_version: None })
        };
        match api.delete(&pod.name, &params).await {
            Ok(_) => {}
            // Gone, or another pod has its name by now.
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {}
            Err(source) => {
                let pod = format!("{}/{}", pod.namespace, pod.name);
                return Err(ExecuteError::DeletePod { pod, source });
            }
        }
    }
    Ok(Some(Deed::Deleted { node: node.to_owned(), pods: pods.to_vec() }))
}

async fn write(ctx: &Context, name: &str, body: &serde_json::Value) -> Result<(), kube::Error> {
    let api: Api<Node> = Api::all(ctx.client.clone());
    api.patch(name, &patch(), &Patch::Merge(body)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use http::Method;
    use osimage_planner::Step;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        error::{Class, ReconcileError},
        testing::{Exchange, image, node_os, on_the_wire},
    };

    const VERSION: &str = "41";

    /// Carries out one step against a server that expects one request; tells how it went.
    async fn wire(step: Step, expected: Exchange) -> (Vec<Deed>, Option<Class>) {
        let image = image();
        let (deeds, outcome) =
            on_the_wire(vec![expected], async move |ctx| steps(&ctx, &image, std::slice::from_ref(&step)).await).await;
        (deeds, outcome.err().map(|error| ReconcileError::from(error).class()))
    }

    fn cordon() -> Step {
        let annotate = BTreeSet::from(["karpenter.sh/do-not-disrupt".to_owned()]);
        Step::Cordon { node: "n1".into(), owner: "web@u1".into(), annotate, resource_version: VERSION.into() }
    }

    fn cordoning() -> Value {
        json!({
            "metadata": {"resourceVersion": VERSION, "annotations": {
                "osimage.dev/cordoned-by": "web@u1",
                "osimage.dev/added-annotations": "karpenter.sh/do-not-disrupt",
                "karpenter.sh/do-not-disrupt": "true",
            }},
            "spec": {"unschedulable": true}
        })
    }

    fn uncordon() -> Step {
        let remove = BTreeSet::from(["karpenter.sh/do-not-disrupt".to_owned()]);
        Step::Uncordon { node: "n1".into(), remove, resource_version: VERSION.into() }
    }

    fn node(replies: Result<Value, u16>, patch: Value) -> Exchange {
        Exchange::new(Method::PATCH, "/api/v1/nodes/n1?&fieldManager=osimage-operator", patch, replies)
    }

    #[tokio::test]
    async fn cordon_and_signature_are_one_write_on_the_version_that_was_seen() {
        let patch = cordoning();
        let done = (vec![Deed::Cordoned { node: "n1".into() }], None);
        assert_eq!(wire(cordon(), node(Ok(json!({"metadata": {}})), patch.clone())).await, done);
        assert_eq!(wire(cordon(), node(Err(409), patch.clone())).await, (vec![], Some(Class::Conflict)));
        assert_eq!(wire(cordon(), node(Err(404), patch)).await, (vec![], Some(Class::Conflict)), "a node that is gone");
    }

    #[tokio::test]
    async fn uncordon_takes_both_away_in_one_write_on_the_version_that_was_seen() {
        let patch = json!({
            "metadata": {"resourceVersion": VERSION, "annotations": {
                "osimage.dev/cordoned-by": null,
                "osimage.dev/added-annotations": null,
                "karpenter.sh/do-not-disrupt": null,
            }},
            "spec": {"unschedulable": null}
        });
        let done = (vec![Deed::Uncordoned { node: "n1".into() }], None);
        assert_eq!(wire(uncordon(), node(Ok(json!({"metadata": {}})), patch.clone())).await, done);
        assert_eq!(wire(uncordon(), node(Err(409), patch.clone())).await, (vec![], Some(Class::Conflict)));
        assert_eq!(wire(uncordon(), node(Err(404), patch)).await, (vec![], None), "nothing is left to give back");
    }

    #[tokio::test]
    async fn a_nodeos_is_replaced_only_at_the_version_that_was_seen() {
        let object = node_os("n1", Some(VERSION));
        let body = serde_json::to_value(&object).unwrap();
        assert_eq!(body["metadata"]["resourceVersion"], VERSION);
        let path = "/apis/osimage.dev/v1alpha1/nodeoses/n1?&fieldManager=osimage-operator";
        let put = |reply| Exchange::new(Method::PUT, path, body.clone(), reply);
        let step = |object: &NodeOS| Step::UpdateNodeOS { object: Box::new(object.clone()), change: Change::Withdraw };
        let done = Deed::Changed { node: "n1".into(), change: Change::Withdraw, commit: None };
        assert_eq!(wire(step(&object), put(Ok(body.clone()))).await, (vec![done], None));
        assert_eq!(wire(step(&object), put(Err(409))).await, (vec![], Some(Class::Conflict)));
        let (deeds, outcome) =
            on_the_wire(vec![], async move |ctx| steps(&ctx, &image(), &[step(&node_os("n1", None))]).await).await;
        assert!(deeds.is_empty() && matches!(outcome, Err(ExecuteError::VersionMissing)), "never without a version");
    }

    #[tokio::test]
    async fn a_nodeos_is_deleted_only_as_it_was_seen() {
        let body = json!({"preconditions": {"uid": "uid-n1", "resourceVersion": VERSION}});
        let delete =
            |reply| Exchange::new(Method::DELETE, "/apis/osimage.dev/v1alpha1/nodeoses/n1?", body.clone(), reply);
        let step = || Step::DeleteNodeOS(Box::new(node_os("n1", Some(VERSION))));
        let success = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
        assert_eq!(wire(step(), delete(Ok(success))).await, (vec![Deed::Removed { node: "n1".into() }], None));
        assert_eq!(wire(step(), delete(Err(409))).await, (vec![], Some(Class::Conflict)));
        assert_eq!(wire(step(), delete(Err(404))).await, (vec![], None));
    }

    #[tokio::test]
    async fn the_finalizer_is_changed_at_the_version_that_was_seen_and_others_stay() {
        let path = "/apis/osimage.dev/v1alpha1/osimages/web?&fieldManager=osimage-operator";
        let patch = |finalizers: Value| json!({"metadata": {"resourceVersion": "7", "finalizers": finalizers}});
        let reply = || Ok(serde_json::to_value(image()).unwrap());
        let add = Exchange::new(Method::PATCH, path, patch(json!(["other/one", "osimage.dev/unwind"])), reply());
        assert_eq!(wire(Step::AddFinalizer, add).await, (vec![Deed::Held], None));
        let remove = Exchange::new(Method::PATCH, path, patch(json!(["other/one"])), reply());
        assert_eq!(wire(Step::RemoveFinalizer, remove).await, (vec![Deed::LetGo], None));
    }

    #[tokio::test]
    async fn nothing_follows_a_step_that_failed() {
        let first = node(Err(409), cordoning());
        let (deeds, outcome) =
            on_the_wire(vec![first], async move |ctx| steps(&ctx, &image(), &[cordon(), uncordon()]).await).await;
        assert!(deeds.is_empty() && outcome.is_err());
    }
}
