//! Rules broken on purpose, to prove that the simulator would find them broken. Nothing of it is in product code: a
//! mutant changes what an operator or a daemon is shown, so that the rule decides as if it were not there.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use osimage_crds::{NodeOSSpec, Period};
use osimage_planner::Fleet;

/// One broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The budget gate does not count nodes that are down without us.
    BudgetForgetsOthers,
    /// The budget gate lets one more through.
    BudgetOffByOne,
    /// The host does not compare the boot that a permit is for.
    PermitForAnyBoot,
    /// Every cordon counts as ours.
    EveryCordonIsOurs,
    /// The topology gate is open.
    NoTopology,
    /// Waves open as soon as the one before is complete.
    NoSoak,
}

impl Mutant {
    /// What an operator with the broken rule plans on.
    pub fn blind(self, fleet: &mut Fleet) {
        let owner = fleet.owner();
        let rollout = &mut fleet.image.spec.rollout;
        match self {
            Mutant::BudgetForgetsOthers => {
                let slots = fleet.status().slots;
                for node in fleet.nodes.values_mut().filter(|n| !slots.iter().any(|s| s.node == n.name)) {
                    (node.ready, node.unschedulable) = (true, false);
                }
            }
            Mutant::BudgetOffByOne => {
                if let IntOrString::Int(max) = &mut rollout.max_unavailable {
                    *max += 1;
                }
            }
            Mutant::EveryCordonIsOurs => {
                for node in fleet.nodes.values_mut().filter(|n| n.unschedulable) {
                    node.cordoned_by = Some(owner.clone());
                }
            }
            Mutant::NoTopology => rollout.topology_key = None,
            Mutant::NoSoak => rollout.waves.iter_mut().for_each(|w| w.soak = Period::seconds(0)),
            Mutant::PermitForAnyBoot => {}
        }
    }

    /// What a daemon with the broken rule is asked.
    pub fn deceive(self, spec: &mut NodeOSSpec, boot_id: &str) {
        if let (Mutant::PermitForAnyBoot, Some(permit)) = (self, &mut spec.permit) {
            permit.boot_id = boot_id.into();
        }
    }
}
