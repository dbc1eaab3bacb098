//! The programs: inputs, launches and what Rust says must come out.

use crate::support::{Bench, Case, close, same};
use half::{bf16, f16};
use rambac_simulator::device::{Arg, BufferId, Extent};
use rambac_simulator::exec::tensor_map::{Swizzle, TensorMap};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub type Result = std::result::Result<(), String>;

macro_rules! cases {
    ($($name:ident: $file:literal, $arch:literal, $kernel:literal;)*) => {
        /// Programs.
        pub const ALL: &[Case] = &[$(Case {
            name: stringify!($name),
            file: $file,
            source: include_str!($file),
            arch: $arch,
            kernel: $kernel,
            run: $name,
        }),*];
    };
}

cases! {
    vector_add: "vector.cu", "compute_80", "add";
    vector_add4: "vector.cu", "compute_80", "add4";
    sum_shared: "reduce.cu", "compute_80", "sum_shared";
    sum_shuffle: "reduce.cu", "compute_80", "sum_shuffle";
    sum_warp: "reduce.cu", "compute_80", "sum_warp";
    sum_all: "reduce.cu", "compute_80", "sum_all";
    transpose33: "transpose.cu", "compute_80", "transpose33";
    transpose32: "transpose.cu", "compute_80", "transpose32";
    histogram: "histogram.cu", "compute_80", "histogram";
    atomic_kinds: "histogram.cu", "compute_80", "kinds";
    collatz: "control.cu", "compute_80", "collatz";
    functions: "control.cu", "compute_80", "functions";
    votes: "control.cu", "compute_80", "votes";
    locked: "control.cu", "compute_80", "locked";
    named_barriers: "control.cu", "compute_80", "named";
    integers: "arithmetic.cu", "compute_80", "integers";
    floats: "arithmetic.cu", "compute_80", "floats";
    halves: "arithmetic.cu", "compute_80", "halves";
    mbarrier_copy: "async80.cu", "compute_80", "mbarrier_copy";
    zero_fill: "async80.cu", "compute_80", "zero_fill";
    transposed_loads: "async80.cu", "compute_80", "transposed";
    products: "async80.cu", "compute_80", "products";
    gemm_bf16: "gemm_bf16.cu", "compute_80", "gemm_bf16";
    bulk_copies: "hopper.cu", "sm_90a", "bulk";
    cluster_pair: "hopper.cu", "sm_90a", "pair";
    gemm_wgmma: "hopper.cu", "sm_90a", "gemm";
    gemm_copied: "hopper.cu", "sm_90a", "gemm_copied";
}

pub fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(7)
}

/// Small whole numbers: sums are exact in any order.
pub fn whole(n: usize) -> Vec<f32> {
    let mut r = rng();
    (0..n).map(|_| r.random_range(-8..9) as f32).collect()
}

fn real(n: usize, low: f32, high: f32) -> Vec<f32> {
    let mut r = rng();
    (0..n).map(|_| r.random_range(low..high)).collect()
}

fn extent(grid: [u32; 3], block: [u32; 3]) -> Extent {
    Extent { grid, block, cluster: [1; 3], shared: 0, early: false }
}

fn vector_add(b: &mut Bench) -> Result {
    let n = 1000;
    let (x, z) = (real(n, -1.0, 1.0), whole(n));
    let (y, a, c) = (b.output::<f32>("y", n), b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(8, 128), &[y.into(), a.into(), c.into(), Arg::from(n as i32)])?;
    same("y", &b.get(y), &x.iter().zip(&z).map(|(a, b)| a + b).collect::<Vec<f32>>())?;
    let t = b.counts().traffic("y").unwrap();
    // 1000 floats are 125 sectors of 32 bytes.
    same("sectors of y", &[t.write_sectors, t.write_bytes, t.read_bytes], &[125, 4000, 0])
}

fn vector_add4(b: &mut Bench) -> Result {
    let n = 3000;
    let (x, z) = (real(n, -1.0, 1.0), whole(n));
    let (y, a, c) = (b.output::<f32>("y", n), b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(3, 128), &[y.into(), a.into(), c.into(), Arg::from(n as i32 / 4)])?;
    same("y", &b.get(y), &x.iter().zip(&z).map(|(a, b)| a + b).collect::<Vec<f32>>())
}

fn sums(x: &[f32], of: usize) -> Vec<f32> {
    x.chunks(of).map(|c| c.iter().sum()).collect()
}

fn sum_shared(b: &mut Bench) -> Result {
    let x = whole(5 * 256);
    let (out, a) = (b.output::<f32>("out", 5), b.input("x", &x));
    b.launch(Extent::line(5, 256), &[out.into(), a.into()])?;
    same("out", &b.get(out), &sums(&x, 256))
}

fn sum_shuffle(b: &mut Bench) -> Result {
    sum_shared(b)
}

fn sum_warp(b: &mut Bench) -> Result {
    let x = whole(2 * 256);
    let (out, a) = (b.output::<f32>("out", 16), b.input("x", &x));
    b.launch(Extent::line(2, 256), &[out.into(), a.into()])?;
    same("out", &b.get(out), &sums(&x, 32))
}

fn sum_all(b: &mut Bench) -> Result {
    let x = whole(9 * 256);
    let (out, part, a) = (b.output::<f32>("out", 1), b.output::<f32>("partial", 9), b.input("x", &x));
    b.launch(Extent::line(9, 256), &[out.into(), part.into(), a.into()])?;
    same("out", &b.get(out), &sums(&x, 9 * 256))
}

fn transpose(b: &mut Bench, conflicts: bool) -> Result {
    let (rows, cols) = (70, 45);
    let x = real(rows * cols, -1.0, 1.0);
    let (y, a) = (b.output::<f32>("y", rows * cols), b.input("x", &x));
    let args = [y.into(), a.into(), Arg::from(rows as i32), Arg::from(cols as i32)];
    b.launch(extent([2, 3, 1], [32, 8, 1]), &args)?;
    let want: Vec<f32> = (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect();
    same("y", &b.get(y), &want)?;
    let c = b.counts();
    // Stores to shared memory never conflict; at pitch 32 a warp's loads meet in one bank, one pass per lane.
    match conflicts {
        false => same("conflicts", &[c.shared_conflicts], &[0]),
        true if c.shared_conflicts > 1000 => Ok(()),
        true => Err(format!("only {} conflicts", c.shared_conflicts)),
    }
}

fn transpose33(b: &mut Bench) -> Result {
    transpose(b, false)
}

fn transpose32(b: &mut Bench) -> Result {
    transpose(b, true)
}

fn histogram(b: &mut Bench) -> Result {
    let n = 5000;
    let mut r = rng();
    let x: Vec<u8> = (0..n).map(|_| (r.random_range(0..256) & r.random_range(0..256)) as u8).collect();
    let (counts, a) = (b.inout("counts", &[0u32; 256]), b.input("x", &x));
    b.launch(Extent::line(4, 128), &[counts.into(), a.into(), Arg::from(n)])?;
    let mut want = [0u32; 256];
    x.iter().for_each(|&v| want[v as usize] += 1);
    same("counts", &b.get(counts), &want)
}

fn atomic_kinds(b: &mut Bench) -> Result {
    let n = 160u32;
    let (u, s) = (b.inout("u", &[0, !0, 0, !0, 0, 0, 0, 0u32]), b.inout("s", &[0, i32::MIN, 0]));
    let (w, f, d) = (b.inout("w", &[0u64; 2]), b.inout("f", &[0f32]), b.inout("d", &[0f64]));
    b.launch(Extent::line(5, 32), &[u.into(), s.into(), w.into(), f.into(), d.into()])?;
    let xor = (0..n).fold(0, |a, i| a ^ i);
    // 160 steps of a counter with 10 states, upwards from 0 and downwards.
    same("u", &b.get(u), &[7 * (n - 1), 5, !0, !0xff, xor, 0, 0, 3 * n])?;
    same("s", &b.get(s), &[-(n as i32 - 1), n as i32 - 1 - 1000, -(n as i32)])?;
    same("w", &b.get(w), &[u64::from(n) << 33, u64::from(n - 1) << 40])?;
    same("f", &b.get(f), &[0.5 * n as f32])?;
    same("d", &b.get(d), &[0.25 * f64::from(n)])
}

fn collatz(b: &mut Bench) -> Result {
    let n = 300;
    let start: Vec<u32> = (0..n).map(|i| 1 + i * 7 % 97).collect();
    let (steps, x) = (b.output::<u32>("steps", n as usize), b.input("start", &start));
    b.launch(Extent::line(3, 128), &[steps.into(), x.into(), Arg::from(n as i32)])?;
    let count = |mut x: u32| {
        let mut k = 0;
        while x != 1 {
            x = if x % 2 == 1 { 3 * x + 1 } else { x / 2 };
            k += 1;
        }
        k
    };
    same("steps", &b.get(steps), &start.iter().map(|&x| count(x)).collect::<Vec<u32>>())
}

fn weigh(kind: i32, x: i32) -> i32 {
    match kind {
        0 => x + 1,
        1 => x * 3,
        2 => x - 7,
        3 => x ^ 0x55,
        4 => -x,
        5 => x / 3,
        6 => x << 2,
        _ => x % 11,
    }
}

/// As the kernel contracts it: multiply-add fused.
fn horner(x: f64, n: i32) -> f64 {
    (1..=n).rev().fold(0.0, |s: f64, i| s.mul_add(x, 1.0 / f64::from(i)))
}

fn functions(b: &mut Bench) -> Result {
    let n = 96;
    let x: Vec<i32> = (0..n).map(|i| i * 13 - 300).collect();
    let (out, real, a) = (b.output::<i32>("out", 96), b.output::<f64>("real", 96), b.input("x", &x));
    let mut first = 1.5f32.to_le_bytes().to_vec();
    first.extend(4i32.to_le_bytes());
    first.extend(0.5f64.to_le_bytes());
    b.launch(Extent::line(3, 32), &[out.into(), real.into(), a.into(), Arg::Bytes(first)])?;
    let (mut want, mut reals) = (vec![], vec![]);
    for i in 0..n {
        let mut v = x[i as usize];
        for k in 0..(i & 3) + 1 {
            v = weigh((i + k) & 7, v);
        }
        let (mut pa, mut pb, mut pc) = (1.5f32, 4 + i, 0.5f64);
        if i % 3 == 0 {
            pa += i as f32;
            pb = weigh(pb & 7, i);
            pc = horner(pc, i & 3);
        }
        want.push(v + pb);
        reals.push(horner(1.0 / f64::from(i + 1), 5) + pc + f64::from(pa));
    }
    same("out", &b.get(out), &want)?;
    close("real", &b.get::<f64>(real), &reals, 1e-15)
}

fn votes(b: &mut Bench) -> Result {
    let n = 64usize;
    let x: Vec<i32> = (0..n as i32).map(|i| i * 37 % 23 - 9).collect();
    let (out, a) = (b.output::<u32>("out", n), b.input("x", &x));
    b.launch(Extent::line(1, 64), &[out.into(), a.into()])?;
    let mut want = vec![];
    for i in 0..n {
        let warp = &x[i / 32 * 32..i / 32 * 32 + 32];
        let all = warp.iter().enumerate().fold(0u32, |m, (k, &v)| m | u32::from(v > 0) << k);
        let least = *warp.iter().min().unwrap() as u32;
        let any = u32::from(warp.contains(&3));
        let first = if x[i] > 0 { all.count_ones() } else { all };
        want.push(first.wrapping_add(least).wrapping_add(any));
    }
    same("out", &b.get(out), &want)
}

fn locked(b: &mut Bench) -> Result {
    let (counter, lock) = (b.inout("counter", &[0i32]), b.inout("lock", &[0i32]));
    b.launch(Extent::line(2, 40), &[counter.into(), lock.into()])?;
    same("counter", &b.get(counter), &[80i32])
}

fn named_barriers(b: &mut Bench) -> Result {
    let rounds = 7;
    let x = whole(64 * rounds);
    let (out, a) = (b.output::<f32>("out", 64), b.input("x", &x));
    b.launch(Extent::line(1, 128), &[out.into(), a.into(), Arg::from(rounds as i32)])?;
    let want: Vec<f32> = (0..64).map(|t| (0..rounds).map(|r| x[r * 64 + (t + 1) % 64]).sum()).collect();
    same("out", &b.get(out), &want)
}

fn integers(b: &mut Bench) -> Result {
    let n = 500;
    let mut r = rng();
    let edge = [0u32, 1, !0, 1 << 31, i32::MAX as u32, 0x0001_0000];
    let mut draw = |i: usize| if i.is_multiple_of(3) { edge[i / 3 % 6] } else { r.random() };
    let x: Vec<u32> = (0..n).map(&mut draw).collect();
    let z: Vec<u32> = (0..n).map(|i| draw(i + 1)).collect();
    let (out, a, c) = (b.output::<u32>("out", 12 * n), b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(4, 128), &[out.into(), a.into(), c.into(), Arg::from(n as i32)])?;
    let mut want = vec![];
    for (&x, &y) in x.iter().zip(&z) {
        let (sx, sy) = (x as i32, y as i32);
        want.push((x / (y | 1)).wrapping_add(x % (y | 1)));
        want.push(sx.wrapping_div(sy | 1) as u32 ^ sx.wrapping_rem(sy | 1) as u32);
        let high = (i64::from(sx) * i64::from(sy)) >> 32;
        want.push(((u64::from(x) * u64::from(y)) >> 32) as u32 ^ high as u32);
        let ffs = if x == 0 { 0 } else { x.trailing_zeros() + 1 };
        want.push(x.count_ones() + y.leading_zeros() * 64 + ffs * 4096);
        let both = u64::from(y) << 32 | u64::from(x);
        let bytes = (0..4).fold(0u32, |o, k| o | ((both >> (8 * (x >> (4 * k) & 7))) as u32 & 0xff) << (8 * k));
        want.push(x.reverse_bits() ^ bytes);
        let left = ((both << (x & 31)) >> 32) as u32;
        want.push(left ^ (both >> (y & 31)) as u32);
        let sum = (u64::from(x) * u64::from(y)).wrapping_add(both);
        want.push((sum >> 17) as u32);
        want.push(x.min(y).wrapping_add(sx.max(sy) as u32).wrapping_add(sx.wrapping_abs() as u32));
        want.push((x >> 5 & 0x7ff) ^ (y & !(0x1fff << 7) | (x & 0x1fff) << 7));
        let (p, q) = (u128::from(x) << 32 | u128::from(y), u128::from(y) << 32 | u128::from(x));
        let total = p + q + ((u128::from(x) + u128::from(y)) << 64);
        let (lo, hi) = (total as u64, (total >> 64) as u64);
        want.push((lo ^ hi ^ (hi >> 32)) as u32);
        want.push((i64::from(sx) * i64::from(sy) % 1_000_003) as u32);
        want.push((x & y) ^ (!x | (y >> 3)) ^ (sx >> 5) as u32);
    }
    same("out", &b.get(out), &want)
}

fn floats(b: &mut Bench) -> Result {
    let n = 300;
    let (x, z) = (real(n, -6.0, 6.0), real(n + 1, 0.25, 5.0)[1..].to_vec());
    let (out, wide) = (b.output::<f32>("out", 10 * n), b.output::<f64>("wide", 4 * n));
    let (a, c) = (b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(3, 128), &[out.into(), wide.into(), a.into(), c.into(), Arg::from(n as i32)])?;
    let (mut want, mut wides) = (vec![], vec![]);
    for (&x, &y) in x.iter().zip(&z) {
        let (d, e) = (f64::from(x), f64::from(y));
        let m = f64::from(x.abs());
        want.extend([d / e, m.sqrt(), d.exp(), (m + f64::from(0.1f32)).ln(), d.sin() + e.cos(), d.tanh()]);
        want.extend([1.0 / (e + 0.5).sqrt(), m.powf(1.5), (d * e + 1.0) + (d + e) - d * e]);
        want.push(d.floor() + e.round_ties_even() + (d * 3.0).trunc() + d.min(e) * d.max(0.5));
        wides.extend([d / e + d.abs().sqrt(), d.exp() - (e + 0.5).ln(), d.sin() * e.cos(), d.mul_add(e, 1.0 / 3.0)]);
    }
    // Sums of r[8] are rounded in f32 at up to 60.
    close("out", &b.get::<f32>(out), &want, 4e-6)?;
    close("wide", &b.get::<f64>(wide), &wides, 1e-14)
}

fn halves(b: &mut Bench) -> Result {
    let n = 256;
    let (x, z) = (real(n, -300.0, 300.0), real(n, -2.0, 2.0));
    let (out, a, c) = (b.output::<u32>("out", 6 * n), b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(2, 128), &[out.into(), a.into(), c.into(), Arg::from(n as i32)])?;
    let mut want = vec![];
    for (&x, &y) in x.iter().zip(&z) {
        let pair = |hi: u16, lo: u16| u32::from(hi) << 16 | u32::from(lo);
        let (bx, by) = (bf16::from_f32(x), bf16::from_f32(y));
        let (hx, hy) = (f16::from_f32(x), f16::from_f32(y));
        want.push(pair(bx.to_bits(), by.to_bits()));
        want.push(pair(hx.to_bits(), hy.to_bits()));
        // p·p + p is exact in f64 here.
        let fma = |v: bf16| bf16::from_f64(v.to_f64() * v.to_f64() + v.to_f64()).to_bits();
        want.push(pair(fma(bx), fma(by)));
        let square = |v: f16| f16::from_f64(v.to_f64() * v.to_f64());
        want.push(pair(square(hx).to_bits(), square(hy).to_bits()));
        let sum = |v: f16| f16::from_f64(square(v).to_f64() + v.to_f64()).to_bits();
        want.push(pair(sum(hx), sum(hy)));
        want.push(x.to_bits() >> 16);
    }
    same("out", &b.get(out), &want)
}

fn mbarrier_copy(b: &mut Bench) -> Result {
    let x = real(3 * 256, -1.0, 1.0);
    let (y, a) = (b.output::<f32>("y", 3 * 256), b.input("x", &x));
    b.launch(Extent::line(3, 64), &[y.into(), a.into()])?;
    let want: Vec<f32> = (0..3 * 256).map(|i| x[i / 256 * 256 + 255 - i % 256]).collect();
    same("y", &b.get(y), &want)
}

fn zero_fill(b: &mut Bench) -> Result {
    let n = 101;
    let x = real(n, 1.0, 2.0);
    let (y, a) = (b.output::<f32>("y", 128), b.input("x", &x));
    b.launch(Extent::line(1, 32), &[y.into(), a.into(), Arg::from(n as i32)])?;
    same("y", &b.get(y), &(0..128).map(|i| x.get(i ^ 1).copied().unwrap_or(0.0)).collect::<Vec<f32>>())
}

fn transposed_loads(b: &mut Bench) -> Result {
    let x: Vec<u16> = (0..256).map(|i| i * 3).collect();
    let (y, a) = (b.output::<u16>("y", 256), b.input("x", &x));
    b.launch(Extent::line(1, 32), &[y.into(), a.into()])?;
    let want: Vec<u16> = (0..256).map(|i| x[i / 64 * 64 + i % 8 * 8 + i / 8 % 8]).collect();
    same("y", &b.get(y), &want)
}

fn products(b: &mut Bench) -> Result {
    let mut r = rng();
    // Bytes for the one, small tf32 numbers for the other: both from the same bits.
    let mut draw = || f32::to_bits(r.random_range(-64..64) as f32 / 8.0);
    let x: Vec<u32> = (0..128).map(|_| draw()).collect();
    let z: Vec<u32> = (0..64).map(|_| draw()).collect();
    let (f, s) = (b.output::<f32>("f", 128), b.output::<i32>("s", 128));
    let (a, c) = (b.input("a", &x), b.input("b", &z));
    b.launch(Extent::line(1, 32), &[f.into(), s.into(), a.into(), c.into()])?;
    let (mut floats, mut ints) = (vec![], vec![]);
    for t in 0..32usize {
        for i in 0..4 {
            let (row, col) = (t / 4 + 8 * (i / 2), t % 4 * 2 + i % 2);
            let mut sum = (i + 1) as f64;
            for k in 0..8 {
                let at = |v: u32| f64::from(f32::from_bits(v));
                let (lane_a, reg_a) = (row % 8 * 4 + k % 4, row / 8 + k / 4 * 2);
                sum += at(x[4 * lane_a + reg_a]) * at(z[2 * (col * 4 + k % 4) + k / 4]);
            }
            floats.push(sum as f32);
            let t = t as i32;
            let mut sum = [t, -t, 2 * t, 0][i];
            for k in 0..32 {
                let (lane_a, reg_a) = (row % 8 * 4 + k % 16 / 4, row / 8 + k / 16 * 2);
                let va = (x[4 * lane_a + reg_a] >> (8 * (k % 4))) as u8 as i8;
                let vb = (z[2 * (col * 4 + k % 16 / 4) + k / 16] >> (8 * (k % 4))) as u8 as i8;
                sum += i32::from(va) * i32::from(vb);
            }
            ints.push(sum);
        }
    }
    same("f", &b.get(f), &floats)?;
    same("s", &b.get(s), &ints)
}

fn gemm_bf16(b: &mut Bench) -> Result {
    let (m, n, k) = (128, 64, 96);
    let half = |v: Vec<f32>| v.into_iter().map(|x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>();
    let (x, z) = (half(real(m * k, -1.0, 1.0)), half(real(n * k + 5, -1.0, 1.0)[5..].to_vec()));
    let (c, a, w) = (b.output::<f32>("c", m * n), b.input("a", &x), b.input("b", &z));
    let sizes = [m, n, k].map(|v| Arg::from(v as i32));
    let args: Vec<Arg> = [c.into(), a.into(), w.into()].into_iter().chain(sizes).collect();
    b.launch(extent([(n / 64) as u32, (m / 64) as u32, 1], [128, 1, 1]), &args)?;
    let at = |v: &[u16], i: usize| bf16::from_bits(v[i]).to_f64();
    let want: Vec<f64> =
        (0..m * n).map(|i| (0..k).map(|j| at(&x, i / n * k + j) * at(&z, i % n * k + j)).sum()).collect();
    close("c", &b.get::<f32>(c), &want, 1e-5)?;
    let counts = b.counts();
    same("FLOPs", &[counts.tensor_flops], &[2 * (m * n * k) as u64])?;
    // Copies write two rows of 64 bytes per quarter warp, 80 bytes apart: they share four banks.  ldmatrix has none.
    let quarters = (m / 64) * (n / 64) * (k / 32) * 2 * 256 / 8;
    same("conflicts", &[counts.shared_conflicts], &[quarters as u64])
}

fn bulk_copies(b: &mut Bench) -> Result {
    let stages = 5;
    let x = real(256 * stages, -1.0, 1.0);
    let (y, a) = (b.output::<f32>("y", 256 * stages), b.input("x", &x));
    b.launch(Extent::line(1, 96), &[y.into(), a.into(), Arg::from(stages as i32)])?;
    same("y", &b.get(y), &x.iter().map(|v| 2.0 * v).collect::<Vec<f32>>())
}

fn cluster_pair(b: &mut Bench) -> Result {
    let x = real(4 * 64, -1.0, 1.0);
    let (y, a) = (b.output::<f32>("y", 4 * 64), b.input("x", &x));
    b.launch(Extent { cluster: [2, 1, 1], ..Extent::line(4, 64) }, &[y.into(), a.into()])?;
    let want: Vec<f32> = (0..4 * 64).map(|i| x[((i / 64) ^ 1) * 64 + 63 - i % 64] + x[i]).collect();
    same("y", &b.get(y), &want)
}

/// C[64, 64] = A[64, 192] · B[64, 192]ᵀ in bf16; `args` are C's, A's and B's.
fn gemm_64(
    b: &mut Bench,
    args: impl Fn(&Bench, [BufferId; 3], usize) -> std::result::Result<Vec<Arg>, String>,
) -> Result {
    let (m, n, k) = (64, 64, 192);
    let half = |v: Vec<f32>| v.into_iter().map(|x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>();
    let (x, z) = (half(real(m * k, -1.0, 1.0)), half(real(n * k + 5, -1.0, 1.0)[5..].to_vec()));
    let (c, a, w) = (b.output::<f32>("c", m * n), b.input("a", &x), b.input("b", &z));
    let args = args(b, [c, a, w], k)?;
    b.launch(Extent::line(1, 128), &args)?;
    let at = |v: &[u16], i: usize| bf16::from_bits(v[i]).to_f64();
    let want: Vec<f64> =
        (0..m * n).map(|i| (0..k).map(|j| at(&x, i / n * k + j) * at(&z, i % n * k + j)).sum()).collect();
    close("c", &b.get::<f32>(c), &want, 1e-5)?;
    same("FLOPs", &[b.counts().tensor_flops], &[2 * (m * n * k) as u64])
}

fn gemm_wgmma(b: &mut Bench) -> Result {
    gemm_64(b, |b, [c, a, w], k| {
        let map = |id: BufferId| {
            let at = b.sim.address(id);
            let map = TensorMap::new(at, 2, &[k as u32, 64], &[2 * k as u64], &[64, 64], Swizzle::B128)?;
            Ok::<_, String>(Arg::Bytes(map.encode().to_vec()))
        };
        Ok(vec![c.into(), map(a)?, map(w)?, Arg::from(k as i32)])
    })
}

fn gemm_copied(b: &mut Bench) -> Result {
    gemm_64(b, |_, all, _| Ok(all.map(Arg::from).to_vec()))
}
