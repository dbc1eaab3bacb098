//! Gradients of the selective scan: states and their gradients at block boundaries are written down by walks, then a
//! block of tokens goes through the heads of a group.

use super::scan as walk;
use super::scan::{A, B, C, D, FILL, H0, SEGMENT, Scan, Walk, X, enough};
use super::slots::Slots;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Launch, Operand};
use crate::cuda::stub::{Stub, c_type};
use crate::cuda::target::{Arch, Target};
use rambac_ir::DType;
use rambac_ir::ops::*;

/// How a block of scan_backward.cuh or scan_grad_hopper.cuh works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    /// Tokens.
    block: usize,
    /// Warps side by side.
    columns: usize,
    stages: usize,
    /// Of a group's heads.
    parts: usize,
    /// Dynamic shared memory, in bytes; the kernel's `Shared` has the same.
    shared: usize,
    threads: usize,
    /// scan_grad_hopper.cuh.
    warpgroups: bool,
}

impl Tile {
    /// Shared memory of scan_backward.cuh's `ScanGrad::Shared`.
    fn shared(s: &Scan, block: usize, columns: usize, stages: usize, parts: usize) -> usize {
        let size = s.dtype.size();
        let pad = 16 / size;
        let (rows, heads) = (block / 16, s.heads / s.groups / parts);
        let warps = rows * columns;
        let (p, r) = s.full();
        let stage = 2 * block * (p + pad) + 2 * p * (r + pad);
        let tiles = warps * if size == 2 { 256 } else { pad };
        let elements = stages * stage + 2 * block * (r + pad) + block * (block + pad) + tiles;
        let partial = (3 * columns + rows) * block + 2 * warps;
        (size * elements + 2 * 4 * (5 * block + partial) + s.exact.size() * block * (heads | 1)).next_multiple_of(16)
    }

    /// The tile of scan_grad_hopper.cuh: a warpgroup per side of the products and one that copies.
    fn warpgroups(s: &Scan, parts: usize, target: &Target) -> Option<Tile> {
        const STAGES: usize = 3;
        let ((p, r), heads) = (s.full(), s.heads / s.groups / parts);
        let fits = s.whole && s.dtype.size() == 2 && p == 64 && (r == 64 || r == 128);
        if target.arch != Arch::Sm90a || !fits {
            return None;
        }
        // It reads what this walk writes.
        walk::Tile::warpgroups(s, Walk::Panels, 1, target)?;
        // Panels of 64 rows of 128 bytes: x, dy, states and their gradients of every stage; b, c, E and c·bᵀ in f32.
        let (panel, wide) = (64 * 128, 64 * 128 * r / 64);
        let tiles = STAGES * (2 * panel + 2 * wide) + 2 * wide + 3 * panel;
        let factors = STAGES * 4 * (5 * 64 + 3 * 64 + 8);
        let steps = s.exact.size() * 64 * (heads | 1) + 4 * 4 * heads;
        let shared = (tiles + factors + steps + 16 * STAGES).next_multiple_of(1024);
        let tile = Tile { block: 64, columns: 2, stages: STAGES, parts, shared, threads: 384, warpgroups: true };
        (shared <= target.shared_per_block).then_some(tile)
    }

    /// Warpgroups where they do, else as many tokens as registers and shared memory allow: what gathers over the heads, [block, R] of db and dc, lies in
    /// registers, and so more warps side by side share it where R or elements are larger.
    fn choose(s: &Scan, parts: usize, target: &Target) -> Option<Tile> {
        if let Some(t) = Tile::warpgroups(s, parts, target) {
            return Some(t);
        }
        let (narrow, (p, r)) = (s.dtype.size() == 2, s.full());
        let all: &[(usize, usize, usize)] = match (narrow, r <= 128, p * r <= 64 * 128) {
            (true, true, _) => &[(64, 2, 2), (64, 2, 1), (32, 4, 1), (16, 8, 1)],
            (true, false, _) => &[(32, 4, 2), (32, 4, 1), (16, 8, 1)],
            // Compiled for Hopper 32 tokens of the largest state take more registers than there are.
            (false, _, true) if target.arch != Arch::Sm90a || p * r < 64 * 128 => &[(32, 4, 2), (32, 4, 1), (16, 8, 1)],
            (false, ..) => &[(16, 8, 2), (16, 8, 1)],
        };
        all.iter()
            .map(|&(block, columns, stages)| {
                let shared = Tile::shared(s, block, columns, stages, parts);
                Tile { block, columns, stages, parts, shared, threads: 2 * block * columns, warpgroups: false }
            })
            .find(|t| t.shared <= target.shared_per_block)
    }
}

/// Parts that heads of a group fall into where blocks of tokens are few: the largest divisor up to 8.
fn parts(s: &Scan) -> usize {
    let heads = s.heads / s.groups;
    (1..=8).rev().find(|p| heads.is_multiple_of(*p)).unwrap_or(1)
}

const DY: Operand = Operand::Input(7);
const DH: Operand = Operand::Input(8);
const DX: Operand = Operand::Output(0);
const DDT: Operand = Operand::Output(1);
const DA: Operand = Operand::Output(2);
const DB: Operand = Operand::Output(3);
const DC: Operand = Operand::Output(4);
const DD: Operand = Operand::Output(5);
const DH0: Operand = Operand::Output(6);
const STATES: Operand = Operand::Workspace(0);
const GRADIENTS: Operand = Operand::Workspace(1);
const DA_SLOTS: Operand = Operand::Workspace(2);
const DD_SLOTS: Operand = Operand::Workspace(3);

/// Walks that write states down: over whole sequences, or over segments.
#[derive(Clone, Copy, PartialEq)]
enum Walks {
    Whole,
    Segments,
}

struct Plan<'a> {
    site: &'a Site<'a>,
    s: &'a Scan,
    tile: Tile,
}

impl Plan<'_> {
    fn blocks(&self) -> Expr {
        Expr::from(&self.s.l).ceil_div(self.tile.block)
    }
    /// Of walks over segments, a head each.
    fn segment(&self) -> Expr {
        self.s.segment(1, FILL, self.site.target)
    }

    /// `dt` and what it walks over → states before every block, or in reverse gradients behind every block.
    fn record(&self, walks: Walks, ends: (Operand, Operand), reverse: bool) -> Result<Vec<Launch>, Unsupported> {
        let (s, site) = (self.s, self.site);
        // The blocks are those of the gradients' kernel.
        let own = |walk| s.tile_of(walk, 1, self.tile.block, site.target);
        let t = own(if self.tile.warpgroups { Walk::Panels } else { Walk::Record })?;
        let (over, first, last, to) = if reverse { ((DY, C), DH, DH0, GRADIENTS) } else { ((X, B), H0, DH0, STATES) };
        let stub = |template, start: DType| {
            let stub = s.walk("scan_backward", template, t, reverse);
            s.operands(site, stub.line(format!("using Start = {};", c_type(start))), over.0, over.1)
        };
        match walks {
            Walks::Whole if reverse => Ok(vec![
                stub("scan_record_to_start", s.exact)?
                    .read("dh", s.exact, first)
                    .write("record", s.dtype, to)
                    .write("dh0", s.exact, last)
                    .i32("l", &s.l)
                    .launch(s.grid(1, t.heads)),
            ]),
            Walks::Whole => Ok(vec![
                stub("scan_record", s.exact)?
                    .tag("whole")
                    .read("start", s.exact, first)
                    .write("record", s.dtype, to)
                    .i32("l", &s.l)
                    .i32("segment", &s.l)
                    .launch(s.grid(1, t.heads)),
            ]),
            Walks::Segments => {
                let segment = &self.segment();
                // Forward, the last state goes where the gradient of the first will be written after it.
                let pass = s.segment_states(site, own(Walk::States)?, segment, over, (first, last), ends, reverse)?;
                let record = stub("scan_record", DType::F32)?
                    .tag("segments")
                    .read("start", DType::F32, ends.0)
                    .write("record", s.dtype, to)
                    .i32("l", &s.l)
                    .i32("segment", segment.clone())
                    .launch(s.grid(s.segments(segment), t.heads));
                let [states, combine] = pass;
                Ok(vec![states, combine, record])
            }
        }
    }

    fn grad(&self, db: Operand, dc: Operand) -> Result<Launch, Unsupported> {
        let (s, site, t) = (self.s, self.site, self.tile);
        let whole = t.parts == 1;
        let (sum, rows) = if whole { (s.dtype, None) } else { (DType::F32, Some(s.groups * s.state)) };
        let stride = |at| match rows {
            Some(r) => Ok(Expr::int(r)),
            None => site.row_stride(at, 2),
        };
        let (header, template) =
            if t.warpgroups { ("scan_grad_hopper", "scan_grad_hopper") } else { ("scan_backward", "scan_grad") };
        let stub = s
            .sized(Stub::new(header, template, t.threads))
            .int("block", t.block)
            .tag(format!("q{}", t.block))
            .int("columns", t.columns)
            .tag(format!("c{}", t.columns))
            .int("stages", t.stages)
            .tag(format!("s{}", t.stages))
            .int("parts", t.parts)
            .tag(format!("n{}", t.parts))
            .line(format!("using Sum = {};", c_type(sum)))
            .int("shared", t.shared)
            .shared(t.shared);
        Ok(s.operands(site, stub, X, B)?
            .read("c", s.dtype, C)
            .i64("c_stride", site.row_stride(C, 2)?)
            .read("d", s.exact, D)
            .read("dy", s.dtype, DY)
            .i64("dy_stride", site.row_stride(DY, 2)?)
            .read("states", s.dtype, STATES)
            .read("gradients", s.dtype, GRADIENTS)
            .write("dx", s.dtype, DX)
            .i64("dx_stride", site.row_stride(DX, 2)?)
            .write("ddt", s.exact, DDT)
            .i64("ddt_stride", site.row_stride(DDT, 2)?)
            .write("db", sum, db)
            .i64("db_stride", stride(DB)?)
            .write("dc", sum, dc)
            .i64("dc_stride", stride(DC)?)
            .write("da", DType::F32, DA_SLOTS)
            .write("dd", DType::F32, DD_SLOTS)
            .i32("l", &s.l)
            .launch((self.blocks().max(1), s.groups * t.parts, &s.n)))
    }

    fn form(&self, walks: Walks) -> Result<Form, Unsupported> {
        let (s, site, t) = (self.s, self.site, self.tile);
        let n = Expr::from(&s.n);
        let slots = n.clone() * self.blocks().max(1);
        let (p, r) = s.full();
        let records = n.clone() * self.blocks() * (s.heads * p * r);
        let mut work = vec![
            ("states", s.dtype, records.clone()),
            ("gradients", s.dtype, records),
            ("da", DType::F32, slots.clone() * s.heads),
            ("dd", DType::F32, slots.clone() * s.heads),
        ];
        let mut ends = (STATES, STATES);
        if walks == Walks::Segments {
            ends = (Operand::Workspace(work.len()), Operand::Workspace(work.len() + 1));
            let count = n.clone() * s.segments(&self.segment());
            work.push(("ends", DType::F32, count.clone() * s.states()));
            work.push(("decays", DType::F32, count * s.heads));
        }
        let (mut db, mut dc) = (DB, DC);
        let tokens = n * Expr::from(&s.l);
        let width = s.groups * s.state;
        if t.parts > 1 {
            (db, dc) = (Operand::Workspace(work.len()), Operand::Workspace(work.len() + 1));
            let all = tokens.clone() * (t.parts * width);
            work.push(("db", DType::F32, all.clone()));
            work.push(("dc", DType::F32, all));
        }
        let mut launches = self.record(walks, ends, false)?;
        launches.extend(self.record(walks, ends, true)?);
        launches.push(self.grad(db, dc)?);
        for (at, to) in [(DA_SLOTS, DA), (DD_SLOTS, DD)] {
            launches.push(Slots::of_row(at, slots.clone(), s.heads).sum(site, to, 0, 1));
        }
        if t.parts > 1 {
            for (at, to) in [(db, DB), (dc, DC)] {
                let slots = Slots {
                    at,
                    first: 0,
                    count: Expr::int(t.parts),
                    stride: tokens.clone() * width,
                    rows: tokens.clone(),
                    cols: Expr::int(width),
                };
                launches.push(slots.sum(site, to, site.row_stride(to, 2)?, 1));
            }
        }
        let walk = match walks {
            Walks::Whole => format!("{} walks write states", s.pairs(1)),
            Walks::Segments => format!("walks over segments of {SEGMENT} tokens or a multiple write states"),
        };
        let heads = s.heads / s.groups / t.parts;
        let by = if t.warpgroups { " by warpgroups" } else { "" };
        let why = format!("{walk}, then {} tokens a block go through {heads} heads{by}{}", t.block, s.manner());
        let calls: Vec<Call> = launches.into_iter().map(Call::from).collect();
        let name = if walks == Walks::Whole { "scan_grad" } else { "scan_grad_segments" };
        Ok(work.into_iter().fold(Form::new(name, why, calls), |f, (name, t, n)| f.with(name, t, n)))
    }
}

impl Cuda for SelectiveScanGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let s = Scan::new(site, &[X, B, C, DY, DX, DB, DC], &[A, D, H0, DH, DA, DD, DH0])?;
        let tile = |parts| match Tile::choose(&s, parts, site.target) {
            Some(t) => Ok(t),
            None => because(format!(
                "head_dim {}, state {} and {} heads need more than {} bytes of shared memory",
                s.head_dim, s.state, s.heads, site.target.shared_per_block
            )),
        };
        let plan = |parts| Ok::<_, Unsupported>(Plan { site, s: &s, tile: tile(parts)? });
        let (one, many) = (plan(1)?, plan(parts(&s))?);
        // Blocks of tokens that fill the GPU twice need no parts.
        let filled = || {
            let blocks = Expr::from(&s.n) * one.blocks() * s.groups;
            Condition::AtLeast(blocks, Expr::int(2 * site.target.sms))
        };
        let pairs = || Condition::AtLeast(s.pairs(1), enough(site.target));
        let short = || Condition::Below(Expr::from(&s.l), Expr::int(2 * SEGMENT + 1));
        Ok(vec![
            one.form(Walks::Whole)?.when(filled()).when(pairs()),
            many.form(Walks::Whole)?.when(short()),
            one.form(Walks::Segments)?.when(filled()),
            many.form(Walks::Segments)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::target::Arch;
    use rambac_ir::Dim;

    #[test]
    fn tiles_of_the_370m_model() {
        let s = |dtype, state| Scan {
            n: Dim::sym("N"),
            l: Dim::sym("L"),
            heads: 32,
            head_dim: 64,
            groups: 1,
            state,
            dtype,
            exact: dtype,
            whole: true,
        };
        let tile = |s: &Scan, parts, arch| {
            Tile::choose(s, parts, &Target::of(arch)).map(|t| (t.block, t.columns, t.stages, t.threads))
        };
        let bf16 = s(DType::BF16, 128);
        assert_eq!(parts(&bf16), 8);
        assert_eq!(tile(&bf16, 1, Arch::Sm90a), Some((64, 2, 3, 384)));
        assert_eq!(tile(&bf16, 1, Arch::Sm80), Some((64, 2, 2, 256)));
        // 80 heads, as the 3B model has: their steps do not fit beside two stages on an A100.
        let wide = Scan { heads: 80, ..s(DType::BF16, 128) };
        assert_eq!(tile(&wide, 1, Arch::Sm80), Some((64, 2, 1, 256)));
        assert_eq!(tile(&s(DType::F32, 128), 1, Arch::Sm80), Some((32, 4, 1, 256)));
        assert_eq!(tile(&s(DType::BF16, 256), 1, Arch::Sm80), Some((32, 4, 1, 256)));
        assert_eq!(tile(&s(DType::F32, 256), 1, Arch::Sm80), None);
    }
}
