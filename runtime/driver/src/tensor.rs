//! Tensors that kernels copy boxes of, by one instruction of one thread (Hopper's tensor maps).

use crate::{BufferId, Float};

/// Where a tensor is and what a copy of it moves.  Dims count from the innermost, whose elements follow each other.  A box lies in
/// shared memory row after row of 128 bytes, whose 16-byte pieces are exchanged by the row's number in its eight; outside the
/// tensor it is zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub buffer: BufferId,
    /// Its first byte: with the buffer's address a multiple of 16.
    pub at: u64,
    pub float: Float,
    /// Elements along each of 2 to 5 dims.
    pub dims: Vec<usize>,
    /// Elements from one index to the next of every dim but the first: multiples of 16 bytes.
    pub strides: Vec<usize>,
    /// Elements of a box along each dim, at most 256; 128 bytes along the first.
    pub tile: Vec<usize>,
}
