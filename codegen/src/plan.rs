//! The memory plan: where every buffer lies in the arena at concrete dims, and the peak, known before running.
//!
//! Buffers live from their first to their last step.  A kernel's scratch is planned like a buffer that lives for its
//! step; how much a kernel takes is asked of the device.  Placement is greedy by size (largest first, lowest free
//! address), which for these graphs stays within a few per cent of the largest sum of live buffers.

use crate::program::{BufferKind, Program, View};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, DimError};

/// Bytes of scratch that a device's kernel for an op takes, from the types of its operands and results.
pub type Scratch = fn(&Op, &[ConcreteTy], &[ConcreteTy]) -> usize;

/// The scratch of a device whose kernels need none.
pub fn no_scratch(_: &Op, _: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
    0
}

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
    /// Byte offset and length in the arena of every step's scratch.
    pub scratch: Vec<(usize, usize)>,
    /// Bytes that live at every step: buffers of the arena and the step's scratch.
    pub alive: Vec<usize>,
    /// Bytes of the arena: the peak of activations and scratch.
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
    /// The first step at which most bytes live; `None` for a program without steps.
    pub fn fullest(&self) -> Option<usize> {
        (0..self.alive.len()).max_by_key(|&s| (self.alive[s], std::cmp::Reverse(s)))
    }
}

/// Plans `p` at `dims` for a device with this scratch.
///
/// # Errors
/// A dim without a value; more bytes in all than can be addressed.
pub fn plan(p: &Program, dims: &Bindings, scratch: Scratch) -> Result<MemoryPlan, DimError> {
    p.check_dims(dims)?;
    let sizes = p
        .buffers
        .iter()
        .map(|b| Ok(b.ty.bind(dims)?.bytes().next_multiple_of(ALIGN)))
        .collect::<Result<Vec<usize>, DimError>>()?;
    let bind = |vs: &[View]| vs.iter().map(|v| v.ty.bind(dims)).collect::<Result<Vec<_>, _>>();
    let taken = p
        .steps
        .iter()
        .map(|s| Ok(scratch(&s.op, &bind(&s.inputs)?, &bind(&s.outputs)?).next_multiple_of(ALIGN)))
        .collect::<Result<Vec<usize>, DimError>>()?;
    // Every sum below is a part of this one.
    let all = sizes.iter().chain(&taken).try_fold(0usize, |a, &s| a.checked_add(s));
    if all.is_none_or(|a| a > isize::MAX as usize) {
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

    let arena_buffers =
        (0..p.buffers.len()).filter(|&b| p.buffers[b].kind == BufferKind::Arena && lifetimes[b].is_some());
    // What needs a place: a buffer by its index, then a step's scratch.
    let buffers = p.buffers.len();
    let life = |i: usize| if i < buffers { lifetimes[i] } else { Some((i - buffers, i - buffers)) };
    let size = |i: usize| if i < buffers { sizes[i] } else { taken[i - buffers] };
    let mut order: Vec<usize> =
        arena_buffers.chain((0..taken.len()).filter(|&s| taken[s] > 0).map(|s| buffers + s)).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(size(i)), life(i)));
    let mut offsets = vec![None; buffers];
    let mut places = vec![(0, 0); taken.len()];
    let mut change = vec![0isize; p.steps.len() + 2];
    // Placed buffers by address, so that the lowest gap is found in one walk: (offset, end, first step, last step).
    let mut placed: Vec<(usize, usize, usize, usize)> = vec![];
    let mut arena = 0;
    for i in order {
        let Some((first, last)) = life(i) else { continue };
        let mut at = 0;
        for &(offset, end, f, l) in &placed {
            if f <= last && first <= l {
                if offset >= at + size(i) {
                    break;
                }
                at = at.max(end);
            }
        }
        let end = at + size(i);
        if i < buffers {
            offsets[i] = Some(at);
        } else {
            places[i - buffers] = (at, size(i));
        }
        arena = arena.max(end);
        let key = (at, end, first, last);
        placed.insert(placed.partition_point(|p| *p < key), key);
        change[first] += size(i) as isize;
        change[last + 1] -= size(i) as isize;
    }
    let mut now = 0;
    let alive: Vec<usize> = change[..p.steps.len()]
        .iter()
        .map(|c| {
            now += c;
            now as usize
        })
        .collect();
    let floor = alive.iter().copied().max().unwrap_or(0).max((now + change[p.steps.len()]) as usize);
    let of = |wanted: fn(SourceKind) -> bool| {
        p.sources.iter().filter(|s| wanted(s.kind)).map(|s| sizes[s.buffer.index()]).sum()
    };
    Ok(MemoryPlan {
        offsets,
        lifetimes,
        scratch: places,
        alive,
        arena,
        persistent: of(|k| k != SourceKind::Input),
        inputs: of(|k| k == SourceKind::Input),
        floor,
        sizes,
    })
}
