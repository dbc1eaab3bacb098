//! The selective scan: states in registers where (sequence, head) pairs fill the GPU, three passes over segments where
//! they don't, and one token by itself.

use super::map::element_hook;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Launch, Operand};
use crate::cuda::join::one_token;
use crate::cuda::stub::{Stub, c_type};
use crate::cuda::target::{Arch, Target};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Sizes of a scan.
pub(super) struct Scan {
    pub n: Dim,
    pub l: Dim,
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub dtype: DType,
    /// Of steps, decays and states.
    pub exact: DType,
    /// head_dim and state are multiples of 16 and rows are whole pieces of 16 bytes; else elements are moved one by one.
    pub whole: bool,
}

/// What a walk does beside carrying states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walk {
    Outputs,
    States,
    Record,
    /// As `Record`, states in the panels that scan_grad_hopper.cuh reads.
    Panels,
}

/// How a block walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Tokens of a block.
    pub block: usize,
    /// Blocks copied ahead.
    pub stages: usize,
    /// Heads of a group side by side.
    pub heads: usize,
    /// Dynamic shared memory, in bytes; the kernel's `Shared` has the same.
    pub shared: usize,
    pub threads: usize,
    /// Products of warpgroups, and one more warpgroup that copies ahead: scan_hopper.cuh.
    pub warpgroups: bool,
    /// Blocks that share a multiprocessor, which registers are kept few for.
    pub per_sm: usize,
    /// States are recorded in panels.
    pub panels: bool,
}

impl Tile {
    /// Shared memory of scan.cuh's `ScanWalk::Shared`.
    fn shared(s: &Scan, walk: Walk, block: usize, stages: usize, heads: usize) -> usize {
        let size = s.dtype.size();
        let pad = 16 / size;
        let (p, state) = s.full();
        let (x, r) = (block * (heads * p + pad), block * (state + pad));
        let outputs = walk == Walk::Outputs;
        let stage = x + r + if outputs { r } else { pad };
        let g = if outputs { heads * block * (block + pad) } else { pad };
        let out = match walk {
            Walk::Record | Walk::Panels => 16 * (state + pad),
            Walk::Outputs if size == 2 => 256,
            _ => pad,
        };
        let warps = heads * p / 16;
        size * (stages * stage + g + warps * out) + heads * 5 * block * 4
    }

    /// The tile of scan_hopper.cuh: a warpgroup per 64 rows of a head's state, two of them at most.
    pub fn warpgroups(s: &Scan, walk: Walk, heads: usize, target: &Target) -> Option<Tile> {
        const STAGES: usize = 3;
        let (p, r) = s.full();
        let fits = s.whole && s.dtype.size() == 2 && p.is_multiple_of(64) && (r == 64 || r == 128);
        let (groups, panels) = (heads * p / 64, walk == Walk::Panels);
        if target.arch != Arch::Sm90a
            || !fits
            || groups > if panels { 1 } else { 2 }
            || !(s.heads / s.groups).is_multiple_of(heads)
        {
            return None;
        }
        // Panels of 64 rows of 128 bytes: x, b and perhaps c of every stage; g and y of every warpgroup, or two states on their way out.
        let (panel, outputs) = (64 * 128, walk == Walk::Outputs);
        let wide = panel * r / 64 * if outputs { 2 } else { 1 };
        let out = if outputs { 2 * groups * panel } else { 0 } + if panels { 2 * wide } else { 0 };
        let tiles = STAGES * (groups * panel + wide) + out;
        // Factors of the blocks in use and of those that four warps make at once.
        let factors = (STAGES - 1 + 4 / heads.clamp(1, 4)) * heads * 5 * 64 * 4;
        let shared = (tiles + factors + 4 * 8 + STAGES * 16).next_multiple_of(1024);
        // A walk with one warpgroup, which keeps a state and no more, leaves room for another.
        let two = groups == 1 && !outputs && 2 * (shared + Target::SHARED_RESERVED) <= target.shared_per_sm;
        let (threads, per_sm) = (128 * (groups + 1), if two { 2 } else { 1 });
        let tile = Tile { block: 64, stages: STAGES, heads, shared, threads, warpgroups: true, per_sm, panels };
        (shared <= target.shared_per_block).then_some(tile)
    }

    /// Warpgroups where they do, else the longest block that fits with two stages, else with one.  f32 takes 32 tokens: 64 would leave no registers for
    /// copying ahead.
    fn choose(s: &Scan, walk: Walk, heads: usize, target: &Target) -> Option<Tile> {
        if let Some(t) = Tile::warpgroups(s, walk, heads, target) {
            return Some(t);
        }
        let blocks: &[usize] = if s.dtype.size() == 2 { &[64, 32, 16] } else { &[32, 16] };
        blocks.iter().find_map(|&block| Tile::warps(s, walk, heads, block, target))
    }
    /// A tile of scan.cuh with blocks of so many tokens.
    fn warps(s: &Scan, walk: Walk, heads: usize, block: usize, target: &Target) -> Option<Tile> {
        let threads = 32 * heads * (s.full().0 / 16);
        if threads > 1024 || !(s.heads / s.groups).is_multiple_of(heads) {
            return None;
        }
        let all = [2, 1].map(|stages| {
            let shared = Tile::shared(s, walk, block, stages, heads);
            Tile { block, stages, heads, shared, threads, warpgroups: false, per_sm: 1, panels: false }
        });
        all.into_iter().find(|t| t.shared <= target.shared_per_block)
    }

    /// Heads side by side share c·bᵀ and copies of b and c; 8 warps are enough.
    fn heads(s: &Scan) -> usize {
        let most = (8 / (s.full().0 / 16)).max(1);
        (1..=most).rev().find(|h| (s.heads / s.groups).is_multiple_of(*h)).unwrap_or(1)
    }
}

/// Tokens of a segment of the three passes: a multiple of so many.
pub(super) const SEGMENT: usize = 256;
/// How often segments fill the GPU.
pub(super) const FILL: usize = 2;

pub(super) const X: Operand = Operand::Input(0);
pub(super) const DT: Operand = Operand::Input(1);
pub(super) const A: Operand = Operand::Input(2);
pub(super) const B: Operand = Operand::Input(3);
pub(super) const C: Operand = Operand::Input(4);
pub(super) const D: Operand = Operand::Input(5);
pub(super) const H0: Operand = Operand::Input(6);

impl Scan {
    /// `rows` are read or written in pieces of 16 bytes.
    pub fn new(site: &Site, rows: &[Operand], contiguous: &[Operand]) -> Result<Scan, Unsupported> {
        contiguous.iter().try_for_each(|&at| site.contiguous(at))?;
        let shape = &site.inputs[0].ty.shape;
        let (heads, head_dim) = (site.int(X, 2)?, site.int(X, 3)?);
        let (groups, state, dtype) = (site.int(B, 2)?, site.int(B, 3)?, site.dtype(X));
        if head_dim == 0 || state == 0 || head_dim > 256 || state > 256 {
            return because(format!("head_dim {head_dim} and state {state} must be 1 to 256"));
        }
        let piece = 16 / dtype.size();
        let whole = head_dim.is_multiple_of(16) && state.is_multiple_of(16) && site.vector(rows, piece) == piece;
        let exact = site.dtype(DT);
        Ok(Scan { n: shape[0].clone(), l: shape[1].clone(), heads, head_dim, groups, state, dtype, exact, whole })
    }
    /// head_dim and state filled up to multiples of 16.
    pub fn full(&self) -> (usize, usize) {
        (self.head_dim.next_multiple_of(16), self.state.next_multiple_of(16))
    }
    /// The end of a form's reason where something is slower than it might be.
    pub fn manner(&self) -> String {
        let single = "; elements one by one, since rows are no whole pieces of 16 bytes";
        let spilled = "; a few registers spilled, since f32 states of more than 240 take them all";
        let large = self.dtype == DType::F32 && self.full().1 > 240;
        [(!self.whole, single), (large, spilled)].into_iter().filter(|m| m.0).map(|m| m.1).collect()
    }

    /// Types and sizes that every kernel of the scan has.
    pub fn sized(&self, stub: Stub) -> Stub {
        let stub = stub.element("T", self.dtype).line(format!("using Exact = {};", c_type(self.exact)));
        let stub = if self.exact == self.dtype { stub } else { stub.tag(self.exact) };
        stub.int("heads", self.heads)
            .tag(format!("m{}", self.heads))
            .int("groups", self.groups)
            .tag(format!("g{}", self.groups))
            .int("head_dim", self.head_dim)
            .tag(format!("p{}", self.head_dim))
            .int("state", self.state)
            .tag(format!("r{}", self.state))
            .flag("whole", self.whole)
            .tag(if self.whole { "whole" } else { "ragged" })
    }
    pub fn walk(&self, header: &'static str, template: &'static str, t: Tile, reverse: bool) -> Stub {
        let (header, template) = match template {
            _ if !t.warpgroups => (header, template),
            "selective_scan" => ("scan_hopper", "selective_scan_hopper"),
            "scan_states" => ("scan_hopper", "scan_states_hopper"),
            "scan_outputs" => ("scan_hopper", "scan_outputs_hopper"),
            "scan_record" => ("scan_hopper", "scan_record_hopper"),
            "scan_record_to_start" => ("scan_hopper", "scan_record_to_start_hopper"),
            _ => panic!("BUG: {template} has no walk of warpgroups"),
        };
        self.sized(Stub::new(header, template, t.threads))
            .int("block", t.block)
            .tag(format!("q{}", t.block))
            .int("heads_per_cta", t.heads)
            .tag(format!("h{}", t.heads))
            .int("stages", t.stages)
            .tag(format!("s{}", t.stages))
            .int("shared", t.shared)
            .flag("panels", t.panels)
            .flag("reverse", reverse)
            .tag(if reverse { "back" } else { "forth" })
            .blocks_per_sm(t.per_sm)
            .shared(t.shared)
    }
    /// Parameters (x, dt, a, b) that walks begin with; backward in time dy and c stand for x and b.
    pub fn operands(&self, site: &Site, stub: Stub, x: Operand, b: Operand) -> Result<Stub, Unsupported> {
        Ok(stub
            .read("x", self.dtype, x)
            .i64("x_stride", site.row_stride(x, 2)?)
            .read("dt", self.exact, DT)
            .i64("dt_stride", site.row_stride(DT, 2)?)
            .read("a", self.exact, A)
            .read("b", self.dtype, b)
            .i64("b_stride", site.row_stride(b, 2)?))
    }
    pub fn states(&self) -> usize {
        self.heads * self.head_dim * self.state
    }
    /// Blocks of a walk without segments.
    pub fn pairs(&self, heads: usize) -> Expr {
        Expr::from(&self.n) * (self.heads / heads)
    }
    /// Tokens of a segment where so many heads share a block: as many as still fill the GPU so many times, so that states are few.
    pub fn segment(&self, heads: usize, times: usize, target: &Target) -> Expr {
        let (fill, blocks) = (Expr::int(times * target.sms), self.pairs(heads));
        // Rounded down: a few blocks more would be a round of their own.
        let segments = (fill.less(blocks.clone()) + 1).ceil_div_by(blocks);
        (Expr::from(&self.l).ceil_div_by(segments).ceil_div(SEGMENT) * SEGMENT).max(SEGMENT)
    }
    /// Segments of a sequence, at least one.
    pub fn segments(&self, segment: &Expr) -> Expr {
        Expr::from(&self.l).ceil_div_by(segment.clone()).max(1)
    }
    pub fn grid(&self, segments: impl Into<Expr>, heads: usize) -> (Expr, Expr, Expr) {
        (segments.into(), Expr::int(self.heads / heads), Expr::from(&self.n))
    }

    /// Passes one and two of three: states from which every segment begins, in `ends`; the last state goes to `last`.
    #[allow(clippy::too_many_arguments)]
    pub fn segment_states(
        &self,
        site: &Site,
        t: Tile,
        segment: &Expr,
        (x, b): (Operand, Operand),
        (first, last): (Operand, Operand),
        (ends, decays): (Operand, Operand),
        reverse: bool,
    ) -> Result<[Launch; 2], Unsupported> {
        const THREADS: usize = 128;
        let segments = self.segments(segment);
        let vec = if self.whole { site.vector(&[first, last], 4) } else { 1 };
        let states = self
            .operands(site, self.walk("scan", "scan_states", t, reverse), x, b)?
            .write("ends", DType::F32, ends)
            .write("decays", DType::F32, decays)
            .i32("l", &self.l)
            .i32("segment", segment.clone())
            .launch(self.grid(segments.clone(), t.heads));
        let combine = self
            .sized(Stub::new("scan", "scan_combine", THREADS))
            .int("threads", THREADS)
            .int("vec", vec)
            .tag(format!("v{vec}"))
            .flag("reverse", reverse)
            .tag(if reverse { "back" } else { "forth" })
            .write("ends", DType::F32, ends)
            .read("decays", DType::F32, decays)
            .read("h0", self.exact, first)
            .write("h", self.exact, last)
            .i32("segments", segments)
            .launch(((self.head_dim * self.state).div_ceil(vec * THREADS), self.heads, &self.n));
        Ok([states, combine])
    }
    /// A tile with blocks of so many tokens.
    pub fn tile_of(&self, walk: Walk, heads: usize, block: usize, target: &Target) -> Result<Tile, Unsupported> {
        let tile = Tile::warpgroups(self, walk, heads, target).filter(|t| t.block == block);
        match tile.or_else(|| Tile::warps(self, walk, heads, block, target)) {
            Some(t) => Ok(t),
            None => because(format!("walks in blocks of {block} need more than {} bytes", target.shared_per_block)),
        }
    }
    pub fn tile(&self, walk: Walk, heads: usize, target: &Target) -> Result<Tile, Unsupported> {
        match Tile::choose(self, walk, heads, target) {
            Some(t) => Ok(t),
            None => because(format!(
                "head_dim {} and state {} need more than {} bytes of shared memory",
                self.head_dim, self.state, target.shared_per_block
            )),
        }
    }
}

/// Walks of whole sequences fill the GPU from here on: three quarters of its multiprocessors.
pub(super) fn enough(target: &Target) -> Expr {
    Expr::int((3 * target.sms).div_ceil(4))
}

/// Forms of the forward scan.
impl Scan {
    fn one_token(&self, site: &Site) -> Result<Form, Unsupported> {
        const THREADS: usize = 128;
        let (y, h) = (Operand::Output(0), Operand::Output(1));
        let vec = if self.whole { site.vector(&[H0, h], 16 / self.exact.size()) } else { 1 };
        let lanes = self.state.div_ceil(vec).next_power_of_two().min(32);
        let early = site.target.arch == Arch::Sm90a;
        let mut s = self
            .sized(Stub::new("scan_step", "scan_step", THREADS))
            .int("vec", vec)
            .tag(format!("v{vec}"))
            .int("lanes", lanes)
            .int("threads", THREADS)
            .flag("early", early)
            .flag("decays_ahead", early && site.made(2).is_some())
            .hashed()
            .read("x", self.dtype, X)
            .i64("x_stride", site.row_stride(X, 2)?)
            .read("b", self.dtype, B)
            .i64("b_stride", site.row_stride(B, 2)?)
            .read("c", self.dtype, C)
            .i64("c_stride", site.row_stride(C, 2)?)
            .read("d", self.exact, D)
            .read("h0", self.exact, H0)
            .write("y", self.dtype, y)
            .i64("y_stride", site.row_stride(y, 2)?)
            .write("h", self.exact, h);
        let mut hooks = vec![];
        for (k, name, at, axis) in [(1, "Dt", DT, 2), (2, "A", A, 0)] {
            let Some((map, operands)) = site.made(k) else {
                let low = name.to_lowercase();
                s = s.read(&low, self.exact, at).i64(&format!("{low}_stride"), site.row_stride(at, axis)?);
                hooks.push(format!("Rows<{}>{{{low}, {low}_stride}}", c_type(self.exact)));
                continue;
            };
            let Some((text, value, with)) = element_hook(name, map, &operands, s) else {
                return because("a map within it has operands that no hook reads");
            };
            s = with.hook(&text);
            hooks.push(value);
        }
        if early {
            let decays = site.made(2).map(|(_, operands)| operands).unwrap_or_default();
            s = s.early([D, H0].into_iter().chain(decays.into_iter().map(|o| o.0)));
        }
        let body = format!(
            "    scan_step<Config>(x, x_stride, {}, {}, b, b_stride, c, c_stride, d, h0, y, y_stride, h);\n",
            hooks[0], hooks[1]
        );
        let l = s.launch_body(((self.heads * self.head_dim).div_ceil(THREADS / lanes), &self.n, 1), body);
        let with = if site.joined.maps.is_empty() { "" } else { ", its steps and decays made on the spot" };
        let why = format!("one token: {lanes} lanes a row of the state{with}{}", self.manner());
        Ok(Form { needs: one_token(&self.l).to_vec(), ..Form::new("scan_step", why, vec![l.into()]) })
    }

    /// `l` is given where a kernel needs no segment.
    fn outputs(&self, site: &Site, t: Tile, from: Option<Operand>) -> Result<Stub, Unsupported> {
        let (y, h) = (Operand::Output(0), Operand::Output(1));
        let template = if from.is_some() { "scan_outputs" } else { "selective_scan" };
        let stub = self
            .operands(site, self.walk("scan", template, t, false), X, B)?
            .read("c", self.dtype, C)
            .i64("c_stride", site.row_stride(C, 2)?)
            .read("d", self.exact, D);
        let stub = match from {
            Some(at) => stub.read("starts", DType::F32, at),
            None => stub.read("h0", self.exact, H0),
        };
        let stub = stub.write("y", self.dtype, y).i64("y_stride", site.row_stride(y, 2)?);
        let stub = if from.is_some() { stub } else { stub.write("h", self.exact, h) };
        Ok(stub.i32("l", &self.l))
    }

    fn one_pass(&self, site: &Site, heads: usize) -> Result<Form, Unsupported> {
        let t = self.tile(Walk::Outputs, heads, site.target)?;
        let l = self.outputs(site, t, None)?.launch(self.grid(1, heads));
        let by = if t.warpgroups { " of warpgroups" } else { "" };
        let (blocks, manner) = (self.pairs(heads), self.manner());
        let why = format!("{blocks} blocks keep the states of {heads} heads each in registers{by}{manner}");
        Ok(Form::new("selective_scan", why, vec![l.into()]))
    }

    fn three_passes(&self, site: &Site, times: usize) -> Result<Form, Unsupported> {
        let heads = Tile::heads(self);
        let segment = &self.segment(heads, times, site.target);
        let (ends, decays) = (Operand::Workspace(0), Operand::Workspace(1));
        let t = self.tile(Walk::States, heads, site.target)?;
        let [states, combine] =
            self.segment_states(site, t, segment, (X, B), (H0, Operand::Output(1)), (ends, decays), false)?;
        let t = self.tile(Walk::Outputs, heads, site.target)?;
        let outputs = self.outputs(site, t, Some(ends))?.i32("segment", segment.clone());
        let calls: Vec<Call> =
            vec![states.into(), combine.into(), outputs.launch(self.grid(self.segments(segment), heads)).into()];
        let (all, manner) = (self.pairs(1), self.manner());
        let why =
            format!("{all} heads are few: segments of {SEGMENT} tokens or a multiple, their states added up{manner}");
        let count = Expr::from(&self.n) * self.segments(segment);
        let form = Form::new("scan_segments", why, calls);
        Ok(form.with("ends", DType::F32, count.clone() * self.states()).with("decays", DType::F32, count * self.heads))
    }
}

impl Cuda for SelectiveScan {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (y, h) = (Operand::Output(0), Operand::Output(1));
        let s = Scan::new(site, &[X, B, C, y], &[A, D, H0, h])?;
        let mut forms = vec![];
        if s.l.as_int().is_none_or(|l| l == 1) {
            forms.push(s.one_token(site)?);
        }
        let most = Tile::heads(&s);
        for heads in if most > 1 { vec![most, 1] } else { vec![1] } {
            forms.push(s.one_pass(site, heads)?.when(Condition::AtLeast(s.pairs(heads), enough(site.target))));
        }
        // Short sequences: one walk is over before three have begun.
        let few = Expr::int(2 * SEGMENT + 1);
        forms.push(s.one_pass(site, 1)?.when(Condition::Below(Expr::from(&s.l), few)));
        forms.push(s.three_passes(site, FILL)?);
        Ok(forms)
    }
    fn candidates(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let mut all = self.forms(site)?;
        // Shorter segments: more blocks take turns, and more states lie between the passes.
        all.push(
            Scan::new(site, &[X, B, C, Operand::Output(0)], &[A, D, H0, Operand::Output(1)])?
                .three_passes(site, 4 * FILL)?,
        );
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(heads: usize, head_dim: usize, state: usize, dtype: DType) -> Scan {
        let (n, l) = (Dim::sym("N"), Dim::sym("L"));
        Scan { n, l, heads, head_dim, groups: 1, state, dtype, exact: dtype, whole: true }
    }

    #[test]
    fn the_tile_of_the_370m_model() {
        let s = scan(32, 64, 128, DType::BF16);
        assert_eq!(Tile::heads(&s), 2);
        let tile = |arch| s.tile(Walk::Outputs, 2, &Target::of(arch)).unwrap();
        let warps = Tile {
            block: 64,
            stages: 2,
            heads: 2,
            shared: 129_536,
            threads: 256,
            warpgroups: false,
            per_sm: 1,
            panels: false,
        };
        assert_eq!(tile(Arch::Sm80), warps);
        let groups = Tile {
            block: 64,
            stages: 3,
            heads: 2,
            shared: 191_488,
            threads: 384,
            warpgroups: true,
            per_sm: 1,
            panels: false,
        };
        assert_eq!(tile(Arch::Sm90a), groups);
        assert_eq!(s.tile(Walk::Panels, 1, &Target::of(Arch::Sm90a)).unwrap().per_sm, 2);
        let s = scan(32, 64, 128, DType::F32);
        assert_eq!(s.tile(Walk::Outputs, 1, &Target::of(Arch::Sm80)).unwrap().block, 32);
    }

    #[test]
    fn large_states_take_less_ahead_spill_or_are_refused() {
        assert!(scan(4, 64, 256, DType::F32).manner().contains("spilled"));
        assert_eq!(scan(4, 64, 240, DType::F32).manner() + &scan(4, 64, 256, DType::BF16).manner(), "");
        let a100 = Target::of(Arch::Sm80);
        let s = scan(8, 128, 256, DType::BF16);
        assert_eq!(Tile::heads(&s), 1);
        let t = s.tile(Walk::Outputs, 1, &a100).unwrap();
        assert_eq!((t.block, t.stages), (64, 1));
        let small = Target { shared_per_block: 16 * 1024, ..a100 };
        let e = s.tile(Walk::Outputs, 1, &small).unwrap_err();
        assert_eq!(e.to_string(), "head_dim 128 and state 256 need more than 16384 bytes of shared memory");
    }

    #[test]
    fn segments_fill_the_gpu_and_leave_few_states() {
        let s = scan(32, 64, 128, DType::BF16);
        let segment = |n, l| {
            let tokens = s.segment(2, FILL, &Target::of(Arch::Sm90a));
            tokens.eval(&rambac_ir::Bindings::new([("N", n), ("L", l)])).unwrap()
        };
        // 16 pairs of heads: 16 segments make 256 blocks for 132 multiprocessors.
        assert_eq!(segment(1, 1 << 20), 1 << 16);
        assert_eq!(segment(1, 4096), 256);
        assert_eq!(segment(2, 100_000), 12_544);
        assert_eq!((segment(1000, 4096), segment(0, 4096), segment(1, 0)), (4096, 256, 256));
    }

    #[test]
    fn heads_share_a_block_where_their_number_allows() {
        assert_eq!(Tile::heads(&scan(30, 16, 16, DType::F32)), 6);
        assert_eq!(Tile::heads(&scan(7, 64, 16, DType::F32)), 1);
        let groups = Scan { groups: 4, ..scan(8, 32, 16, DType::F32) };
        assert_eq!(Tile::heads(&groups), 2);
    }
}
