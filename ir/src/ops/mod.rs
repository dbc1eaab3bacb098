//! The one list of ops, and what every op must say about itself.
//!
//! An op is a struct of attributes in a file of its own.  [`for_each_op!`](crate::for_each_op) lists them all; every
//! dispatch in the workspace (text form, inference, cost, evaluation, gradients, lowering, kernels) is generated from
//! it, so a missing piece is a compile error.

use crate::attr::{Attr, AttrError, AttrReader};
use crate::builder::Builder;
use crate::dim::Dim;
use crate::graph::Value;
use crate::host::HostArray;
use crate::ty::{ConcreteTy, DType, Ty};

/// Calls `$m! { Op1, Op2, ... }` with every op of the IR.
#[macro_export]
macro_rules! for_each_op {
    ($m:path) => {
        $m! {
            Source, Constant, Iota,
            Unary, Binary, Where, Cast, FusedMap, MapEach,
            Broadcast, Reshape, Transpose, Slice, Pad, Concat,
            Reduce, SumSquares, Softmax, MatMul, MatMulMap,
            RmsNorm, RmsNormGrad, GatedRmsNorm, GatedRmsNormGrad, Rotary, Embedding, EmbeddingGrad,
            CrossEntropy, CrossEntropyGrad, LinearCrossEntropy, LinearCrossEntropyGrad,
            CausalConv1d, CausalConv1dGrad, SelectiveScan, SelectiveScanGrad, Attention, AttentionGrad,
            Summarise, Score, ScoreGrad, Mask, Select, Weigh, WeighGrad, Attend, AttendGrad, Aggregate, AggregateGrad,
            Append, Merge, MergeGrad, Selection, SelectionGrad, ChunkAttention, ChunkAttentionGrad
        }
    };
}

mod aggregate;
mod append;
mod attend;
mod attention;
mod causal_conv1d;
mod chunk_attention;
mod cross_entropy;
mod embedding;
mod fused_map;
mod gated_rms_norm;
mod linear_cross_entropy;
mod map;
mod map_each;
mod mask;
mod matmul;
mod matmul_map;
mod merge;
mod reduce;
mod rms_norm;
mod rotary;
mod score;
mod select;
mod selection;
mod selective_scan;
mod shape;
mod softmax;
mod source;
mod sum_squares;
mod summarise;
mod weigh;

pub use aggregate::{Aggregate, AggregateGrad};
pub use append::Append;
pub use attend::{Attend, AttendGrad};
pub use attention::{Attention, AttentionGrad};
pub use causal_conv1d::{CausalConv1d, CausalConv1dGrad};
pub use chunk_attention::{ChunkAttention, ChunkAttentionGrad};
pub use cross_entropy::{CrossEntropy, CrossEntropyGrad};
pub use embedding::{Embedding, EmbeddingGrad};
pub use fused_map::{FusedMap, MapBody, MapFn, MapInst};
pub use gated_rms_norm::{GatedRmsNorm, GatedRmsNormGrad};
pub use linear_cross_entropy::{LinearCrossEntropy, LinearCrossEntropyGrad};
pub use map::{Binary, BinaryFn, Cast, Unary, UnaryFn, Where};
pub use map_each::MapEach;
pub use mask::Mask;
pub use matmul::MatMul;
pub use matmul_map::MatMulMap;
pub use merge::{Merge, MergeGrad};
pub use reduce::{Reduce, ReduceFn};
pub use rms_norm::{RmsNorm, RmsNormGrad};
pub use rotary::Rotary;
pub use score::{Score, ScoreGrad};
pub use select::{Order, Select};
pub use selection::{Selection, SelectionGrad};
pub use selective_scan::{SelectiveScan, SelectiveScanGrad};
pub use shape::{Broadcast, Concat, Pad, Reshape, Slice, Transpose};
pub use softmax::Softmax;
pub use source::{Constant, Iota, Source, SourceKind};
pub use sum_squares::SumSquares;
pub use summarise::{Summarise, Summary};
pub use weigh::{Weigh, WeighGrad, Weighting};

/// Why an op does not accept its operands, or has no gradient.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    #[error("takes {expected} operands, {found} given")]
    Arity { expected: String, found: usize },
    #[error("operand {index} must be {expected}, but is {found}")]
    Operand { index: usize, expected: String, found: String },
    #[error("{0}")]
    Mismatch(String),
    #[error("has no gradient: it is itself a gradient or was fused; differentiate before fusing")]
    NoGradient,
}

/// Work of one op: floating-point operations (a multiply-add is two) and bytes that must cross memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub flops: f64,
    pub bytes: f64,
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, o: Cost) -> Cost {
        Cost { flops: self.flops + o.flops, bytes: self.bytes + o.bytes }
    }
}
impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(i: I) -> Cost {
        i.fold(Cost::default(), |a, b| a + b)
    }
}

/// How an op is written.  [`op_struct!`](crate::op_struct) implements it.
pub trait OpText: Sized {
    /// Every mnemonic that reads as this op; families have several.
    const MNEMONICS: &'static [&'static str];
    fn mnemonic(&self) -> &'static str;
    fn attrs(&self) -> Vec<(&'static str, Attr)>;
    fn read(mnemonic: &str, r: &mut AttrReader) -> Result<Self, AttrError>;
}

/// What a gradient rule sees.
pub struct Vjp<'a> {
    pub b: &'a mut Builder,
    /// The op's operands and results.
    pub x: &'a [Value],
    pub y: &'a [Value],
    dy: &'a [Option<Value>],
}

impl<'a> Vjp<'a> {
    pub fn new(b: &'a mut Builder, x: &'a [Value], y: &'a [Value], dy: &'a [Option<Value>]) -> Self {
        Self { b, x, y, dy }
    }
    /// The gradient at result `i`; zeros where none flows in.
    pub fn dy(&mut self, i: usize) -> Value {
        match self.dy[i] {
            Some(v) => v,
            None => {
                let ty = self.b.ty(self.y[i]).clone();
                self.b.constant(0.0, ty)
            }
        }
    }
}

/// The gradient at each operand; `None` where none flows.
pub type Gradients = Result<Vec<Option<Value>>, OpError>;

/// What is true of an op on any machine.
pub trait OpDef {
    /// Result types from operand types.
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError>;
    /// Work at concrete sizes.  The default: no FLOPs, every operand and result crosses memory once.
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 0.0, bytes: traffic(x, y) }
    }
    /// The definition: slow, obvious, in f64.  `y` are the result types.
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray>;
    /// Emits the vector-Jacobian product as IR.
    fn vjp(&self, _cx: &mut Vjp) -> Gradients {
        Err(OpError::NoGradient)
    }
    /// One output element depends on one element of each operand; such ops fuse into maps.
    fn is_elementwise(&self) -> bool {
        false
    }
}

/// Bytes of all operands and results.
pub fn traffic(x: &[ConcreteTy], y: &[ConcreteTy]) -> f64 {
    x.iter().chain(y).map(|t| t.bytes() as f64).sum()
}

macro_rules! op_enum {
    ($($op:ident),* $(,)?) => {
        /// Any op.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op { $($op($op)),* }

        impl Op {
            pub fn def(&self) -> &dyn OpDef { match self { $(Op::$op(o) => o),* } }
            pub fn mnemonic(&self) -> &'static str { match self { $(Op::$op(o) => o.mnemonic()),* } }
            pub fn attrs(&self) -> Vec<(&'static str, Attr)> { match self { $(Op::$op(o) => o.attrs()),* } }
            /// The op that `mnemonic` names with these attributes; `None` if there is no such op.
            pub fn read(mnemonic: &str, attrs: Vec<(String, Attr)>) -> Option<Result<Op, AttrError>> {
                $(if $op::MNEMONICS.contains(&mnemonic) {
                    let mut r = AttrReader::new(attrs);
                    return Some($op::read(mnemonic, &mut r).and_then(|o| { r.finish()?; Ok(Op::$op(o)) }));
                })*
                None
            }
            /// Every mnemonic of the IR.
            pub fn mnemonics() -> Vec<&'static str> {
                let mut all = vec![];
                $(all.extend_from_slice($op::MNEMONICS);)*
                all
            }
        }
        $(impl From<$op> for Op { fn from(o: $op) -> Op { Op::$op(o) } })*
    };
}
crate::for_each_op!(op_enum);

// Checks that inference rules share.

pub(crate) fn arity(x: &[&Ty], n: usize) -> Result<(), OpError> {
    if x.len() == n { Ok(()) } else { Err(OpError::Arity { expected: n.to_string(), found: x.len() }) }
}

pub(crate) fn operand(x: &[&Ty], index: usize, ok: bool, expected: impl Into<String>) -> Result<(), OpError> {
    if ok { Ok(()) } else { Err(OpError::Operand { index, expected: expected.into(), found: x[index].to_string() }) }
}

pub(crate) fn float(x: &[&Ty], index: usize) -> Result<(), OpError> {
    operand(x, index, x[index].dtype.is_float(), "of a float type")
}

pub(crate) fn rank(x: &[&Ty], index: usize, r: usize) -> Result<(), OpError> {
    operand(x, index, x[index].rank() == r, format!("of rank {r}"))
}

/// Operand `index` must be exactly `dtype` and `shape`.
pub(crate) fn exactly(x: &[&Ty], index: usize, dtype: DType, shape: &[&Dim]) -> Result<(), OpError> {
    let want = Ty::new(dtype, shape.iter().map(|d| (*d).clone()));
    operand(x, index, *x[index] == want, want.to_string())
}

pub(crate) fn mismatch(m: impl Into<String>) -> OpError {
    OpError::Mismatch(m.into())
}

pub(crate) fn div(d: &Dim, n: usize, what: &str) -> Result<Dim, OpError> {
    let q = d.checked_div(n as u64).ok_or_else(|| mismatch(format!("{what} must be at least 1")))?;
    match (d.as_int(), q.as_int()) {
        (Some(v), None) => Err(mismatch(format!("dim {v} is not divisible by {what} {n}"))),
        _ => Ok(q),
    }
}
