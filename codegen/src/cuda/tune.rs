//! Choosing among forms and tiles by measuring them.
//!
//! [`tune`] runs every candidate of a step on a device: first at small sizes, where its results must be what the op's definition
//! gives, then at the real ones, where they must be those of the other candidates.  The fastest that is right is kept in the
//! [`Cache`], and [`measured`] puts it in front of what is predicted.  What a device is, is nobody's business here: whoever has one
//! implements [`Measure`].

use super::cache::Cache;
use super::choices::{Candidate, Choice, Verdict, fingerprint, site};
use super::emit::{GpuProgram, GpuStep};
use super::expr::Expr;
use super::form::{Condition, Form, Kernel};
use super::join::ALONE;
use super::ops::{Site, candidates};
use super::target::Target;
use crate::program::{Buffer, BufferId, BufferKind, OutputSlot, Program, SourceSlot, Step, Strided, View};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DType, DimError, Graph, HostArray, NodeId, Ty};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// One run of a candidate.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Of a run after others that warmed up, without copies to and from the device.
    pub seconds: f64,
    pub results: Vec<HostArray>,
}

/// A device that candidates are measured on.
pub trait Measure {
    /// As its maker calls it; choices are kept by this name.
    fn device(&self) -> String;
    /// Runs a form of a step on operands of the types that `dims` gives it.
    ///
    /// # Errors
    /// It can't run; the candidate is refused with this text.
    fn trial(&mut self, step: &Step, form: &Form, dims: &Bindings, operands: &[HostArray]) -> Result<Trial, String>;
    /// Whether the last trial took the device with it: then what follows tells nothing of the candidates.
    fn lost(&self) -> bool {
        false
    }
}

/// Why nothing was chosen.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error("{step}: no candidate is right on {device}: {}", refused(.candidates))]
    NoneRight { step: String, device: String, candidates: Vec<Candidate> },
    /// Nothing was kept of this step.
    #[error(
        "{step}: the candidate {form} ({why}) took the device with it: {error}; what was measured of other steps is kept, and \
         --op chooses among those that are left"
    )]
    Lost { step: String, form: String, why: String, error: String },
}

fn refused(all: &[Candidate]) -> String {
    let one = |c: &Candidate| match &c.verdict {
        Verdict::Refused(why) => Some(format!("{} ({why})", c.form)),
        Verdict::Seconds(_) => None,
    };
    all.iter().filter_map(one).collect::<Vec<_>>().join("; ")
}

/// Seconds for people.
pub(super) fn duration(s: f64) -> String {
    match s {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// The ways to run a step at these sizes, what is predicted to be best first.
///
/// # Errors
/// A dim without a value.
fn ways(step: &Step, target: &Target, dims: &Bindings) -> Result<Vec<Form>, DimError> {
    let (inputs, outputs, joined) = (&step.inputs, &step.outputs, &ALONE);
    let all = candidates(&step.op, &Site { inputs, outputs, target, joined }).unwrap_or_default();
    let holds = |c: &[Condition]| c.iter().map(|c| c.holds(dims)).collect::<Result<Vec<_>, _>>();
    let (mut ways, mut prints, mut predicted) = (vec![], vec![], None);
    for f in all {
        if holds(&f.needs)?.contains(&false) {
            continue;
        }
        let print = fingerprint(&f);
        if predicted.is_none() && !holds(&f.when)?.contains(&false) {
            predicted = Some(print.clone());
        }
        // A form can stand in the list twice, under other conditions.
        if !prints.contains(&print) {
            prints.push(print);
            ways.push(f);
        }
    }
    if let Some(at) = prints.iter().position(|p| Some(p) == predicted.as_ref()) {
        ways[..=at].rotate_right(1);
    }
    Ok(ways)
}

/// Sizes at which the definition can be evaluated: each symbol's value halved as long as more than `most` elements are left,
/// all types and forms have sizes, and there are chunks to choose from.
fn small(step: &Step, forms: &[Form], dims: &Bindings, most: usize) -> Bindings {
    let elements = |b: &Bindings| -> Option<usize> {
        step.inputs.iter().chain(&step.outputs).try_fold(0, |n, v| Some(n + v.ty.bind(b).ok()?.elements()))
    };
    let fits = |b: &Bindings| {
        elements(b).is_some()
            && chunks(&step.op, &step.inputs, b).is_none_or(|c| c >= CHUNKS)
            && forms.iter().all(|f| f.has_sizes(b) || !f.has_sizes(dims))
    };
    let mut b = dims.clone();
    while elements(&b).is_none_or(|n| n > most) {
        let mut all: Vec<_> = b.iter().map(|(s, v)| (v, s.clone())).collect();
        all.sort_by(|x, y| y.cmp(x));
        let next = all.into_iter().filter(|(v, _)| *v > 1).find_map(|(v, s)| {
            let mut half = b.clone();
            half.set(s, v / 2);
            fits(&half).then_some(half)
        });
        match next {
            Some(n) => b = n,
            None => break,
        }
    }
    b
}

/// Chunks where the definition is evaluated, at least: with fewer no token sees enough of them to tell forms apart.
const CHUNKS: usize = 4;

/// Chunks that tokens of an op with choices among its operands choose from.
fn chunks(op: &Op, inputs: &[View], b: &Bindings) -> Option<usize> {
    let axis = |i: usize| inputs[i].ty.shape[1].eval(b).ok();
    match op {
        Op::ChunkAttention(o) => Some(axis(1)? / o.chunk.max(1)),
        Op::ChunkAttentionGrad(o) => Some(axis(1)? / o.chunk.max(1)),
        Op::SelectionGrad(_) => axis(1),
        _ => None,
    }
}

/// Elements of all operands and results where the definition is evaluated.
const PROOF: usize = 1 << 16;

/// Chooses a way to run `step` at `dims`: a choice that was made before, or else by measuring.
///
/// # Errors
/// No candidate gives right results; a dim without a value.
pub fn tune(
    step: &Step,
    target: &Target,
    dims: &Bindings,
    device: &mut dyn Measure,
    cache: &Cache,
) -> Result<Choice, TuneError> {
    let forms = ways(step, target, dims)?;
    let (name, words) = (device.device(), site(step, dims)?);
    if let Some(c) = cache.choice(&name, target, &words, &forms) {
        return Ok(c);
    }
    let proof = small(step, &forms, dims, PROOF);
    let (few, many) = (operands(step, &proof, 1)?, operands(step, dims, 2)?);
    let tys = step.outputs.iter().map(|v| v.ty.bind(&proof)).collect::<Result<Vec<ConcreteTy>, _>>()?;
    let want = step.op.def().eval(&few.iter().collect::<Vec<_>>(), &tys);
    let mut first: Option<Vec<HostArray>> = None;
    let mut all = vec![];
    for f in &forms {
        let mut judge = || -> Result<f64, String> {
            let t = device.trial(step, f, &proof, &few)?;
            close(&t.results, &want, 0.0).map_err(|e| format!("at {proof}: {e}"))?;
            let t = device.trial(step, f, dims, &many)?;
            match &first {
                // Choices among equals may fall otherwise where there are many.
                Some(want) => close(&t.results, want, 1e-3).map_err(|e| format!("at {dims}: {e}"))?,
                None => first = Some(t.results),
            }
            if t.seconds.is_finite() && t.seconds >= 0.0 {
                Ok(t.seconds)
            } else {
                Err(format!("it took {} s", t.seconds))
            }
        };
        let judged = judge();
        if let Err(error) = &judged
            && device.lost()
        {
            let (form, why, error) = (f.name.to_string(), f.why.clone(), error.clone());
            return Err(TuneError::Lost { step: words, form, why, error });
        }
        let verdict = judged.map_or_else(Verdict::Refused, Verdict::Seconds);
        all.push(Candidate { form: f.name.into(), why: f.why.clone(), fingerprint: fingerprint(f), verdict });
    }
    match Choice::new(&name, target.arch, words.clone(), all.clone()) {
        Some(c) => {
            cache.keep(target, &c);
            Ok(c)
        }
        None => Err(TuneError::NoneRight { step: words, device: name, candidates: all }),
    }
}

/// The choice that `cache` has for a step, and its form: what is measured, made to stand in front of what is predicted.
///
/// # Errors
/// A dim without a value.
pub fn chosen(
    step: &Step,
    target: &Target,
    dims: &Bindings,
    device: &str,
    cache: &Cache,
) -> Result<Option<(Choice, Form)>, DimError> {
    let forms = ways(step, target, dims)?;
    let Some(c) = cache.choice(device, target, &site(step, dims)?, &forms) else { return Ok(None) };
    let mut f = forms[c.chosen].clone();
    f.why = c.reason();
    f.measured = true;
    // At these sizes alone.
    f.when.clear();
    for (s, v) in dims.iter() {
        let size = Expr::from(rambac_ir::Dim::sym(s.as_str()));
        f = f.when(Condition::AtLeast(size.clone(), Expr::int(v))).when(Condition::Below(size, Expr::int(v + 1)));
    }
    Ok(Some((c, f)))
}

/// `p` with every choice that was measured on `device` at `dims`; `None` if there is none.
///
/// # Errors
/// A dim without a value.
pub fn measured(p: &GpuProgram, dims: &Bindings, device: &str, cache: &Cache) -> Result<Option<GpuProgram>, DimError> {
    let mut out = p.clone();
    let mut known: HashMap<*const Vec<Form>, Option<GpuStep>> = HashMap::new();
    let mut kernels: HashSet<String> = p.kernels.iter().map(|k| k.name.clone()).collect();
    let mut any = false;
    for (s, step) in out.steps.iter_mut().zip(&p.program.steps) {
        // Steps that are joined choose together.
        if !s.joined.alone() {
            continue;
        }
        let with = match known.entry(Arc::as_ptr(&s.forms)) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => {
                let form = chosen(step, &p.target, dims, device, cache)?.map(|c| c.1);
                let launched = form.iter().flat_map(Form::launches).map(|l| &l.kernel);
                out.kernels.extend(launched.filter(|k| kernels.insert(k.name.clone())).cloned());
                let all = |f| [f].into_iter().chain(s.forms.iter().cloned()).collect();
                e.insert(form.map(|f| GpuStep { forms: Arc::new(all(f)), joined: s.joined.clone() }))
            }
        };
        if let Some(with) = with {
            any = true;
            *s = with.clone();
        }
    }
    Ok(any.then_some(out))
}

/// A step as a program of its own: operands `x0..` are inputs, results `y0..` outputs.  Where rows of an operand are strided they
/// lie in a wider array, see [`Alone::given`].
pub struct Alone {
    pub program: Program,
}

/// A view's buffer where nothing else is in it, and the view of it.
fn own(v: &View, id: usize) -> Option<(Ty, View)> {
    let buffer = BufferId(id as u32);
    let Some(Strided { cols, stride }) = &v.strided else {
        return Some((v.ty.clone(), View { buffer, offset: 0usize.into(), ..v.clone() }));
    };
    let rows = v.ty.elements()?.checked_quotient(cols)?;
    Some((Ty::new(v.ty.dtype, [rows, stride.clone()]), View { buffer, ..v.clone() }))
}

impl Alone {
    /// `None` if a view's rows have no number.
    pub fn new(step: &Step) -> Option<Alone> {
        let (mut buffers, mut sources, mut outputs) = (vec![], vec![], vec![]);
        let mut s = step.clone();
        for (i, v) in s.inputs.iter_mut().enumerate() {
            let (ty, view) = own(v, buffers.len())?;
            let (name, kind) = (format!("x{i}"), BufferKind::Source(i));
            sources.push(SourceSlot { kind: SourceKind::Input, name, ty: ty.clone(), buffer: view.buffer });
            buffers.push(Buffer { ty, kind });
            *v = view;
        }
        for (i, v) in s.outputs.iter_mut().enumerate() {
            let (ty, view) = own(v, buffers.len())?;
            let whole = View { buffer: view.buffer, offset: 0usize.into(), ty: ty.clone(), strided: None };
            outputs.push(OutputSlot { name: format!("y{i}"), view: whole, update: false });
            buffers.push(Buffer { ty, kind: BufferKind::Arena });
            *v = view;
        }
        s.node = NodeId(0);
        let name = format!("{} alone", step.op.mnemonic());
        let program =
            Program { name, syms: vec![], buffers, steps: vec![s], sources, outputs, graph: Graph::default() };
        Some(Alone { program })
    }

    /// As a GPU program that runs `form`.
    pub fn gpu(&self, form: &Form, target: &Target) -> GpuProgram {
        let form = Form { when: vec![], needs: vec![], ..form.clone() };
        let mut kernels: Vec<Kernel> = vec![];
        for k in form.launches().map(|l| &l.kernel) {
            if kernels.iter().all(|o| o.name != k.name) {
                kernels.push(k.clone());
            }
        }
        let steps = vec![GpuStep { forms: Arc::new(vec![form]), joined: ALONE.clone() }];
        GpuProgram { program: Arc::new(self.program.clone()), target: target.clone(), steps, kernels }
    }

    /// Operand `i` as the program's input.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn given(&self, i: usize, a: &HostArray, dims: &Bindings) -> Result<HostArray, DimError> {
        let v = &self.program.steps[0].inputs[i];
        let Some((cols, stride, at)) = places(v, dims)? else { return Ok(a.clone()) };
        let ty = self.program.sources[i].ty.bind(dims)?;
        let from = |e: usize| match (e % stride).checked_sub(at).filter(|c| *c < cols) {
            Some(c) => a.get(e / stride * cols + c),
            None => 0.0,
        };
        Ok(HostArray::from_f64(&ty, (0..ty.elements()).map(from).collect()))
    }

    /// Result `i` of what the program gave.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn taken(&self, i: usize, whole: &HostArray, dims: &Bindings) -> Result<HostArray, DimError> {
        let v = &self.program.steps[0].outputs[i];
        let Some((cols, stride, at)) = places(v, dims)? else { return Ok(whole.clone()) };
        let ty = v.ty.bind(dims)?;
        let from = |e: usize| whole.get(e / cols * stride + at + e % cols);
        Ok(HostArray::from_f64(&ty, (0..ty.elements()).map(from).collect()))
    }
}

/// (cols, stride, first element) of a view with strided rows.
fn places(v: &View, dims: &Bindings) -> Result<Option<(usize, usize, usize)>, DimError> {
    match &v.strided {
        None => Ok(None),
        Some(s) => Ok(Some((s.cols.eval(dims)?, s.stride.eval(dims)?, v.offset.eval(dims)?))),
    }
}

/// Steele, Lea and Flood's SplitMix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Operands of a step as a model would have them: choices of chunks that are visible, tokens of the vocabulary.
///
/// # Errors
/// A dim without a value.
fn operands(step: &Step, dims: &Bindings, seed: u64) -> Result<Vec<HostArray>, DimError> {
    let tys = step.inputs.iter().map(|v| v.ty.bind(dims)).collect::<Result<Vec<ConcreteTy>, _>>()?;
    let mut draw = Draw(seed);
    // Where choices are.
    let at = if matches!(step.op, Op::SelectionGrad(_)) { 2 } else { 3 };
    let slots = chunks(&step.op, &step.inputs, dims).map(|chunks| (at, chunks));
    let chosen = slots.map(|(at, chunks)| (at, choices(&mut draw, &tys[at].shape, chunks)));
    let mut out = vec![];
    for (i, ty) in tys.iter().enumerate() {
        let n = ty.elements();
        let values: Vec<f64> = match (&step.op, &chosen) {
            (_, Some((at, c))) if i == *at => c.0.clone(),
            (_, Some((at, c))) if i == at + 1 => c.1.clone(),
            // What unfilled slots weigh.
            (Op::ChunkAttention(_) | Op::ChunkAttentionGrad(_), Some((_, c))) if i == 5 => {
                let k = ty.shape[3].max(1);
                (0..n).map(|e| if e % k < c.1[e / k] as usize { draw.between(0.0, 1.0) } else { 0.0 }).collect()
            }
            (Op::Embedding(_), _) if i == 0 => (0..n).map(|_| draw.below(tys[1].shape[0]) as f64).collect(),
            (Op::EmbeddingGrad(o), _) if i == 0 => {
                let vocab = o.vocab.eval(dims)?;
                (0..n).map(|_| draw.below(vocab) as f64).collect()
            }
            (Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_), _) if ty.dtype == DType::I32 => {
                (0..n).map(|_| draw.below(tys[1].shape[0]) as f64).collect()
            }
            // Steps forward in time, and decay.
            (Op::SelectiveScan(_) | Op::SelectiveScanGrad(_), _) if i == 1 => {
                (0..n).map(|_| draw.between(0.001, 0.1)).collect()
            }
            (Op::SelectiveScan(_) | Op::SelectiveScanGrad(_), _) if i == 2 => {
                (0..n).map(|_| draw.between(-4.0, -0.5)).collect()
            }
            _ if ty.dtype.is_float() => (0..n).map(|_| draw.between(-1.0, 1.0)).collect(),
            _ => vec![0.0; n],
        };
        let mut a = HostArray::from_f64(ty, values);
        a.round_to_dtype();
        out.push(a);
    }
    Ok(out)
}

/// Chunks that each of `[N, L, h]` chose of those behind it, in `[N, L, h, K]`, and how many.
fn choices(draw: &mut Draw, shape: &[usize], chunks: usize) -> (Vec<f64>, Vec<f64>) {
    let (l, h, k) = (shape[1], shape[2], shape[3]);
    let (mut index, mut count) = (vec![], vec![]);
    for row in 0..shape[0] * l * h {
        let visible = if l == 1 { chunks } else { (row / h % l + 1) * chunks / l };
        let n = k.min(visible);
        let mut all: Vec<usize> = vec![];
        while all.len() < n {
            // Often the last ones, as models do.
            let c = if draw.below(2) == 0 { visible - 1 - draw.below(visible.min(2 * k)) } else { draw.below(visible) };
            if !all.contains(&c) {
                all.push(c);
            }
        }
        count.push(n as f64);
        all.resize(k, 0);
        index.extend(all.into_iter().map(|c| c as f64));
    }
    (index, count)
}

/// Compares results; `outliers`: the part of the elements of steps with integer results that may differ.
fn close(got: &[HostArray], want: &[HostArray], outliers: f64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} results, {} are wanted", got.len(), want.len()));
    }
    let whole = want.iter().any(|w| matches!(w.dtype, DType::I32 | DType::Bool));
    for (r, (g, w)) in got.iter().zip(want).enumerate() {
        if g.ty() != w.ty() {
            return Err(format!("result {r} is {}, {} is wanted", g.ty(), w.ty()));
        }
        let tolerance = match w.dtype {
            DType::F32 => 1e-4,
            DType::BF16 => 3e-2,
            DType::F16 => 4e-3,
            DType::I32 | DType::Bool => 0.0,
        };
        let scale = (0..w.len()).map(|i| w.get(i).abs()).filter(|v| v.is_finite()).fold(0.0, f64::max);
        let far = |i: &usize| {
            let (a, b) = (g.get(*i), w.get(*i));
            let off = (a - b).abs();
            !(a == b || (a.is_nan() && b.is_nan()) || off <= tolerance * scale)
        };
        let mut wrong = (0..w.len()).filter(far);
        if let Some(i) = wrong.next() {
            let all = 1 + wrong.count();
            if !whole || all as f64 > outliers * w.len() as f64 {
                return Err(format!("result {r}, element {i}: {}, {} is wanted; {all} such", g.get(i), w.get(i)));
            }
        }
    }
    Ok(())
}
