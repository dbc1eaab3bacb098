//! Deterministic parallel helpers: loops over tasks, ordered sums of partial results, scratch memory.
//!
//! Invariants: what a task computes depends on its index alone, and the number of tasks on the shapes alone; the
//! thread count only decides who runs a task.  Partial sums are combined in index order.  Small work runs inline.
//! Deliberately absent: atomics on floats, thread ids, work sizes derived from the pool.

use crate::team;
use rayon::prelude::*;
use std::cell::RefCell;
use std::marker::PhantomData;

/// Work (roughly: scalar operations) below which waking other threads costs more than it saves.
pub const INLINE_WORK: usize = 1 << 16;
/// The same where the other threads are awake, in a [`team`].
const INLINE_IN_TEAM: usize = 1 << 14;

/// Calls `f(i)` for every `i < tasks`, in parallel when `work` (scalar operations of all tasks together) is large.
#[inline]
pub fn for_each(tasks: usize, work: usize, f: impl Fn(usize) + Sync + Send) {
    team::with_current(|team| {
        let least = if team.is_some() { INLINE_IN_TEAM } else { INLINE_WORK };
        if tasks <= 1 || work < least {
            return (0..tasks).for_each(f);
        }
        if team.is_some_and(|t| t.each(tasks, &f)) {
            return;
        }
        if rayon::current_num_threads() == 1 {
            (0..tasks).for_each(f);
        } else {
            // Unequal tasks must not queue behind each other: every task may be stolen.
            (0..tasks).into_par_iter().with_max_len(1).for_each(f);
        }
    });
}

/// Cuts `0..len` in blocks of `block` and calls `f(index, start, end)` for each.
#[inline]
pub fn for_blocks(len: usize, block: usize, work: usize, f: impl Fn(usize, usize, usize) + Sync + Send) {
    let block = block.max(1);
    for_each(len.div_ceil(block), work, |i| f(i, i * block, ((i + 1) * block).min(len)));
}

/// Rows a task should own so that it does about `INLINE_WORK / 2` operations: a function of the row's cost alone.
pub fn rows_per_task(work_per_row: usize) -> usize {
    (INLINE_WORK / 2 / work_per_row.max(1)).clamp(1, 1 << 16)
}

/// `out[j] = sum over p of partials[p * out.len() + j]`, in the order of p.
pub fn sum_partials(partials: &[f32], out: &mut [f32]) {
    let (len, all) = (out.len(), partials);
    if len == 0 {
        return;
    }
    assert_eq!(all.len() % len, 0, "BUG: {} partials of {len}", all.len());
    let shared = SharedMut::new(out);
    for_blocks(len, 1024, all.len(), |_, start, end| {
        // SAFETY: blocks are disjoint.
        let out = unsafe { shared.slice(start, end - start) };
        out.fill(0.0);
        for part in all.chunks_exact(len) {
            for (o, &v) in out.iter_mut().zip(&part[start..end]) {
                *o += v;
            }
        }
    });
}

/// A mutable slice whose disjoint parts are handed to parallel tasks.
#[derive(Clone, Copy)]
pub struct SharedMut<'a, T = f32> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: an exclusive borrow of plain data; `slice` puts disjointness on the caller.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self { ptr: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// The address of element `start`, of which `len` from there on are inside.
    pub fn ptr(&self, start: usize, len: usize) -> *mut T {
        assert!(start + len <= self.len, "BUG: {start}+{len} of {}", self.len);
        // SAFETY: in range.
        unsafe { self.ptr.add(start) }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No two live borrows may overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start + len <= self.len, "BUG: {start}+{len} of {}", self.len);
        // SAFETY: in range; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}

/// Buffers larger than this are given back to the allocator after use.
const KEEP: usize = 1 << 25;

/// Idle buffers a thread keeps.
const IDLE: usize = 8;

thread_local! {
    /// Idle buffers of this thread by length; taken out while in use, so nested and stolen tasks each get their own.
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` floats of scratch, 64-byte aligned, contents unspecified.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    const LANES: usize = 16;
    if len == 0 {
        return f(&mut []);
    }
    // The smallest idle buffer that fits, so that a small user does not take a large one away.
    let idle = POOL.with(|p| {
        let mut pool = p.borrow_mut();
        let at = pool.partition_point(|b| b.len() < len + LANES);
        (at < pool.len()).then(|| pool.remove(at))
    });
    let mut buf = idle.unwrap_or_else(|| vec![0.0; (len + LANES).next_power_of_two().max(1024)]);
    let skew = buf.as_ptr().align_offset(64).min(LANES);
    let r = f(&mut buf[skew..skew + len]);
    if buf.len() <= KEEP {
        POOL.with(|p| {
            let mut pool = p.borrow_mut();
            let at = pool.partition_point(|b| b.len() < buf.len());
            pool.insert(at, buf);
            if pool.len() > IDLE {
                pool.remove(0);
            }
        });
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn par_runs_every_task_once() {
        for work in [0, usize::MAX] {
            let count = AtomicUsize::new(0);
            for_blocks(1000, 7, work, |_, s, e| {
                count.fetch_add(e - s, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 1000);
        }
    }

    #[test]
    fn par_scratch_nests_and_is_aligned() {
        with_scratch(100, |a| {
            a.fill(1.0);
            with_scratch(5000, |b| b.fill(2.0));
            assert!(a.iter().all(|&v| v == 1.0) && a.as_ptr().align_offset(64) == 0);
        });
    }

    #[test]
    fn par_sums_partials_in_order() {
        let parts: Vec<f32> = (0..3 * 2000).map(|i| (i as f32).sin()).collect();
        let mut out = vec![0.0; 2000];
        sum_partials(&parts, &mut out);
        for j in 0..2000 {
            assert_eq!(out[j], ((0.0 + parts[j]) + parts[2000 + j]) + parts[4000 + j]);
        }
    }
}
