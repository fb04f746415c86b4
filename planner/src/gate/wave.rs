//! `rollout.waves`: which wave a node is in, and whether that wave has begun.

use std::collections::BTreeMap;

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::LabelSelector,
    jiff::{SignedDuration, Timestamp},
};
use kube::core::{Selector, SelectorExt};
use osimage_crds::{
    names::APPROVE_PREFIX,
    osimage::{Approval, Wave, WaveStatus},
};

use super::whole;
use crate::{
    fleet::{Fleet, NodeView},
    plan::{Hold, HoldReason},
    rollout::resolve,
};

/// Digits of a commit that an approval must name, at least.
const APPROVAL_DIGITS: usize = 12;

/// Which wave each selected node is in, by name; `waves.len()` for those in none.
pub type Membership<'a> = BTreeMap<&'a str, usize>;

/// Sorts the selected nodes into waves. Fails when a node is in two waves by its labels, naming the field.
pub fn membership<'a>(fleet: &'a Fleet, order: &[&'a NodeView]) -> Result<Membership<'a>, String> {
    let waves = &fleet.image.spec.rollout.waves;
    let mut members: Membership<'a> = BTreeMap::new();
    for (index, wave) in waves.iter().enumerate() {
        let Some(selector) = wave.node_selector.as_ref() else { continue };
        let selector = parse(selector).map_err(|e| format!("spec.rollout.waves[{index}].nodeSelector: {e}"))?;
        for node in order.iter().filter(|n| selector.matches(&n.labels)) {
            if let Some(first) = members.insert(&node.name, index) {
                let first = waves.get(first).map_or("", |w| w.name.as_str());
                return Err(format!(
                    "spec.rollout.waves[{index}].nodeSelector: node {} is in wave {first} and in wave {}: let only one select it",
                    node.name, wave.name
                ));
            }
        }
    }
    for (index, wave) in waves.iter().enumerate() {
        let Some(size) = wave.size.as_ref() else { continue };
        let free: Vec<&str> = order.iter().map(|n| n.name.as_str()).filter(|n| !members.contains_key(n)).collect();
        members.extend(free.into_iter().take(resolve(size, order.len())).map(|name| (name, index)));
    }
    for node in order {
        members.entry(&node.name).or_insert(waves.len());
    }
    Ok(members)
}

fn parse(selector: &LabelSelector) -> Result<Selector, String> {
    Selector::try_from(selector.clone()).map_err(|e| e.to_string())
}

/// The first wave that has not begun, and why. Waves before it are open; it and all after it are not.
pub struct Closed {
    /// Its index; nodes in it and in later waves are held.
    pub from: usize,
    /// Why.
    pub hold: Hold,
    /// When it opens by itself.
    pub opens: Option<Timestamp>,
}

/// Finds the first wave that has not begun.
pub fn closed(fleet: &Fleet, statuses: &[WaveStatus], now: Timestamp) -> Option<Closed> {
    let waves = &fleet.image.spec.rollout.waves;
    for index in 0..=waves.len() {
        if let Some(before) = index.checked_sub(1).and_then(|i| waves.get(i)) {
            let status = statuses.iter().find(|s| s.name == before.name);
            let name = waves.get(index).map_or("the nodes in no wave", |w| w.name.as_str());
            let Some(completed) = status.and_then(|s| s.completed.as_ref()) else {
                let (updated, nodes) = status.map_or((0, 0), |s| (s.updated, s.nodes));
                let message = format!("{name} waits for wave {}: {updated} of {nodes} nodes are updated", before.name);
                return Some(Closed { from: index, hold: whole(HoldReason::WaveNotOpen, message), opens: None });
            };
            let soaked = SignedDuration::try_from(before.soak.get()).ok().and_then(|d| completed.0.checked_add(d).ok());
            if let Some(opens) = soaked.filter(|at| *at > now) {
                let message = format!("{name} waits until {opens}: wave {} soaks for {}", before.name, before.soak);
                let hold = whole(HoldReason::WaveSoaking, message);
                return Some(Closed { from: index, hold, opens: Some(opens) });
            }
        }
        if let Some(wave) = waves.get(index).filter(|w| w.approval == Approval::Manual && !approved(fleet, w)) {
            let message = format!(
                "wave {} waits for approval: kubectl annotate osimage {} --overwrite {APPROVE_PREFIX}{}={}",
                wave.name,
                fleet.name(),
                wave.name,
                fleet.commit().short()
            );
            return Some(Closed { from: index, hold: whole(HoldReason::WaveNotApproved, message), opens: None });
        }
    }
    None
}

/// Whether a person has approved this wave, for this commit.
fn approved(fleet: &Fleet, wave: &Wave) -> bool {
    let annotations = fleet.image.metadata.annotations.as_ref();
    let value = annotations.and_then(|a| a.get(&format!("{APPROVE_PREFIX}{}", wave.name)));
    value.is_some_and(|v| v.len() >= APPROVAL_DIGITS && fleet.commit().as_str().starts_with(v.as_str()))
}
