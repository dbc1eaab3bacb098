//! Softmax attention within a sequence, and its gradient in two launches.

use super::any_size::AnyAttention;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::Stub;
use crate::cuda::target::Target;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// The three kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// dq, by rows.
    Rows,
    /// dk and dv, by keys.
    Keys,
}

/// How a pass is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionTile {
    pub warps: usize,
    /// Keys at a time.
    pub keys: usize,
    /// All keys are one part.
    pub whole: bool,
    /// Dynamic shared memory, in bytes.
    pub shared: usize,
    pub blocks_per_sm: usize,
}

/// Sizes that choices depend on; `tokens` and `keys` if they are known.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    pub element: usize,
    pub head_dim: usize,
    pub group: usize,
    pub tokens: Option<usize>,
    pub keys: Option<usize>,
    /// Rows see ranges of keys, whose bounds take registers.
    pub ranged: bool,
}

impl AttentionSizes {
    /// Registers of a thread, from above: accumulators and logits, and what addresses and fragments take (seen).
    fn registers(&self, pass: Pass, keys: usize) -> usize {
        let wide = self.element == 4;
        let own = if wide && pass != Pass::Keys { 136 } else { 104 };
        let own = own + if self.ranged && pass != Pass::Keys { 16 } else { 0 };
        own + match pass {
            Pass::Forward => (self.head_dim + keys) / 2 + 16,
            Pass::Rows => self.head_dim / 2 + keys,
            Pass::Keys if wide => self.head_dim + keys * 5 / 4,
            Pass::Keys => self.head_dim + keys,
        }
    }
    /// Bytes of the pass's layout.
    fn bytes(&self, pass: Pass, warps: usize, keys: usize, whole: bool) -> usize {
        let row = |cols: usize| (cols + 16 / self.element) * self.element;
        let (d, rows, stages) = (row(self.head_dim), 16 * warps, if whole { 1 } else { 2 });
        match pass {
            Pass::Forward => (rows + 2 * stages * keys) * d,
            Pass::Rows => (2 * rows + 2 * stages * keys) * d,
            Pass::Keys => (2 * keys + 4 * rows) * d + 2 * rows * row(keys),
        }
    }
    /// As many warps as a sequence fills, and all its keys at once where registers hold them.
    pub fn tile(&self, target: &Target, pass: Pass) -> Option<AttentionTile> {
        let all = self.keys.map(|t| t.max(1).next_multiple_of(16));
        // Of f32, dk and dv of more rows at a time need more registers than there are.
        let most = if pass == Pass::Keys && self.element == 4 { 4 } else { 8 };
        let warps = self.tokens.map_or(4, |t| (t * self.group).div_ceil(16).clamp(1, most));
        let sizes = all.filter(|&k| k <= 96).into_iter().chain([64, 48, 32, 16]);
        let most = if pass == Pass::Keys && self.element == 4 && self.head_dim > 64 { 32 } else { 96 };
        let tiles = sizes.filter(|&k| k <= most && all.is_none_or(|a| k <= a));
        let tiles = tiles.flat_map(|k| [warps, 4, 2, 1].into_iter().filter(|&w| w <= warps).map(move |w| (k, w)));
        for (keys, warps) in tiles {
            // A warp has a tile of keys.
            let warps = if pass == Pass::Keys { warps.max(keys / 16) } else { warps };
            let whole = pass != Pass::Keys && all == Some(keys);
            let shared = self.bytes(pass, warps, keys, whole);
            let registers = self.registers(pass, keys);
            if shared > target.shared_per_block || registers > 255 {
                continue;
            }
            let blocks = target.occupancy(32 * warps, registers, shared);
            if blocks > 0 {
                return Some(AttentionTile { warps, keys, whole, shared, blocks_per_sm: blocks });
            }
        }
        None
    }
}

struct Attending {
    sizes: AttentionSizes,
    dtype: DType,
    b: Dim,
    t: Dim,
    keys: Dim,
    h: usize,
    op: rambac_ir::ops::Attention,
    strides: [Expr; 3],
}

impl Attending {
    fn new(site: &Site, op: &rambac_ir::ops::Attention, rows: &[Operand]) -> Result<Attending, Unsupported> {
        let [q, k, v] = [0, 1, 2].map(Operand::Input);
        let dtype = site.dtype(q);
        let (heads, head_dim, h) = (site.int(q, 2)?, site.int(q, 3)?, site.int(k, 2)?);
        if !head_dim.is_multiple_of(16) || !(16..=128).contains(&head_dim) {
            return because(format!("head_dim is {head_dim}; kernels take multiples of 16 from 16 to 128"));
        }
        if op.scale <= 0.0 {
            return because(format!("the scale is {}; kernels take positive ones", op.scale));
        }
        let piece = 16 / dtype.size();
        if site.vector(rows, piece) < piece {
            return because("rows of q, k, v and of what goes with them must begin at multiples of 16 bytes");
        }
        let (shape, keys) = (&site.view(q).ty.shape, &site.view(k).ty.shape[1]);
        Ok(Attending {
            sizes: AttentionSizes {
                element: dtype.size(),
                head_dim,
                group: heads / h,
                tokens: shape[1].as_int(),
                keys: keys.as_int(),
                ranged: op.is_ranged(),
            },
            dtype,
            b: shape[0].clone(),
            t: shape[1].clone(),
            keys: keys.clone(),
            h,
            op: op.clone(),
            strides: [site.row_stride(q, 2)?, site.row_stride(k, 2)?, site.row_stride(v, 2)?],
        })
    }
    fn tile(&self, target: &Target, pass: Pass) -> Result<AttentionTile, Unsupported> {
        match self.sizes.tile(target, pass) {
            Some(t) => Ok(t),
            None => because(format!("no tile of {:?} fits {} bytes", self.sizes, target.shared_per_block)),
        }
    }
    fn lists(&self) -> Expr {
        Expr::from(&self.b) * self.h
    }
    fn rows(&self) -> Expr {
        Expr::from(&self.t) * self.sizes.group
    }
    fn stub(&self, template: &'static str, t: &AttentionTile) -> Stub {
        Stub::new("attention", template, 32 * t.warps)
            .element("T", self.dtype)
            .int("head_dim", self.sizes.head_dim)
            .int("heads_per_kv", self.sizes.group)
            .int("warps", t.warps)
            .int("keys", t.keys)
            .int("shared", t.shared)
            .float("scale", self.op.scale)
            .flag("causal", self.op.causal)
            .int("window", self.op.window)
            .int("local", self.op.local)
            .int("unit", self.op.unit)
            .flag("whole", t.whole)
            .tag(format!("d{}_g{}", self.sizes.head_dim, self.sizes.group))
            .hashed()
            .shared(t.shared)
            .blocks_per_sm(t.blocks_per_sm)
    }
    fn read_qkv(&self, s: Stub) -> Stub {
        let [q, k, v] = self.strides.clone();
        s.read("q", self.dtype, Operand::Input(0))
            .i64("q_stride", q)
            .read("k", self.dtype, Operand::Input(1))
            .i64("k_stride", k)
            .read("v", self.dtype, Operand::Input(2))
            .i64("v_stride", v)
    }
    fn sized(&self, s: Stub) -> Stub {
        s.i32("all_rows", self.rows()).i32("t", &self.t).i32("all_keys", &self.keys).i32("h", self.h)
    }
    fn by_rows(&self, t: &AttentionTile) -> Expr {
        self.rows().ceil_div(16 * t.warps) * self.lists()
    }
}

fn cut(t: &AttentionTile) -> String {
    format!("{} warps, {} keys at a time, {} blocks per SM", t.warps, t.keys, t.blocks_per_sm)
}

/// What tiles do not take runs a warp per row.
fn any_size(
    op: &rambac_ir::ops::Attention,
    site: &Site,
    dy: Option<Operand>,
    tiled: Result<Vec<Form>, Unsupported>,
) -> Result<Vec<Form>, Unsupported> {
    tiled.or_else(|why| {
        let dlse = dy.filter(|_| op.lse).map(|_| Operand::Input(4));
        let (op, why) = (op.clone(), why.to_string());
        AnyAttention { site, op, chunk: None, weighed: false, off_by_one: 0.0, dy, dlse, why }.forms()
    })
}

impl Cuda for rambac_ir::ops::Attention {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        any_size(self, site, None, forward(self, site))
    }
}

impl Cuda for AttentionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let op = self.forward();
        any_size(&op, site, Some(Operand::Input(3)), gradient(&op, site))
    }
}

fn forward(op: &rambac_ir::ops::Attention, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [o, lse] = [0, 1].map(Operand::Output);
    let a = Attending::new(site, op, &[0, 1, 2].map(Operand::Input))?;
    if site.vector(&[o], 16 / a.dtype.size()) < 16 / a.dtype.size() {
        return because("rows of the result must begin at multiples of 16 bytes");
    }
    let t = a.tile(site.target, Pass::Forward)?;
    let started = site.inputs.len() > 3;
    let mut stub = a.stub(
        match (op.lse, started) {
            (false, false) => "attention",
            (true, false) => "attention_lse",
            (false, true) => "attention_from",
            (true, true) => "attention_lse_from",
        },
        &t,
    );
    if started {
        let start = Operand::Input(3);
        site.contiguous(start)?;
        stub = stub.read("start", DType::I32, start);
    }
    if op.lse {
        site.contiguous(lse)?;
        stub = stub.write("lse", a.dtype, lse);
    }
    let stub = stub.write("o", a.dtype, o).i64("o_stride", site.row_stride(o, 2)?);
    let launch = a.sized(a.read_qkv(stub)).launch((a.by_rows(&t), 1, 1));
    Ok(vec![Form::new("attention", cut(&t), vec![launch.into()])])
}

fn gradient(op: &rambac_ir::ops::Attention, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [dy, dlse] = [3, 4].map(Operand::Input);
    let [dq, dk, dv] = [0, 1, 2].map(Operand::Output);
    let inputs = [0, 1, 2, 3].map(Operand::Input);
    let a = Attending::new(site, op, &inputs)?;
    if site.vector(&[dq, dk, dv], 16 / a.dtype.size()) < 16 / a.dtype.size() {
        return because("rows of the results must begin at multiples of 16 bytes");
    }
    let [log2_sum, delta] = [0, 1].map(Operand::Workspace);
    let (rows, keys) = (a.tile(site.target, Pass::Rows)?, a.tile(site.target, Pass::Keys)?);
    let read = |s: Stub| -> Result<Stub, Unsupported> {
        let s = a.read_qkv(s).read("dy", a.dtype, dy).i64("dy_stride", site.row_stride(dy, 2)?);
        Ok(a.sized(s))
    };
    let by_rows = if op.lse {
        site.contiguous(dlse)?;
        a.stub("attention_grad_rows_lse", &rows).read("dlse", a.dtype, dlse)
    } else {
        a.stub("attention_grad_rows", &rows)
    };
    let by_rows = by_rows
        .write("dq", a.dtype, dq)
        .i64("dq_stride", site.row_stride(dq, 2)?)
        .write("log2_sum", DType::F32, log2_sum)
        .write("delta", DType::F32, delta);
    let by_keys = a
        .stub("attention_grad_keys", &keys)
        .write("dk", a.dtype, dk)
        .i64("dk_stride", site.row_stride(dk, 2)?)
        .write("dv", a.dtype, dv)
        .i64("dv_stride", site.row_stride(dv, 2)?)
        .read("log2_sum", DType::F32, log2_sum)
        .read("delta", DType::F32, delta);
    let calls = vec![
        read(by_rows)?.launch((a.by_rows(&rows), 1, 1)).into(),
        read(by_keys)?.launch((Expr::from(&a.keys).ceil_div(keys.keys) * a.lists(), 1, 1)).into(),
    ];
    let why = format!("dq by rows ({}), then dk and dv by keys ({})", cut(&rows), cut(&keys));
    let size = a.lists() * a.rows();
    Ok(vec![Form::new("attention_grad", why, calls).with("log2_sum", DType::F32, size.clone()).with(
        "delta",
        DType::F32,
        size,
    )])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::target::Arch;

    #[test]
    fn tiles_of_a_chunk_encoder() {
        let t = Target::of(Arch::Sm80);
        // A chunk of 64 and its summary: five tiles of 16 rows, all keys at once.
        let s = AttentionSizes { element: 2, head_dim: 64, group: 1, tokens: Some(65), keys: Some(65), ranged: false };
        let f = s.tile(&t, Pass::Forward).unwrap();
        assert_eq!((f.warps, f.keys, f.whole), (5, 80, true));
        assert!(f.blocks_per_sm >= 2);
        let k = s.tile(&t, Pass::Keys).unwrap();
        assert_eq!((k.warps, k.keys), (5, 80));
        // Every size fits, whatever is known of the length.
        for arch in Arch::ALL {
            for (element, head_dim, group) in
                [2, 4].into_iter().flat_map(|e| (1..9).flat_map(move |d| [1, 3, 16].map(|g| (e, 16 * d, g))))
            {
                for tokens in [None, Some(1), Some(65), Some(500)] {
                    for (keys, ranged) in [(tokens, false), (tokens, true), (tokens.map(|t| t / 64), true)] {
                        let s = AttentionSizes { element, head_dim, group, tokens, keys, ranged };
                        for pass in [Pass::Forward, Pass::Rows, Pass::Keys] {
                            assert!(s.tile(&Target::of(arch), pass).is_some(), "{s:?} {pass:?}");
                        }
                    }
                }
            }
        }
    }
}
