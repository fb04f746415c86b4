//! Writes the status of an OSImage, if it has changed, on condition that the OSImage is still as it was read.
//!
//! The status holds the slot book, so this write is what reserves the disruption budget: it comes before every
//! step that relies on it, and of two operators that plan on the same book only one can write.

use k8s_openapi::jiff::Timestamp;
use kube::{Api, ResourceExt, api::PostParams};
use osimage_crds::{
    ConditionType, OSImage, OSImageStatus,
    condition::{self, Verdict},
    names,
    osimage::whole_seconds,
};

use crate::{context::Context, error::PublishError};

/// Reason of `Degraded` when the spec cannot be understood.
const INVALID_SPEC: &str = "InvalidSpec";

/// Writes the status unless it is as it was read. Returns the OSImage as it then is, with its version.
pub async fn status(ctx: &Context, image: &OSImage, status: &OSImageStatus) -> Result<OSImage, PublishError> {
    if image.status.clone().unwrap_or_default() == *status {
        return Ok(image.clone());
    }
    let api: Api<OSImage> = Api::all(ctx.client.clone());
    // Its resourceVersion is the one it was read at: the server refuses the write if anybody wrote since.
    let object = OSImage { status: Some(status.clone()), ..image.clone() };
    let params = PostParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PostParams::default() };
    api.replace_status(&image.name_any(), &params, &object).await.map_err(PublishError::ReplaceStatus)
}

/// The status of an OSImage whose spec cannot be understood. Its slots and its nodes stay as they are.
pub fn invalid_spec(image: &OSImage, message: &str, now: Timestamp) -> OSImageStatus {
    let mut status = image.status.clone().unwrap_or_default();
    let generation = image.metadata.generation;
    status.observed_generation = generation;
    status.message = message.to_owned();
    let now = whole_seconds(now).0;
    for (kind, holds) in
        [(ConditionType::Degraded, true), (ConditionType::Ready, false), (ConditionType::Progressing, false)]
    {
        let verdict = Verdict { holds, reason: INVALID_SPEC, message: message.to_owned() };
        condition::set(&mut status.conditions, kind, verdict, generation, now);
    }
    status
}
