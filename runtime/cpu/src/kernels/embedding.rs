//! Embedding lookup and its gradient.
//!
//! The gradient sorts token positions by id (a stable counting sort), so that each table row is the sum of its tokens'
//! rows in token order, whoever computes it.  An id outside the table is a bug of the caller: ids are checked upstream.

use super::gemm::widen;
use crate::par;
use crate::{Mat, MatMut};
use half::bf16;

#[inline(always)]
fn index(id: i32, vocab: usize) -> usize {
    assert!(id >= 0 && (id as usize) < vocab, "BUG: token id {id} outside a vocabulary of {vocab}");
    id as usize
}

/// `y[i] = table[ids[i]]`; table (vocab, d), y (ids.len(), d).
pub fn gather(ids: &[i32], table: Mat, y: MatMut) {
    assert!(y.rows() == ids.len() && y.cols() == table.cols(), "BUG: gather into {}x{}", y.rows(), y.cols());
    let d = table.cols();
    par::for_blocks(ids.len(), par::rows_per_task(d), ids.len() * d, |_, start, end| {
        for (i, &id) in ids.iter().enumerate().take(end).skip(start) {
            // SAFETY: row i belongs to this task.
            unsafe { y.row_unchecked(i) }.copy_from_slice(table.row(index(id, table.rows())));
        }
    });
}

/// As [`gather`], from a table in bf16.
pub fn gather_bf16(ids: &[i32], table: Mat<bf16>, y: MatMut) {
    assert!(y.rows() == ids.len() && y.cols() == table.cols(), "BUG: gather into {}x{}", y.rows(), y.cols());
    let d = table.cols();
    par::for_blocks(ids.len(), par::rows_per_task(d), ids.len() * d, |_, start, end| {
        for (i, &id) in ids.iter().enumerate().take(end).skip(start) {
            // SAFETY: row i belongs to this task.
            widen(table.row(index(id, table.rows())), unsafe { y.row_unchecked(i) });
        }
    });
}

/// `dtable[v]` = sum of `dy[i]` over i with `ids[i] = v`, in the order of i; overwrites all of dtable (vocab, d).
pub fn scatter_add(ids: &[i32], dy: Mat, dtable: MatMut) {
    assert!(dy.rows() == ids.len() && dy.cols() == dtable.cols(), "BUG: scatter of {}x{}", dy.rows(), dy.cols());
    let vocab = dtable.rows();
    par::with_plain(scatter_scratch(ids.len(), vocab), |words: &mut [u32]| {
        let (ends, rest) = words.split_at_mut(vocab + 1);
        let (next, positions) = rest.split_at_mut(vocab);
        sort_by_id(ids, vocab, ends, next, positions);
        add_rows(dy, &dtable, ends, positions);
    });
}

/// Floats of scratch that [`scatter_add`] takes on the calling thread.
pub fn scatter_scratch(ids: usize, vocab: usize) -> usize {
    2 * vocab + 1 + ids
}

/// Fills `positions[ends[v]..ends[v + 1]]` with the tokens of id v, in order.
fn sort_by_id(ids: &[i32], vocab: usize, ends: &mut [u32], next: &mut [u32], positions: &mut [u32]) {
    ends.fill(0);
    for &id in ids {
        ends[index(id, vocab) + 1] += 1;
    }
    for v in 0..vocab {
        ends[v + 1] += ends[v];
    }
    next.copy_from_slice(&ends[..vocab]);
    for (i, &id) in ids.iter().enumerate() {
        let slot = &mut next[id as usize];
        positions[*slot as usize] = i as u32;
        *slot += 1;
    }
}

fn add_rows(dy: Mat, dtable: &MatMut, ends: &[u32], positions: &[u32]) {
    let (vocab, d) = (dtable.rows(), dtable.cols());
    // Few frequent ids would leave one task with all the work: columns are cut as well.
    let cut = 64.max(d.div_ceil(8)).min(d.max(1));
    let (col_blocks, row_block) = (d.div_ceil(cut), (vocab / 64).clamp(1, 256));
    let work = (vocab + positions.len()) * d;
    par::for_each(vocab.div_ceil(row_block) * col_blocks, work, |t| {
        let (v0, c0) = (t / col_blocks * row_block, t % col_blocks * cut);
        let c1 = (c0 + cut).min(d);
        for v in v0..(v0 + row_block).min(vocab) {
            // SAFETY: rows and column ranges of tasks are disjoint.
            let mut out = unsafe { dtable.block_unchecked(v, 1, c0, c1 - c0) };
            let out = out.row_mut(0);
            out.fill(0.0);
            for &i in &positions[ends[v] as usize..ends[v + 1] as usize] {
                for (o, g) in out.iter_mut().zip(&dy.row(i as usize)[c0..c1]) {
                    *o += g;
                }
            }
        }
    });
}
