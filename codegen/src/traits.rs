//! What the kernels of each op accept beyond contiguous operands.
//!
//! One row per op of the list; an op without a row does not compile.

use rambac_ir::for_each_op;
use rambac_ir::ops::*;

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
    /// Why the op has no kernel of its own and runs by its reference evaluation.
    pub reference: Option<&'static str>,
}

/// Implemented for every op.
pub trait Lower {
    fn kernel_traits(&self) -> KernelTraits;
}

macro_rules! traits {
    ($($op:ident: in $i:expr, out $o:expr $(, paged $p:expr)?;)*) => {
        $(impl Lower for $op {
            fn kernel_traits(&self) -> KernelTraits {
                KernelTraits {
                    strided_inputs: &$i,
                    strided_outputs: &$o,
                    $(paged_inputs: &$p,)?
                    ..KernelTraits::default()
                }
            }
        })*
    };
}

traits! {
    Source: in [], out [];
    Constant: in [], out [];
    Iota: in [], out [];
    Reshape: in [0], out [0];
    Slice: in [0], out [0];
    Broadcast: in [], out [];
    Transpose: in [], out [];
    Pad: in [], out [];
    Concat: in [], out [];
    Reduce: in [], out [];
    Cast: in [], out [];
    MatMul: in [0, 1], out [0];
    RmsNorm: in [0], out [0];
    RmsNormGrad: in [0, 2], out [0];
    Rotary: in [0], out [0];
    Embedding: in [], out [0];
    EmbeddingGrad: in [1], out [];
    CrossEntropy: in [0], out [];
    CrossEntropyGrad: in [0], out [0];
    CausalConv1d: in [0], out [0];
    CausalConv1dGrad: in [0, 4], out [0];
    SelectiveScan: in [0, 1, 3, 4], out [0];
    SelectiveScanGrad: in [0, 1, 3, 4, 7], out [0, 1, 3, 4];
    Attention: in [0, 1, 2], out [0];
    AttentionGrad: in [0, 1, 2, 3], out [0, 1, 2];
    Summarise: in [], out [];
    Selection: in [0], out [], paged [1];
    SelectionGrad: in [0], out [0];
    ChunkAttention: in [0, 1, 2], out [0], paged [1, 2];
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

macro_rules! unfused {
    ($($op:ident),*) => {
        $(impl Lower for $op {
            fn kernel_traits(&self) -> KernelTraits {
                KernelTraits {
                    reference: Some("it was not fused; its reference evaluation runs, which is slow and holds L×C or per-chunk values"),
                    ..KernelTraits::default()
                }
            }
        })*
    };
}
unfused! { Score, ScoreGrad, Select, Weigh, WeighGrad, Attend, AttendGrad, Aggregate, AggregateGrad }

macro_rules! dispatch {
    ($($op:ident),* $(,)?) => {
        /// The abilities of any op's kernels.
        pub fn kernel_traits(op: &Op) -> KernelTraits {
            match op { $(Op::$op(o) => o.kernel_traits()),* }
        }
    };
}
for_each_op!(dispatch);
