//! Deterministic parallel helpers: loops over tasks, ordered sums of partial results, scratch memory.
//!
//! Invariants: what a task computes depends on its index alone, and the number of tasks on the shapes alone; the
//! thread count only decides who runs a task.  Partial sums are combined in index order.  Small work runs inline.
//! Deliberately absent: atomics on floats, thread ids, work sizes derived from the pool.

use crate::team;
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

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

/// Elements that scratch may hold.
///
/// # Safety
/// Any bits are a value; the size is a multiple of four bytes, the alignment at most a cache line's.
pub unsafe trait Plain: Copy + Send + Sync {}
// SAFETY: plain numbers of four bytes.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// Floats of a vector: scratch starts and ends on cache lines.
const LANES: usize = 16;

/// Floats of each thread's own stack: what the tasks of a parallel loop take.
const STACK: usize = 1 << 18;

/// Bytes of scratch that every thread keeps for tasks.
pub const THREAD_BYTES: usize = STACK * size_of::<f32>();

/// A thread's own scratch.
struct Stack {
    floats: Vec<f32>,
    top: usize,
}

impl Stack {
    fn prepare(&mut self) {
        if self.floats.is_empty() {
            self.floats = vec![0.0; STACK + LANES];
        }
    }
}

thread_local! {
    static OWN: RefCell<Stack> = const { RefCell::new(Stack { floats: Vec::new(), top: 0 }) };
    /// What is left of the memory lent to this thread.
    static LENT: Cell<(*mut f32, usize)> = const { Cell::new((std::ptr::null_mut(), 0)) };
}

/// Bytes of scratch from the heap, now and at most.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Bytes of scratch that all threads together took from the heap at their peak, beside what was lent and their stacks.
/// A program whose kernels tell their scratch truly takes none.
pub fn heap_peak() -> usize {
    MOST.load(Ordering::Relaxed)
}

/// Floats of lent memory that a scratch of `len` takes.
pub fn rounded(len: usize) -> usize {
    len.next_multiple_of(LANES)
}

/// Floats of scratch that hold `len` elements of another type.
pub fn floats_of<T: Plain>(len: usize) -> usize {
    len * (size_of::<T>() / size_of::<f32>())
}

/// Scratch as elements of another type; contents are unspecified.
pub fn plain<T: Plain>(scratch: &mut [f32]) -> &mut [T] {
    const { assert!(size_of::<T>().is_multiple_of(4) && size_of::<T>() > 0 && align_of::<T>() <= 64) };
    if scratch.is_empty() {
        return &mut [];
    }
    assert!(scratch.as_ptr().cast::<T>().is_aligned(), "BUG: scratch that starts on no cache line");
    let len = size_of_val(scratch) / size_of::<T>();
    // SAFETY: aligned, as long as that, and any bits are a `T` and a float.
    unsafe { std::slice::from_raw_parts_mut(scratch.as_mut_ptr().cast(), len) }
}

/// Puts the lent memory back as it was, also when a task panics.
struct Restore((*mut f32, usize));

impl Drop for Restore {
    fn drop(&mut self) {
        LENT.set(self.0);
    }
}

/// Gives a part of the thread's stack back, also when its user panics.
struct Taken(usize);

impl Drop for Taken {
    fn drop(&mut self) {
        OWN.with(|own| own.borrow_mut().top -= self.0);
    }
}

/// Scratch from the heap, counted.
struct Heap(Vec<f32>);

impl Heap {
    fn new(len: usize) -> Self {
        let v = vec![0.0; len + LANES];
        let bytes = v.len() * size_of::<f32>();
        MOST.fetch_max(LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes, Ordering::Relaxed);
        Self(v)
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        LIVE.fetch_sub(self.0.len() * size_of::<f32>(), Ordering::Relaxed);
    }
}

/// Runs `f` with `memory` as the place of scratch on this thread, as a stack, while it lasts.
///
/// # Safety
/// `len` floats at `memory` must be writable, on a cache line, and nobody else's meanwhile.
pub unsafe fn lend<R>(memory: *mut f32, len: usize, f: impl FnOnce() -> R) -> R {
    let _restore = Restore(LENT.replace((memory, len)));
    f()
}

/// As [`lend`], of the caller's own memory from its first cache line on.
pub fn with_lent<R>(memory: &mut [f32], f: impl FnOnce() -> R) -> R {
    let skew = memory.as_ptr().align_offset(64).min(memory.len());
    let memory = &mut memory[skew..];
    // SAFETY: borrowed exclusively for the call.
    unsafe { lend(memory.as_mut_ptr(), memory.len(), f) }
}

/// Makes the stacks of all threads of a pool, so that no task has to.
pub fn prepare(pool: &rayon::ThreadPool) {
    pool.broadcast(|_| OWN.with(|own| own.borrow_mut().prepare()));
}

/// Calls `f` with `len` floats of scratch, 64-byte aligned, contents unspecified: of what was lent to this thread, else
/// of its own stack, else, where neither has room, of the heap.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if len == 0 {
        return f(&mut []);
    }
    // Whatever this thread runs meanwhile, stolen tasks too, returns before `f` does: both are stacks.
    let (memory, left) = LENT.get();
    let take = rounded(len);
    if take <= left {
        // SAFETY: `lend`'s contract; the part taken is skipped until it is restored.
        let (rest, scratch) = unsafe { (memory.add(take), std::slice::from_raw_parts_mut(memory, len)) };
        let _restore = Restore(LENT.replace((rest, left - take)));
        return f(scratch);
    }
    let own = OWN.with(|own| {
        let mut own = own.borrow_mut();
        own.prepare();
        let at = own.top;
        if at + take > STACK {
            return None;
        }
        own.top += take;
        // By pointer: other parts of the stack are borrowed.
        let base = own.floats.as_mut_ptr();
        Some(base.wrapping_add(base.align_offset(64).min(LANES) + at))
    });
    if let Some(ptr) = own {
        let _taken = Taken(take);
        // SAFETY: `take` floats above all that this thread has handed out, until `_taken` gives them back; the stack
        // lives as long as its thread and never moves.
        return f(unsafe { std::slice::from_raw_parts_mut(ptr, len) });
    }
    let mut heap = Heap::new(len);
    let skew = heap.0.as_ptr().align_offset(64).min(LANES);
    f(&mut heap.0[skew..skew + len])
}

/// As [`with_scratch`], of elements of another type.
pub fn with_plain<T: Plain, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    with_scratch(floats_of::<T>(len), |scratch| f(plain(scratch)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            // More than the stack has left comes from the heap, and the stack goes on.
            with_scratch(STACK, |b| {
                assert_eq!(b.as_ptr().align_offset(64), 0);
                b.fill(3.0);
                with_plain(7, |c: &mut [u32]| c.fill(u32::MAX));
                assert!(b.iter().all(|&v| v == 3.0));
            });
            assert!(a.iter().all(|&v| v == 1.0) && heap_peak() >= STACK * 4);
        });
    }

    #[test]
    fn par_scratch_survives_a_panic() {
        let top = || OWN.with(|own| own.borrow().top);
        let before = top();
        assert!(std::panic::catch_unwind(|| with_scratch(100, |_| panic!("on purpose"))).is_err());
        assert_eq!(top(), before);
    }

    #[test]
    fn par_lent_memory_is_a_stack() {
        let mut memory = vec![0.0f32; 64 + 16];
        let base = memory.as_ptr().align_offset(64);
        let at = memory[base..].as_mut_ptr();
        let here = |s: &[f32]| (s.as_ptr() as usize).wrapping_sub(at as usize);
        // SAFETY: 64 floats from an aligned place of a vector that lives here.
        unsafe {
            lend(at, 64, || {
                with_scratch(20, |a| {
                    assert_eq!(here(a), 0);
                    with_scratch(16, |b| assert_eq!(here(b), 32 * 4));
                    // What does not fit comes from elsewhere, and the rest is still there.
                    with_scratch(33, |b| assert!(here(b) >= 64 * 4));
                    lend(a.as_mut_ptr(), 16, || with_scratch(16, |b| assert_eq!(here(b), 0)));
                    with_scratch(32, |b| assert_eq!(here(b), 32 * 4));
                });
                with_scratch(64, |a| assert_eq!(here(a), 0));
            });
        }
        with_scratch(1, |a| assert!(!memory.as_ptr_range().contains(&a.as_ptr())));
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
