//! Fits a program into a limit of memory: decides what the forward keeps and what the backward computes again.
//!
//! The judge is the real plan of the lowered program at concrete dims, scratch and weights included.  The pass
//! `recompute` gives, for any price of memory, the set of nodes that is best at that price; here the price is searched:
//!
//! ```text
//! price 0 ────────── lower ─┊─ upper ────────── ∞        the plan of `lower` is too large, that of `upper` fits
//! nodes of the forward      first ──────┊────── last     decided as in `upper` up to here, as in `lower` from here on
//! ```
//! First by bisection of the price, which brings the two sets together up to ties: equal layers change their mind at
//! the same price.  Ties are then broken by bisection over nodes in the forward's order, earlier first: what was made
//! earlier lies longer in memory.  A value has a price only if throwing it away frees memory where the plan is too full;
//! if that does not lead below the limit, every value has one; where even that is too much, inputs of layers are given up
//! (`recompute_layers`), as few as it takes, by bisection of how many are held at once.  About 30 plans are made, and nothing
//! is measured, so the same limit gives the same program on every machine.

use crate::cuda::{self, EmitError, emit};
use crate::lower::lower_for;
use crate::plan::{MemoryPlan, Scratch, plan};
use crate::program::Program;
use crate::traits::Kernels;
use rambac_ir::{Bindings, Cost, DimError, Graph, NodeId};
use rambac_passes::autodiff::GRAD;
use rambac_passes::recompute::{candidates, choose, free_between, layer};
use rambac_passes::{Options, Recompute, Target, pipeline, recompute};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How much memory a program may take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// Whatever keeping every value takes.
    #[default]
    Keep,
    /// As little as recomputing everything takes.
    Recompute,
    /// At most so many bytes at each of these dims, at the least cost in time.
    Within { limit: usize, dims: Vec<Bindings> },
}

/// Whose program and memory it is about.
#[derive(Clone, Debug)]
pub enum Machine {
    /// A CPU, whose kernels take such scratch.
    Cpu(Scratch),
    /// A GPU, whose forms say what workspace they take.
    Gpu(cuda::Target),
}

impl Machine {
    /// Lowers an optimised graph and plans it at each of `dims`.
    ///
    /// # Errors
    /// A dim without a value; a step that can't run there.
    pub fn plans(&self, g: &Graph, dims: &[Bindings]) -> Result<(Program, Vec<MemoryPlan>), FitError> {
        match self {
            Machine::Cpu(scratch) => {
                let program = lower_for(g, Kernels::Cpu);
                let plans = dims.iter().map(|d| plan(&program, d, *scratch)).collect::<Result<_, _>>()?;
                Ok((program, plans))
            }
            Machine::Gpu(target) => {
                let program = Arc::new(lower_for(g, Kernels::Gpu));
                let gpu = emit(program.clone(), target.clone())?;
                let plans = dims.iter().map(|d| gpu.plan(d)).collect::<Result<_, _>>()?;
                drop(gpu);
                Ok((Arc::unwrap_or_clone(program), plans))
            }
        }
    }
    /// Its rates, for prices of memory.
    pub fn rates(&self) -> Target {
        match self {
            Machine::Cpu(_) => Target::default(),
            Machine::Gpu(_) => Target::GPU,
        }
    }
}

/// Why no program fits.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error(transparent)]
    Emit(#[from] EmitError),
    #[error(
        "{program} at {dims} does not fit into {}: recomputing all that can be recomputed it still needs {}: {} of \
         activations and scratch, fullest at {fullest}, and {} of weights, optimiser and inputs",
        mib(*limit), mib(*least), mib(*arena), mib(least - arena)
    )]
    TooSmall { program: String, dims: Bindings, limit: usize, least: usize, arena: usize, fullest: String },
}

/// For messages, rounded up: what is promised must suffice.
fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", (bytes as f64 / f64::from(1 << 20) * 10.0).ceil() / 10.0)
}

/// A decision and what it rests on.
#[derive(Clone, Debug)]
pub struct Fit {
    /// The graph before recomputation, whose nodes the decision names.
    pub prepared: Graph,
    /// Nodes that are computed again.
    pub again: BTreeSet<NodeId>,
    /// Inputs of layers that are held at once; 0: all are.
    pub held: usize,
    /// The dims that need most memory.
    pub dims: Bindings,
    /// Plans at these dims, and work, if everything is kept, and as decided.
    pub kept: (MemoryPlan, Cost),
    pub fitted: (MemoryPlan, Cost),
}

/// A candidate: the program, its plan and the dims at which it needs most.
struct Tried {
    again: BTreeSet<NodeId>,
    program: Program,
    plan: MemoryPlan,
    dims: Bindings,
}

impl Tried {
    fn cost(&self) -> Result<Cost, FitError> {
        Ok(self.program.costs(&self.dims)?.into_iter().sum())
    }
}

struct Search<'a> {
    prepared: Graph,
    dims: &'a [Bindings],
    machine: &'a Machine,
    options: &'a Options,
    held: usize,
    /// Bytes that the program's own plan may take.
    limit: usize,
}

impl Search<'_> {
    fn attempt(&self, what: Recompute, again: BTreeSet<NodeId>) -> Result<Tried, FitError> {
        let options = Options { recompute: what, held: self.held, ..self.options.clone() };
        let (program, plans) = self.machine.plans(&pipeline::complete(&self.prepared, &options), self.dims)?;
        let mut worst: Option<(MemoryPlan, &Bindings)> = None;
        for (p, d) in plans.into_iter().zip(self.dims) {
            if worst.as_ref().is_none_or(|(w, _)| p.peak() > w.peak()) {
                worst = Some((p, d));
            }
        }
        let (plan, dims) = worst.expect("BUG: a limit holds at some dims");
        Ok(Tried { again, program, plan, dims: dims.clone() })
    }
    fn nodes(&self, again: BTreeSet<NodeId>) -> Result<Tried, FitError> {
        self.attempt(Recompute::Nodes(again.clone()), again)
    }
    fn fits(&self, t: &Tried) -> bool {
        t.plan.peak() <= self.limit
    }

    /// For each node, whether throwing its values away frees memory where `kept` is too full.
    fn in_the_way(&self, kept: &Tried) -> Vec<bool> {
        let phase = |scope: Option<&str>| scope.is_some_and(|s| s == GRAD || s.starts_with("grad."));
        // Where a part of the graph lies: first and last node of every layer, forward and backward.
        let mut parts: BTreeMap<(Option<&str>, bool), (NodeId, NodeId)> = BTreeMap::new();
        for (id, n) in self.prepared.iter() {
            parts.entry((layer(n), phase(n.scope.as_deref()))).or_insert((id, id)).1 = id;
        }
        let room = self.limit.saturating_sub(kept.plan.persistent + kept.plan.inputs);
        let full: BTreeSet<(NodeId, NodeId)> = kept
            .program
            .steps
            .iter()
            .zip(&kept.plan.alive)
            .filter(|(_, alive)| **alive > room)
            .filter_map(|(s, _)| {
                let n = kept.program.graph.node(s.node);
                parts.get(&(layer(n), phase(n.scope.as_deref()))).copied()
            })
            .collect();
        let frees = |(last, first): (NodeId, NodeId)| full.iter().any(|(from, to)| last < *from && *to < first);
        free_between(&self.prepared).into_iter().map(|f| f.is_some_and(frees)).collect()
    }

    /// The cheapest that fits if `priced` values have a price; if none does, what needs least of all.
    fn cheapest(&self, kept: &Tried, priced: &[bool]) -> Result<Result<Tried, Tried>, FitError> {
        let target = &self.machine.rates();
        let at =
            |price: f64| choose(&self.prepared, &kept.dims, target, |n| if priced[n.index()] { price } else { 0.0 });
        let mut upper = self.nodes(at(f64::INFINITY)?)?;
        if !self.fits(&upper) {
            return Ok(Err(upper));
        }
        let mut lower = BTreeSet::new();
        // Seconds per byte: a copy takes 4e-11 of them, a matrix product of a wide model some 1e-8.
        let (mut low, mut high) = (1e-14f64, 1e-5f64);
        for _ in 0..16 {
            let price = (low * high).sqrt();
            let again = at(price)?;
            if again == upper.again {
                high = price;
            } else if again == lower {
                low = price;
            } else {
                let t = self.nodes(again)?;
                if self.fits(&t) {
                    (upper, high) = (t, price);
                } else {
                    (lower, low) = (t.again, price);
                }
            }
        }
        let ties: Vec<NodeId> = upper.again.symmetric_difference(&lower).copied().collect();
        let end = upper.again.clone();
        // Decided as in `end` before ties[i], as in `lower` from there on: too large at 0, fits at the end.
        let (mut few, mut enough) = (0, ties.len());
        while few + 1 < enough {
            let middle = (few + enough) / 2;
            let border = ties[middle];
            let early = end.iter().filter(|id| **id < border);
            let t = self.nodes(early.chain(lower.iter().filter(|id| **id >= border)).copied().collect())?;
            if self.fits(&t) {
                (upper, enough) = (t, middle);
            } else {
                few = middle;
            }
        }
        Ok(Ok(upper))
    }

    /// Where the inputs of layers are too much even if all else is computed again: sets `held` to the most of them that fit, in
    /// as few levels of groups as that takes.  If none do, what needs least, if there are several layers at all.
    fn hold_less(&mut self) -> Result<Option<Tried>, FitError> {
        let (all, mut many) = (candidates(&self.prepared), recompute::layers(&self.prepared).len());
        let mut least: Option<Tried> = None;
        for levels in 1..=recompute::LEVELS {
            let mut enough = recompute::least_held(many.max(1), levels);
            if enough >= many {
                break;
            }
            self.held = enough;
            let t = self.nodes(all.clone())?;
            if !self.fits(&t) {
                least = least.filter(|l| l.plan.peak() <= t.plan.peak()).or(Some(t));
                continue;
            }
            while enough + 1 < many {
                self.held = enough.midpoint(many);
                if self.fits(&self.nodes(all.clone())?) {
                    enough = self.held;
                } else {
                    many = self.held;
                }
            }
            self.held = enough;
            return Ok(None);
        }
        self.held = 0;
        Ok(least)
    }

    fn decided(self, kept: Tried, best: Tried) -> Result<Fit, FitError> {
        let costs = (kept.cost()?, best.cost()?);
        Ok(Fit {
            prepared: self.prepared,
            again: best.again,
            held: self.held,
            dims: best.dims,
            kept: (kept.plan, costs.0),
            fitted: (best.plan, costs.1),
        })
    }

    fn too_small(&self, name: &str, least: &Tried, limit: usize, reserved: usize) -> FitError {
        let fullest = least.plan.fullest().map_or("no step".into(), |s| {
            let step = &least.program.steps[s];
            let scope = least.program.graph.node(step.node).scope.as_deref();
            format!("{}{}", step.op.mnemonic(), scope.map(|s| format!(" @{s}")).unwrap_or_default())
        });
        FitError::TooSmall {
            program: name.to_string(),
            dims: least.dims.clone(),
            limit,
            least: least.plan.peak() + reserved,
            arena: least.plan.arena,
            fullest,
        }
    }
}

/// What of `g` to compute again so that it fits into `limit` bytes at each of `dims`; `reserved` bytes of them are taken
/// by others.
///
/// # Errors
/// A dim without a value; a limit below what recomputing everything needs; a step that can't run on the machine.
pub fn fit(
    g: &Graph,
    limit: usize,
    dims: &[Bindings],
    machine: &Machine,
    reserved: usize,
    options: &Options,
) -> Result<Fit, FitError> {
    let prepared = pipeline::prepare(g, options);
    let mut s = Search { prepared, dims, machine, options, held: 0, limit: limit.saturating_sub(reserved) };
    let kept = s.attempt(Recompute::Nothing, BTreeSet::new())?;
    if s.fits(&kept) {
        let best = s.nodes(BTreeSet::new())?;
        return s.decided(kept, best);
    }
    // What is in the way alone, then all values.
    let all = vec![true; s.prepared.nodes.len()];
    let mut least: Option<Tried> = None;
    for priced in [s.in_the_way(&kept), all.clone()] {
        match s.cheapest(&kept, &priced)? {
            Ok(best) => return s.decided(kept, best),
            Err(t) => least = Some(t),
        }
    }
    let held = s.hold_less()?;
    least = held.into_iter().chain(least).min_by_key(|t| t.plan.peak());
    if s.held > 0
        && let Ok(best) = s.cheapest(&kept, &all)?
    {
        return s.decided(kept, best);
    }
    let least = least.expect("BUG: something was tried");
    Err(s.too_small(&g.name, &least, limit, reserved))
}

/// The other extreme: everything that can be computed again, at `dims`.
///
/// # Errors
/// A dim without a value; a step that can't run on the machine.
pub fn everything(g: &Graph, dims: &Bindings, machine: &Machine, options: &Options) -> Result<Fit, FitError> {
    let prepared = pipeline::prepare(g, options);
    let s = Search { prepared, dims: std::slice::from_ref(dims), machine, options, held: 0, limit: 0 };
    let kept = s.attempt(Recompute::Nothing, BTreeSet::new())?;
    let all = s.nodes(candidates(&s.prepared))?;
    s.decided(kept, all)
}

/// `others`, and such recomputation that `g` takes no more than `memory`.
///
/// # Errors
/// As [`fit`].
pub fn options(
    g: &Graph,
    memory: &Memory,
    machine: &Machine,
    reserved: usize,
    others: &Options,
) -> Result<Options, FitError> {
    let (recompute, held) = match memory {
        Memory::Keep => (Recompute::Nothing, 0),
        Memory::Recompute => (Recompute::All, 0),
        Memory::Within { limit, dims } => {
            let fit = fit(g, *limit, dims, machine, reserved, others)?;
            (Recompute::Nodes(fit.again), fit.held)
        }
    };
    Ok(Options { recompute, held, ..others.clone() })
}
