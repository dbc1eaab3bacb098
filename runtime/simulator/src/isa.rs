//! The form that PTX is decoded to: operands are slots of a flat register file, constants and special registers are
//! slots that are filled before a warp starts, and arithmetic is a pointer to a loop over 32 lanes.

use crate::parse::ast::Space;
pub use crate::program::{Class, Param, Place, Program, Special};

/// A register of all lanes of a warp.  Values of fewer than 64 bits are zero-extended.
pub type Lanes = [u64; 32];
/// Arithmetic over all lanes: (result, a, b, c).
pub type AluFn = fn(&mut Lanes, &Lanes, &Lanes, &Lanes);
/// A comparison of all lanes, as a mask.
pub type CmpFn = fn(&Lanes, &Lanes) -> u32;
/// Arithmetic with the carry flag: (result, a, b, c, carry in) → carry out.
pub type CarryFn = fn(&mut Lanes, &Lanes, &Lanes, &Lanes, u32) -> u32;

/// Index of a register, constant or special register.
pub type Slot = u32;

/// Types of PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    E4m3x2,
    E5m2x2,
}

impl Ty {
    /// The type of a suffix such as `f32`.
    pub fn named(s: &str) -> Option<Ty> {
        use Ty::*;
        Some(match s {
            "pred" => Pred,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "b128" => B128,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "tf32" => Tf32,
            "f32" => F32,
            "f64" => F64,
            "e4m3x2" => E4m3x2,
            "e5m2x2" => E5m2x2,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        use Ty::*;
        match self {
            Pred | B8 | U8 | S8 => 1,
            B16 | U16 | S16 | F16 | Bf16 | E4m3x2 | E5m2x2 => 2,
            B32 | U32 | S32 | F32 | F16x2 | Bf16x2 | Tf32 => 4,
            B64 | U64 | S64 | F64 => 8,
            B128 => 16,
        }
    }

    pub fn bits(self) -> u32 {
        self.bytes() as u32 * 8
    }

    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    pub fn float(self) -> bool {
        use Ty::*;
        matches!(self, F16 | F16x2 | Bf16 | Bf16x2 | Tf32 | F32 | F64 | E4m3x2 | E5m2x2)
    }
}

/// A predicate as an operand; index 0 is the constant true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pred {
    pub index: u16,
    pub negated: bool,
}

impl Pred {
    pub const TRUE: Pred = Pred { index: 0, negated: false };

    pub fn mask(self, preds: &[u32]) -> u32 {
        preds[self.index as usize] ^ if self.negated { u32::MAX } else { 0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoolOp {
    And,
    Or,
    Xor,
}

impl BoolOp {
    pub fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            BoolOp::And => a & b,
            BoolOp::Or => a | b,
            BoolOp::Xor => a ^ b,
        }
    }
}

/// One instruction.
pub struct Inst {
    pub guard: Pred,
    pub op: Op,
}

pub enum Op {
    Nop,
    Alu {
        f: AluFn,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// A conversion without a loop of its own; `b` is the second of a pair.
    Convert {
        by: crate::math::convert::Convert,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    /// Any boolean function of three bits.
    Lop3 {
        table: u8,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Carry {
        f: CarryFn,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        writes: bool,
    },
    Setp {
        f: CmpFn,
        a: Slot,
        b: Slot,
        combine: Option<(BoolOp, Pred)>,
        p: u16,
        q: Option<u16>,
    },
    /// `one` where the comparison holds, else 0.
    Set {
        f: CmpFn,
        a: Slot,
        b: Slot,
        combine: Option<(BoolOp, Pred)>,
        dst: Slot,
        one: u64,
    },
    Selp {
        dst: Slot,
        a: Slot,
        b: Slot,
        p: Pred,
    },
    Pred {
        op: BoolOp,
        dst: u16,
        a: Pred,
        b: Pred,
    },
    /// Parts of `width` bits, lowest first, make one register.
    Pack {
        dst: Slot,
        parts: Box<[Slot]>,
        width: u32,
    },
    Unpack {
        a: Slot,
        parts: Box<[Option<Slot>]>,
        width: u32,
    },
    Clock {
        dst: Slot,
        narrow: bool,
    },
    Bra {
        target: u32,
    },
    /// A table of targets.
    Brx {
        index: Slot,
        targets: Box<[u32]>,
    },
    Call(Box<Call>),
    Ret,
    Exit,
    Trap,
    Ld(Box<Access>),
    St(Box<Access>),
    Atom(Box<Atom>),
    /// Nothing happens: prefetches, hints.
    Hint,
    /// Waits for the launches before this one.
    WaitEarlier,
    /// Whether an address lies in a space.
    IsSpace {
        p: u16,
        a: Slot,
        space: Space,
    },
    Shfl(Box<Shfl>),
    Vote {
        kind: Vote,
        dst: Slot,
        p: Pred,
        mask: Slot,
    },
    Match {
        all: bool,
        wide: bool,
        dst: Slot,
        p: Option<u16>,
        a: Slot,
        mask: Slot,
    },
    Redux {
        kind: Redux,
        dst: Slot,
        a: Slot,
        mask: Slot,
    },
    ActiveMask {
        dst: Slot,
    },
    Elect {
        dst: Option<Slot>,
        p: u16,
        mask: Slot,
    },
    Bar(Box<Bar>),
    BarWarp {
        mask: Slot,
    },
    /// Of all of the device (or the system) rather than the block alone.
    Fence {
        wide: bool,
        proxy: bool,
    },
    ClusterArrive {
        aligned: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    Matrix(Box<Matrix>),
    MoveMatrix {
        dst: Slot,
        a: Slot,
    },
    Mma(Box<Mma>),
    CpAsync(Box<CpAsync>),
    CpAsyncCommit,
    /// Waits until at most `keep` of a thread's groups are in flight; `None` is for all its copies.
    CpAsyncWait {
        keep: Option<u32>,
    },
    Mbarrier(Box<MbarrierOp>),
    Mapa {
        dst: Slot,
        a: Slot,
        rank: Slot,
        generic: bool,
    },
    GetCtaRank {
        dst: Slot,
        a: Slot,
        generic: bool,
    },
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait {
        keep: u32,
    },
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        keep: u32,
    },
}

pub struct Call {
    pub target: u32,
    /// (from, to, bytes) within local memory.
    pub copies: Box<[(u32, u32, u32)]>,
    /// Copied when the function returns.
    pub results: Box<[(u32, u32, u32)]>,
}

/// A load or a store.
pub struct Access {
    pub space: Space,
    /// Of one element, in bytes.
    pub width: u8,
    /// Bytes of the register that a signed value fills; 0 if it is not signed.
    pub sign_extend: u8,
    /// One slot per element; `None` is `_`.
    pub regs: Box<[Option<Slot>]>,
    pub address: Slot,
    pub offset: i64,
    /// `volatile`, `relaxed`, `acquire`, `release`: made to be shared without a barrier.
    pub strong: bool,
    pub acquire: bool,
    pub release: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

pub struct Atom {
    pub space: Space,
    pub op: AtomOp,
    pub ty: Ty,
    /// `None` for `red`.
    pub dst: Box<[Option<Slot>]>,
    pub address: Slot,
    pub offset: i64,
    pub b: Box<[Slot]>,
    pub c: Slot,
    pub acquire: bool,
    pub release: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShflKind {
    Up,
    Down,
    Bfly,
    Idx,
}

pub struct Shfl {
    pub kind: ShflKind,
    pub dst: Slot,
    pub p: Option<u16>,
    pub a: Slot,
    pub b: Slot,
    pub c: Slot,
    pub mask: Slot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redux {
    Add,
    MinU,
    MaxU,
    MinS,
    MaxS,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    Sync,
    Arrive,
    Red(Vote),
    Popc,
}

pub struct Bar {
    pub kind: BarKind,
    pub id: Slot,
    /// Threads that take part; `None` for all of the block.
    pub threads: Option<Slot>,
    /// All threads of a warp must come together.
    pub aligned: bool,
    pub dst: Option<Slot>,
    pub p_dst: Option<u16>,
    pub p: Pred,
}

/// `ldmatrix` and `stmatrix`.
pub struct Matrix {
    pub load: bool,
    pub transposed: bool,
    pub regs: Box<[Slot]>,
    pub address: Slot,
    pub offset: i64,
    pub generic: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmaTy {
    F16,
    Bf16,
    Tf32,
    F64,
    U8,
    S8,
}

pub struct Mma {
    pub m: u8,
    pub n: u8,
    pub k: u8,
    pub a_ty: MmaTy,
    pub b_ty: MmaTy,
    /// Sums in f16 rather than f32.
    pub half_sum: bool,
    pub half_out: bool,
    pub saturate: bool,
    pub d: Box<[Slot]>,
    pub a: Box<[Slot]>,
    pub b: Box<[Slot]>,
    pub c: Box<[Slot]>,
}

pub struct CpAsync {
    pub dst: Slot,
    pub dst_offset: i64,
    pub src: Slot,
    pub src_offset: i64,
    pub bytes: u8,
    /// Bytes read; the rest is zero.
    pub src_bytes: Option<Slot>,
    /// Nothing is read where it holds.
    pub ignore: Option<Pred>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MbarrierKind {
    Init,
    Inval,
    /// Expects bytes first if `bytes` is given.
    Arrive {
        drop: bool,
    },
    ExpectTx,
    CompleteTx,
    Test {
        parity: bool,
        wait: bool,
    },
    PendingCount,
    /// `cp.async.mbarrier.arrive`
    AsyncArrive {
        noinc: bool,
    },
}

pub struct MbarrierOp {
    pub kind: MbarrierKind,
    /// Addresses are in the cluster's window.
    pub space: Space,
    pub address: Slot,
    pub offset: i64,
    /// Count, state, parity or bytes.
    pub value: Option<Slot>,
    pub bytes: Option<Slot>,
    pub dst: Option<Slot>,
    pub p: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkKind {
    /// Global to shared, completing on an mbarrier.
    Load,
    /// Shared to global, in bulk groups.
    Store,
    /// Shared of one block to shared of another.
    Cluster,
    /// Shared added to global.
    Reduce(AtomOp, Ty),
    Prefetch,
}

pub struct Bulk {
    pub kind: BulkKind,
    /// 0: plain bytes; else a tensor of so many dims.
    pub dims: u8,
    /// Address in shared memory (destination of loads).
    pub shared: Slot,
    pub shared_offset: i64,
    /// Global address, or that of the tensor map.
    pub global: Slot,
    pub global_offset: i64,
    pub coords: Box<[Slot]>,
    pub bytes: Option<Slot>,
    pub mbarrier: Option<(Slot, i64)>,
    pub multicast: Option<Slot>,
}

pub struct Wgmma {
    pub n: u16,
    pub k: u8,
    pub a_ty: MmaTy,
    pub b_ty: MmaTy,
    pub d: Box<[Slot]>,
    /// Four registers, or a descriptor.
    pub a: Box<[Slot]>,
    pub a_in_shared: bool,
    pub b: Slot,
    pub scale_d: Pred,
    pub negate_a: bool,
    pub negate_b: bool,
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub half_out: bool,
}

impl Wgmma {
    /// A's registers: none where it lies in shared memory.
    pub fn fragments(&self) -> &[Slot] {
        if self.a_in_shared { &[] } else { &self.a }
    }

    /// Registers of D and A.
    pub fn registers(&self) -> impl Iterator<Item = Slot> {
        self.d.iter().chain(self.fragments()).copied()
    }
}

impl Op {
    /// The product of a warp group that it is.
    pub fn product(&self) -> Option<&Wgmma> {
        if let Op::Wgmma(w) = self { Some(w) } else { None }
    }
}

/// First address of each window of generic space; global addresses lie below them.
pub mod window {
    pub const SHARED: u64 = 1 << 56;
    pub const LOCAL: u64 = 2 << 56;
    pub const CONST: u64 = 3 << 56;
    pub const PARAM: u64 = 4 << 56;

    /// Shift of a block's rank within its cluster in a shared address.
    pub const RANK_SHIFT: u32 = 24;
}
