//! Attention to selected chunks: by query tiles or chunk by chunk, and its gradient.
//!
//! What decides: ρ = L·K / C, the pairs (token, slot) per chunk, which is how often a chunk that stays on chip is used.  Chunk
//! by chunk a pair moves its queries, a slot written and the slot read, 3·G rows of d, and 2·chunk / ρ rows of keys and values;
//! by query tiles 2·chunk rows of keys and values, shared by as many pairs of the tile as chose the chunk, for which we take
//! `SHARED_BY`.  Where tokens are so few that most multiprocessors would idle, every pair has a block.  On Hopper the device looks,
//! tile by tile, whether neighbours share chunks: those that do run as tiles of warpgroups, the others chunk by chunk.

use super::any_size::AnyAttention;
use super::chunk_attention_forms::*;
use super::chunk_attention_sizes::Tile;
use super::inverted_index::InvertedIndex;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::DType;
use rambac_ir::ops::*;

/// What tiles do not take runs a warp per row.
fn or_any_size(
    tiled: Result<Vec<Form>, Unsupported>,
    site: &Site,
    (chunk, scale, off_by_one): (usize, f64, f64),
    dy: Option<Operand>,
) -> Result<Vec<Form>, Unsupported> {
    tiled.or_else(|why| {
        let (op, why) = (rambac_ir::ops::Attention::new(scale, false), why.to_string());
        AnyAttention { site, op, chunk: Some(chunk), weighed: true, off_by_one, dy, dlse: None, why }.forms()
    })
}

impl Cuda for ChunkAttention {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(forward(self, site), site, (self.chunk, self.scale, self.off_by_one), None)
    }
    fn candidates(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let mut all = self.forms(site)?;
        let o = Operand::Output(0);
        let pages = site.pages(6, K)?;
        let Ok(a) = Attending::new(site, self.chunk, self.scale, self.off_by_one, &[Q, K, V, o], pages, false) else {
            return Ok(all);
        };
        for t in a.sizes.query_tiles(site.target) {
            all.push(a.query_tile(&t, site.row_stride(o, 2)?));
        }
        // Chunk by chunk wherever there are chunks, and without a look at what neighbours share.
        let shared = a.sizes.shared_tile(site.target);
        if a.pages.is_none() && a.sizes.chunk_major_from().is_none() {
            all.extend(a.chunk_majors(site.target, 0, &site.row_stride(o, 2)?, shared));
        }
        if a.pages.is_none() && shared.is_some() {
            all.extend(a.chunk_majors(site.target, 0, &site.row_stride(o, 2)?, None));
        }
        Ok(all)
    }
}

/// What attending ops run where no tile takes them.
fn attend_any(op: &Attend, site: &Site, grad: bool, why: String) -> Result<Vec<Form>, Unsupported> {
    let attention = rambac_ir::ops::Attention { lse: op.joint, ..rambac_ir::ops::Attention::new(op.scale, false) };
    let dy = grad.then_some(Operand::Input(if op.joint { 7 } else { 5 }));
    let dlse = dy.filter(|_| op.joint).map(|_| Operand::Input(8));
    let (chunk, off_by_one) = (Some(op.chunk), op.off_by_one);
    AnyAttention { site, op: attention, chunk, weighed: false, off_by_one, dy, dlse, why }.forms()
}

impl Cuda for Attend {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        joint(self, site).or_else(|why| attend_any(self, site, false, why.to_string()))
    }
}

impl Cuda for AttendGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let AttendGrad { chunk, scale, off_by_one, joint } = *self;
        let op = Attend { chunk, scale, off_by_one, joint };
        joint_gradient(&op, site).or_else(|why| attend_any(&op, site, true, why.to_string()))
    }
}

/// Tiles make a softmax per chunk only together with the sum over chunks, which is another op.
fn refuse_apart(op: &Attend) -> Result<(), Unsupported> {
    if op.joint {
        Ok(())
    } else {
        because("it was not fused with the sum over chunks, so the output of every chunk is in memory")
    }
}

fn joint(op: &Attend, site: &Site) -> Result<Vec<Form>, Unsupported> {
    refuse_apart(op)?;
    let [o, lse] = [0, 1].map(Operand::Output);
    if site.pages(5, K)?.is_some() {
        return because("keys lie in pages, which tiles with one softmax over all chunks do not read");
    }
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, o], None, true)?;
    site.contiguous(lse)?;
    let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
    let launch = a.joint_tile(&t, (lse, a.dtype), o, site.row_stride(o, 2)?);
    let why = format!(
        "one softmax over what {} tokens side by side chose; {} warps, {} keys at a time, {} blocks per SM",
        a.sizes.tokens(16 * t.warps),
        t.warps,
        t.keys,
        t.blocks_per_sm
    );
    Ok(vec![Form::new("query_tile", why, vec![launch.into()])])
}

/// Chunk by chunk, with the log-sum-exp of the forward; where that was rounded to 16 bits, it is computed again.
fn joint_gradient(op: &Attend, site: &Site) -> Result<Vec<Form>, Unsupported> {
    refuse_apart(op)?;
    let [o, lse, dy, dlse] = [5, 6, 7, 8].map(Operand::Input);
    let rows = [Q, K, V, dy].into_iter().chain([0, 1, 2].map(Operand::Output)).collect::<Vec<_>>();
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &rows, None, true)?;
    [lse, dlse].into_iter().try_for_each(|at| site.contiguous(at))?;
    let stats = Operand::Workspace(InvertedIndex::WORKSPACES + 2);
    let (mut before, mut from) = (vec![], (lse, (o, site.row_stride(o, 2)?)));
    let exact = a.dtype == DType::F32;
    if !exact {
        let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
        // The slots of dq are not in use yet.
        let (again, slots) =
            (Operand::Workspace(InvertedIndex::WORKSPACES + 4), Operand::Workspace(InvertedIndex::WORKSPACES));
        let stride = Expr::from(a.h * a.sizes.group * a.sizes.head_dim);
        before.push(a.joint_tile(&t, (again, DType::F32), slots, stride.clone()).into());
        from = (again, (slots, stride));
    }
    let tokens = a.whole().n * a.whole().l;
    let all = tokens * (a.h * a.sizes.group);
    let found = a
        .stub("attend_grad", "attend_joint_stats", ADD_THREADS)
        .write("log2_sum", DType::F32, Operand::Workspace(InvertedIndex::WORKSPACES + 3))
        .write("delta", DType::F32, stats)
        .read("o", a.dtype, from.1.0)
        .i64("o_stride", from.1.1)
        .read("lse", if exact { a.dtype } else { DType::F32 }, from.0)
        .read("dy", a.dtype, dy)
        .i64("dy_stride", site.row_stride(dy, 2)?)
        .read("dlse", a.dtype, dlse)
        .i64("rows", all.clone())
        .i32("heads", a.h * a.sizes.group)
        .launch(((all.clone() * 32).ceil_div(ADD_THREADS), 1, 1));
    before.push(found.into());
    let forms = by_chunks(&a, site, dy, before, all.clone())?;
    Ok(forms.into_iter().map(|f| if exact { f } else { f.with("lse", DType::F32, all.clone()) }).collect())
}

impl Cuda for ChunkAttentionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        or_any_size(gradient(self, site), site, (self.chunk, self.scale, self.off_by_one), Some(DY))
    }
}

fn forward(op: &ChunkAttention, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let o = Operand::Output(0);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, o], site.pages(6, K)?, false)?;
    let o_stride = site.row_stride(o, 2)?;
    let Some(t) = a.sizes.query_tile(site.target) else { return a.does_not_fit(site.target) };
    let blocks = (Expr::from(&a.l) * a.sizes.group).ceil_div(16 * t.warps) * a.lists();
    let mut forms: Vec<Form> = a.pairs(site.target, blocks, o_stride.clone()).into_iter().collect();
    // Segments of a long context choose each chunk a few times: no index of all chunks.
    if let Some(from) = a.sizes.chunk_major_from().filter(|_| a.pages.is_none()) {
        forms.extend(a.chunk_majors(site.target, from, &o_stride, a.sizes.shared_tile(site.target)));
    }
    forms.push(a.query_tile(&t, o_stride));
    Ok(forms)
}

fn gradient(op: &ChunkAttentionGrad, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [dq, dk, dv, dw] = [0, 1, 2, 3].map(Operand::Output);
    let a = Attending::new(site, op.chunk, op.scale, op.off_by_one, &[Q, K, V, DY, dq, dk, dv], None, false)?;
    site.contiguous(dw)?;
    let rows = a.lists() * &a.l * (a.sizes.slots * a.sizes.group);
    by_chunks(&a, site, DY, vec![], rows)
}

/// The gradient chunk by chunk; `before`: what finds the `rows` log2-sums and δ of joint softmaxes, once the index is there.
fn by_chunks(a: &Attending, site: &Site, dy: Operand, before: Vec<Call>, rows: Expr) -> Result<Vec<Form>, Unsupported> {
    let [dq, dk, dv, dw] = [0, 1, 2, 3].map(Operand::Output);
    let s = &a.sizes;
    let (template, t, shared) = match (s.grad_hopper(site.target), s.grad(site.target)) {
        (Some(t), _) => (("attend_chunks_hopper", "attend_grad_hopper"), t, t.shared),
        (None, Some(t)) => (("attend_grad", "attend_grad"), t, s.grad_bytes(t.warps, t.keys)),
        (None, None) => return a.does_not_fit(site.target),
    };
    let parts = s.chunk / t.keys;
    let index = a.index(0, &a.whole());
    let [slots, partial, delta, log2_sum] = [0, 1, 2, 3].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
    let operands = |stub: Stub| -> Result<Stub, Unsupported> {
        let stub = a.read_qkv(stub);
        let stub = if s.joint { stub } else { stub.read("weights", a.exact, WEIGHTS) };
        let stub = stub.read("dy", a.dtype, dy);
        Ok(index.read(stub.i64("dy_stride", site.row_stride(dy, 2)?)))
    };
    let mut calls = index.calls(INDICES, COUNT);
    calls.extend(before);
    let slabs = index.lists() * index.max_slabs();
    let two_passes = parts > 1 && !s.joint;
    if two_passes {
        let (held, shared) = s.stats(&t, site.target);
        // Of f32 a few keys at a time: registers hold no more beside whole rows.
        let keys = if a.dtype == DType::F32 { 16 } else { t.keys };
        let tile = Tile { blocks_per_sm: 1, keys, ..t };
        let stub = a.tiled("attend_grad", "attend_grad_stats", &tile, shared, s.slab());
        let stub = stub.int("held", held);
        let stub = stub.write("log2_sum", DType::F32, log2_sum).write("delta", DType::F32, delta);
        calls.push(operands(stub)?.launch((slabs.clone(), 1, 1)).into());
    }
    let template = if s.joint { ("attend_grad", "attend_grad_joint") } else { template };
    let stub = a
        .tiled(template.0, template.1, &t, shared, s.slab())
        .write("slots", a.dtype, slots)
        .write("partial", DType::F32, partial)
        .write("delta", DType::F32, delta)
        .read("log2_sum", DType::F32, log2_sum);
    calls.push(operands(stub)?.launch((slabs * parts, 1, 1)).into());
    calls.push(a.reduce_slots(dq, site.row_stride(dq, 2)?, slots, parts, COUNT));
    if !s.joint {
        let weights = a.lists() * &a.l * s.slots;
        calls.push(
            a.stub("attend_grad", "attend_grad_heads", ADD_THREADS)
                .write("dw", site.dtype(dw), dw)
                .read("delta", DType::F32, delta)
                .read("count", DType::I32, COUNT)
                .i64("lists_tokens", a.lists() * &a.l)
                .launch((weights.ceil_div(ADD_THREADS), 1, 1))
                .into(),
        );
    }
    let stub = a
        .stub("attend_grad", "attend_grad_chunks", 4 * ADD_THREADS)
        .int("chunk", s.chunk)
        .int("keys", t.keys)
        .write("dk", a.dtype, dk)
        .i64("dk_stride", site.row_stride(dk, 2)?)
        .write("dv", a.dtype, dv)
        .i64("dv_stride", site.row_stride(dv, 2)?)
        .read("partial", DType::F32, partial);
    calls.push(index.read_slabs(stub).launch((a.lists() * &a.chunks, 1, 1)).into());
    let why = format!(
        "chunk by chunk, {} products; {} pairs a slab, {} warps, {} keys at a time, {} blocks per SM",
        if two_passes { 7 } else { 5 },
        index.slab,
        t.warps,
        t.keys,
        t.blocks_per_sm
    );
    let form = index
        .reserve(Form::new("chunk_major", why, calls))
        .with("slots", a.dtype, a.slots_elements(parts))
        .with("partial", DType::F32, index.lists() * index.max_slabs() * (2 * s.chunk * s.head_dim))
        .with("delta", DType::F32, rows.clone())
        .with("log2_sum", DType::F32, if two_passes || s.joint { rows } else { Expr::int(0) });
    Ok(vec![form])
}
