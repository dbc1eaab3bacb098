//! Operands of a growing chunk memory: one array, or pages that need not be in memory at all.
//!
//! Kernels read keys, values and landmarks chunk by chunk and pack what they read anyway, so a memory in pages of
//! another precision, or in a file, costs a copy of what was chosen and no array of the whole ever exists.

use crate::Mat;

/// Rows of a chunk memory by chunk.
pub trait ChunkRows: Sync {
    /// Writes the rows of `chunks` whole chunks of one sequence and head, from chunk `first` on, row after row.
    ///
    /// What can't be read becomes zeros; whoever owns the memory keeps the reason and asks for it after the run.
    fn read(&self, seq: usize, head: usize, first: usize, chunks: usize, out: &mut [f32]);
}

impl std::fmt::Debug for dyn ChunkRows + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("pages")
    }
}

/// Keys, values or landmarks of `n` sequences.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// (sequences · chunks · rows per chunk) x (heads · dim).
    Dense(Mat<'a>),
    Paged(&'a dyn ChunkRows),
}

/// How a memory is cut.
#[derive(Clone, Copy, Debug)]
pub struct RowShape {
    /// Chunks per sequence; of a paged memory at least as many as any token sees.
    pub chunks: usize,
    /// Rows per chunk: 1 for landmarks.
    pub per_chunk: usize,
    pub dim: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `chunks` chunks from `first` on; `scratch` holds them if they are paged.
    #[inline(always)]
    pub fn chunks<'s>(
        &self,
        shape: RowShape,
        (seq, head): (usize, usize),
        first: usize,
        chunks: usize,
        scratch: &'s mut [f32],
    ) -> Mat<'s>
    where
        'a: 's,
    {
        let (rows, dim) = (chunks * shape.per_chunk, shape.dim);
        match self {
            Rows::Dense(x) => x.block((seq * shape.chunks + first) * shape.per_chunk, rows, head * dim, dim),
            Rows::Paged(pages) => {
                let out = &mut scratch[..rows * dim];
                pages.read(seq, head, first, chunks, out);
                Mat::new(out, rows, dim)
            }
        }
    }

    /// Floats of scratch that [`chunks`](Self::chunks) needs.
    pub fn scratch(&self, shape: RowShape, chunks: usize) -> usize {
        match self {
            Rows::Dense(_) => 0,
            Rows::Paged(_) => chunks * shape.per_chunk * shape.dim,
        }
    }
}
