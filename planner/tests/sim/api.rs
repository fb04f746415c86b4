//! The API server of the simulation: objects with resource versions, generations, conflicts, and a history
//! from which stale caches are served.

use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use osimage_crds::{NodeOS, NodeOSStatus, OSImage, OSImageStatus};
use osimage_planner::fleet::{NodeView, PodFacts};

/// The write was refused because the object had changed, or was gone.
#[derive(Debug)]
pub struct Conflict;

/// Label with the zone of a node.
pub const ZONE: &str = "zone";

/// A Node object and its pods.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Node {
    pub version: u64,
    pub ready: bool,
    pub unschedulable: bool,
    pub cordoned_by: Option<String>,
    pub boot_id: String,
    pub selected: bool,
    pub zone: String,
    pub pods: Vec<PodFacts>,
}

/// What the API server holds at one moment.
#[derive(Clone, Debug)]
pub struct State {
    pub image: Rc<OSImage>,
    pub nodes: BTreeMap<Rc<str>, Rc<Node>>,
    pub node_oses: BTreeMap<Rc<str>, Rc<NodeOS>>,
}

/// The API server.
pub struct Api {
    pub now: State,
    /// Earlier states, newest last; caches are served from here.
    pub past: VecDeque<State>,
    version: u64,
    /// Writes by us, counted to see that rest is rest.
    pub writes: u64,
}

const HISTORY: usize = 40;

impl Api {
    pub fn new(image: OSImage, nodes: BTreeMap<String, Node>) -> Self {
        let nodes = nodes.into_iter().map(|(name, node)| (name.into(), Rc::new(node))).collect();
        Api {
            now: State { image: Rc::new(image), nodes, node_oses: BTreeMap::new() },
            past: VecDeque::new(),
            version: 1,
            writes: 0,
        }
    }

    /// Called before each change.
    fn next(&mut self) -> String {
        self.past.push_back(self.now.clone());
        if self.past.len() > HISTORY {
            self.past.pop_front();
        }
        self.version += 1;
        self.version.to_string()
    }

    /// The state `back` changes ago.
    pub fn cached(&self, back: usize) -> &State {
        self.past.len().checked_sub(back).and_then(|i| self.past.get(i)).unwrap_or(&self.now)
    }

    pub fn edit_image(&mut self, edit: impl FnOnce(&mut OSImage), spec_changed: bool) {
        let version = self.next();
        let image = Rc::make_mut(&mut self.now.image);
        edit(image);
        image.metadata.resource_version = Some(version);
        if spec_changed {
            *image.metadata.generation.get_or_insert(1) += 1;
        }
    }

    pub fn write_image_status(&mut self, read_at: Option<&str>, status: OSImageStatus) -> Result<(), Conflict> {
        if self.now.image.metadata.resource_version.as_deref() != read_at {
            return Err(Conflict);
        }
        self.writes += 1;
        self.edit_image(|image| image.status = Some(status), false);
        Ok(())
    }

    pub fn add_node(&mut self, name: &str, mut node: Node) {
        node.version = self.next().parse().unwrap();
        self.now.nodes.insert(name.into(), Rc::new(node));
    }

    pub fn remove_node(&mut self, name: &str) {
        self.next();
        self.now.nodes.remove(name);
    }

    /// Changes a Node, if there is one.
    pub fn edit_node(&mut self, name: &str, edit: impl FnOnce(&mut Node)) {
        let Some(known) = self.now.nodes.get(name) else { return };
        let mut node = Node::clone(known);
        edit(&mut node);
        if node != *self.now.nodes[name] {
            node.version = self.next().parse().unwrap();
            self.now.nodes.insert(name.into(), Rc::new(node));
        }
    }

    pub fn create_node_os(&mut self, mut object: NodeOS) -> Result<(), Conflict> {
        let name = object.metadata.name.clone().unwrap();
        if self.now.node_oses.contains_key(name.as_str()) {
            return Err(Conflict);
        }
        self.writes += 1;
        object.metadata.resource_version = Some(self.next());
        object.metadata.generation = Some(1);
        object.metadata.uid = object.metadata.resource_version.clone();
        self.now.node_oses.insert(name.into(), Rc::new(object));
        Ok(())
    }

    fn fresh(&self, object: &NodeOS) -> Result<NodeOS, Conflict> {
        let name = object.metadata.name.as_deref().unwrap();
        let known = self.now.node_oses.get(name).ok_or(Conflict)?;
        let same = known.metadata.resource_version == object.metadata.resource_version;
        same.then(|| NodeOS::clone(known)).ok_or(Conflict)
    }

    pub fn update_node_os(&mut self, object: &NodeOS) -> Result<(), Conflict> {
        let mut known = self.fresh(object)?;
        self.writes += 1;
        if known.spec != object.spec {
            *known.metadata.generation.get_or_insert(1) += 1;
        }
        known.spec = object.spec.clone();
        known.metadata.resource_version = Some(self.next());
        self.now.node_oses.insert(known.metadata.name.clone().unwrap().into(), Rc::new(known));
        Ok(())
    }

    pub fn delete_node_os(&mut self, object: &NodeOS) -> Result<(), Conflict> {
        self.fresh(object)?;
        self.writes += 1;
        self.next();
        self.now.node_oses.remove(object.metadata.name.as_deref().unwrap());
        Ok(())
    }

    /// What a daemon writes: no precondition, only its own status.
    pub fn write_node_status(&mut self, name: &str, status: NodeOSStatus) {
        let Some(known) = self.now.node_oses.get(name) else { return };
        if known.status.as_ref() == Some(&status) {
            return;
        }
        let mut known = NodeOS::clone(known);
        self.writes += 1;
        known.status = Some(status);
        known.metadata.resource_version = Some(self.next());
        self.now.node_oses.insert(name.into(), Rc::new(known));
    }
}

impl State {
    /// The node as an operator's `observe` would build it from this state.
    pub fn view(&self, name: &str) -> NodeView {
        let node = self.nodes.get(name).map(|n| Node::clone(n)).unwrap_or_default();
        NodeView {
            name: name.into(),
            resource_version: node.version.to_string(),
            exists: self.nodes.contains_key(name),
            selected: node.selected,
            labels: BTreeMap::from([(ZONE.to_owned(), node.zone.clone())]),
            ready: node.ready,
            unschedulable: node.unschedulable,
            cordoned_by: node.cordoned_by,
            boot_id: node.boot_id,
            node_os: self.node_oses.get(name).map(|n| NodeOS::clone(n)),
            pods: None,
            ..NodeView::default()
        }
    }
}
