//! NodeOS objects as they shall be, stray cordons of ours, and the end of a deletion.

use super::*;

impl Draft<'_> {
    /// NodeOS objects as they shall be, stray cordons of ours, and the end of a deletion.
    pub(super) fn look_after_the_rest(&mut self) {
        let fleet = self.fleet;
        let mut pulls = self.free_pulls();
        let mut left_over = false;
        let begun: BTreeSet<String> = self.book.slots.iter().map(|s| s.node.clone()).collect();
        for node in fleet.nodes.values() {
            if self.taken.contains(node.name.as_str()) || begun.contains(&node.name) {
                left_over = true;
                continue;
            }
            if node.exists && node.cordoned_by.as_deref() == Some(fleet.owner().as_str()) {
                left_over = true;
                self.uncordon(node);
                continue;
            }
            let wanted = node.exists && node.selected && !fleet.deleting();
            match &node.node_os {
                None if wanted => {
                    let object = self.new_node_os(&node.name, &mut pulls);
                    self.steps.push(Step::CreateNodeOS(Box::new(object)));
                }
                Some(node_os) if node_os.spec.os_image.uid == fleet.uid() && !wanted => {
                    left_over = true;
                    self.steps.push(Step::DeleteNodeOS(Box::new(node_os.clone())));
                }
                Some(node_os) if wanted => self.assign(node, node_os, &mut pulls),
                None | Some(_) => {}
            }
        }
        if fleet.deleting() && !left_over && self.book.slots.is_empty() {
            self.steps.push(Step::RemoveFinalizer);
        }
    }

    /// How many more nodes may download now.
    pub(super) fn free_pulls(&self) -> usize {
        let busy = self.fleet.nodes.values().filter_map(|n| n.node_os.as_ref()).filter(|n| {
            let status = n.status.as_ref();
            let done = status.and_then(|s| s.pulled.as_ref()) == Some(self.fleet.commit());
            let given_up = status.and_then(|s| s.problem.as_ref()).is_some_and(|p| !p.retrying);
            n.spec.may_pull && n.spec.os_image.uid == self.fleet.uid() && !done && !given_up
        });
        usize::try_from(self.fleet.image.spec.rollout.max_staging).unwrap_or(1).saturating_sub(busy.count())
    }

    /// What a node that is not in a slot shall hold ready. A rejected commit is dropped everywhere.
    pub(super) fn spec_for(&self, current: Option<&NodeOSSpec>, pulls: &mut usize) -> NodeOSSpec {
        let spec = &self.fleet.image.spec;
        let rejected = self.rejected(self.fleet.commit()).is_some();
        let mut image = spec.image.clone();
        image.ostree.remote.get_or_insert_with(|| self.fleet.name().to_owned());
        let image = (!rejected).then_some(image);
        let keeps = current.is_some_and(|c| c.may_pull && commit_of(c) == image.as_ref().map(|i| &i.ostree.commit));
        let may_pull = image.is_some() && (keeps || *pulls > 0);
        if may_pull && !keeps {
            *pulls -= 1;
        }
        NodeOSSpec {
            os_image: OSImageRef { name: self.fleet.name().into(), uid: self.fleet.uid().into() },
            image,
            may_pull,
            health: spec.health.clone(),
            permit: None,
            retry: self.book.retry_handled.clone(),
            released: current.and_then(|c| c.released.clone()),
        }
    }

    pub(super) fn new_node_os(&self, node: &str, pulls: &mut usize) -> NodeOS {
        let mut object = NodeOS::new(node, self.spec_for(None, pulls));
        object.metadata = ObjectMeta {
            name: Some(node.to_owned()),
            labels: Some(BTreeMap::from([(names::OSIMAGE_LABEL.to_owned(), self.fleet.name().to_owned())])),
            ..ObjectMeta::default()
        };
        object
    }

    pub(super) fn assign(&mut self, node: &NodeView, node_os: &NodeOS, pulls: &mut usize) {
        let ours = node_os.spec.os_image.uid == self.fleet.uid();
        let orphan = !self.fleet.existing_images.contains(&node_os.spec.os_image.uid);
        if !ours && !orphan {
            return;
        }
        let there = node.booted() == Some(self.fleet.commit());
        let mut no_pull_needed = usize::MAX;
        let spec = self.spec_for(Some(&node_os.spec), if there { &mut no_pull_needed } else { pulls });
        if spec != node_os.spec {
            let label = self.fleet.name().to_owned();
            let mut object = NodeOS { spec, status: None, ..node_os.clone() };
            object.metadata.labels.get_or_insert_default().insert(names::OSIMAGE_LABEL.to_owned(), label);
            self.steps.push(Step::UpdateNodeOS { object: Box::new(object), change: Change::Assign });
        }
    }
}
