//! Kinds of ops and their colours; what else colours show.

use crate::scene::Figures;
use rambac_ir::ops::Op;

/// A colour: red, green, blue.
pub type Colour = [u8; 3];

/// Ops that people think of together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Source,
    Product,
    Scan,
    Attention,
    Selection,
    Norm,
    Loss,
    Embedding,
    Elementwise,
    Reduction,
    Movement,
    Constant,
}

impl Family {
    pub const ALL: [Family; 12] = [
        Family::Product,
        Family::Scan,
        Family::Attention,
        Family::Selection,
        Family::Norm,
        Family::Loss,
        Family::Embedding,
        Family::Elementwise,
        Family::Reduction,
        Family::Movement,
        Family::Source,
        Family::Constant,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Family::Source => "inputs and weights",
            Family::Product => "matrix products",
            Family::Scan => "scan and convolution",
            Family::Attention => "attention",
            Family::Selection => "selection of chunks",
            Family::Norm => "norms",
            Family::Loss => "loss",
            Family::Embedding => "embedding",
            Family::Elementwise => "elementwise",
            Family::Reduction => "reductions",
            Family::Movement => "movement",
            Family::Constant => "constants",
        }
    }

    pub fn colour(self) -> Colour {
        match self {
            Family::Source => [176, 190, 197],
            Family::Product => [92, 155, 213],
            Family::Scan => [112, 173, 100],
            Family::Attention => [222, 132, 82],
            Family::Selection => [226, 180, 75],
            Family::Norm => [160, 134, 196],
            Family::Loss => [214, 96, 96],
            Family::Embedding => [110, 182, 180],
            Family::Elementwise => [198, 170, 150],
            Family::Reduction => [181, 134, 154],
            Family::Movement => [202, 206, 214],
            Family::Constant => [224, 227, 231],
        }
    }
}

/// The family of an op.
pub fn family(op: &Op) -> Family {
    match op {
        Op::Source(_) => Family::Source,
        Op::Constant(_) | Op::Iota(_) => Family::Constant,
        Op::Unary(_) | Op::Binary(_) | Op::Where(_) | Op::Cast(_) | Op::FusedMap(_) | Op::MapEach(_) => {
            Family::Elementwise
        }
        Op::Broadcast(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Slice(_)
        | Op::Pad(_)
        | Op::Concat(_)
        | Op::Append(_) => Family::Movement,
        Op::Reduce(_) | Op::SumSquares(_) | Op::Softmax(_) => Family::Reduction,
        Op::MatMul(_) | Op::MatMulMap(_) => Family::Product,
        Op::RmsNorm(_) | Op::RmsNormGrad(_) | Op::GatedRmsNorm(_) | Op::GatedRmsNormGrad(_) => Family::Norm,
        Op::Embedding(_) | Op::EmbeddingGrad(_) => Family::Embedding,
        Op::CrossEntropy(_) | Op::CrossEntropyGrad(_) | Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad(_) => {
            Family::Loss
        }
        Op::CausalConv1d(_) | Op::CausalConv1dGrad(_) | Op::SelectiveScan(_) | Op::SelectiveScanGrad(_) => Family::Scan,
        Op::Summarise(_) | Op::Score(_) | Op::ScoreGrad(_) | Op::Select(_) | Op::Weigh(_) | Op::WeighGrad(_) => {
            Family::Selection
        }
        Op::Mask(_) | Op::Selection(_) | Op::SelectionGrad(_) => Family::Selection,
        Op::Rotary(_) | Op::Attention(_) | Op::AttentionGrad(_) | Op::Attend(_) | Op::AttendGrad(_) => {
            Family::Attention
        }
        Op::Aggregate(_) | Op::AggregateGrad(_) | Op::Merge(_) | Op::MergeGrad(_) => Family::Attention,
        Op::ChunkAttention(_) | Op::ChunkAttentionGrad(_) => Family::Attention,
    }
}

/// What the colour of a node says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ColourBy {
    #[default]
    Family,
    Flops,
    Bytes,
    Time,
    Memory,
}

impl ColourBy {
    pub const ALL: [ColourBy; 5] =
        [ColourBy::Family, ColourBy::Flops, ColourBy::Bytes, ColourBy::Time, ColourBy::Memory];

    pub fn name(self) -> &'static str {
        match self {
            ColourBy::Family => "kind of op",
            ColourBy::Flops => "FLOPs",
            ColourBy::Bytes => "bytes moved",
            ColourBy::Time => "predicted time",
            ColourBy::Memory => "memory of results",
        }
    }

    /// One of [`ALL`](Self::ALL) by a short name.
    pub fn from_name(s: &str) -> Option<Self> {
        let names = ["family", "flops", "bytes", "time", "memory"];
        names.iter().position(|n| *n == s).map(|i| Self::ALL[i])
    }

    /// The number that it shows.
    pub fn figure(self, f: &Figures) -> Option<f64> {
        match self {
            ColourBy::Family => None,
            ColourBy::Flops => Some(f.flops),
            ColourBy::Bytes => Some(f.bytes),
            ColourBy::Time => Some(f.seconds),
            ColourBy::Memory => Some(f.memory),
        }
    }
}

/// The colour of a part `0..=1` of the largest: pale to dark (after the map `inferno`, its bright half).
pub fn heat(part: f64) -> Colour {
    const STOPS: [[f64; 3]; 5] =
        [[246.0, 246.0, 240.0], [251.0, 221.0, 150.0], [247.0, 152.0, 80.0], [214.0, 75.0, 80.0], [124.0, 34.0, 92.0]];
    // Small parts must be told from nothing.
    let x = part.clamp(0.0, 1.0).sqrt() * (STOPS.len() - 1) as f64;
    let i = (x as usize).min(STOPS.len() - 2);
    let t = x - i as f64;
    std::array::from_fn(|c| (STOPS[i][c] * (1.0 - t) + STOPS[i + 1][c] * t).round() as u8)
}

/// Whether dark letters are read on this ground.
pub fn wants_dark(c: Colour) -> bool {
    0.299 * f64::from(c[0]) + 0.587 * f64::from(c[1]) + 0.114 * f64::from(c[2]) > 140.0
}
