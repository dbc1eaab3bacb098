//! `wgmma`: products of a warp group of four warps with operands in shared memory.
//!
//! Every warp makes its own 16 of the 64 rows, so the four need not meet.  A product happens when it is issued (eager) or
//! when its group is waited for (lazy); then D holds NaN until the wait.  Either way, until then using D and writing
//! what the product reads, A's registers among it, are findings.  So is a product whose registers something else used since the last
//! `wgmma.fence`; shared memory is the proxy fence's matter.  Sums are made as those of `mma`.
//!
//! A descriptor's element lies, for operands whose k is contiguous, in rows of the swizzle's width (8 rows to a block,
//! blocks of rows `stride` apart); without swizzle in blocks of 8 rows by 16 bytes, `leading` apart along k.  Transposed
//! operands have runs of the swizzle's width along m or n, 8 k to a block: `leading` apart along m or n, `stride` along k
//! (without swizzle the other way round).

use super::cluster::Block;
use super::matrix::element;
use super::memory::{Spot, shared_place};
use super::tensor_map::Swizzle;
use super::warp::{Flow, Warp};
use super::{Env, Site};
use crate::check::Kind;
use crate::check::shared::{Actor, SharedMemory};
use crate::isa::{Inst, Lanes, MmaTy, Op, Slot, Wgmma};
use half::f16;

#[derive(Default)]
pub(crate) struct Pending {
    /// Instructions issued and not waited for.
    issued: Vec<Issue>,
    group: u32,
    /// Lazily: what D's registers hold but don't show.
    hidden: Vec<(Slot, Lanes)>,
    /// By register: what of pending products it is.
    roles: Vec<Role>,
    /// How many fences came, and by register: how many there were, and at which instruction, when it was last used.
    fences: u32,
    used: Vec<Option<(u32, u32)>>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    None,
    A,
    D,
}

impl Pending {
    fn role(&self, r: Slot) -> Role {
        self.roles.get(r as usize).copied().unwrap_or_default()
    }

    fn uses(&mut self, registers: impl Iterator<Item = Slot>, pc: u32, n_slots: usize) {
        self.used.resize(n_slots, None);
        registers.for_each(|r| self.used[r as usize] = Some((self.fences, pc)));
    }

    /// The instruction whose use of a register no fence parts from product `w`, though one must: only sums of the same shape,
    /// and what is read and read again, are in order by themselves.
    fn unordered(&self, w: &Wgmma, code: &[Inst]) -> Option<u32> {
        let unordered = |(i, r): (usize, Slot)| {
            let (_, pc) = self.used.get(r as usize).copied().flatten().filter(|u| u.0 == self.fences)?;
            let before = code[pc as usize].op.product();
            let fine = before.is_some_and(|b| match i < w.d.len() {
                true => (b.n, b.k) == (w.n, w.k) && (b.d.get(i) == Some(&r) || b.d.contains(&r)),
                false => !b.d.contains(&r),
            });
            (!fine).then_some(pc)
        };
        w.registers().enumerate().find_map(unordered)
    }
}

struct Issue {
    pc: u32,
    /// A's registers, or its descriptor.
    a: Vec<Lanes>,
    b: u64,
    keep_d: bool,
    group: u32,
}

fn product<'a>(env: &'a Env, i: &Issue) -> &'a Wgmma {
    env.program.code[i.pc as usize].op.product().expect("BUG: an issue is of a product")
}

/// A matrix in shared memory.
struct Operand {
    unit: usize,
    start: usize,
    leading: usize,
    stride: usize,
    swizzle: Swizzle,
    transposed: bool,
    element: usize,
}

impl Operand {
    fn new(bits: u64, rank: usize, transposed: bool, element: usize) -> Operand {
        let field = |from: u32| (bits >> from & 0x3fff) as usize * 16;
        Operand {
            unit: rank,
            start: field(0),
            leading: field(16),
            stride: field(32),
            swizzle: match bits >> 62 {
                0 => Swizzle::None,
                1 => Swizzle::B128,
                2 => Swizzle::B64,
                _ => Swizzle::B32,
            },
            transposed,
            element,
        }
    }

    /// Byte of an element: `r` along m or n, `k` along k.
    fn place(&self, r: usize, k: usize) -> usize {
        let width = match self.swizzle {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        };
        let e = self.element;
        let offset = if self.transposed {
            let run = width / e;
            let (along, across) =
                if self.swizzle == Swizzle::None { (self.stride, self.leading) } else { (self.leading, self.stride) };
            r % run * e + k % 8 * width + r / run * along + k / 8 * across
        } else if self.swizzle == Swizzle::None {
            r % 8 * 16 + r / 8 * self.stride + k * e / 16 * self.leading + k * e % 16
        } else {
            r % 8 * width + r / 8 * self.stride + k * e
        };
        self.swizzle.apply(self.start + offset)
    }
}

/// Bytes of an operand's element.
fn operand_size(w: &Wgmma) -> usize {
    if w.a_ty == MmaTy::Tf32 { 4 } else { 2 }
}

impl Warp {
    pub fn wgmma(&mut self, op: &Op, mask: u32, site: &mut Site) -> Flow {
        let pc = site.pc;
        let all = [u64::from(self.threads); 32];
        if self.gather(all, mask, site).is_none() {
            return Flow::Again;
        }
        match op {
            Op::Wgmma(w) => {
                self.order(w, site);
                let a = if w.a_in_shared {
                    vec![self.regs[w.a[0] as usize]]
                } else {
                    w.a.iter().map(|r| self.regs[*r as usize]).collect()
                };
                let issue = Issue {
                    pc,
                    a,
                    b: self.regs[w.b as usize][0],
                    keep_d: w.scale_d.mask(&self.preds) & 1 == 1,
                    group: self.wgmma.group,
                };
                if !site.env.options.lazy {
                    self.multiply(w, &issue, site);
                }
                self.each_operand(w, &issue, site.blocks, |s, at, n, a| s.begin_product(at, n, 0, a));
                self.wgmma.issued.push(issue);
                self.hide(site.env);
            }
            Op::WgmmaFence => self.wgmma.fences += 1,
            Op::WgmmaCommit => self.wgmma.group += 1,
            Op::WgmmaWait { keep } => {
                let group = self.wgmma.group;
                let (due, rest): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.wgmma.issued).into_iter().partition(|i| i.group + keep < group);
                for (r, held) in std::mem::take(&mut self.wgmma.hidden) {
                    self.regs[r as usize] = held;
                }
                for i in &due {
                    let w = product(site.env, i);
                    self.each_operand(w, i, site.blocks, |s, at, n, a| s.end_product(at, n, 0, a));
                    if site.env.options.lazy {
                        self.multiply(w, i, &mut site.at(i.pc));
                    }
                }
                self.wgmma.issued = rest;
                self.hide(site.env);
            }
            _ => {}
        }
        Flow::Next
    }

    /// Notes the registers of pending products; lazily, those that they write show NaN.
    fn hide(&mut self, env: &Env) {
        self.wgmma.roles.clear();
        self.wgmma.roles.resize(self.regs.len(), Role::None);
        for i in &self.wgmma.issued {
            let w = product(env, i);
            w.fragments().iter().for_each(|&r| self.wgmma.roles[r as usize] = Role::A);
        }
        for i in &self.wgmma.issued {
            for &r in &product(env, i).d {
                let role = std::mem::replace(&mut self.wgmma.roles[r as usize], Role::D);
                if role == Role::D || !env.options.lazy {
                    continue;
                }
                if self.wgmma.hidden.iter().all(|h| h.0 != r) {
                    self.wgmma.hidden.push((r, self.regs[r as usize]));
                    self.regs[r as usize] = [u64::from(u32::MAX); 32];
                }
            }
        }
    }

    /// An instruction that is no product uses registers of products.
    #[cold]
    pub fn touch(&mut self, registers: &[(Slot, bool)], mask: u32, site: &mut Site) {
        let pc = site.pc;
        let clashes = |&&(r, written): &&(Slot, bool)| match self.wgmma.role(r) {
            Role::None => false,
            Role::A => written,
            Role::D => true,
        };
        if let Some(&(r, written)) = registers.iter().find(clashes) {
            let does = if self.wgmma.role(r) == Role::D { "writes" } else { "reads" };
            let done = if written { "written" } else { "read" };
            let text = || format!("a register that a product still {does} is {done} before wgmma.wait_group");
            self.find(site, Kind::AsyncUnwaited, mask.trailing_zeros(), None, text);
        }
        self.wgmma.uses(registers.iter().map(|r| r.0), pc, self.regs.len());
    }

    /// A product begins: its registers must be in order by a fence, and A's not the results of one under way.
    fn order(&mut self, w: &Wgmma, site: &mut Site) {
        let pc = site.pc;
        if w.fragments().iter().any(|&r| self.wgmma.role(r) == Role::D) {
            let text = || "A's registers are what a product still writes: wgmma.wait_group must come before".into();
            self.find(site, Kind::AsyncUnwaited, 0, None, text);
        }
        if self.wgmma.fences == 0 {
            let text = || "the warp's first product comes before any wgmma.fence".into();
            self.find(site, Kind::ProductFence, 0, None, text);
        } else if let Some(by) = self.wgmma.unordered(w, &site.env.program.code) {
            let text = || {
                let by = &site.env.program.mnemonics[by as usize];
                format!("a register of the product was used by {by} and no wgmma.fence came since")
            };
            self.find_two(site, Kind::ProductFence, Some(by), 0, None, text);
        }
        self.wgmma.uses(w.registers(), pc, self.regs.len());
    }

    /// Calls `f` for all that a product reads of shared memory: (memory, place, bytes, who).
    fn each_operand(
        &self,
        w: &Wgmma,
        issue: &Issue,
        blocks: &mut [Block],
        f: impl Fn(&mut SharedMemory, usize, usize, &Actor),
    ) {
        let (rank, size, k) = (self.block as usize, operand_size(w), w.k as usize);
        let actor = self.actor(issue.pc, 0);
        let mut all = |from: Operand, rows: std::ops::Range<usize>| {
            let bytes = blocks[from.unit].shared.bytes.len();
            for r in rows {
                for i in 0..k {
                    let (_, at) = shared_place(from.place(r, i) as u64);
                    if at + size <= bytes {
                        f(&mut blocks[from.unit].shared, at, size, &actor);
                    }
                }
            }
        };
        if w.a_in_shared {
            let first = 16 * (self.within as usize % 4);
            all(Operand::new(issue.a[0][0], rank, w.transpose_a, size), first..first + 16);
        }
        all(Operand::new(issue.b, rank, w.transpose_b, size), 0..w.n as usize);
    }

    fn multiply(&mut self, w: &Wgmma, issue: &Issue, site: &mut Site) {
        let (n, k) = (w.n as usize, w.k as usize);
        let size = operand_size(w);
        let rank = self.block as usize;
        let mut a = vec![0f32; 16 * k];
        if w.a_in_shared {
            let from = Operand::new(issue.a[0][0], rank, w.transpose_a, size);
            let first = 16 * (self.within as usize % 4);
            self.gather_operand(&from, first..first + 16, k, w.a_ty, &mut a, site);
        } else {
            let e = 4 / size;
            for (i, reg) in issue.a.iter().enumerate() {
                for (l, &v) in reg.iter().enumerate() {
                    for j in 0..e {
                        let bits = (v >> (32 / e * j)) as u32;
                        a[(l / 4 + 8 * (i % 2)) * k + e * (l % 4) + 4 * e * (i / 2) + j] = element(bits, w.a_ty);
                    }
                }
            }
        }
        let mut b = vec![0f32; n * k];
        let from = Operand::new(issue.b, rank, w.transpose_b, size);
        self.gather_operand(&from, 0..n, k, w.b_ty, &mut b, site);
        let sign = if w.negate_a != w.negate_b { -1.0 } else { 1.0 };
        // B by rows of k, so that the inner loop runs along n.
        let mut bt = vec![0f32; n * k];
        for j in 0..n {
            for i in 0..k {
                bt[i * n + j] = sign * b[j * k + i];
            }
        }
        let mut acc = vec![0f32; 16 * n];
        let spot = |l: usize, j: usize, i: usize| (l / 4 + 8 * (i / 2)) * n + 8 * j + l % 4 * 2 + i % 2;
        if issue.keep_d {
            for (r, reg) in w.d.iter().enumerate() {
                let v = self.regs[*reg as usize];
                for (l, &v) in v.iter().enumerate() {
                    if w.half_out {
                        let (j, i) = (r / 2, r % 2 * 2);
                        acc[spot(l, j, i)] = f16::from_bits(v as u16).to_f32();
                        acc[spot(l, j, i + 1)] = f16::from_bits((v >> 16) as u16).to_f32();
                    } else {
                        acc[spot(l, r / 4, r % 4)] = f32::from_bits(v as u32);
                    }
                }
            }
        }
        for row in 0..16 {
            let sums = &mut acc[row * n..(row + 1) * n];
            for i in 0..k {
                let x = a[row * k + i];
                for (s, y) in sums.iter_mut().zip(&bt[i * n..(i + 1) * n]) {
                    *s += x * y;
                }
            }
        }
        for (r, reg) in w.d.iter().enumerate() {
            self.regs[*reg as usize] = std::array::from_fn(|l| {
                if w.half_out {
                    let (j, i) = (r / 2, r % 2 * 2);
                    let h = |x: f32| u64::from(f16::from_f32(x).to_bits());
                    h(acc[spot(l, j, i)]) | h(acc[spot(l, j, i + 1)]) << 16
                } else {
                    u64::from(acc[spot(l, r / 4, r % 4)].to_bits())
                }
            });
        }
    }

    fn gather_operand(
        &self,
        from: &Operand,
        rows: std::ops::Range<usize>,
        k: usize,
        ty: MmaTy,
        out: &mut [f32],
        site: &mut Site,
    ) {
        let pc = site.pc;
        let bytes = site.blocks[from.unit].shared.bytes.len();
        let mut clash = None;
        for (r, row) in rows.enumerate() {
            for i in 0..k {
                let (_, at) = shared_place(from.place(row, i) as u64);
                if at + from.element > bytes {
                    let text = || format!("an operand reaches byte {at} of {bytes} bytes of shared memory");
                    self.find(site, Kind::OutOfBounds, 0, Some(at as u64), text);
                    return;
                }
                let memory = &mut site.blocks[from.unit].shared;
                let actor = self.actor(pc, 0);
                if let Some(c) = memory.async_read(at, from.element, 0, &actor, &site.common.proxied) {
                    clash = clash.or(Some((c, Spot { unit: from.unit, at })));
                }
                out[r * k + i] = element(memory.load(at, from.element as u8) as u32, ty);
            }
        }
        if let Some((c, spot)) = clash {
            self.shared_clash(c, spot, false, 0, site);
        }
    }
}
