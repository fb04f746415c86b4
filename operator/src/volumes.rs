//! Which volumes are still attached to a node that is being emptied. A node must not go down while a volume is attached
//! that a pod used which has left: elsewhere it could be attached a second time, or not at all.

use std::collections::BTreeSet;

use k8s_openapi::api::{
    core::v1::{PersistentVolume, Pod},
    storage::v1::VolumeAttachment,
};
use kube::{Api, ResourceExt, api::ListParams};

use crate::{context::Context, error::ObserveError};

/// Attachments asked for at once.
const PAGE: u32 = 500;

/// The attachments of all nodes, as `(node, persistent volume)`.
pub async fn attachments(ctx: &Context) -> Result<Vec<(String, String)>, ObserveError> {
    let api: Api<VolumeAttachment> = Api::all(ctx.client.clone());
    let mut params = ListParams::default().limit(PAGE);
    let mut found = Vec::new();
    loop {
        let page = api.list(&params).await.map_err(ObserveError::ListVolumeAttachments)?;
        let attached = page.items.into_iter().filter(|a| a.status.as_ref().is_some_and(|s| s.attached));
        found.extend(attached.filter_map(|a| Some((a.spec.node_name, a.spec.source.persistent_volume_name?))));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

/// Of the volumes attached to a node, those that no pod on it uses: they are about to be detached.
pub async fn leaving(
    ctx: &Context,
    node: &str,
    attachments: &[(String, String)],
    pods: &[Pod],
) -> Result<Vec<String>, ObserveError> {
    let used: BTreeSet<(String, String)> = pods.iter().flat_map(claims).collect();
    let api: Api<PersistentVolume> = Api::all(ctx.client.clone());
    let mut leaving = Vec::new();
    for (_, volume) in attachments.iter().filter(|(on, _)| on == node) {
        let found = api.get_opt(volume).await;
        let found = found.map_err(|source| ObserveError::ReadVolume { volume: volume.clone(), source })?;
        let claim = found.and_then(|v| v.spec?.claim_ref);
        let claim = claim.map(|c| (c.namespace.unwrap_or_default(), c.name.unwrap_or_default()));
        if !claim.is_some_and(|claim| used.contains(&claim)) {
            leaving.push(format!("PersistentVolume {volume}"));
        }
    }
    Ok(leaving)
}

/// The claims that a pod uses, as `(namespace, name)`.
fn claims(pod: &Pod) -> Vec<(String, String)> {
    let namespace = pod.namespace().unwrap_or_default();
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let named =
        volumes.filter_map(|v| v.persistent_volume_claim.as_ref()).map(|c| (namespace.clone(), c.claim_name.clone()));
    // A generic ephemeral volume has a claim named after pod and volume.
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let ephemeral = volumes
        .filter(|v| v.ephemeral.is_some())
        .map(|v| (namespace.clone(), format!("{}-{}", pod.name_any(), v.name)));
    named.chain(ephemeral).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_uses_its_claims_and_those_of_its_ephemeral_volumes() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "db-0", "namespace": "prod"},
            "spec": {"containers": [], "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}},
                {"name": "scratch", "ephemeral": {}},
                {"name": "tmp", "emptyDir": {}},
            ]}
        }))
        .unwrap();
        let expected = [("prod", "data-db-0"), ("prod", "db-0-scratch")];
        assert_eq!(claims(&pod), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
}
