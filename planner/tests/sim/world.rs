//! The world: an API server, operators, hosts, kubelets, pods, faults, and the invariants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use fastrand::Rng;
use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use osimage_crds::{
    Commit, NodeOS, OSImage, OSImageSpec, OSImageStatus, Period, names,
    osimage::{
        Approval, Drain, Health, Image, OSTreeImage, OnDrainTimeout, Phase, Reboot, Rollout, Verification, Wave,
    },
};
use osimage_planner::{
    Fleet, NodeView, Plan, Step,
    fleet::{BudgetFacts, PodFacts},
    host::{HostStep, Record},
    plan::Change,
    rollout,
};

use crate::{
    api::{Api, Conflict, Node, ZONE},
    host::{Boot, Host},
    mutant::Mutant,
};

/// Which faults there are, before they end and the fleet must converge.
#[derive(Clone, Copy)]
pub struct Faults {
    pub operators: usize,
    pub crashes: bool,
    pub stale: bool,
    pub lost_writes: bool,
    pub boot_faults: bool,
    pub partitions: bool,
    pub edits: bool,
    /// Nobody reaches the API server for a while.
    pub outages: bool,
    /// The clock of an operator goes forward or back by minutes.
    pub clock_jumps: bool,
    /// Nodes are deleted, and added: new ones, and other machines of an old name.
    pub churn: bool,
    /// The fewest and the most nodes.
    pub nodes: (usize, usize),
    pub bad_commit: bool,
    /// A rule that is broken on purpose.
    pub broken: Option<Mutant>,
}

impl Faults {
    pub fn none() -> Self {
        Faults {
            operators: 1,
            crashes: false,
            stale: false,
            lost_writes: false,
            boot_faults: false,
            partitions: false,
            edits: false,
            outages: false,
            clock_jumps: false,
            churn: false,
            nodes: (1, 6),
            bad_commit: false,
            broken: None,
        }
    }
}

/// Seconds with faults, then seconds that the fleet has to converge.
const FAULTY: u64 = 250;
const CALM: u64 = 8000;

/// Seconds that a wave soaks.
const SOAK: u64 = 5;

enum Op {
    Status(Option<String>, Box<OSImageStatus>),
    Do(Step),
}

#[derive(Default)]
struct Operator {
    queue: VecDeque<Op>,
    refusals: BTreeMap<String, String>,
    /// Seconds that its clock is wrong.
    skew: i64,
}

pub struct World {
    rng: Rng,
    faults: Faults,
    api: Api,
    hosts: BTreeMap<String, Host>,
    up_at: BTreeMap<String, u64>,
    cut_off: BTreeMap<String, u64>,
    user_cordons: BTreeSet<String>,
    operators: Vec<Operator>,
    now: u64,
    steps: u64,
    trace: VecDeque<String>,
    retries: u64,
    /// Nobody reaches the API server before this.
    outage_until: u64,
    machines: u64,
    /// Nodes that we disrupt now.
    disrupted: BTreeSet<String>,
}

fn commit(digit: char) -> Commit {
    digit.to_string().repeat(64).parse().unwrap()
}

/// Old, new, another one, and one that boots but is never healthy.
const OLD: char = '1';
const NEW: char = '2';
const OTHER: char = '3';
const BAD: char = 'b';

fn image(name: &str, commit: Commit, max: i32) -> OSImage {
    let verification = Verification { gpg: None, insecure_skip: Some(true) };
    let ostree = OSTreeImage { url: "http://repo".into(), remote: None, ref_: None, commit, verification };
    let spec = OSImageSpec {
        image: Image { ostree },
        node_selector: LabelSelector::default(),
        rollout: Rollout { max_unavailable: IntOrString::Int(max), max_staging: 2, ..Rollout::default() },
        drain: Drain { delete_unmanaged_pods: true, ..Drain::default() },
        reboot: Reboot { timeout: Period::seconds(30) },
        health: Health { deadline: Period::seconds(20), soak: Period::seconds(3), checks: vec![] },
    };
    let mut image = OSImage::new(name, spec);
    image.metadata = ObjectMeta {
        name: Some(name.into()),
        uid: Some("0a1b2c3d-0000".into()),
        generation: Some(1),
        resource_version: Some("1".into()),
        ..ObjectMeta::default()
    };
    image
}

/// Half of the fleets have more rules than the budget.
fn vary(spec: &mut OSImageSpec, rng: &mut Rng) {
    if rng.u32(0..3) == 0 {
        spec.rollout.topology_key = Some(ZONE.into());
    }
    if rng.u32(0..3) == 0 {
        let wave = |name: &str, size| Wave {
            name: name.into(),
            node_selector: None,
            size: Some(IntOrString::Int(size)),
            soak: Period::seconds(SOAK),
            approval: Approval::Automatic,
        };
        spec.rollout.waves = vec![wave("canary", 1), wave("early", 2)];
    }
    if rng.u32(0..3) == 0 {
        spec.rollout.min_ready_seconds = 4;
    }
    spec.drain.timeout = Period::seconds(rng.u64(15..60));
    spec.drain.on_timeout = [OnDrainTimeout::Abort, OnDrainTimeout::Force][rng.usize(0..2)];
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> Self {
        let mut rng = Rng::with_seed(seed);
        let (fewest, most) = faults.nodes;
        let count = rng.usize(fewest..=most);
        let max = rng.i32(1..=2) * (count as i32 / 10).max(1);
        let target = commit(if faults.bad_commit { BAD } else { NEW });
        let (mut nodes, mut hosts) = (BTreeMap::new(), BTreeMap::new());
        for i in 0..count {
            let name = format!("n{i}");
            let (node, host) = machine(&name, 0, &mut rng);
            nodes.insert(name.clone(), node);
            hosts.insert(name, host);
        }
        let mut osimage = image("fleet", target, max);
        vary(&mut osimage.spec, &mut rng);
        World {
            rng,
            faults,
            api: Api::new(osimage, nodes),
            hosts,
            up_at: BTreeMap::new(),
            cut_off: BTreeMap::new(),
            user_cordons: BTreeSet::new(),
            operators: (0..faults.operators).map(|_| Operator::default()).collect(),
            now: 1_000,
            steps: 0,
            trace: VecDeque::new(),
            retries: 0,
            outage_until: 0,
            machines: 0,
            disrupted: BTreeSet::new(),
        }
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn trace(&self) -> String {
        let lines: Vec<&str> = self.trace.iter().map(String::as_str).collect();
        lines.join("\n")
    }

    fn say(&mut self, text: String) {
        const KEPT: usize = 120;
        self.trace.push_back(format!("{:>5}s {text}", self.now));
        if self.trace.len() > KEPT {
            self.trace.pop_front();
        }
    }

    fn faulty(&self) -> bool {
        self.now < 1_000 + FAULTY
    }

    fn chance(&mut self, on: bool, percent: u32) -> bool {
        on && self.faulty() && self.rng.u32(0..100) < percent
    }

    pub fn run(&mut self) -> Result<(), String> {
        while self.now < 1_000 + FAULTY + CALM {
            self.second()?;
            if !self.faulty() && self.settled() {
                return self.rest();
            }
        }
        let status = self.api.now.image.status.as_ref().map(|s| (&s.phase, &s.message, &s.slots, &s.failures));
        Err(format!(
            "liveness: did not converge: {status:?}\nnodes {:#?}\n{:#?}",
            self.api.now.nodes, self.api.now.node_oses
        ))
    }

    fn second(&mut self) -> Result<(), String> {
        self.now += 1;
        if self.now == 1_000 + FAULTY {
            self.calm();
        }
        self.disturb();
        let names: Vec<String> = self.hosts.keys().cloned().collect();
        names.iter().try_for_each(|name| self.check(name))?;
        // Several turns a second, in any order, so that writes of all parties interleave.
        for _ in 0..3 {
            for at in 0..self.operators.len() {
                for _ in 0..self.rng.usize(0..4) {
                    self.operator(at)?;
                }
            }
            let host = names[self.rng.usize(0..names.len())].clone();
            self.daemon(&host)?;
            self.check(&host)?;
        }
        for name in &names {
            self.kubelet(name);
            self.host(name);
            self.check(name)?;
            self.daemon(name)?;
            self.check(name)?;
        }
        Ok(())
    }

    /// The faults end. What is left must converge by itself.
    fn calm(&mut self) {
        self.say("---- faults end".into());
        self.cut_off.clear();
        self.outage_until = 0;
        self.operators.iter_mut().for_each(|o| o.skew = 0);
        for host in self.hosts.values_mut() {
            host.silent = false;
        }
        self.api.edit_image(|i| i.spec.rollout.paused = false, true);
        let names: Vec<String> = self.hosts.keys().cloned().collect();
        for name in names {
            let person = self.user_cordons.remove(&name);
            self.api.edit_node(&name, |n| {
                n.selected = true;
                n.unschedulable &= !person;
            });
        }
    }

    fn disturb(&mut self) {
        let names: Vec<String> = self.hosts.keys().cloned().collect();
        let any = names[self.rng.usize(0..names.len())].clone();
        if self.chance(self.faults.partitions, 3) {
            let until = self.now + self.rng.u64(1..60);
            self.say(format!("{any} is cut off from the API server until {until}s"));
            self.cut_off.insert(any.clone(), until);
        }
        if self.chance(self.faults.boot_faults, 1) && self.hosts[&any].up {
            self.say(format!("{any} loses power"));
            self.reboot(&any);
        }
        if self.chance(self.faults.crashes, 4) {
            self.hosts.get_mut(&any).unwrap().daemon_restarts();
        }
        if self.chance(self.faults.clock_jumps, 2) {
            let at = self.rng.usize(0..self.operators.len());
            let skew = if self.rng.bool() { self.rng.i64(-600..600) } else { 0 };
            self.operators[at].skew = skew;
            self.say(format!("the clock of operator {at} is {skew} s ahead"));
        }
        if self.chance(self.faults.outages, 1) {
            self.outage_until = self.now + self.rng.u64(1..60);
            self.say(format!("nobody reaches the API server until {}s", self.outage_until));
        }
        if self.is_out() {
            return;
        }
        if self.chance(self.faults.edits, 3) {
            self.edit(&any);
        }
        if self.chance(self.faults.churn, 2) {
            self.come_or_go(&any);
        }
    }

    fn is_out(&self) -> bool {
        self.now < self.outage_until
    }

    /// A node leaves with its machine, a new one joins, or another machine takes the name of one.
    fn come_or_go(&mut self, node: &str) {
        let kind = self.rng.u32(0..3);
        if kind != 1 && (self.hosts.len() > 1 || kind == 2) {
            self.say(format!("{node} is deleted"));
            self.api.remove_node(node);
            self.hosts.remove(node);
            self.up_at.remove(node);
            self.user_cordons.remove(node);
            self.disrupted.remove(node);
        }
        if kind != 0 {
            self.machines += 1;
            let name = if kind == 1 { format!("x{}", self.machines) } else { node.to_owned() };
            self.say(format!("{name} joins"));
            let (node, host) = machine(&name, self.machines, &mut self.rng);
            self.api.add_node(&name, node);
            self.hosts.insert(name, host);
        }
    }

    fn edit(&mut self, node: &str) {
        let kind = self.rng.u32(0..8);
        self.say(format!("somebody makes edit {kind} ({node})"));
        match kind {
            0 => self.api.edit_image(|i| i.spec.rollout.paused ^= true, true),
            1 => {
                let to = commit([OLD, NEW, OTHER][self.rng.usize(0..3)]);
                self.api.edit_image(|i| i.spec.image.ostree.commit = to, true);
            }
            2 => self.api.edit_node(node, |n| n.selected ^= true),
            3 => {
                if !self.api.now.nodes[node].unschedulable {
                    self.user_cordons.insert(node.into());
                    self.api.edit_node(node, |n| n.unschedulable = true);
                }
            }
            4 => {
                if self.user_cordons.remove(node) {
                    self.api.edit_node(node, |n| n.unschedulable = false);
                }
            }
            5 => {
                self.retries += 1;
                let token = self.retries.to_string();
                let set = |i: &mut OSImage| {
                    i.metadata.annotations.get_or_insert_default().insert(names::RETRY.into(), token);
                };
                self.api.edit_image(set, false);
            }
            6 => {
                let pod = pod(node, self.rng.usize(10..1000), self.rng.bool());
                if !self.api.now.nodes[node].unschedulable {
                    self.api.edit_node(node, |n| n.pods.push(pod));
                }
            }
            _ => {
                if let Some(object) = self.api.now.node_oses.get(node).cloned() {
                    let _ = self.api.delete_node_os(&object);
                }
            }
        }
    }

    // ---- hosts and kubelets ---------------------------------------------------------------------------

    fn reboot(&mut self, name: &str) {
        self.hosts.get_mut(name).unwrap().go_down();
        let late = if self.chance(self.faults.boot_faults, 10) { 60 } else { 0 };
        self.up_at.insert(name.into(), self.now + late + self.rng.u64(1..5));
    }

    fn host(&mut self, name: &str) {
        let now = self.now;
        if self.hosts[name].up {
            if self.hosts.get_mut(name).unwrap().guard_tick(now) {
                self.say(format!("{name}: the guard rolls back"));
                self.reboot(name);
            }
            return;
        }
        if self.up_at.get(name).is_some_and(|at| *at > now) {
            return;
        }
        let trial = self.hosts[name].deployments.iter().any(|d| d.staged);
        let how = match self.rng.u32(0..10) {
            0 if self.chance(self.faults.boot_faults && trial, 100) => Boot::FellBack,
            1 if self.chance(self.faults.boot_faults && trial, 100) => Boot::NotFinalized,
            _ => Boot::Normal,
        };
        let silent = self.chance(self.faults.boot_faults, 8);
        let host = self.hosts.get_mut(name).unwrap();
        host.come_up(how, now);
        host.silent = silent;
        let text = format!("{name}: boots {:?} ({how:?}{})", host.booted(), if silent { ", silent" } else { "" });
        self.say(text);
    }

    fn kubelet(&mut self, name: &str) {
        if self.is_out() {
            return;
        }
        let host = &self.hosts[name];
        let (up, boot_id) = (host.up, host.boot_id());
        self.api.edit_node(name, |n| {
            n.ready = up;
            if up {
                n.boot_id = boot_id;
                n.pods.retain(|p| !p.terminating);
            }
        });
    }

    fn daemon(&mut self, name: &str) -> Result<(), String> {
        let connected = self.cut_off.get(name).is_none_or(|until| *until < self.now) && !self.is_out();
        let back = if self.chance(self.faults.stale, 30) { self.rng.usize(0..15) } else { 0 };
        let crash = self.chance(self.faults.crashes, 5);
        let flap = self.chance(self.faults.boot_faults, 5);
        let seen = self.api.cached(back).node_oses.get(name).cloned();
        let now = self.now;
        let host = self.hosts.get_mut(name).unwrap();
        if !host.up || host.silent {
            return Ok(());
        }
        self.steps += 1;
        if connected {
            let seen = if back == 0 || host.hears_first() { self.api.now.node_oses.get(name).cloned() } else { seen };
            // That it is gone is never old news: before it was made nobody told of it.
            let gone = seen.is_none() && self.api.now.node_oses.contains_key(name);
            if !gone {
                host.hear(seen.as_deref());
            }
        }
        let healthy = *host.booted() != commit(BAD) && !flap;
        let (state, plan) = host.decide(now, healthy, self.faults.broken);
        if let Some(status) = host.report(&state, &plan).filter(|_| connected) {
            self.api.write_node_status(name, status);
        }
        let Some(step) = plan.step else { return Ok(()) };
        let record = state.record.clone();
        let reboot = step == HostStep::Reboot;
        self.say(format!("{name}: {}{}", short(&step), if crash { " (crashes in it)" } else { "" }));
        self.may_act(name, &step, record.as_ref())?;
        let host = self.hosts.get_mut(name).unwrap();
        host.carry_out(step, crash);
        if crash {
            host.daemon_restarts();
        }
        if reboot {
            self.reboot(name);
        }
        Ok(())
    }

    /// No step towards the new commit without a slot of exactly this attempt. The way back is always free.
    fn may_act(&self, name: &str, step: &HostStep, record: Option<&Record>) -> Result<(), String> {
        let attempt = match (step, record) {
            (HostStep::Arm(record), _) => &record.attempt,
            (HostStep::Stage(_), Some(record)) => &record.attempt,
            (HostStep::Reboot, Some(record)) if record.boot_id == self.hosts[name].boot_id() => &record.attempt,
            _ => return Ok(()),
        };
        let status = self.api.now.image.status.clone().unwrap_or_default();
        let slot = status.slots.iter().find(|s| s.node == name && s.attempt == *attempt);
        match slot {
            Some(slot) if slot.boot_id != self.hosts[name].boot_id() => {
                Err(format!("permit: {name} does {} for {attempt} on another boot than that of its slot", short(step)))
            }
            Some(slot) if slot.permitted.is_some() && slot.outcome.is_none() => Ok(()),
            slot => Err(format!("permit: {name} does {} for {attempt} with slot {slot:?}", short(step))),
        }
    }

    // ---- operators ------------------------------------------------------------------------------------

    /// What an operator plans on; and the truth beside it, where a rule is broken on purpose.
    fn observe(&mut self, at: usize) -> (Fleet, Option<Fleet>) {
        let back = if self.chance(self.faults.stale, 50) { self.rng.usize(0..20) } else { 0 };
        let allowed = if self.faulty() { self.rng.i32(0..2) } else { 1 };
        let cached = if back == 0 { &self.api.now } else { self.api.cached(back) };
        // Nodes in slots are read from the API server itself, at the same version of the slot book.
        let book = self.api.now.image.status.clone().unwrap_or_default();
        let in_slot = |n: &str| book.slots.iter().any(|s| s.node == n);
        let mut names: BTreeSet<&str> = cached.nodes.keys().chain(cached.node_oses.keys()).map(|n| &**n).collect();
        names.extend(book.slots.iter().map(|s| s.node.as_str()));
        let view = |n: &str| if in_slot(n) { self.api.now.view(n) } else { cached.view(n) };
        let nodes = names.into_iter().map(|n| (n.to_string(), view(n)));
        let mut fleet = Fleet {
            nodes: nodes.collect(),
            image: OSImage::clone(&self.api.now.image),
            existing_images: BTreeSet::from(["0a1b2c3d-0000".to_owned()]),
            operator_node: None,
            refuges: BTreeSet::new(),
            refusals: self.operators[at].refusals.clone(),
            gates: vec![],
        };
        fleet.image.metadata.finalizers = Some(vec![names::FINALIZER.into()]);
        let truth = self.faults.broken.map(|mutant| {
            let truth = fleet.clone();
            mutant.blind(&mut fleet);
            truth
        });
        for name in rollout::inspect(&fleet, self.timestamp(at)) {
            let Some(node) = fleet.nodes.get_mut(&name) else { continue };
            let mut pods = self.api.now.nodes.get(name.as_str()).map(|n| n.pods.clone()).unwrap_or_default();
            pods.iter_mut().flat_map(|p| &mut p.budgets).for_each(|b| b.allowed = allowed);
            node.pods = Some(pods);
        }
        (fleet, truth)
    }

    /// The time by the clock of an operator.
    fn timestamp(&self, at: usize) -> Timestamp {
        Timestamp::from_second(self.now as i64 + self.operators[at].skew).unwrap()
    }

    fn operator(&mut self, at: usize) -> Result<(), String> {
        self.steps += 1;
        if self.chance(self.faults.crashes, 3) {
            let skew = self.operators[at].skew;
            self.operators[at] = Operator { skew, ..Operator::default() };
            return Ok(());
        }
        if self.is_out() {
            self.operators[at].queue.clear();
            return Ok(());
        }
        let Some(op) = self.operators[at].queue.pop_front() else {
            let (fleet, truth) = self.observe(at);
            let Plan { status, steps, holds: _, wake: _ } = rollout::plan(&fleet, self.timestamp(at));
            may_start(truth.as_ref().unwrap_or(&fleet), &status, self.timestamp(at))?;
            let changed = Some(&status) != fleet.image.status.as_ref();
            let write = changed.then(|| Op::Status(fleet.image.metadata.resource_version.clone(), Box::new(status)));
            self.operators[at].queue = write.into_iter().chain(steps.into_iter().map(Op::Do)).collect();
            return Ok(());
        };
        let lost = self.chance(self.faults.lost_writes, 4);
        let node = match &op {
            Op::Do(Step::Cordon { node, .. } | Step::Uncordon { node, .. }) => Some(node.clone()),
            Op::Do(_) | Op::Status(..) => None,
        };
        let done = self.carry_out(at, op)?;
        if let Some(node) = node {
            self.check(&node)?;
        }
        if done.is_err() || lost {
            self.operators[at].queue.clear();
        }
        Ok(())
    }

    fn carry_out(&mut self, at: usize, op: Op) -> Result<Result<(), Conflict>, String> {
        Ok(match op {
            Op::Status(read_at, status) => {
                self.may_reserve(&status, read_at.as_deref())?;
                let slots: Vec<String> = status
                    .slots
                    .iter()
                    .map(|s| {
                        format!(
                            "{} {} {:?}{}",
                            s.node,
                            s.attempt,
                            s.commit,
                            if s.permitted.is_some() { " permitted" } else { "" }
                        )
                    })
                    .collect();
                let done = self.api.write_image_status(read_at.as_deref(), *status);
                self.say(format!("operator {at}: book {slots:?} {}", if done.is_ok() { "" } else { "CONFLICT" }));
                done
            }
            Op::Do(step) => {
                let text = format!("operator {at}: {}", named(&step));
                let done = self.step(at, step)?;
                self.say(format!("{text} {}", if done.is_ok() { "" } else { "CONFLICT" }));
                done
            }
        })
    }

    fn step(&mut self, at: usize, step: Step) -> Result<Result<(), Conflict>, String> {
        let same = |world: &World, node: &str, version: &str| {
            world.api.now.nodes.get(node).is_some_and(|n| n.version.to_string() == version)
        };
        Ok(match step {
            Step::AddFinalizer | Step::RemoveFinalizer => Ok(()),
            Step::CreateNodeOS(object) => self.api.create_node_os(*object),
            Step::DeleteNodeOS(object) => self.api.delete_node_os(&object),
            Step::UpdateNodeOS { object, change } => {
                let done = self.api.update_node_os(&object);
                let forced = self.api.now.image.spec.drain.on_timeout == OnDrainTimeout::Force;
                if done.is_ok() && change == Change::Permit && !forced {
                    self.is_drained(&object)?;
                }
                done
            }
            Step::Cordon { node, owner, annotate: _, resource_version } => {
                if !same(self, &node, &resource_version) {
                    return Ok(Err(Conflict));
                }
                self.api.edit_node(&node, |n| (n.unschedulable, n.cordoned_by) = (true, Some(owner)));
                self.api.writes += 1;
                Ok(())
            }
            Step::Uncordon { node, remove: _, resource_version } => {
                if !same(self, &node, &resource_version) {
                    return Ok(Err(Conflict));
                }
                self.api.edit_node(&node, |n| (n.unschedulable, n.cordoned_by) = (false, None));
                self.api.writes += 1;
                Ok(())
            }
            Step::Delete { node, pods, grace_period_seconds: _ } => {
                self.api.edit_node(&node, |n| {
                    n.pods
                        .iter_mut()
                        .filter(|p| pods.iter().any(|d| d.uid == p.uid))
                        .for_each(|p| p.terminating = true);
                });
                Ok(())
            }
            Step::Evict { node, pods, grace_period_seconds: _ } => {
                for pod in pods {
                    let refused = self.chance(true, 20);
                    if refused {
                        self.operators[at].refusals.insert(pod.uid, "not now".into());
                        continue;
                    }
                    let stop = |n: &mut Node| {
                        n.pods.iter_mut().filter(|p| p.uid == pod.uid).for_each(|p| p.terminating = true)
                    };
                    self.api.edit_node(&node, stop);
                }
                Ok(())
            }
        })
    }

    // ---- invariants -----------------------------------------------------------------------------------

    /// After everything that is done to a node: never more nodes disrupted by us than allowed; the way back is kept; a
    /// person's cordon stays.
    fn check(&mut self, name: &str) -> Result<(), String> {
        let (Some(node), Some(host)) = (self.api.now.nodes.get(name), self.hosts.get(name)) else { return Ok(()) };
        let trial = host.record.as_ref().filter(|r| !r.finished());
        let rebooted = trial.is_some_and(|r| r.boot_id != host.boot_id() || !host.up);
        match node.cordoned_by.is_some() || rebooted {
            true => self.disrupted.insert(name.into()),
            false => self.disrupted.remove(name),
        };
        if let Some(record) = trial.filter(|_| host.up)
            && !host.deployments.iter().any(|d| d.commit == record.previous)
        {
            return Err(format!("way back: {name}: the previous deployment is gone during {}", record.attempt));
        }
        if self.user_cordons.contains(name) && !node.unschedulable {
            return Err(format!("cordon: {name}: we uncordoned what a person cordoned"));
        }
        let rollout = &self.api.now.image.spec.rollout;
        let disrupted = &self.disrupted;
        if rollout.topology_key.is_some() {
            let zones: BTreeSet<&str> =
                disrupted.iter().map(|n| self.api.now.nodes[n.as_str()].zone.as_str()).collect();
            if zones.len() > 1 {
                return Err(format!("topology: {disrupted:?} are disrupted by us in two zones"));
            }
        }
        let IntOrString::Int(max) = rollout.max_unavailable else { unreachable!() };
        match disrupted.len() > max as usize {
            true => Err(format!("budget: {disrupted:?} are disrupted by us, but only {max} may be")),
            false => Ok(()),
        }
    }

    /// A slot is taken only for a commit and a node that have not failed.
    fn may_reserve(&self, status: &OSImageStatus, read_at: Option<&str>) -> Result<(), String> {
        if self.api.now.image.metadata.resource_version.as_deref() != read_at {
            return Ok(());
        }
        let before = self.api.now.image.status.clone().unwrap_or_default();
        for slot in &status.slots {
            if before.slots.iter().any(|s| s.attempt == slot.attempt) {
                continue;
            }
            if status.rejected.iter().any(|r| r.commit == slot.commit) {
                return Err(format!("rejected: slot {} for the rejected commit {:?}", slot.attempt, slot.commit));
            }
            if status.failures.iter().any(|f| f.commit == slot.commit && f.node == slot.node) {
                return Err(format!(
                    "rejected: slot {} for node {} that failed on {:?}",
                    slot.attempt, slot.node, slot.commit
                ));
            }
        }
        Ok(())
    }

    /// A permit is given only to an empty node. One for a boot that is over is dead: that nobody obeys it is checked
    /// where hosts act.
    fn is_drained(&self, object: &NodeOS) -> Result<(), String> {
        let node = self.api.now.nodes.get(object.metadata.name.as_deref().unwrap());
        let boot_id = object.spec.permit.as_ref().map(|p| p.boot_id.as_str());
        match node.filter(|n| !n.pods.is_empty() && boot_id == Some(n.boot_id.as_str())) {
            None => Ok(()),
            Some(node) => Err(format!("drain: a permit was given with pods on the node: {:?}", node.pods)),
        }
    }

    /// Everything is as it shall be: nodes on the commit, or the rollout halted, and nothing of ours left.
    fn settled(&self) -> bool {
        let Some(status) = &self.api.now.image.status else { return false };
        let ended = match status.phase {
            Some(Phase::Updated) => true,
            Some(Phase::Halted) => self.hosts.values().all(|h| h.record.as_ref().is_none_or(Record::finished)),
            _ => false,
        };
        let clean = self.api.now.nodes.values().all(|n| n.cordoned_by.is_none() && n.ready);
        let idle = self.operators.iter().all(|o| o.queue.is_empty());
        ended && clean && idle && status.slots.is_empty() && self.hosts.values().all(|h| h.up)
    }

    /// At rest nothing is written, by anybody.
    fn rest(&mut self) -> Result<(), String> {
        for _ in 0..30 {
            self.second()?;
        }
        let before = self.api.writes;
        for _ in 0..60 {
            self.second()?;
        }
        if self.api.writes != before {
            return Err(format!("rest: {} writes at rest", self.api.writes - before));
        }
        let status = self.api.now.image.status.clone().unwrap_or_default();
        let target = self.api.now.image.spec.image.ostree.commit.clone();
        let on_target = self.hosts.values().filter(|h| *h.booted() == target).count();
        match status.phase {
            Some(Phase::Updated) if on_target != self.hosts.len() => Err("status: says Updated, but is not".into()),
            Some(Phase::Halted) if target == commit(BAD) && on_target > 0 => {
                Err(format!("rejected: {on_target} nodes were left on the bad commit"))
            }
            _ => Ok(()),
        }
    }
}

/// A slot is taken only while, as far as was seen, the selected nodes that are down for any cause leave room, and the
/// waves before that of the node are complete and have soaked.
fn may_start(seen: &Fleet, status: &OSImageStatus, now: Timestamp) -> Result<(), String> {
    let before = seen.status();
    let new: Vec<&str> = status
        .slots
        .iter()
        .filter(|s| !before.slots.iter().any(|b| b.attempt == s.attempt))
        .map(|s| s.node.as_str())
        .collect();
    if new.is_empty() {
        return Ok(());
    }
    new.iter().try_for_each(|node| wave_has_begun(seen, status, node, now))?;
    let IntOrString::Int(max) = seen.image.spec.rollout.max_unavailable else { unreachable!() };
    let in_slot = |name: &str| status.slots.iter().any(|s| s.node == name);
    let out = |n: &NodeView| n.exists && (in_slot(&n.name) || (n.selected && (!n.ready || n.unschedulable)));
    let out: Vec<&str> = seen.nodes.values().filter(|n| out(n)).map(|n| n.name.as_str()).collect();
    match out.len() > max as usize {
        true => Err(format!("budget: {new:?} is begun while {out:?} are in slots or down, but only {max} may be")),
        false => Ok(()),
    }
}

fn wave_has_begun(seen: &Fleet, status: &OSImageStatus, node: &str, now: Timestamp) -> Result<(), String> {
    let spec = &seen.image.spec.rollout;
    let mut order: Vec<&NodeView> = seen.nodes.values().filter(|n| n.exists && n.selected).collect();
    order.sort_by_key(|n| (spec.topology_key.as_ref().map(|key| n.labels.get(key)), &n.name));
    let mut place = order.iter().position(|n| n.name == node).unwrap_or(usize::MAX);
    for wave in &spec.waves {
        let Some(IntOrString::Int(size)) = wave.size else { unreachable!() };
        if place < size as usize {
            return Ok(());
        }
        place -= size as usize;
        let known = status.rollout.iter().flat_map(|r| &r.waves).find(|w| w.name == wave.name);
        let completed = known.and_then(|w| w.completed.as_ref()).map(|at| at.0.as_second());
        if completed.is_none_or(|at| at + SOAK as i64 > now.as_second()) {
            return Err(format!(
                "waves: {node} is begun at {now}, but wave {} was complete at {completed:?}",
                wave.name
            ));
        }
    }
    Ok(())
}

/// A new node, on the old commit.
fn machine(name: &str, machine: u64, rng: &mut Rng) -> (Node, Host) {
    let host = Host::new(name, machine, &commit(OLD));
    let pods = (0..rng.usize(0..3)).map(|p| pod(name, p, rng.bool())).collect();
    let zone = format!("z{}", rng.u32(0..2));
    let node = Node { ready: true, selected: true, zone, boot_id: host.boot_id(), pods, ..Node::default() };
    (node, host)
}

fn pod(node: &str, number: usize, guarded: bool) -> PodFacts {
    let budgets =
        if guarded { vec![BudgetFacts { name: "pdb".into(), allowed: 1, lets_unready: false }] } else { vec![] };
    let name = format!("{node}-pod-{number}");
    PodFacts { namespace: "web".into(), uid: name.clone(), name, budgets, ..PodFacts::default() }
}

fn short(step: &HostStep) -> String {
    match step {
        HostStep::Pull(image) => format!("pull {:?}", image.ostree.commit),
        HostStep::Release { keep } => format!("release all but {keep:?}"),
        HostStep::Arm(r) => format!("arm {} {:?}", r.attempt, r.commit),
        HostStep::Stage(image) => format!("stage {:?}", image.ostree.commit),
        HostStep::Reboot => "reboot".into(),
        HostStep::Disarm => "disarm".into(),
        HostStep::Confirm(r) => format!("confirm {}", r.attempt),
        HostStep::Close(r) => format!("close {} {:?}", r.attempt, r.stage),
        HostStep::RollBack(r) => format!("roll back {}", r.attempt),
    }
}

fn named(step: &Step) -> String {
    match step {
        Step::AddFinalizer => "add finalizer".into(),
        Step::RemoveFinalizer => "remove finalizer".into(),
        Step::CreateNodeOS(o) => format!("create {}", o.metadata.name.as_deref().unwrap()),
        Step::DeleteNodeOS(o) => format!("delete {}", o.metadata.name.as_deref().unwrap()),
        Step::UpdateNodeOS { object, change } => format!("{change:?} {}", object.metadata.name.as_deref().unwrap()),
        Step::Cordon { node, .. } => format!("cordon {node}"),
        Step::Uncordon { node, .. } => format!("uncordon {node}"),
        Step::Delete { node, pods, .. } => format!("delete {} pods of {node}", pods.len()),
        Step::Evict { node, pods, .. } => format!("evict {} pods of {node}", pods.len()),
    }
}
