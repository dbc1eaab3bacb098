//! The memory plan: where every buffer lies in the arena at concrete dims, and the peak, known before running.
//!
//! Buffers live from their first to their last step.  Placement is greedy by size (largest first, lowest free address),
//! which for these graphs stays within a few per cent of the largest sum of live buffers.

use crate::program::{BufferKind, Program, View};
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, DimError};

/// Alignment of every buffer, in bytes: a cache line and an AVX-512 vector.
pub const ALIGN: usize = 64;

/// Addresses in the arena and what the program needs in all.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// Byte offset of each buffer in the arena; sources have none.
    pub offsets: Vec<Option<usize>>,
    /// First and last step that touches each buffer.
    pub lifetimes: Vec<Option<(usize, usize)>>,
    /// Bytes of each buffer.
    pub sizes: Vec<usize>,
    /// Bytes of the arena: the peak of activations.
    pub arena: usize,
    /// Bytes of params and states.
    pub persistent: usize,
    /// Bytes of inputs.
    pub inputs: usize,
    /// The largest sum of bytes alive at one step: no placement can need less.
    pub floor: usize,
}

impl MemoryPlan {
    /// Bytes in all.
    pub fn peak(&self) -> usize {
        self.arena + self.persistent + self.inputs
    }
}

/// Plans `p` at `dims`.
///
/// # Errors
/// A dim without a value; more bytes in all than can be addressed.
pub fn plan(p: &Program, dims: &Bindings) -> Result<MemoryPlan, DimError> {
    p.check_dims(dims)?;
    let sizes = p
        .buffers
        .iter()
        .map(|b| Ok(b.ty.bind(dims)?.bytes().next_multiple_of(ALIGN)))
        .collect::<Result<Vec<usize>, DimError>>()?;
    // Every sum below is a part of this one.
    let all = sizes.iter().try_fold(0usize, |a, &s| a.checked_add(s)).filter(|&a| a <= isize::MAX as usize);
    if all.is_none() {
        return Err(DimError::Overflow { dim: format!("all buffers of {}", p.name), bindings: dims.to_string() });
    }
    let mut lifetimes: Vec<Option<(usize, usize)>> = vec![None; p.buffers.len()];
    let mut touch = |v: &View, at: usize| {
        let l = lifetimes[v.buffer.index()].get_or_insert((at, at));
        *l = (l.0.min(at), l.1.max(at));
    };
    for (i, s) in p.steps.iter().enumerate() {
        s.inputs.iter().chain(&s.outputs).for_each(|v| touch(v, i));
    }
    p.outputs.iter().for_each(|o| touch(&o.view, p.steps.len()));

    let mut order: Vec<usize> =
        (0..p.buffers.len()).filter(|&b| p.buffers[b].kind == BufferKind::Arena && lifetimes[b].is_some()).collect();
    order.sort_by_key(|&b| (std::cmp::Reverse(sizes[b]), lifetimes[b]));
    let mut offsets = vec![None; p.buffers.len()];
    // Placed buffers by address, so that the lowest gap is found in one walk.
    let mut placed: Vec<(usize, usize, usize)> = vec![];
    let mut arena = 0;
    for b in order {
        let Some((first, last)) = lifetimes[b] else { continue };
        let mut at = 0;
        for &(offset, end, other) in &placed {
            let Some((f, l)) = lifetimes[other] else { continue };
            if f <= last && first <= l {
                if offset >= at + sizes[b] {
                    break;
                }
                at = at.max(end);
            }
        }
        offsets[b] = Some(at);
        arena = arena.max(at + sizes[b]);
        let key = (at, at + sizes[b], b);
        let i = placed.partition_point(|p| *p < key);
        placed.insert(i, key);
    }

    let mut change = vec![0isize; p.steps.len() + 2];
    for b in 0..p.buffers.len() {
        if let (BufferKind::Arena, Some((f, l))) = (p.buffers[b].kind, lifetimes[b]) {
            change[f] += sizes[b] as isize;
            change[l + 1] -= sizes[b] as isize;
        }
    }
    let mut alive = 0;
    let floor = change
        .iter()
        .map(|c| {
            alive += c;
            alive as usize
        })
        .max()
        .unwrap_or(0);
    let of = |wanted: fn(SourceKind) -> bool| {
        p.sources.iter().filter(|s| wanted(s.kind)).map(|s| sizes[s.buffer.index()]).sum()
    };
    Ok(MemoryPlan {
        offsets,
        lifetimes,
        arena,
        persistent: of(|k| k != SourceKind::Input),
        inputs: of(|k| k == SourceKind::Input),
        floor,
        sizes,
    })
}
