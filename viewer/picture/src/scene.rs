//! A graph on its way through the passes, with what is known of every node at concrete sizes.

use crate::family::{Family, family};
use rambac_codegen::{MemoryPlan, Program, lower, plan};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{Bindings, Cost, DimError, Graph, Node, NodeId, text};
use rambac_passes::{Options, Target, pipeline};
use rambac_runtime::cpu::scratch;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;

/// Name of the first stage.
pub const WRITTEN: &str = "as written";

/// The graph after a pass.
pub struct Stage {
    /// The pass; [`WRITTEN`] before all.
    pub name: &'static str,
    pub graph: Graph,
    /// See [`Stage::lines`] and [`Stage::keys`]: only what is looked at is made.
    lines: OnceLock<Vec<String>>,
    keys: OnceLock<Vec<u64>>,
}

impl Stage {
    fn new(name: &'static str, graph: Graph) -> Self {
        Self { name, graph, lines: OnceLock::new(), keys: OnceLock::new() }
    }

    /// The line of every node in the graph's text.
    pub fn lines(&self) -> &[String] {
        self.lines.get_or_init(|| {
            let text = text::print(&self.graph);
            text.lines().skip(1).take(self.graph.nodes.len()).map(|l| l.trim().to_string()).collect()
        })
    }

    /// What tells nodes apart across passes, which number them anew: op, attributes, types, names and scope, and how many
    /// of the same came before.  Operands do not count, or all that follows a change would be new.
    pub fn keys(&self) -> &[u64] {
        self.keys.get_or_init(|| {
            let mut seen: HashMap<u64, u64> = HashMap::new();
            let key = |n: &Node| {
                let nth = seen.entry(local_key(n)).or_default();
                *nth += 1;
                let mut h = DefaultHasher::new();
                (local_key(n), *nth).hash(&mut h);
                h.finish()
            };
            self.graph.nodes.iter().map(key).collect()
        })
    }
}

fn local_key(n: &Node) -> u64 {
    let mut h = DefaultHasher::new();
    n.op.mnemonic().hash(&mut h);
    n.op.attrs().iter().for_each(|(k, a)| (k, a.to_string()).hash(&mut h));
    n.tys.hash(&mut h);
    n.names.hash(&mut h);
    n.scope.hash(&mut h);
    h.finish()
}

/// What a pass did to the nodes of a graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Nodes of this stage that were not there before.
    pub appeared: Vec<bool>,
    /// Nodes of the stage before that are gone.
    pub vanished: Vec<NodeId>,
}

/// What a node costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    pub flops: f64,
    /// That must cross memory.
    pub bytes: f64,
    /// Predicted from FLOPs and bytes.
    pub seconds: f64,
    /// Bytes of its results.
    pub memory: f64,
}

impl std::ops::Add for Figures {
    type Output = Figures;
    fn add(self, o: Figures) -> Figures {
        Figures {
            flops: self.flops + o.flops,
            bytes: self.bytes + o.bytes,
            seconds: self.seconds + o.seconds,
            memory: self.memory + o.memory,
        }
    }
}

/// A graph with its stages, and what the last one is compiled to.
pub struct Scene {
    /// What was opened, for people.
    pub title: String,
    pub stages: Vec<Stage>,
    pub dims: Bindings,
    pub program: Program,
    pub plan: MemoryPlan,
    /// Of every step of the program.
    pub costs: Vec<Cost>,
}

impl Scene {
    /// Runs the passes and plans at `dims`, which must give every symbol a value.
    ///
    /// # Errors
    /// A dim without a value, or one that does not divide.
    pub fn new(title: &str, graph: &Graph, dims: &Bindings) -> Result<Self, DimError> {
        let mut stages = vec![Stage::new(WRITTEN, graph.clone())];
        pipeline::optimise_with(graph, &Options::default(), |name, g| stages.push(Stage::new(name, g.clone())));
        Self::of(title, stages, dims)
    }

    /// Of graphs that are compiled already, as in an executable.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn compiled(title: &str, before: Graph, after: Graph, dims: &Bindings) -> Result<Self, DimError> {
        Self::of(title, vec![Stage::new(WRITTEN, before), Stage::new("compiled", after)], dims)
    }

    fn of(title: &str, stages: Vec<Stage>, dims: &Bindings) -> Result<Self, DimError> {
        let program = lower(&stages[stages.len() - 1].graph);
        let plan = plan(&program, dims, scratch)?;
        let costs = program.costs(dims)?;
        Ok(Self { title: title.into(), stages, dims: dims.clone(), program, plan, costs })
    }

    /// The same at other sizes.
    ///
    /// # Errors
    /// As [`new`](Self::new); the scene is then as before.
    pub fn resize(&mut self, dims: &Bindings) -> Result<(), DimError> {
        for s in &self.stages {
            s.graph.nodes.iter().flat_map(|n| &n.tys).try_for_each(|t| t.bind(dims).map(drop))?;
        }
        let plan = plan(&self.program, dims, scratch)?;
        self.costs = self.program.costs(dims)?;
        (self.plan, self.dims) = (plan, dims.clone());
        Ok(())
    }

    pub fn last(&self) -> usize {
        self.stages.len() - 1
    }

    /// What stage `s` changed.
    pub fn difference(&self, s: usize) -> Difference {
        let now = self.stages[s].keys();
        if s == 0 {
            return Difference { appeared: vec![false; now.len()], vanished: vec![] };
        }
        let before = self.stages[s - 1].keys();
        let sets = [before, now].map(|k| k.iter().copied().collect::<std::collections::HashSet<u64>>());
        Difference {
            appeared: now.iter().map(|k| !sets[0].contains(k)).collect(),
            vanished: (0..before.len()).filter(|&i| !sets[1].contains(&before[i])).map(|i| NodeId(i as u32)).collect(),
        }
    }

    /// The node of stage `to` that is the same as node `id` of stage `from`, if it is still or already there.
    pub fn same(&self, from: usize, id: NodeId, to: usize) -> Option<NodeId> {
        let key = self.stages[from].keys()[id.index()];
        self.stages[to].keys().iter().position(|k| *k == key).map(|i| NodeId(i as u32))
    }

    /// Work and memory of every node of stage `s`.
    pub fn figures(&self, s: usize) -> Vec<Figures> {
        let g = &self.stages[s].graph;
        let t = Target::default();
        let of = |(_, n): (NodeId, &Node)| -> Figures {
            let bind = |tys: &mut dyn Iterator<Item = &rambac_ir::Ty>| -> Option<Vec<_>> {
                tys.map(|t| t.bind(&self.dims).ok()).collect()
            };
            let operands = bind(&mut n.inputs.iter().map(|v| g.ty(*v)));
            let Some((x, y)) = operands.zip(bind(&mut n.tys.iter())) else { return Figures::default() };
            let memory = y.iter().map(|t| t.bytes() as f64).sum();
            // Sources are given, and views are free.
            let free = matches!(n.op, Op::Source(_) | Op::Reshape(_) | Op::Slice(_) | Op::Constant(_));
            let c = if free { Cost::default() } else { n.op.def().cost(&x, &y) };
            let seconds = (c.flops / t.flops_per_second).max(c.bytes / t.bytes_per_second);
            Figures { flops: c.flops, bytes: c.bytes, seconds, memory }
        };
        g.iter().map(of).collect()
    }

    /// The other half of a node in a training step: the backward nodes made for a forward one, or the forward ones that a
    /// backward one belongs to.  Gradient ops by their name; else those of the same layer that read what the node reads or
    /// makes.
    pub fn counterparts(&self, s: usize, id: NodeId) -> Vec<NodeId> {
        let g = &self.stages[s].graph;
        let n = g.node(id);
        if family(&n.op) == Family::Source {
            return vec![];
        }
        let (back, layer) = split_scope(n.scope.as_deref());
        let mnemonic = n.op.mnemonic();
        let gradient = |forward: &str, backward: &str| backward.strip_suffix("_grad") == Some(forward);
        let touches = |forward: NodeId, backward: &Node| {
            let f = g.node(forward);
            let computed = |v: &rambac_ir::Value| !matches!(g.node(v.node).op, Op::Constant(_));
            backward.inputs.iter().any(|v| computed(v) && (v.node == forward || f.inputs.contains(v)))
        };
        let mut named = vec![];
        let mut near = vec![];
        for (other, o) in g.iter() {
            let (other_back, other_layer) = split_scope(o.scope.as_deref());
            if other_back == back || other_layer != layer || family(&o.op) == Family::Source {
                continue;
            }
            let (f, b) = if back { (other, id) } else { (id, other) };
            if !touches(f, g.node(b)) {
                continue;
            }
            let by_name = if back { gradient(o.op.mnemonic(), mnemonic) } else { gradient(mnemonic, o.op.mnemonic()) };
            if by_name { named.push(other) } else { near.push(other) }
        }
        if named.is_empty() { near } else { named }
    }
}

/// Whether a scope is of the backward, and the layer that it is of.
pub fn split_scope(scope: Option<&str>) -> (bool, &str) {
    match scope {
        Some("grad") => (true, ""),
        Some(s) => s.strip_prefix("grad.").map_or((false, s), |rest| (true, rest)),
        None => (false, ""),
    }
}

/// What a source is: `input`, `param`, `state`.
pub fn source_kind(op: &Op) -> Option<SourceKind> {
    match op {
        Op::Source(s) => Some(s.kind),
        _ => None,
    }
}
