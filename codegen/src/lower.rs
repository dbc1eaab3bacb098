//! Graph → Program.
//!
//! Reshapes and slices become views where strides allow; operands of a concat are written in place by the kernels
//! that make them; elementwise results overwrite operands that die; updates are written into their source's buffer.
//! Where a kernel can't take a strided view, a copy step stands before it.  Casts from bf16 and to it are steps only where
//! a kernel can't read or write bf16 itself, which `narrow.rs` says.

use crate::narrow::Narrow;
use crate::overlay::overlay;
use crate::program::*;
use crate::traits::{Kernels, kernel_traits};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim, Graph, NodeId, Ty, Value};
use rambac_passes::mixed::widens;
use std::collections::HashMap;

struct Lowering<'g> {
    g: &'g Graph,
    users: Vec<Vec<NodeId>>,
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
    sources: Vec<SourceSlot>,
    views: HashMap<Value, View>,
    /// Values that are written straight into a concat's result: `(concat, element offset, row length)`.
    placed: HashMap<Value, (NodeId, Dim)>,
    concats: HashMap<NodeId, BufferId>,
    narrow: Narrow,
}

/// Lowers `g`, which should have been through the pipeline, for CPUs.
pub fn lower(g: &Graph) -> Program {
    lower_for(g, Kernels::Cpu)
}

/// Lowers `g` for a device with such kernels.
pub fn lower_for(g: &Graph, kernels: Kernels) -> Program {
    let mut l = Lowering {
        g,
        narrow: Narrow::new(g, kernels),
        users: g.users(),
        buffers: vec![],
        steps: vec![],
        sources: vec![],
        views: HashMap::new(),
        placed: HashMap::new(),
        concats: HashMap::new(),
    };
    l.place_concats();
    for (id, _) in g.iter() {
        l.node(id);
    }
    let mut outputs: Vec<OutputSlot> = g
        .outputs
        .iter()
        .map(|o| {
            l.widen(o.value);
            OutputSlot { name: o.name.to_string(), view: l.contiguous(o.value), update: false }
        })
        .collect();
    l.updates(&mut outputs);
    if kernels != Kernels::Cpu {
        overlay(g, &mut l.buffers, &mut l.steps, &outputs);
    }
    l.in_place(&mut outputs);
    Program {
        name: g.name.clone(),
        syms: g.syms.clone(),
        buffers: l.buffers,
        steps: l.steps,
        sources: l.sources,
        outputs,
        graph: g.clone(),
    }
}

/// Product of dims.  Types bind without overflow, so their products exist.
fn product(dims: &[Dim]) -> Dim {
    Dim::product(dims).expect("BUG: the verifier admits no type whose size overflows")
}

fn times(a: &Dim, b: &Dim) -> Dim {
    product(&[a.clone(), b.clone()])
}

impl Lowering<'_> {
    fn buffer(&mut self, ty: Ty, kind: BufferKind) -> BufferId {
        self.buffers.push(Buffer { ty, kind });
        BufferId(self.buffers.len() as u32 - 1)
    }

    fn fresh(&mut self, ty: &Ty) -> View {
        let buffer = self.buffer(ty.clone(), BufferKind::Arena);
        View { buffer, offset: Dim::int(0), ty: ty.clone(), strided: None }
    }

    /// Finds operands of concats that their makers can write in place, also from behind reshapes.
    fn place_concats(&mut self) {
        for (id, n) in self.g.iter() {
            let Op::Concat(c) = &n.op else { continue };
            let inner = product(&n.tys[0].shape[c.axis + 1..]);
            let mut at = 0usize;
            for &v in &n.inputs {
                let size = self.g.ty(v).shape[c.axis].as_int().unwrap_or(0);
                let cols = product(&self.g.ty(v).shape[c.axis..]);
                let mut made = v;
                while self.used_once(made) && matches!(self.g.node(made.node).op, Op::Reshape(_)) {
                    made = self.g.node(made.node).inputs[0];
                }
                if self.used_once(made)
                    && let Some(wide) = self.narrow.written(self.g, made.node)
                {
                    made = wide;
                }
                let maker = &self.g.node(made.node).op;
                let able = takes_strides(self.g, made.node)
                    && kernel_traits(maker).strided_outputs.contains(&(made.result as usize))
                    && !matches!(maker, Op::Reshape(_) | Op::Slice(_) | Op::Source(_));
                if able && self.used_once(made) && rows_fit(maker, self.g.ty(made), &cols) {
                    self.placed.insert(made, (id, times(&Dim::int(at), &inner)));
                }
                at += size;
            }
        }
    }

    fn used_once(&self, v: Value) -> bool {
        let uses = self.users[v.node.index()].iter().flat_map(|u| &self.g.node(*u).inputs).filter(|&&w| w == v).count();
        uses == 1 && self.g.outputs.iter().all(|o| o.value != v)
    }

    fn result(&mut self, v: Value) -> View {
        let ty = self.narrow.result(self.g, v);
        let Some((concat, offset)) = self.placed.get(&v).cloned() else { return self.fresh(&ty) };
        let Op::Concat(c) = &self.g.node(concat).op else { unreachable!("BUG: placed in a concat") };
        let whole = self.g.node(concat).tys[0].clone();
        let buffer = match self.concats.get(&concat) {
            Some(b) => *b,
            None => {
                let b = self.buffer(whole.clone(), BufferKind::Arena);
                self.concats.insert(concat, b);
                b
            }
        };
        // Behind a reshape the value has other axes, but as many rows as the concat.
        let rows = product(&whole.shape[..c.axis]);
        let cols = ty.elements().and_then(|e| e.checked_quotient(&rows)).expect("BUG: tested by `rows_fit`");
        let stride = product(&whole.shape[c.axis..]);
        View { buffer, offset, ty, strided: Some(Strided { cols, stride }) }
    }

    /// Makes the step of a cast from bf16 that was put off.
    fn widen(&mut self, v: Value) {
        if !self.views.contains_key(&v) {
            self.step(v.node, self.g.node(v.node).op.clone());
        }
    }

    fn node(&mut self, id: NodeId) {
        let n = self.g.node(id);
        if self.narrow.written(self.g, id).is_some() || self.narrow.copied(self.g, id) {
            return; // By what makes its operand.
        }
        for (i, &v) in n.inputs.iter().enumerate() {
            if !self.narrow.reads(id, i) {
                self.widen(v);
            }
        }
        match &n.op {
            // Put off: perhaps all who read it can read bf16.
            Op::Cast(c) if c.to == DType::F32 && self.g.ty(n.inputs[0]).dtype == DType::BF16 => {}
            Op::Source(s) => {
                let buffer = self.buffer(s.ty.clone(), BufferKind::Source(self.sources.len()));
                self.sources.push(SourceSlot { kind: s.kind, name: s.name.clone(), ty: s.ty.clone(), buffer });
                let view = View { buffer, offset: Dim::int(0), ty: s.ty.clone(), strided: None };
                self.views.insert(id.result(0), view);
            }
            Op::Reshape(_) => {
                let x = self.views[&n.inputs[0]].clone();
                let y = match reshape(&x, &n.tys[0]) {
                    Some(y) => y,
                    None => View { ty: n.tys[0].clone(), ..self.copied(id, &x) },
                };
                self.views.insert(id.result(0), y);
            }
            Op::Slice(s) => {
                let x = self.contiguous_rows(id, n.inputs[0], s.axis);
                let y = slice(&x, s, &n.tys[0]).unwrap_or_else(|| {
                    let whole = self.copied(id, &x);
                    slice(&whole, s, &n.tys[0]).expect("BUG: a copy starts at 0")
                });
                self.views.insert(id.result(0), y);
            }
            Op::Concat(c) => self.concat(id, c.axis),
            Op::Unary(_) | Op::Binary(_) | Op::Where(_) | Op::Cast(_) if as_map(self.g, id).is_some() => {
                let map = as_map(self.g, id).expect("BUG: tested in the guard");
                self.step(id, map.into());
            }
            _ => self.step(id, n.op.clone()),
        }
    }

    /// A step for `op` on the operands of `id`.
    fn step(&mut self, id: NodeId, op: Op) {
        let n = self.g.node(id);
        let t = kernel_traits(&op);
        let mut inputs = vec![];
        for (i, &v) in n.inputs.iter().enumerate() {
            // A cast that was put off is read through.
            let through = self.narrow.reads(id, i) && widens(self.g, self.g.node(v.node));
            let view = self.views[&if through { self.g.node(v.node).inputs[0] } else { v }].clone();
            let fits = || takes_strides(self.g, id) && t.strided_inputs.contains(&i) && strided_fits(&op, &view);
            let ok = view.strided.is_none() || fits();
            inputs.push(if ok { view } else { self.copied(id, &view) });
        }
        match &op {
            Op::FusedMap(m) => self.map_operands(id, &m.shape, &mut inputs),
            Op::MatMulMap(_) => self.map_operands(id, &n.tys[0].shape, &mut inputs[2..]),
            _ => {}
        }
        let mut outputs: Vec<View> = (0..n.tys.len()).map(|r| self.result(id.result(r))).collect();
        if by_rows(&op) {
            let cols = outputs.iter().find_map(|v| v.strided.as_ref().map(|s| s.cols.clone()));
            let cols = cols.or_else(|| inputs.iter().find_map(|v| v.strided.as_ref().map(|s| s.cols.clone())));
            for v in &mut inputs {
                if v.strided.as_ref().is_some_and(|s| Some(&s.cols) != cols.as_ref()) {
                    *v = self.copied(id, v);
                }
            }
            // A result placed with other rows is made apart and copied there.
            for (r, y) in outputs.iter_mut().enumerate() {
                if y.strided.as_ref().is_some_and(|s| Some(&s.cols) != cols.as_ref()) {
                    self.placed.remove(&id.result(r));
                    *y = self.fresh(&self.narrow.result(self.g, id.result(r)));
                }
            }
        }
        for (r, v) in outputs.iter().enumerate() {
            let y = id.result(r);
            self.views.insert(self.narrow.cast_of(y).unwrap_or(y), v.clone());
        }
        // Copies in bf16 come after the op's own results.
        let copies: Vec<Value> = (0..n.tys.len()).filter_map(|r| self.narrow.copy_of(id.result(r))).collect();
        for copy in copies {
            let y = self.fresh(self.g.ty(copy));
            self.views.insert(copy, y.clone());
            outputs.push(y);
        }
        self.steps.push(Step { op, node: id, inputs, outputs });
    }

    /// Operands of a map whose broadcast is neither a scalar, a suffix nor a prefix are broadcast by a step.
    fn map_operands(&mut self, id: NodeId, shape: &[Dim], inputs: &mut [View]) {
        for v in inputs {
            if v.ty.shape != shape && v.strided.is_some() {
                *v = self.copied(id, v);
            }
            if !simple_broadcast(&v.ty.shape, shape) {
                let y = self.fresh(&Ty::new(v.ty.dtype, shape.to_vec()));
                let op = Broadcast { shape: shape.to_vec() }.into();
                self.steps.push(Step { op, node: id, inputs: vec![v.clone()], outputs: vec![y.clone()] });
                *v = y;
            }
        }
    }

    fn concat(&mut self, id: NodeId, axis: usize) {
        let n = self.g.node(id);
        let whole = n.tys[0].clone();
        let buffer = match self.concats.get(&id) {
            Some(b) => *b,
            None => self.buffer(whole.clone(), BufferKind::Arena),
        };
        let inner = product(&whole.shape[axis + 1..]);
        let stride = product(&whole.shape[axis..]);
        let mut at = 0usize;
        for &v in &n.inputs {
            let ty = self.g.ty(v).clone();
            let x = self.views[&v].clone();
            if x.buffer != buffer {
                let cols = product(&ty.shape[axis..]);
                let x = if x.strided.as_ref().is_none_or(|s| s.cols == cols) { x } else { self.copied(id, &x) };
                let strided = Some(Strided { cols, stride: stride.clone() });
                let y = View { buffer, offset: times(&Dim::int(at), &inner), ty: ty.clone(), strided };
                let op = Reshape { shape: ty.shape.clone() }.into();
                self.steps.push(Step { op, node: id, inputs: vec![x], outputs: vec![y] });
            }
            at += ty.shape[axis].as_int().unwrap_or(0);
        }
        self.views.insert(id.result(0), View { buffer, offset: Dim::int(0), ty: whole, strided: None });
    }

    /// A contiguous copy of `x`.
    fn copied(&mut self, node: NodeId, x: &View) -> View {
        let y = self.fresh(&x.ty);
        self.steps.push(copy_step(node, x.clone(), y.clone()));
        y
    }

    fn contiguous(&mut self, v: Value) -> View {
        let x = self.views[&v].clone();
        if x.strided.is_none() { x } else { self.copied(v.node, &x) }
    }

    /// The view of `v` if it can be sliced along `axis` without a copy, else a copy.
    fn contiguous_rows(&mut self, node: NodeId, v: Value, axis: usize) -> View {
        let x = self.views[&v].clone();
        match &x.strided {
            Some(s) if s.cols != product(&x.ty.shape[axis..]) => self.copied(node, &x),
            _ => x,
        }
    }

    /// Copies what is still to be read of a source that an update will overwrite: outputs read after the run, and
    /// updates are written one after another.
    fn save_overwritten(&mut self, outputs: &mut [OutputSlot]) {
        let source = |l: &Self, name: &str| l.sources.iter().find(|s| s.name == name).map(|s| (s.kind, s.buffer));
        let overwritten: Vec<BufferId> = outputs
            .iter()
            .filter_map(|o| source(self, &o.name).filter(|(kind, _)| *kind != SourceKind::Input).map(|(_, b)| b))
            .collect();
        for o in outputs {
            let own = source(self, &o.name).map(|(_, b)| b);
            if overwritten.contains(&o.view.buffer) && own != Some(o.view.buffer) {
                o.view = self.copied(NodeId(0), &o.view);
            }
        }
    }

    /// Writes updates into their source's buffer: by the step that makes them where nothing reads the old value after
    /// it, else by a copy at the end.
    fn updates(&mut self, outputs: &mut [OutputSlot]) {
        self.save_overwritten(outputs);
        // The steps that use a buffer, in order.
        let mut users: Vec<Vec<usize>> = vec![vec![]; self.buffers.len()];
        for (i, s) in self.steps.iter().enumerate() {
            s.inputs.iter().chain(&s.outputs).for_each(|v| users[v.buffer.index()].push(i));
        }
        for i in 0..outputs.len() {
            let o = &outputs[i];
            let Some(slot) = self.sources.iter().find(|s| s.name == o.name && s.kind != SourceKind::Input) else {
                continue;
            };
            let target = slot.buffer;
            let made = o.view.buffer;
            outputs[i].update = true;
            if made == target {
                continue;
            }
            let makes = |s: &&usize| self.steps[**s].outputs.iter().any(|v| v.buffer == made);
            let reads = |s: &&usize| self.steps[**s].inputs.iter().any(|v| v.buffer == target);
            let maker = users[made.index()].iter().find(makes).copied();
            let last_read = users[target.index()].iter().rev().find(reads).copied();
            let whole = self.buffers[made.index()].kind == BufferKind::Arena
                && self.buffers[made.index()].ty.elements() == self.buffers[target.index()].ty.elements();
            let direct = maker.is_some_and(|m| {
                whole && last_read.is_none_or(|r| r < m || (r == m && overwrites(&self.steps[m], made, target)))
            });
            if direct {
                let moved = std::mem::take(&mut users[made.index()]);
                for &s in &moved {
                    let s = &mut self.steps[s];
                    let views = s.inputs.iter_mut().chain(&mut s.outputs);
                    views.filter(|v| v.buffer == made).for_each(|v| v.buffer = target);
                }
                users[target.index()].extend(moved);
                users[target.index()].sort_unstable();
                // Other outputs may be the same value.
                let views = outputs.iter_mut().map(|o| &mut o.view);
                views.filter(|v| v.buffer == made).for_each(|v| v.buffer = target);
            } else {
                let x = outputs[i].view.clone();
                let y = View { buffer: target, offset: Dim::int(0), ty: x.ty.clone(), strided: None };
                let op = Reshape { shape: x.ty.shape.clone() }.into();
                [made, target].iter().for_each(|b| users[b.index()].push(self.steps.len()));
                self.steps.push(Step { op, node: NodeId(0), inputs: vec![x], outputs: vec![y.clone()] });
                outputs[i].view = y;
            }
        }
    }

    /// Lets results take the buffer of an operand that dies there, where their kernel allows it.
    fn in_place(&mut self, outputs: &mut [OutputSlot]) {
        let mut last = vec![0usize; self.buffers.len()];
        for (i, s) in self.steps.iter().enumerate() {
            s.inputs.iter().chain(&s.outputs).for_each(|v| last[v.buffer.index()] = i);
        }
        outputs.iter().for_each(|o| last[o.view.buffer.index()] = usize::MAX);
        let mut become_: Vec<BufferId> = (0..self.buffers.len() as u32).map(BufferId).collect();
        let mut seen = vec![false; self.buffers.len()];
        for i in 0..self.steps.len() {
            if let Some(p) = i.checked_sub(1).map(|p| &self.steps[p]) {
                p.inputs.iter().chain(&p.outputs).for_each(|v| seen[v.buffer.index()] = true);
            }
            for v in self.steps[i].inputs.iter_mut() {
                v.buffer = become_[v.buffer.index()];
            }
            for v in self.steps[i].outputs.iter_mut() {
                v.buffer = become_[v.buffer.index()];
            }
            let t = kernel_traits(&self.steps[i].op);
            if !t.in_place && t.overwrites.is_empty() {
                continue;
            }
            for o in 0..self.steps[i].outputs.len() {
                let s = &self.steps[i];
                let y = &s.outputs[o];
                let own = |v: &View| {
                    self.buffers[v.buffer.index()].kind == BufferKind::Arena
                        && v.strided.is_none()
                        && self.buffers[v.buffer.index()].ty.elements() == v.ty.elements()
                };
                // The result must be this buffer's first appearance.
                if !own(y) || seen[y.buffer.index()] {
                    continue;
                }
                let may = |k: usize| t.in_place || t.overwrites.contains(&(o, k));
                let dies = s.inputs.iter().enumerate().filter(|(k, _)| may(*k)).map(|(_, x)| x).find(|x| {
                    own(x)
                        && x.ty == y.ty
                        && last[x.buffer.index()] == i
                        && s.inputs.iter().enumerate().all(|(k, w)| w.buffer != x.buffer || (w == *x && may(k)))
                        && s.outputs.iter().all(|w| w.buffer != x.buffer)
                });
                if let Some(x) = dies {
                    let (from, to) = (y.buffer, x.buffer);
                    last[to.index()] = last[from.index()];
                    become_[from.index()] = to;
                    self.steps[i].outputs[o].buffer = to;
                }
            }
        }
        outputs.iter_mut().for_each(|o| o.view.buffer = become_[o.view.buffer.index()]);
    }
}

/// Copies `x` to `y`, of the same type.
pub(crate) fn copy_step(node: NodeId, x: View, y: View) -> Step {
    Step { op: Reshape { shape: x.ty.shape.clone() }.into(), node, inputs: vec![x], outputs: vec![y] }
}

/// Norms, whose rows may hold several groups.
fn is_norm(op: &Op) -> bool {
    matches!(op, Op::RmsNorm(_) | Op::RmsNormGrad(_) | Op::GatedRmsNorm(_) | Op::GatedRmsNormGrad(_))
}

/// Whether all strided views of the op's step must have rows of one length.
fn by_rows(op: &Op) -> bool {
    matches!(op, Op::FusedMap(_)) || is_norm(op)
}

/// Whether the step may write its result `made` over `target` while reading it, whole: an elementwise op, or one that
/// says so.
fn overwrites(s: &Step, made: BufferId, target: BufferId) -> bool {
    if let Op::MapEach(m) = &s.op {
        let made = |o: &(usize, &View)| o.1.buffer == made;
        return s.inputs.iter().enumerate().filter(|(_, v)| v.buffer == target).all(|(i, v)| {
            let mut results = s.outputs.iter().enumerate().filter(made);
            v.strided.is_none() && results.all(|(r, o)| o.ty == v.ty && m.may_overwrite(r, i))
        });
    }
    let t = kernel_traits(&s.op);
    let mut reads = s.inputs.iter().enumerate().filter(|(_, v)| v.buffer == target);
    if t.in_place {
        let same = |v: &View| s.outputs.iter().filter(|o| o.buffer == made).all(|o| o.ty == v.ty);
        return reads.all(|(_, v)| v.strided.is_none() && same(v));
    }
    let over = |i: usize, v: &View| {
        let same = |o: &View| o.buffer == made && o.strided.is_none() && o.ty == v.ty;
        t.overwrites.iter().any(|&(o, k)| k == i && same(&s.outputs[o]))
    };
    reads.all(|(i, v)| v.strided.is_none() && over(i, v))
}

/// Whether the kernel for this form of the op takes strided views at all: batched products and integers, which run by
/// their reference evaluation, do not.
fn takes_strides(g: &Graph, id: NodeId) -> bool {
    match &g.node(id).op {
        Op::MatMul(_) => g.ty(g.node(id).inputs[1]).rank() == 2,
        Op::Unary(_) | Op::Binary(_) | Op::Where(_) => as_map(g, id).is_some(),
        _ => true,
    }
}

/// Whether a kernel can read this strided operand: its natural matrix must have the view's rows.
fn strided_fits(op: &Op, v: &View) -> bool {
    let Some(s) = &v.strided else { return true };
    let tail = |from: usize| product(&v.ty.shape[from..]) == s.cols;
    match op {
        Op::SelectiveScan(_) | Op::SelectiveScanGrad(_) => tail(2),
        Op::Attention(_) | Op::AttentionGrad(_) | Op::Selection(_) | Op::SelectionGrad(_) => tail(2),
        Op::ChunkAttention(_) | Op::ChunkAttentionGrad(_) | Op::Attend(_) | Op::AttendGrad(_) => tail(2),
        Op::Rotary(_) => v.ty.rank() >= 2 && tail(v.ty.rank() - 2),
        // A norm over heads reads rows that hold several of them.
        _ if is_norm(op) => (1..v.ty.rank()).any(tail),
        Op::FusedMap(m) => v.ty.shape == m.shape,
        Op::Reshape(_) => true,
        _ => tail(v.ty.rank() - 1),
    }
}

/// Whether a kernel can write rows of `cols` elements that do not touch.
fn rows_fit(op: &Op, ty: &Ty, cols: &Dim) -> bool {
    let tail = |from: usize| from <= ty.rank() && product(&ty.shape[from..]) == *cols;
    match op {
        // Their matrices are tokens × (all the rest).
        Op::SelectiveScanGrad(_) | Op::Attention(_) | Op::AttentionGrad(_) => tail(2),
        Op::ChunkAttention(_) | Op::ChunkAttentionGrad(_) | Op::Attend(_) | Op::AttendGrad(_) => tail(2),
        Op::Rotary(_) | Op::SelectionGrad(_) => ty.rank() >= 2 && tail(ty.rank() - 2),
        // Elementwise: any row will do, as long as it is one.
        Op::FusedMap(_) | Op::Unary(_) | Op::Binary(_) | Op::Where(_) => (0..ty.rank()).any(tail),
        _ => tail(ty.rank().saturating_sub(1)),
    }
}

/// Whether the broadcast is a scalar, or repeats a suffix of the shape, or each element along trailing axes.
pub(crate) fn simple_broadcast(from: &[Dim], to: &[Dim]) -> bool {
    let lead = from.iter().take_while(|d| d.is_one()).count();
    let suffix = from[lead..] == to[to.len() - (from.len() - lead)..];
    let tail = from.iter().rev().take_while(|d| d.is_one()).count();
    let prefix = from.len() == to.len() && from[..from.len() - tail] == to[..from.len() - tail];
    suffix || prefix
}

/// An elementwise op in f32 as a map of one instruction.
fn as_map(g: &Graph, id: NodeId) -> Option<FusedMap> {
    let n = g.node(id);
    let single = |t: &Ty| matches!(t.dtype, DType::F32 | DType::Bool);
    if !n.inputs.iter().all(|v| single(g.ty(*v))) || !single(&n.tys[0]) {
        return None;
    }
    let f = match &n.op {
        Op::Unary(u) => MapFn::Unary(u.f),
        Op::Binary(b) => MapFn::Binary(b.f),
        Op::Where(_) => MapFn::Where,
        Op::Cast(c) => MapFn::Cast(c.to),
        _ => return None,
    };
    let args = (0..n.inputs.len() as u32).collect();
    Some(FusedMap {
        shape: n.tys[0].shape.clone(),
        body: vec![MapInst { f, args }],
        outs: vec![n.inputs.len()],
        dtypes: vec![n.tys[0].dtype],
    })
}

/// The same elements under another type; `None` if rows would have to be cut.
fn reshape(x: &View, ty: &Ty) -> Option<View> {
    let y = View { ty: ty.clone(), ..x.clone() };
    let Some(s) = &x.strided else { return Some(y) };
    (0..=ty.rank()).any(|k| product(&ty.shape[k..]) == s.cols).then_some(y)
}

/// A part of `x`; `None` if its offset has no dim's form.
fn slice(x: &View, s: &Slice, ty: &Ty) -> Option<View> {
    let inner = product(&x.ty.shape[s.axis + 1..]);
    let stride = match &x.strided {
        Some(st) => st.stride.clone(),
        None => product(&x.ty.shape[s.axis..]),
    };
    let skip = times(&Dim::int(s.start), &inner);
    let cols = product(&ty.shape[s.axis..]);
    let offset = add(&x.offset, &skip)?;
    let one_row = ty.shape[..s.axis].iter().all(Dim::is_one) && x.strided.is_none();
    let strided = (!one_row).then_some(Strided { cols, stride });
    Some(View { buffer: x.buffer, offset, ty: ty.clone(), strided })
}

/// `a + b` where the sum has the form of a dim.
fn add(a: &Dim, b: &Dim) -> Option<Dim> {
    match (a.as_int(), b.as_int()) {
        (Some(0), _) => Some(b.clone()),
        (_, Some(0)) => Some(a.clone()),
        (Some(a), Some(b)) => a.checked_add(b).map(Dim::int),
        _ => match (a.checked_quotient(b).and_then(|q| q.as_int()), b.checked_quotient(a).and_then(|q| q.as_int())) {
            (Some(q), _) => Some(times(&Dim::int(q + 1), b)),
            (_, Some(q)) => Some(times(&Dim::int(q + 1), a)),
            _ => None,
        },
    }
}
