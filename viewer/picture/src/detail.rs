//! What the viewer tells of one node: its line, types, cost, its other half in a training step, and the kernel it becomes; and of a
//! box: what is in it.

use crate::fold::Item;
use crate::number::{bytes, si};
use crate::scene::{Figures, Scene};
use rambac_codegen::cuda::join::ALONE;
use rambac_codegen::cuda::ops::{Site, forms};
use rambac_codegen::cuda::{Arch, Cache, GpuStep, Kernel, Target};
use rambac_codegen::nvrtc::{Nvrtc, Usage};
use rambac_codegen::program::Step;
use rambac_codegen::traits::kernel_traits;
use rambac_ir::NodeId;
use std::collections::{BTreeMap, HashSet};

/// See the module's comment.
#[derive(Clone, Debug)]
pub struct Detail {
    /// `%y = matmul`
    pub label: String,
    pub scope: Option<String>,
    pub line: String,
    /// Types of its results as written, and at the scene's sizes.
    pub types: Vec<(String, String)>,
    /// Name and number.
    pub costs: Vec<(&'static str, String)>,
    /// Nodes of the other phase.
    pub counterparts: Vec<(NodeId, String)>,
    /// Nodes that it reads, and that read it.
    pub operands: Vec<(NodeId, String)>,
    pub users: Vec<(NodeId, String)>,
}

impl Detail {
    /// Of node `id` of stage `stage`.
    pub fn of(scene: &Scene, stage: usize, id: NodeId) -> Detail {
        let s = &scene.stages[stage];
        let (g, n) = (&s.graph, s.graph.node(id));
        let f = scene.figures(stage)[id.index()];
        let name = |id: NodeId| (id, format!("{} = {}", g.label(id.result(0)), g.node(id).op.mnemonic()));
        let at = |t: &rambac_ir::Ty| t.bind(&scene.dims).map_or_else(|e| e.to_string(), |c| c.to_string());
        let mut operands: Vec<NodeId> = n.inputs.iter().map(|v| v.node).collect();
        let mut seen = HashSet::new();
        operands.retain(|id| seen.insert(*id));
        let reads = |o: &rambac_ir::Node| o.inputs.iter().any(|v| v.node == id);
        Detail {
            label: name(id).1,
            scope: n.scope.as_deref().map(str::to_string),
            line: s.lines()[id.index()].clone(),
            types: n.tys.iter().map(|t| (t.to_string(), at(t))).collect(),
            costs: costs(&f),
            counterparts: scene.counterparts(stage, id).into_iter().map(name).collect(),
            operands: operands.into_iter().map(name).collect(),
            users: g.iter().filter(|(_, o)| reads(o)).map(|(i, _)| name(i)).collect(),
        }
    }
}

fn costs(f: &Figures) -> Vec<(&'static str, String)> {
    vec![
        ("FLOPs", si(f.flops, "FLOP")),
        ("bytes moved", si(f.bytes, "B")),
        ("predicted time", si(f.seconds, "s")),
        ("results", bytes(f.memory as usize)),
    ]
}

/// What is in a box.
#[derive(Clone, Debug)]
pub struct Inside {
    pub layers: usize,
    pub nodes: usize,
    pub costs: Vec<(&'static str, String)>,
    /// Its ops, those first that take longest: name, and number with predicted time.
    pub ops: Vec<(String, String)>,
}

impl Inside {
    /// Of an item of stage `stage`.
    pub fn of(scene: &Scene, stage: usize, item: &Item) -> Inside {
        let figures = scene.figures(stage);
        let g = &scene.stages[stage].graph;
        let mut kinds: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
        let mut sum = Figures::default();
        for id in &item.nodes {
            let f = figures[id.index()];
            sum = sum + f;
            let kind = kinds.entry(g.node(*id).op.mnemonic()).or_default();
            *kind = (kind.0 + 1, kind.1 + f.seconds);
        }
        let mut kinds: Vec<_> = kinds.into_iter().collect();
        kinds.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        let op = |(name, (n, seconds)): (&str, (usize, f64))| (name.to_string(), format!("{n}, {}", si(seconds, "s")));
        Inside {
            layers: item.folded.as_ref().map_or(0, |f| f.count),
            nodes: item.nodes.len(),
            costs: costs(&sum),
            ops: kinds.into_iter().map(op).collect(),
        }
    }
}

/// How a node of the last stage runs.
#[derive(Clone, Debug)]
pub enum Runs {
    /// A source, or a view into another buffer: nothing runs.
    Nothing(&'static str),
    Step(Box<StepDetail>),
}

/// A step on the CPU and on a GPU.
#[derive(Clone, Debug)]
pub struct StepDetail {
    /// Its place in the program.
    pub step: usize,
    /// On the CPU: fused, or by its definition with the reason.
    pub cpu: String,
    /// Form and reason, or why it can't run there.
    pub gpu: Result<(String, String), String>,
    pub kernels: Vec<Kernel>,
    /// Dense products of the vendor's library.
    pub products: usize,
}

/// How node `id` of the last stage runs, on a GPU of `arch`.
pub fn runs(scene: &Scene, id: NodeId, arch: Arch) -> Runs {
    let p = &scene.program;
    let Some((i, step)) = p.steps.iter().enumerate().find(|(_, s)| s.node == id) else {
        let source = matches!(p.graph.node(id).op, rambac_ir::Op::Source(_));
        return Runs::Nothing(if source {
            "given, not computed"
        } else {
            "a view into another buffer, or written in place"
        });
    };
    let cpu = match kernel_traits(&step.op).reference {
        Some(why) => format!("by its definition: {why}"),
        None => "a kernel of runtime/cpu".to_string(),
    };
    let (gpu, kernels, products) = on_gpu(scene, step, arch);
    Runs::Step(Box::new(StepDetail { step: i, cpu, gpu, kernels, products }))
}

#[allow(clippy::type_complexity)]
fn on_gpu(scene: &Scene, step: &Step, arch: Arch) -> (Result<(String, String), String>, Vec<Kernel>, usize) {
    let target = Target::of(arch);
    // A step by itself: what one that takes a norm in would do is told by `explain`.
    let site = Site { inputs: &step.inputs, outputs: &step.outputs, target: &target, joined: &ALONE };
    let forms = match forms(&step.op, &site) {
        Ok(forms) => GpuStep { forms: forms.into(), joined: ALONE.clone() },
        Err(why) => return (Err(why.to_string()), vec![], 0),
    };
    match forms.form(&scene.dims) {
        Err(e) => (Err(e.to_string()), vec![], 0),
        Ok(f) => {
            let kernels: Vec<Kernel> = f.launches().map(|l| l.kernel.clone()).collect();
            let products = f.calls.len() - kernels.len();
            (Ok((f.name.to_string(), f.why.clone())), kernels, products)
        }
    }
}

/// Compiles a kernel for its registers, spills and shared memory: one line per number.
///
/// # Errors
/// No NVRTC on this machine; a kernel that does not compile.
pub fn resources(kernel: &Kernel, arch: Arch) -> Result<Vec<(&'static str, String)>, String> {
    let nvrtc = Nvrtc::open_any().map_err(|e| e.to_string())?;
    let compiled = Cache::standard().compile(&nvrtc, kernel, arch).map_err(|e| e.to_string())?;
    let u: Usage = compiled.usage.first().cloned().unwrap_or_default();
    let shared = u.shared + kernel.shared;
    let blocks = Target::of(arch).occupancy(kernel.threads as usize, u.registers as usize, shared as usize);
    Ok(vec![
        ("threads", kernel.threads.to_string()),
        ("registers", u.registers.to_string()),
        ("spilled bytes", (u.spill_stores + u.spill_loads).to_string()),
        ("shared memory", bytes(shared as usize)),
        ("blocks per multiprocessor", blocks.to_string()),
    ])
}
