//! What the kernels of each op accept beyond contiguous operands.
//!
//! One row per op of the list; an op without a row does not compile.

use rambac_ir::ops::*;
use rambac_ir::{Ty, for_each_op};

/// Abilities of an op's kernels.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTraits {
    /// Operands that may be row-strided.
    pub strided_inputs: &'static [usize],
    /// Results that may be row-strided.
    pub strided_outputs: &'static [usize],
    /// Operands that may be a memory in pages (see `Rows` of rambac-cpu) in place of an array.
    pub paged_inputs: &'static [usize],
    /// Results may overwrite full-size operands (elementwise).
    pub in_place: bool,
    /// Results that may be written over an operand of their type: (result, operand).
    pub overwrites: &'static [(usize, usize)],
    /// f32 operands that may be read as the bf16 they are a cast of, see [`reads_bf16`].
    pub bf16_inputs: &'static [usize],
    /// Moves or casts elements: operands and results may be bf16 themselves.
    pub moves: bool,
    /// Why the op has no kernel of its own and runs by its reference evaluation.
    pub reference: Option<&'static str>,
}

/// Whether a kernel of this form of the op reads operand `i`, of type `ty`, as bf16 where the graph casts it to f32.
pub fn reads_bf16(op: &Op, i: usize, ty: &Ty) -> bool {
    let form = match op {
        // Whole rows of a weight matrix that all rows of the other operand share.
        Op::MatMul(m) => !m.trans_a && m.trans_b && ty.rank() == 2,
        Op::MatMulMap(m) => !m.trans_a && m.trans_b && ty.rank() == 2,
        _ => true,
    };
    form && kernel_traits(op).bf16_inputs.contains(&i)
}

/// Whose kernels a program is for: what they read and write as bf16 where the graph casts differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// [`reads_bf16`] alone.
    #[default]
    Cpu,
    /// What `rambac_passes::mixed::halves` says, in both directions.
    Gpu,
    /// As [`Gpu`](Self::Gpu), of a program whose memory will lie in pages of bf16 (`cuda::paged`): what attends to it is bf16 too.
    GpuPages,
}

/// Implemented for every op.
pub trait Lower {
    fn kernel_traits(&self) -> KernelTraits;
}

macro_rules! traits {
    ($($op:ident: in $i:expr, out $o:expr $(, $more:ident $value:expr)*;)*) => {
        $(impl Lower for $op {
            fn kernel_traits(&self) -> KernelTraits {
                KernelTraits {
                    strided_inputs: &$i,
                    strided_outputs: &$o,
                    $($more: $value,)*
                    ..KernelTraits::default()
                }
            }
        })*
    };
}

traits! {
    Source: in [], out [], moves true;
    Constant: in [], out [], moves true;
    Iota: in [], out [];
    Reshape: in [0], out [0], moves true;
    Slice: in [0], out [0], moves true;
    Broadcast: in [], out [], moves true;
    Transpose: in [], out [], moves true;
    Pad: in [], out [], moves true;
    Concat: in [], out [], moves true;
    Reduce: in [], out [];
    SumSquares: in [], out [];
    MapEach: in [], out [];
    Cast: in [], out [], moves true;
    MatMul: in [0, 1], out [0], bf16_inputs &[1];
    MatMulMap: in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], out [0, 1, 2, 3, 4, 5, 6, 7], bf16_inputs &[1];
    RmsNorm: in [0], out [0];
    RmsNormGrad: in [0, 2, 3], out [0];
    GatedRmsNorm: in [0, 1], out [0], overwrites &[(0, 0)];
    GatedRmsNormGrad: in [0, 1, 3], out [0, 1], overwrites &[(0, 3)];
    Rotary: in [0], out [0];
    Embedding: in [], out [0], bf16_inputs &[1];
    EmbeddingGrad: in [1], out [];
    CrossEntropy: in [0], out [];
    CrossEntropyGrad: in [0], out [0];
    CausalConv1d: in [0], out [0], overwrites &[(1, 3)];
    LinearCrossEntropy: in [0], out [];
    LinearCrossEntropyGrad: in [0], out [0];
    CausalConv1dGrad: in [0, 4], out [0];
    SelectiveScan: in [0, 1, 3, 4], out [0], overwrites &[(1, 6)];
    SelectiveScanGrad: in [0, 1, 3, 4, 7], out [0, 1, 3, 4];
    Attention: in [0, 1, 2], out [0];
    AttentionGrad: in [0, 1, 2, 3], out [0, 1, 2];
    Summarise: in [], out [];
    Score: in [], out [];
    ScoreGrad: in [], out [];
    Mask: in [], out [];
    Select: in [], out [];
    Weigh: in [], out [];
    WeighGrad: in [], out [];
    Aggregate: in [], out [];
    AggregateGrad: in [], out [];
    Append: in [], out [], overwrites &[(0, 0)];
    Merge: in [], out [];
    MergeGrad: in [], out [];
    Softmax: in [], out [];
    Selection: in [0], out [], paged_inputs &[1];
    SelectionGrad: in [0], out [0];
    ChunkAttention: in [0, 1, 2], out [0], paged_inputs &[1, 2];
    ChunkAttentionGrad: in [0, 1, 2, 6], out [0, 1, 2];
}

macro_rules! maps {
    ($($op:ident),*) => {
        $(impl Lower for $op {
            fn kernel_traits(&self) -> KernelTraits {
                KernelTraits { strided_inputs: ANY, strided_outputs: ANY, in_place: true, ..KernelTraits::default() }
            }
        })*
    };
}
const ANY: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
maps! { Unary, Binary, Where, FusedMap }

/// One softmax over all chosen chunks is fused by itself; one per chunk has a kernel only with the sum over chunks.
macro_rules! attends {
    ($($op:ident: in $i:expr, out $o:expr, paged $p:expr;)*) => {
        $(impl Lower for $op {
            fn kernel_traits(&self) -> KernelTraits {
                if self.joint {
                    let (strided_inputs, strided_outputs, paged_inputs): (&[usize], &[usize], &[usize]) = (&$i, &$o, &$p);
                    return KernelTraits { strided_inputs, strided_outputs, paged_inputs, ..KernelTraits::default() };
                }
                KernelTraits {
                    reference: Some("it was not fused; its reference evaluation runs, which is slow and holds per-chunk values"),
                    ..KernelTraits::default()
                }
            }
        })*
    };
}
attends! {
    Attend: in [0, 1, 2], out [0], paged [1, 2];
    AttendGrad: in [0, 1, 2, 5, 7], out [0, 1, 2], paged [];
}

macro_rules! dispatch {
    ($($op:ident),* $(,)?) => {
        /// The abilities of any op's kernels.
        pub fn kernel_traits(op: &Op) -> KernelTraits {
            match op { $(Op::$op(o) => o.kernel_traits()),* }
        }
    };
}
for_each_op!(dispatch);
