//! Small fleets, exhaustively: every order in which operators, daemons, kubelets, boots, crashes and time may follow one
//! another, over the same functions that decide in the product ([`rollout::plan`], and [`host::plan`] in the simulator's
//! host).
//!
//! # What is covered
//! An operator reads everything at one moment, then writes step by step, each write on condition that the object is as it
//! was read, anything in between. A daemon hears, reports and acts in one turn, or acts on what it heard before. Faults
//! (crashes of both, stray reboots, boots that go wrong, a person's cordon) are counted and bounded, as are attempts
//! and the ticks of the clock; one tick is longer than each timeout.
//!
//! # What is not
//! Of the states, one in 256 is asked whether all ends clean from there when there are no more faults. More than one fault
//! in a search is not covered: a daemon that dies between writing that it rolls back and doing it, and a reboot before it
//! is started again, leave a host that waits for a person.
//!
//! Pods, waves, windows, downloads (all nodes hold the commit when the model begins), old caches of operators, edits of
//! the OSImage, nodes that come and go. That is the simulator's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, dead_code)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    hash::{Hash, Hasher},
};

use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use osimage_crds::{
    Commit, NodeOS, NodeOSSpec, NodeOSStatus, OSImage, OSImageSpec, OSImageStatus, Period, names,
    osimage::{Drain, Health, Image, OSTreeImage, Reboot, Rollout, Slot, Verification},
};
use osimage_planner::{Fleet, NodeView, Plan, Step, host::HostStep, rollout};
use stateright::{Checker, HasDiscoveries, Model, Property};

#[path = "sim/host.rs"]
mod host;
#[path = "sim/mutant.rs"]
mod mutant;

use host::{Boot, Host};
use mutant::Mutant;

/// Seconds of one tick: longer than each timeout.
const TICK: u64 = 1_000;
const UID: &str = "0a1b2c3d-0000";

fn commit(digit: char) -> Commit {
    digit.to_string().repeat(64).parse().unwrap()
}

const OLD: char = '1';
const NEW: char = '2';

/// The bounds of one exhaustive search.
#[derive(Clone, Copy)]
struct Bounds {
    nodes: usize,
    max_unavailable: i32,
    operators: usize,
    faults: u32,
    ticks: u64,
    attempts: i64,
    /// The new commit is never healthy.
    bad: bool,
    broken: Option<Mutant>,
}

/// A Node object, as far as it matters.
#[derive(Clone, Debug, Default)]
struct Node {
    ready: bool,
    unschedulable: bool,
    cordoned_by: Option<String>,
    boot_id: String,
    /// A person cordoned it.
    person: bool,
}

#[derive(Clone, Debug)]
struct Object {
    spec: NodeOSSpec,
    status: Option<NodeOSStatus>,
    /// The status speaks of this spec.
    current: bool,
}

/// A write that an operator has decided on, and whether its object is still as it was read.
#[derive(Clone, Debug)]
struct Op {
    write: Write,
    fresh: bool,
}

#[derive(Clone, Debug)]
enum Write {
    Book(Box<OSImageStatus>),
    Do(Step),
}

#[derive(Clone, Debug)]
struct State {
    book: OSImageStatus,
    nodes: Vec<Node>,
    objects: Vec<Option<Object>>,
    hosts: Vec<Host>,
    queues: Vec<VecDeque<Op>>,
    tick: u64,
    faults: u32,
    /// What a step broke, where the state alone does not tell.
    broke: Option<&'static str>,
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        struct Feed<'a, H>(&'a mut H);
        impl<H: Hasher> std::fmt::Write for Feed<'_, H> {
            fn write_str(&mut self, text: &str) -> std::fmt::Result {
                self.0.write(text.as_bytes());
                Ok(())
            }
        }
        write!(Feed(hasher), "{self:?}").unwrap();
    }
}

/// As the checker tells states apart: by all that is in them.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    /// An operator reads everything and decides.
    Plan(usize),
    /// An operator carries out the next write.
    Write(usize),
    OperatorDies(usize),
    /// A daemon hears, reports, and takes a step.
    Daemon(usize),
    /// A daemon that reaches nobody takes a step by what it heard before.
    DaemonAlone(usize),
    DaemonDiesInStep(usize),
    Kubelet(usize),
    Guard(usize),
    Boots(usize, Boot),
    StrayReboot(usize),
    PersonCordons(usize),
    Tick,
}

fn image(bounds: &Bounds, paused: bool) -> OSImage {
    let verification = Verification { gpg: None, insecure_skip: Some(true) };
    let ostree = OSTreeImage { url: "http://r".into(), remote: None, ref_: None, commit: commit(NEW), verification };
    let mut image = OSImage::new(
        "fleet",
        OSImageSpec {
            image: Image { ostree },
            node_selector: LabelSelector::default(),
            rollout: Rollout {
                paused,
                max_unavailable: IntOrString::Int(bounds.max_unavailable),
                max_staging: 10,
                ..Rollout::default()
            },
            drain: Drain { skip: true, ..Drain::default() },
            reboot: Reboot { timeout: Period::seconds(600) },
            health: Health { deadline: Period::seconds(600), soak: Period::seconds(0), checks: vec![] },
        },
    );
    image.metadata = ObjectMeta {
        name: Some("fleet".into()),
        uid: Some(UID.into()),
        generation: Some(1),
        finalizers: Some(vec![names::FINALIZER.into()]),
        ..ObjectMeta::default()
    };
    image
}

fn name(node: usize) -> String {
    format!("n{node}")
}

fn number(name: &str) -> usize {
    name.trim_start_matches('n').parse().unwrap()
}

/// The part of the status that decisions are made from.
fn book(status: OSImageStatus) -> OSImageStatus {
    let OSImageStatus { attempts, slots, failures, rejected, deferred, .. } = status;
    OSImageStatus { attempts, slots, failures, rejected, deferred, ..OSImageStatus::default() }
}

impl State {
    fn now(&self) -> u64 {
        self.tick * TICK
    }

    fn fleet(&self, bounds: &Bounds, paused: bool) -> Fleet {
        let mut image = image(bounds, paused);
        image.status = Some(self.book.clone());
        let view = |i: usize| {
            let node = &self.nodes[i];
            NodeView {
                name: name(i),
                exists: true,
                selected: true,
                ready: node.ready,
                unschedulable: node.unschedulable,
                cordoned_by: node.cordoned_by.clone(),
                boot_id: node.boot_id.clone(),
                node_os: self.objects[i].as_ref().map(|object| self.node_os(i, object)),
                pods: Some(vec![]),
                ..NodeView::default()
            }
        };
        Fleet {
            image,
            existing_images: BTreeSet::from([UID.to_owned()]),
            nodes: (0..self.nodes.len()).map(|i| (name(i), view(i))).collect(),
            operator_node: None,
            refuges: BTreeSet::new(),
            refusals: BTreeMap::new(),
            gates: vec![],
        }
    }

    fn node_os(&self, node: usize, object: &Object) -> NodeOS {
        let mut node_os = NodeOS::new(&name(node), object.spec.clone());
        node_os.metadata.generation = Some(2);
        node_os.status = object.status.clone();
        if let Some(status) = &mut node_os.status {
            status.observed_generation = Some(if object.current { 2 } else { 1 });
        }
        node_os
    }

    /// An object was written: what was decided by its former state is refused.
    fn outdate(&mut self, about: impl Fn(&Write) -> bool) {
        self.queues.iter_mut().flatten().filter(|op| about(&op.write)).for_each(|op| op.fresh = false);
    }

    fn node_changed(&mut self, node: usize) {
        self.outdate(|write| match write {
            Write::Do(Step::Cordon { node: n, .. } | Step::Uncordon { node: n, .. }) => *n == name(node),
            _ => false,
        });
    }

    fn object_changed(&mut self, node: usize) {
        self.outdate(|write| match write {
            Write::Do(Step::UpdateNodeOS { object, .. } | Step::DeleteNodeOS(object)) => {
                object.metadata.name == Some(name(node))
            }
            _ => false,
        });
    }

    fn plan(&mut self, bounds: &Bounds, at: usize, paused: bool) {
        let mut fleet = self.fleet(bounds, paused);
        if let Some(mutant) = bounds.broken {
            mutant.blind(&mut fleet);
        }
        let now = Timestamp::from_second(self.now() as i64).unwrap();
        let Plan { status, steps, holds: _, wake: _ } = rollout::plan(&fleet, now);
        let status = book(status);
        let write = (status != self.book).then(|| Write::Book(Box::new(status)));
        let writes = write.into_iter().chain(steps.into_iter().map(Write::Do));
        self.queues[at] = writes.map(|write| Op { write, fresh: true }).collect();
    }

    /// Carries out the next write of an operator; a conflict ends its pass.
    fn write(&mut self, at: usize) {
        let Some(Op { write, fresh }) = self.queues[at].pop_front() else { return };
        if !fresh {
            return self.queues[at].clear();
        }
        match write {
            Write::Book(status) => {
                self.book = *status;
                self.outdate(|write| matches!(write, Write::Book(_)));
            }
            Write::Do(Step::CreateNodeOS(object)) => {
                let node = number(object.metadata.name.as_deref().unwrap());
                self.objects[node].get_or_insert(Object { spec: object.spec, status: None, current: false });
            }
            Write::Do(Step::UpdateNodeOS { object, change: _ }) => {
                let node = number(object.metadata.name.as_deref().unwrap());
                let known = self.objects[node].as_mut().unwrap();
                known.current &= known.spec == object.spec;
                known.spec = object.spec;
                self.object_changed(node);
            }
            Write::Do(Step::Cordon { node, owner, .. }) => {
                let node = number(&node);
                (self.nodes[node].unschedulable, self.nodes[node].cordoned_by) = (true, Some(owner));
                self.node_changed(node);
            }
            Write::Do(Step::Uncordon { node, .. }) => {
                let node = number(&node);
                (self.nodes[node].unschedulable, self.nodes[node].cordoned_by) = (false, None);
                self.node_changed(node);
            }
            Write::Do(
                Step::AddFinalizer
                | Step::RemoveFinalizer
                | Step::DeleteNodeOS(_)
                | Step::Evict { .. }
                | Step::Delete { .. },
            ) => unreachable!("nothing is deleted here"),
        }
    }

    fn daemon(&mut self, bounds: &Bounds, node: usize, connected: bool, dies: bool) {
        let now = self.now();
        if !self.hosts[node].up {
            return;
        }
        if connected {
            let seen = self.objects[node].as_ref().map(|object| self.node_os(node, object));
            self.hosts[node].hear(seen.as_ref());
        }
        let healthy = !(bounds.bad && *self.hosts[node].booted() == commit(NEW));
        let (state, plan) = self.hosts[node].decide(now, healthy, bounds.broken);
        if connected
            && let Some(said) = self.hosts[node].report(&state, &plan)
            && let Some(object) = &mut self.objects[node]
            && (object.status.as_ref() != Some(&said) || !object.current)
        {
            (object.status, object.current) = (Some(said), true);
            self.object_changed(node);
        }
        let Some(step) = plan.step else { return };
        let attempt = match (&step, &state.record) {
            (HostStep::Arm(record), _) => Some(record.attempt.clone()),
            (HostStep::Stage(_), Some(record)) => Some(record.attempt.clone()),
            (HostStep::Reboot, Some(record)) if record.boot_id == state.boot_id => Some(record.attempt.clone()),
            _ => None,
        };
        let lives = |s: &Slot| s.permitted.is_some() && s.outcome.is_none() && s.boot_id == state.boot_id;
        if let Some(attempt) = attempt
            && !self.book.slots.iter().any(|s| s.node == name(node) && s.attempt == attempt && lives(s))
        {
            self.broke = Some("permit");
        }
        self.hosts[node].carry_out(step, dies);
        if dies {
            self.hosts[node].daemon_restarts();
        }
    }

    fn kubelet(&mut self, node: usize) {
        let (up, boot_id) = (self.hosts[node].up, self.hosts[node].boot_id());
        let known = &mut self.nodes[node];
        let boot_id = if up { boot_id } else { known.boot_id.clone() };
        if (known.ready, &known.boot_id) != (up, &boot_id) {
            (known.ready, known.boot_id) = (up, boot_id);
            self.node_changed(node);
        }
    }

    /// Nodes that are disrupted by us.
    fn disrupted(&self) -> usize {
        let ours = |i: &usize| {
            let host = &self.hosts[*i];
            let trial = host.record.as_ref().filter(|r| !r.finished());
            let rebooted = trial.is_some_and(|r| r.boot_id != host.boot_id() || !host.up);
            self.nodes[*i].cordoned_by.is_some() || rebooted
        };
        (0..self.nodes.len()).filter(ours).count()
    }

    fn way_back(&self) -> bool {
        self.hosts.iter().all(|host| {
            let trial = host.record.as_ref().filter(|r| !r.finished() && host.up);
            trial.is_none_or(|r| host.deployments.iter().any(|d| d.commit == r.previous))
        })
    }

    fn clean(&self) -> bool {
        self.book.slots.is_empty()
            && self.nodes.iter().all(|n| n.cordoned_by.is_none() && n.ready)
            && self.hosts.iter().all(|h| h.up && h.record.as_ref().is_none_or(|r| r.finished()))
    }

    fn updated(&self) -> bool {
        self.clean() && self.hosts.iter().all(|h| *h.booted() == commit(NEW))
    }

    /// Everybody does its part, in turn, for so many rounds, and time passes.
    fn go_on(&mut self, bounds: &Bounds, rounds: usize, paused: bool) {
        for round in 0..rounds {
            for at in 0..self.queues.len() {
                if self.queues[at].is_empty() {
                    self.plan(bounds, at, paused);
                }
                while !self.queues[at].is_empty() {
                    self.write(at);
                }
            }
            for node in 0..self.hosts.len() {
                if !self.hosts[node].up {
                    let now = self.now();
                    self.hosts[node].come_up(Boot::Normal, now);
                }
                self.daemon(bounds, node, true, false);
                self.kubelet(node);
            }
            if round % 12 == 11 && !paused {
                self.tick += 1;
            }
        }
    }
}

impl Model for Bounds {
    type State = State;
    type Action = Action;

    /// Every node holds the new commit and waits for its turn.
    fn init_states(&self) -> Vec<State> {
        let hosts: Vec<Host> = (0..self.nodes)
            .map(|i| {
                let mut host = Host::new(&name(i), 0, &commit(OLD));
                host.must_pull = 1;
                host
            })
            .collect();
        let node = |host: &Host| Node { ready: true, boot_id: host.boot_id(), ..Node::default() };
        let mut state = State {
            book: OSImageStatus::default(),
            nodes: hosts.iter().map(node).collect(),
            objects: vec![None; self.nodes],
            hosts,
            queues: vec![VecDeque::new(); self.operators],
            tick: 1,
            faults: 0,
            broke: None,
        };
        let honest = Bounds { broken: None, ..*self };
        state.go_on(&honest, 10, true);
        state.queues.iter_mut().for_each(VecDeque::clear);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let faults = state.faults < self.faults;
        for at in 0..self.operators {
            match state.queues[at].is_empty() {
                true => actions.push(Action::Plan(at)),
                false => {
                    actions.push(Action::Write(at));
                    if faults {
                        actions.push(Action::OperatorDies(at));
                    }
                }
            }
        }
        for node in 0..self.nodes {
            actions.extend([Action::Kubelet(node), Action::Guard(node)]);
            let host = &state.hosts[node];
            if host.up {
                actions.extend([Action::Daemon(node), Action::DaemonAlone(node)]);
            } else {
                actions.push(Action::Boots(node, Boot::Normal));
            }
            if faults && host.up {
                actions.extend([
                    Action::StrayReboot(node),
                    Action::DaemonDiesInStep(node),
                    Action::PersonCordons(node),
                ]);
            }
            if faults && !host.up && host.deployments.iter().any(|d| d.staged) {
                actions.extend([Action::Boots(node, Boot::FellBack), Action::Boots(node, Boot::NotFinalized)]);
            }
        }
        if state.tick <= self.ticks {
            actions.push(Action::Tick);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.now();
        match action {
            Action::Plan(at) => {
                state.plan(self, at, false);
                // A pass that finds nothing to do changes nothing.
                return (!state.queues[at].is_empty()).then_some(state);
            }
            Action::Write(at) => state.write(at),
            Action::OperatorDies(at) => {
                state.queues[at].clear();
                state.faults += 1;
            }
            Action::Daemon(node) => state.daemon(self, node, true, false),
            Action::DaemonAlone(node) => state.daemon(self, node, false, false),
            Action::DaemonDiesInStep(node) => {
                state.daemon(self, node, true, true);
                state.faults += 1;
            }
            Action::Kubelet(node) => state.kubelet(node),
            Action::Guard(node) => {
                state.hosts[node].guard_tick(now);
            }
            Action::Boots(node, how) => {
                state.hosts[node].come_up(how, now);
                state.faults += u32::from(how != Boot::Normal);
            }
            Action::StrayReboot(node) => {
                state.hosts[node].go_down();
                state.faults += 1;
            }
            Action::PersonCordons(node) => {
                if state.nodes[node].unschedulable {
                    return None;
                }
                (state.nodes[node].unschedulable, state.nodes[node].person) = (true, true);
                state.node_changed(node);
                state.faults += 1;
            }
            Action::Tick => state.tick += 1,
        }
        Some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.book.attempts <= self.attempts
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("budget: never more disrupted by us than may be", |model: &Bounds, state: &State| {
                state.disrupted() <= model.max_unavailable as usize
            }),
            Property::always("permit: no way forward without a live slot of this boot", |_, state: &State| {
                state.broke.is_none()
            }),
            Property::always("way back: the previous deployment is kept", |_, state: &State| state.way_back()),
            Property::always("cordon: a person's cordon stays", |_, state: &State| {
                state.nodes.iter().all(|n| !n.person || n.unschedulable)
            }),
            Property::always("liveness: without more faults all ends clean", |model: &Bounds, state: &State| {
                let mut state = state.clone();
                // Of many states a fixed part: each costs as much as a hundred others.
                let mut hasher = std::hash::DefaultHasher::new();
                state.hash(&mut hasher);
                if !hasher.finish().is_multiple_of(256) {
                    return true;
                }
                // A person that never gives a node back holds the budget for ever.
                state.nodes.iter_mut().for_each(|n| n.unschedulable &= !n.person);
                state.go_on(model, 120, false);
                state.clean()
            }),
            Property::sometimes("every node is updated", |_, state: &State| state.updated()),
        ]
    }
}

const SMALL: Bounds =
    Bounds { nodes: 1, max_unavailable: 1, operators: 1, faults: 1, ticks: 2, attempts: 2, bad: false, broken: None };

fn search(bounds: Bounds) -> impl Checker<Bounds> {
    let most = std::time::Duration::from_secs(120);
    bounds.checker().threads(2).timeout(most).spawn_bfs().join()
}

fn exhaust(fact: &str, bounds: Bounds) {
    let checker = search(bounds);
    println!("{fact}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    assert!(checker.is_done(), "{fact}: not searched to the end: make the bounds smaller");
    for (property, path) in checker.discoveries() {
        if property != "every node is updated" {
            panic!("{fact}: {property}: {:#?}", path.into_actions());
        }
    }
    assert!(bounds.bad || checker.discovery("every node is updated").is_some(), "{fact}: no way to the end");
}

#[test]
fn one_node() {
    exhaust("one node", Bounds { ticks: 1, ..SMALL });
}

#[test]
fn one_node_and_a_bad_commit() {
    exhaust("one node, a bad commit", Bounds { bad: true, ticks: 1, ..SMALL });
}

#[test]
fn two_operators() {
    exhaust("one node, two operators", Bounds { operators: 2, faults: 0, ticks: 1, attempts: 1, ..SMALL });
}

#[test]
fn two_nodes() {
    exhaust("two nodes, one at a time", Bounds { nodes: 2, ticks: 0, ..SMALL });
}

#[test]
fn three_nodes() {
    let two_at_once = Bounds { nodes: 3, max_unavailable: 2, faults: 0, ticks: 0, attempts: 3, ..SMALL };
    exhaust("three nodes, two at once, no faults", two_at_once);
}

#[test]
fn rules_broken_on_purpose_are_found() {
    for (broken, invariant) in [
        (Mutant::BudgetOffByOne, "budget"),
        (Mutant::PermitForAnyBoot, "permit"),
        (Mutant::EveryCordonIsOurs, "cordon"),
    ] {
        let bounds = Bounds { nodes: 2, ticks: 0, broken: Some(broken), ..SMALL };
        let checker = bounds.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checker.discoveries();
        println!("{broken:?}: {:?}", found.keys());
        assert!(found.keys().any(|property| property.starts_with(invariant)), "{broken:?} was not found");
    }
}
