//! `ldmatrix`, `stmatrix`, `movmatrix` and `mma.sync`.
//!
//! Sums of `mma` in f32 start from C and add the products for k = 0, 1, … in turn, each rounded to nearest; products of
//! 16-bit and tf32 operands are exact in f32.  Hardware adds in an order of its own with wider, truncated sums, so
//! results agree within a few ulp of the largest term, not in bits.  Sums in f16 are made in f32 and rounded once.

use super::memory::{Spot, shared_place};
use super::warp::{Flow, Warp};
use super::{Site, lanes};
use crate::isa::{Matrix, Mma, MmaTy, Op};
use half::f16;

/// An operand's element as f32.  tf32 ignores the low 13 bits.
pub(crate) fn element(bits: u32, ty: MmaTy) -> f32 {
    match ty {
        MmaTy::F16 => f16::from_bits(bits as u16).to_f32(),
        MmaTy::Bf16 => f32::from_bits(bits << 16),
        _ => f32::from_bits(bits & !0x1fff),
    }
}

impl Warp {
    pub fn matrix(&mut self, op: &Op, mask: u32, site: &mut Site) -> Flow {
        // All lanes of the warp must take part.
        let all = [u64::from(self.threads); 32];
        let Some(mask) = self.gather(all, mask, site) else { return Flow::Again };
        match op {
            Op::Matrix(m) => self.move_rows(m, mask, site),
            Op::MoveMatrix { dst, a } => {
                let a = self.regs[*a as usize];
                let half = |row: usize, col: usize| a[row * 4 + col / 2] >> (16 * (col % 2)) & 0xffff;
                let out = std::array::from_fn(|l| half(l % 4 * 2, l / 4) | half(l % 4 * 2 + 1, l / 4) << 16);
                self.put(*dst, mask, &out);
            }
            Op::Mma(m) => self.mma(m, mask),
            _ => unreachable!("BUG: not a matrix"),
        }
        Flow::Next
    }

    fn move_rows(&mut self, m: &Matrix, mask: u32, site: &mut Site) {
        let pc = site.pc;
        let a = self.addresses(m.address, m.offset);
        // Lanes 8k to 8k + 7 hold the rows of matrix k.
        let rows = mask & if m.regs.len() == 4 { u32::MAX } else { (1 << (8 * m.regs.len())) - 1 };
        let mut spots = [Spot::default(); 32];
        let good = self.shared_spots(&a, 16, rows, !m.load, site, &mut spots);
        if good != 0 {
            let places: [u64; 32] = std::array::from_fn(|l| shared_place(a[l]).1 as u64);
            self.count_shared(&places, 16, good, site);
        }
        for (k, reg) in m.regs.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            if !m.load {
                let r = self.regs[*reg as usize];
                for (l, &bits) in r.iter().enumerate() {
                    for j in 0..2 {
                        let (row, col) = if m.transposed { (l % 4 * 2 + j, l / 4) } else { (l / 4, l % 4 * 2 + j) };
                        rows[row][col] = (bits >> (16 * j)) as u16;
                    }
                }
            }
            for (i, row) in rows.iter_mut().enumerate() {
                let lane = 8 * k + i;
                if good >> lane & 1 == 0 {
                    continue;
                }
                let s = spots[lane];
                let actor = self.actor(pc, lane as u32);
                let memory = &mut site.blocks[s.unit].shared;
                let clash = if m.load {
                    memory.read(s.at, 16, lane as u32, false, &actor)
                } else {
                    memory.write(s.at, 16, lane as u32, false, false, &actor)
                };
                for (j, v) in row.iter_mut().enumerate() {
                    if m.load {
                        *v = memory.load(s.at + 2 * j, 2) as u16;
                    } else {
                        memory.store(s.at + 2 * j, 2, u64::from(*v));
                    }
                }
                if let Some(c) = clash {
                    self.shared_clash(c, s, !m.load, lane, site);
                }
            }
            if m.load {
                let out = std::array::from_fn(|l| {
                    let at = |j: usize| {
                        if m.transposed { rows[l % 4 * 2 + j][l / 4] } else { rows[l / 4][l % 4 * 2 + j] }
                    };
                    u64::from(at(0)) | u64::from(at(1)) << 16
                });
                self.put(*reg, mask, &out);
            }
        }
    }

    /// D = A·B + C.  Lane l holds, with g = l / 4 and t = l % 4: of A in register i rows g + 8·(i % 2), columns from
    /// e·t + 4·e·(i / 2); of B in register i column g, rows from e·t + 4·e·i; e elements to a register.
    fn mma(&mut self, m: &Mma, mask: u32) {
        match m.a_ty {
            MmaTy::F64 => return self.mma_f64(m, mask),
            MmaTy::S8 | MmaTy::U8 => return self.mma_int(m, mask),
            _ => {}
        }
        let e = if m.a_ty == MmaTy::Tf32 { 1 } else { 2 };
        let k = m.k as usize;
        let mut a = [[0f32; 16]; 16];
        let mut b = [[0f32; 8]; 16];
        let mut acc = [[0f32; 8]; 16];
        let bits = if e == 1 { 32 } else { 16 };
        for (i, reg) in m.a.iter().enumerate() {
            let r = &self.regs[*reg as usize];
            for (l, &v) in r.iter().enumerate() {
                for j in 0..e {
                    let x = element((v >> (bits * j)) as u32, m.a_ty);
                    a[l / 4 + 8 * (i % 2)][e * (l % 4) + 4 * e * (i / 2) + j] = x;
                }
            }
        }
        for (i, reg) in m.b.iter().enumerate() {
            let r = &self.regs[*reg as usize];
            for (l, &v) in r.iter().enumerate() {
                for j in 0..e {
                    b[e * (l % 4) + 4 * e * i + j][l / 4] = element((v >> (bits * j)) as u32, m.b_ty);
                }
            }
        }
        for (i, reg) in m.c.iter().enumerate() {
            let r = &self.regs[*reg as usize];
            for (l, &v) in r.iter().enumerate() {
                if m.half_sum {
                    let row = &mut acc[l / 4 + 8 * i];
                    row[l % 4 * 2] = f16::from_bits(v as u16).to_f32();
                    row[l % 4 * 2 + 1] = f16::from_bits((v >> 16) as u16).to_f32();
                } else {
                    acc[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2] = f32::from_bits(v as u32);
                }
            }
        }
        for (row, sums) in a.iter().zip(&mut acc) {
            for (x, b) in row[..k].iter().zip(&b) {
                for (s, y) in sums.iter_mut().zip(b) {
                    *s += x * y;
                }
            }
        }
        for (i, reg) in m.d.iter().enumerate() {
            let out = std::array::from_fn(|l| {
                if m.half_out {
                    let row = &acc[l / 4 + 8 * i];
                    let h = |x: f32| u64::from(f16::from_f32(x).to_bits());
                    h(row[l % 4 * 2]) | h(row[l % 4 * 2 + 1]) << 16
                } else {
                    let x = acc[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2];
                    if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) }
                }
            });
            self.put(*reg, mask, &out);
        }
    }

    fn mma_f64(&mut self, m: &Mma, mask: u32) {
        let (a, b) = (self.regs[m.a[0] as usize], self.regs[m.b[0] as usize]);
        let c: Vec<_> = m.c.iter().map(|r| self.regs[*r as usize]).collect();
        for (i, reg) in m.d.iter().enumerate() {
            let out = std::array::from_fn(|l| {
                let (row, col) = (l / 4, l % 4 * 2 + i);
                (0..4)
                    .fold(f64::from_bits(c[i][l]), |s, k| {
                        f64::from_bits(a[row * 4 + k]).mul_add(f64::from_bits(b[col * 4 + k]), s)
                    })
                    .to_bits()
            });
            self.put(*reg, mask, &out);
        }
    }

    fn mma_int(&mut self, m: &Mma, mask: u32) {
        let byte = |v: u64, j: usize, ty: MmaTy| {
            let b = (v >> (8 * j)) as u8;
            if ty == MmaTy::S8 { i64::from(b as i8) } else { i64::from(b) }
        };
        let (mut a, mut b) = ([[0i64; 32]; 16], [[0i64; 8]; 32]);
        for (i, reg) in m.a.iter().enumerate() {
            for (l, &v) in self.regs[*reg as usize].iter().enumerate() {
                for j in 0..4 {
                    a[l / 4 + 8 * (i % 2)][4 * (l % 4) + 16 * (i / 2) + j] = byte(v, j, m.a_ty);
                }
            }
        }
        for (i, reg) in m.b.iter().enumerate() {
            for (l, &v) in self.regs[*reg as usize].iter().enumerate() {
                for j in 0..4 {
                    b[4 * (l % 4) + 16 * i + j][l / 4] = byte(v, j, m.b_ty);
                }
            }
        }
        let c: Vec<_> = m.c.iter().map(|r| self.regs[*r as usize]).collect();
        for (i, reg) in m.d.iter().enumerate() {
            let out = std::array::from_fn(|l| {
                let (row, col) = (l / 4 + 8 * (i / 2), l % 4 * 2 + i % 2);
                let s = (0..m.k as usize).fold(i64::from(c[i][l] as i32), |s, k| s + a[row][k] * b[k][col]);
                let s = if m.saturate { s.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) } else { s };
                u64::from(s as u32)
            });
            self.put(*reg, mask, &out);
        }
        let _ = lanes(mask);
    }
}
