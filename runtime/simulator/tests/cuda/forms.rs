//! More programs: who knows what within a warp, what only the asynchronous engine does, and every form of `wgmma`.

use crate::cases::{Result, rng, whole};
use crate::support::{Bench, Case, same};
use half::{bf16, f16};
use rambac_driver::Float;
use rambac_simulator::device::{Arg, Extent, Tensor};
use rambac_simulator::exec::tensor_map::{Swizzle, TensorMap};
use rand::Rng;

cases! {
    masks: "warp.cu", "compute_80", "masks";
    elected: "warp.cu", "compute_80", "elected";
    published: "warp.cu", "compute_80", "published";
    chain: "warp.cu", "compute_80", "chain";
    bulk_reductions: "bulk.cu", "sm_90a", "reductions";
    bulk_to_everyone: "bulk.cu", "sm_90a", "everyone";
    bulk_across: "bulk.cu", "sm_90a", "across";
    bulk_boxes: "bulk.cu", "sm_90a", "boxes";
    bulk_edges: "bulk.cu", "sm_90a", "edges";
    stored_matrices: "bulk.cu", "sm_90a", "matrices";
    wgmma_negated: "wgmma.cu", "sm_90a", "n8_f16_negated";
    wgmma_transposed: "wgmma.cu", "sm_90a", "n24_bf16_transposed";
    wgmma_transposed_swizzled: "wgmma.cu", "sm_90a", "n32_f16_transposed";
    wgmma_tf32: "wgmma.cu", "sm_90a", "n16_tf32";
    wgmma_tf32_registers: "wgmma.cu", "sm_90a", "n16_tf32_registers";
    wgmma_registers: "wgmma.cu", "sm_90a", "n32_bf16_registers";
    wgmma_chained: "wgmma.cu", "sm_90a", "chained";
    wgmma_f16_sums: "wgmma.cu", "sm_90a", "n16_f16_sums";
}

fn masks(b: &mut Bench) -> Result {
    let x = whole(64);
    let (y, a) = (b.output::<f32>("y", 64), b.input("x", &x));
    b.launch(Extent::line(1, 64), &[y.into(), a.into()])?;
    same("y", &b.get(y), &(0..64).map(|t| x[t ^ 30]).collect::<Vec<f32>>())
}

fn elected(b: &mut Bench) -> Result {
    let x = whole(32);
    let (y, a) = (b.output::<f32>("y", 32), b.input("x", &x));
    b.launch(Extent::line(1, 64), &[y.into(), a.into()])?;
    same("y", &b.get(y), &(0..32).map(|t| x[31 - t]).collect::<Vec<f32>>())
}

fn published(b: &mut Bench) -> Result {
    let x = whole(64);
    let (y, row, flag) = (b.output::<f32>("y", 64), b.output::<f32>("row", 64), b.inout("flag", &[0i32]));
    let a = b.input("x", &x);
    b.launch(Extent::line(2, 64), &[y.into(), row.into(), flag.into(), a.into()])?;
    same("y", &b.get(y), &(0..64).map(|t| 2.0 * x[t ^ 63]).collect::<Vec<f32>>())
}

fn chain(b: &mut Bench) -> Result {
    let x = whole(4);
    let (y, a) = (b.output::<f32>("y", 4), b.input("x", &x));
    b.launch(Extent::line(1, 128), &[y.into(), a.into()])?;
    same("y", &b.get(y), &(0..4).map(|t| x[..=t].iter().sum()).collect::<Vec<f32>>())
}

fn bulk_reductions(b: &mut Bench) -> Result {
    let (blocks, x) = (5, whole(5 * 64));
    let (sum, most) = (b.inout("sum", &[0.5f32; 64]), b.inout("most", &[-2i32; 64]));
    let (bits, a) = (b.inout("bits", &[0u32; 64]), b.input("x", &x));
    b.launch(Extent::line(blocks, 64), &[sum.into(), most.into(), bits.into(), a.into()])?;
    let of = |t: usize| (0..blocks as usize).map(move |k| (k, t));
    let sums: Vec<f32> = (0..64).map(|t| 0.5 + of(t).map(|(k, t)| x[64 * k + t]).sum::<f32>()).collect();
    let mosts = (0..64).map(|t| of(t).map(|(k, t)| 3 * x[64 * k + t] as i32).fold(-2, i32::max));
    let ors = (0..64).map(|t| of(t).fold(0, |m, (k, t)| m | 1u32 << ((t + k) % 32)));
    same("sum", &b.get(sum), &sums)?;
    same("most", &b.get(most), &mosts.collect::<Vec<i32>>())?;
    same("bits", &b.get(bits), &ors.collect::<Vec<u32>>())
}

fn bulk_to_everyone(b: &mut Bench) -> Result {
    let x = whole(2 * 64);
    let (y, a) = (b.output::<f32>("y", 4 * 64), b.input("x", &x));
    b.launch(Extent { cluster: [2, 1, 1], ..Extent::line(4, 64) }, &[y.into(), a.into()])?;
    let want = (0..4 * 64).map(|i| x[i / 128 * 64 + 63 - i % 64] + (i / 64 % 2) as f32);
    same("y", &b.get(y), &want.collect::<Vec<f32>>())
}

fn bulk_across(b: &mut Bench) -> Result {
    let x = whole(4 * 64);
    let (y, a) = (b.output::<f32>("y", 4 * 64), b.input("x", &x));
    b.launch(Extent { cluster: [2, 1, 1], ..Extent::line(4, 64) }, &[y.into(), a.into()])?;
    same("y", &b.get(y), &(0..4 * 64).map(|i| x[i ^ 64 ^ 1]).collect::<Vec<f32>>())
}

fn bulk_boxes(b: &mut Bench) -> Result {
    // A box of 8 columns and 16 rows at (16, 5) of a tensor of 20 columns and 12 rows: 4 columns and 7 rows are inside.
    let (cols, rows, pitch) = (20usize, 12usize, 24usize);
    let x = whole(128);
    let base: Vec<f32> = (0..pitch * rows).map(|i| i as f32).collect();
    let (stored, added, a) = (b.inout("stored", &base), b.inout("added", &base), b.input("x", &x));
    let map = |address: u64| -> std::result::Result<Arg, String> {
        let sizes = [cols as u32, rows as u32];
        let map = TensorMap::new(address, 4, &sizes, &[4 * pitch as u64], &[8, 16], Swizzle::None)?;
        Ok(Arg::Bytes(map.encode().to_vec()))
    };
    let (ms, ma) = (map(b.sim.address(stored))?, map(b.sim.address(added))?);
    b.launch(Extent::line(1, 128), &[ms, ma, a.into(), Arg::from(16i32), Arg::from(5i32)])?;
    let (mut want, mut sums) = (base.clone(), base);
    for (row, col) in (5..rows).flat_map(|r| (16..cols).map(move |c| (r, c))) {
        let v = x[(row - 5) * 8 + col - 16];
        want[row * pitch + col] = v;
        sums[row * pitch + col] += v;
    }
    same("stored", &b.get(stored), &want)?;
    same("added", &b.get(added), &sums)
}

fn bulk_edges(b: &mut Bench) -> Result {
    // A box of 64 columns and 8 rows at (16, 5) of a tensor of 61 columns, which end within a piece, and 9 rows.
    let (cols, rows, pitch) = (61usize, 9usize, 72usize);
    let x: Vec<u16> = (0..pitch * rows).map(|i| i as u16 + 1).collect();
    let (y, a) = (b.output::<u16>("y", 64 * 8), b.input("x", &x));
    let map =
        Tensor { buffer: a, at: 0, float: Float::F16, dims: vec![cols, rows], strides: vec![pitch], tile: vec![64, 8] };
    b.launch(Extent::line(1, 128), &[y.into(), Arg::Tensor(map.clone()), Arg::from(16i32), Arg::from(5i32)])?;
    let want = (0..64 * 8).map(|i| {
        let (row, col) = (5 + i / 64, 16 + i % 64);
        if row < rows && col < cols { x[row * pitch + col] } else { 0 }
    });
    same("y", &b.get(y), &want.collect::<Vec<u16>>())?;
    // What no hardware copies is refused before anything runs.
    for (wrong, says) in [
        (Tensor { strides: vec![pitch + 1], ..map.clone() }, "multiples of 16"),
        (Tensor { tile: vec![128, 8], ..map.clone() }, "inner side"),
        (Tensor { at: 2, ..map }, "multiples of 16"),
    ] {
        let e = b.launch(Extent::line(1, 128), &[y.into(), Arg::Tensor(wrong), Arg::from(0i32), Arg::from(0i32)]);
        let e = e.err().unwrap_or_default();
        if !e.contains(says) || !e.contains("argument 1 of edges") {
            return Err(format!("\"{says}\" is expected, the launch says: {e}"));
        }
    }
    Ok(())
}

fn stored_matrices(b: &mut Bench) -> Result {
    let mut r = rng();
    let x: Vec<u32> = (0..6 * 32).map(|_| r.random()).collect();
    let (y, a) = (b.output::<u16>("y", 6 * 64), b.input("x", &x));
    b.launch(Extent::line(1, 32), &[y.into(), a.into()])?;
    // Lane 4·row + pair has the elements 2·pair and 2·pair + 1 of a row; of a transposed matrix, of a column.
    let want = (0..6 * 64).map(|i| {
        let (matrix, row, col) = (i / 64, i / 8 % 8, i % 8);
        let (row, col) = if matrix < 4 { (row, col) } else { (col, row) };
        (x[32 * matrix + 4 * row + col / 2] >> (16 * (col % 2))) as u16
    });
    same("y", &b.get(y), &want.collect::<Vec<u16>>())
}

/// How an operand lies in shared memory: along k or along its rows, in pieces of `width` bytes that are mixed if it is more
/// than 16; bytes from piece to piece as the descriptor has them.
struct Layout {
    along_k: bool,
    width: usize,
    leading: usize,
    stride: usize,
}

impl Layout {
    /// The descriptor without an address.
    fn bits(&self) -> u64 {
        let mode = [16, 128, 64, 32].iter().position(|&w| w == self.width).unwrap() as u64;
        (self.leading as u64 >> 4) << 16 | (self.stride as u64 >> 4) << 32 | mode << 62
    }

    /// Words with the elements, of `size` bytes each, where they belong.
    fn lay(&self, rows: usize, k: usize, size: usize, value: impl Fn(usize, usize) -> u32) -> Vec<u32> {
        let mut bytes = vec![0u8; 4 * 4096];
        for (r, i) in (0..rows).flat_map(|r| (0..k).map(move |i| (r, i))) {
            // Outer and inner: eight lines of `width` bytes make a piece.
            let (line, along) = if self.along_k { (r, i * size) } else { (i, r * size) };
            // Unmixed pieces along rows are told apart the other way round.
            let swapped = !self.along_k && self.width == 16;
            let (lines, widths) = if swapped { (self.leading, self.stride) } else { (self.stride, self.leading) };
            let mut at = line / 8 * lines + line % 8 * self.width + along / self.width * widths + along % self.width;
            let mixed = self.width / 16 - 1;
            at ^= (at >> 7 & mixed) << 4;
            bytes[at..at + size].copy_from_slice(&value(r, i).to_le_bytes()[..size]);
        }
        bytes.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect()
    }
}

/// One form: columns, k, bits of a number, how operands lie (of A `None`: in registers), and the sign of products.
struct Form {
    n: usize,
    k: usize,
    bits: fn(f32) -> u32,
    size: usize,
    a: Option<Layout>,
    b: Layout,
    sign: f32,
}

fn bits16(x: f32) -> u32 {
    f16::from_f32(x).to_bits().into()
}
fn bits_b16(x: f32) -> u32 {
    bf16::from_f32(x).to_bits().into()
}
/// The low 13 bits don't count.
fn bits32(x: f32) -> u32 {
    x.to_bits() | 0x5a5
}

impl Form {
    /// A and B as numbers, and as what the kernel gets.
    #[allow(clippy::type_complexity)] // what it is called once for
    fn operands(&self) -> (Vec<f32>, Vec<f32>, Vec<u32>, Vec<u32>) {
        let (a, b) = (whole(64 * self.k), whole(self.n * self.k + 3)[3..].to_vec());
        let k = self.k;
        let wa = match &self.a {
            Some(l) => l.lay(64, k, self.size, |r, i| (self.bits)(a[r * k + i])),
            None => {
                // Thread t of warp w: rows 16w + t/4 (+ 8), and of k what its register holds.
                let per = 4 / self.size;
                let at = |t: usize, reg: usize, j: usize| {
                    let (row, col) = (t / 32 * 16 + t % 32 / 4 + reg % 2 * 8, (t % 4 + reg / 2 * 4) * per + j);
                    (self.bits)(a[row * k + col]) << (32 / per * j)
                };
                (0..128 * 4).map(|i| (0..per).fold(0, |w, j| w | at(i / 4, i % 4, j))).collect()
            }
        };
        let wb = self.b.lay(self.n, k, self.size, |r, i| (self.bits)(b[r * k + i]));
        (a, b, wa, wb)
    }

    fn product(&self, a: &[f32], b: &[f32], row: usize, col: usize) -> f32 {
        self.sign * (0..self.k).map(|i| a[row * self.k + i] * b[col * self.k + i]).sum::<f32>()
    }

    /// What the kernels take: operands with their words, what sums begin with, and whether they do.
    fn args(&self, y: Arg, a: (Arg, &[u32]), b: (Arg, &[u32]), first: Arg, scale: i32) -> [Arg; 9] {
        let bits = self.a.as_ref().map_or(0, Layout::bits);
        let words = |x: &[u32]| Arg::from(x.len() as i32);
        [y, a.0, words(a.1), b.0, words(b.1), bits.into(), self.b.bits().into(), first, scale.into()]
    }

    fn run(&self, b: &mut Bench) -> Result {
        let (a, w, wa, wb) = self.operands();
        let regs = self.n / 2;
        for scale in [0i32, 1] {
            let y = b.output::<f32>("y", 128 * regs);
            let (ba, bb) = (b.input("a", &wa), b.input("b", &wb));
            let args = self.args(y.into(), (ba.into(), &wa), (bb.into(), &wb), 7f32.into(), scale);
            b.launch(Extent::line(1, 128), &args)?;
            let want = (0..128 * regs).map(|i| {
                let (t, reg) = (i / regs, i % regs);
                let (row, col) = (t / 32 * 16 + t % 32 / 4 + reg / 2 % 2 * 8, reg / 4 * 8 + t % 4 * 2 + reg % 2);
                self.product(&a, &w, row, col) + scale as f32 * (7 + reg) as f32
            });
            same(&format!("scale {scale}: y"), &b.get(y), &want.collect::<Vec<f32>>())?;
            same("FLOPs", &[b.counts().tensor_flops], &[2 * (64 * self.n * self.k) as u64])?;
        }
        Ok(())
    }
}

fn along_k(width: usize, leading: usize, stride: usize) -> Layout {
    Layout { along_k: true, width, leading, stride }
}
fn along_rows(width: usize, leading: usize, stride: usize) -> Layout {
    Layout { along_k: false, width, leading, stride }
}

fn wgmma_negated(b: &mut Bench) -> Result {
    // Eight rows by 16 bytes, the two of k far apart.
    Form { n: 8, k: 16, bits: bits16, size: 2, a: Some(along_k(16, 1024, 128)), b: along_k(16, 256, 512), sign: -1.0 }
        .run(b)
}

fn wgmma_transposed(b: &mut Bench) -> Result {
    // All 64 rows of A in a line of 128 bytes; B's 24 in three lines of 16.
    let (a, w) = (along_rows(128, 4096, 1024), along_rows(16, 512, 128));
    Form { n: 24, k: 16, bits: bits_b16, size: 2, a: Some(a), b: w, sign: 1.0 }.run(b)
}

fn wgmma_transposed_swizzled(b: &mut Bench) -> Result {
    let (a, w) = (along_rows(32, 512, 256), along_rows(64, 2048, 512));
    Form { n: 32, k: 16, bits: bits16, size: 2, a: Some(a), b: w, sign: 1.0 }.run(b)
}

fn wgmma_tf32(b: &mut Bench) -> Result {
    Form { n: 16, k: 8, bits: bits32, size: 4, a: Some(along_k(32, 16, 256)), b: along_k(64, 16, 512), sign: 1.0 }
        .run(b)
}

fn wgmma_tf32_registers(b: &mut Bench) -> Result {
    Form { n: 16, k: 8, bits: bits32, size: 4, a: None, b: along_k(128, 16, 1024), sign: 1.0 }.run(b)
}

fn wgmma_registers(b: &mut Bench) -> Result {
    Form { n: 32, k: 16, bits: bits_b16, size: 2, a: None, b: along_rows(32, 512, 256), sign: -1.0 }.run(b)
}

fn wgmma_chained(b: &mut Bench) -> Result {
    let f = Form { n: 16, k: 16, bits: bits_b16, size: 2, a: None, b: along_k(32, 16, 256), sign: 1.0 };
    let (a, w, wa, wb) = f.operands();
    let (y, ba, bb) = (b.output::<f32>("y", 128 * 8), b.input("a", &wa), b.input("b", &wb));
    let args = f.args(y.into(), (ba.into(), &wa), (bb.into(), &wb), 7f32.into(), 1);
    b.launch(Extent::line(1, 128), &args)?;
    // Twice, once more for the first eight columns, and once less.
    let want = (0..128 * 8).map(|i| {
        let (t, reg) = (i / 8, i % 8);
        let (row, col) = (t / 32 * 16 + t % 32 / 4 + reg / 2 % 2 * 8, reg / 4 * 8 + t % 4 * 2 + reg % 2);
        f.product(&a, &w, row, col) * if col < 8 { 2.0 } else { 1.0 } + (7 + reg) as f32
    });
    same("y", &b.get(y), &want.collect::<Vec<f32>>())
}

fn wgmma_f16_sums(b: &mut Bench) -> Result {
    let f =
        Form { n: 16, k: 16, bits: bits16, size: 2, a: Some(along_k(64, 16, 512)), b: along_k(32, 16, 256), sign: 1.0 };
    let (a, w, wa, wb) = f.operands();
    let (y, ba, bb) = (b.output::<u32>("y", 128 * 4), b.input("a", &wa), b.input("b", &wb));
    let half = bits16(3.0);
    let args = f.args(y.into(), (ba.into(), &wa), (bb.into(), &wb), (half | half << 16).into(), 1);
    b.launch(Extent::line(1, 128), &args)?;
    let want = (0..128 * 4).map(|i| {
        let (t, reg) = (i / 4, i % 4);
        let (row, col) = (t / 32 * 16 + t % 32 / 4 + reg % 2 * 8, reg / 2 * 8 + t % 4 * 2);
        let at = |c: usize| bits16(f.product(&a, &w, row, c) + 3.0);
        at(col) | at(col + 1) << 16
    });
    same("y", &b.get(y), &want.collect::<Vec<u32>>())
}
