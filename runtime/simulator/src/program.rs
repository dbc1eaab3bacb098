//! A kernel ready to run, and what is known of it beside its instructions.

use crate::isa::{Inst, Slot, Ty};
use crate::parse::ast::Source;

/// Registers that the hardware fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    ClusterId(u8),
    NclusterId(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    LaneId,
    WarpId,
    NwarpId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    DynamicShared,
    TotalShared,
    Zero,
    One,
}

/// What an instruction counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    Integer,
    Float,
    Double,
    Half,
    Special,
    Convert,
    Move,
    Compare,
    Control,
    LoadGlobal,
    StoreGlobal,
    LoadShared,
    StoreShared,
    LoadOther,
    StoreOther,
    Atomic,
    Warp,
    Barrier,
    Tensor,
    MatrixMove,
    AsyncCopy,
}

impl Class {
    pub fn name(self) -> &'static str {
        match self {
            Class::Integer => "integer",
            Class::Float => "float32",
            Class::Double => "float64",
            Class::Half => "half",
            Class::Special => "special functions",
            Class::Convert => "conversions",
            Class::Move => "moves",
            Class::Compare => "comparisons",
            Class::Control => "control",
            Class::LoadGlobal => "loads, global",
            Class::StoreGlobal => "stores, global",
            Class::LoadShared => "loads, shared",
            Class::StoreShared => "stores, shared",
            Class::LoadOther => "loads, other",
            Class::StoreOther => "stores, other",
            Class::Atomic => "atomics",
            Class::Warp => "warp exchange",
            Class::Barrier => "barriers, fences",
            Class::Tensor => "tensor cores",
            Class::MatrixMove => "matrix loads, stores",
            Class::AsyncCopy => "asynchronous copies",
        }
    }
}

/// Where an instruction stands.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Of the PTX file.
    pub line: u32,
    pub source: Option<Source>,
}

/// A kernel ready to run: its own code and that of all functions it calls.
pub struct Program {
    pub name: String,
    pub code: Vec<Inst>,
    pub places: Vec<Place>,
    /// Mnemonics, for reports.
    pub mnemonics: Vec<String>,
    pub classes: Vec<Class>,
    /// By instruction: the registers of products of warp groups that it uses, if it is no such product, and whether it writes
    /// them.  Empty where there are none.
    pub touches: Vec<Box<[(Slot, bool)]>>,
    /// Registers, constants and special registers.
    pub n_slots: usize,
    pub n_preds: usize,
    pub constants: Vec<(Slot, u64)>,
    pub specials: Vec<(Slot, Special)>,
    /// Constants that are addresses in shared memory.
    pub shared_slots: Vec<Slot>,
    /// Parameters: (name, offset, bytes).
    pub params: Vec<Param>,
    pub param_bytes: usize,
    /// Variables in shared memory; dynamic memory follows at `shared_bytes`.
    pub shared_vars: Vec<(String, u32, u32)>,
    pub shared_bytes: u32,
    /// Per thread.
    pub local_bytes: u32,
    pub local_vars: Vec<(String, u32, u32)>,
    /// Narrowest access that may touch each space, in bytes (1, 2 or 4): the grain of the checks.
    pub grain_global: u32,
    pub grain_shared: u32,
    pub required_block: Option<[u32; 3]>,
    pub max_threads: Option<u32>,
    pub cluster: Option<[u32; 3]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    pub name: String,
    pub offset: usize,
    pub bytes: usize,
    pub ty: Ty,
}
