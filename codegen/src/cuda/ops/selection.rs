//! The choice of chunks and its gradient.

use super::any_size;
use super::inverted_index::InvertedIndex;
use super::{Cuda, Pages, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Operand};
use crate::cuda::pages::{LANDMARK_PAGE, LANDMARKS_AWAY};
use crate::cuda::stub::Stub;
use crate::cuda::target::{Arch, Target};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Tokens of a block and its threads, as `Selecting` has them.
const ROWS: usize = 128;
const THREADS: usize = 256;
/// Pairs whose part of a landmark's gradient one block adds up.
const SLAB: usize = 64;
const GRAD_WARPS: usize = 4;
/// Parts that the chunks are cut in, at most, where tokens are few.
const SEGMENTS: usize = 256;
const ADD_THREADS: usize = 128;
/// Which pages of landmarks are there: the operand behind their table.
pub(super) const WINDOW: Operand = Operand::Input(4);

/// That all landmarks are there at once.
fn all_there() -> Condition {
    Condition::Below(Expr::from(&Dim::sym(LANDMARKS_AWAY)), Expr::int(1))
}

/// How the selection's tiles are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectTile {
    /// Landmarks that are scored at a time: 64 or 128.
    pub landmarks: usize,
    /// Steps along r that are under way.
    pub stages: usize,
    /// Warpgroups make the products (wgmma) in place of warps.
    pub warpgroups: bool,
    /// Dynamic shared memory, in bytes.
    pub shared: usize,
    pub blocks_per_sm: usize,
}

impl SelectTile {
    /// Most blocks per multiprocessor (two hide each other's look through the scores), then three stages.
    pub fn choose(target: &Target, dtype: DType, slots: usize, landmarks: usize) -> Option<SelectTile> {
        let warpgroups = target.arch == Arch::Sm90a && dtype != DType::F32;
        // Rows of a stage are 128 bytes, and 16 more where no swizzle keeps banks apart.
        let row = if warpgroups { 128 } else { 144 };
        let shared = |stages: usize| {
            let search = stages * (ROWS + landmarks) * row + ROWS * 64 * 4;
            let found = 3 * slots * (if slots > 32 { ROWS } else { slot_pitch(ROWS, slots) }) * 4;
            search.max(found) + slots * (ROWS + (16 / slots.max(1)).max(1)) * 8 + ROWS * 4
        };
        // f32 with 128 landmarks needs more registers than two blocks leave.
        let most = if dtype == DType::F32 && landmarks == 128 { 1 } else { 2 };
        [3, 2]
            .into_iter()
            .filter(|&s| shared(s) <= target.shared_per_block)
            .map(|stages| {
                let shared = shared(stages);
                let blocks = (target.shared_per_sm / (shared + Target::SHARED_RESERVED)).min(most);
                SelectTile { landmarks, stages, warpgroups, shared, blocks_per_sm: blocks }
            })
            .filter(|t| t.blocks_per_sm > 0)
            .max_by_key(|t| (t.blocks_per_sm, t.stages))
    }
}

pub(super) fn rule(w: Weighting) -> String {
    let name = match w {
        Weighting::StickBreaking => "STICK_BREAKING",
        Weighting::Softmax => "SOFTMAX",
        Weighting::Sigmoid => "SIGMOID",
        Weighting::One => "ONE",
        Weighting::Logit => "LOGIT",
    };
    format!("static constexpr Weigh rule = Weigh::{name};")
}

/// Checks the width of queries and landmarks; rows must be whole pieces of 16 bytes.
fn width(site: &Site, slots: usize, rows: &[Operand]) -> Result<usize, Unsupported> {
    let q = Operand::Input(0);
    let (r, piece) = (site.int(q, 3)?, 16 / site.dtype(q).size());
    if slots > 64 {
        return because(format!("{slots} slots per token; kernels take at most 64"));
    }
    if !r.is_multiple_of(piece) || site.vector(rows, piece) < piece {
        return because(format!("rows of queries and landmarks, {r} wide, must be whole pieces of 16 bytes"));
    }
    Ok(r)
}

/// Floats from one slot of a block's rows to the next in shared memory, as `select_grad.cuh` lays them.
pub(super) fn slot_pitch(threads: usize, slots: usize) -> usize {
    threads + (32 / slots.max(1)).max(1)
}

/// dL/ds of the slots, `[ds, scores, dweights, count]`.
///
/// # Errors
/// So many slots that those of a warp's rows do not fit shared memory.
pub(super) fn slot_gradients(
    r: Weighting,
    t: DType,
    slots: usize,
    at: [Operand; 4],
    rows: Expr,
    target: &Target,
) -> Result<Call, Unsupported> {
    let [ds, scores, dweights, count] = at;
    // Scores, gradients and weights of a row a thread.
    let shared = |threads: usize| 3 * slots * slot_pitch(threads, slots) * 4;
    let Some(threads) = [ADD_THREADS, 64, 32].into_iter().find(|&t| shared(t) <= target.shared_per_block) else {
        return because(format!(
            "{slots} slots of 32 rows do not fit {} bytes of shared memory",
            target.shared_per_block
        ));
    };
    Ok(Stub::new("select_grad", "select_grad_scores", threads)
        .tag(t)
        .int("slots", slots)
        .int("threads", threads)
        .line(rule(r))
        .hashed()
        .shared(shared(threads))
        .write("ds", DType::F32, ds)
        .read("scores", t, scores)
        .read("dweights", t, dweights)
        .read("count", DType::I32, count)
        .i64("rows", rows.clone())
        .launch((rows.ceil_div(threads), 1, 1))
        .into())
}

impl Cuda for Selection {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        tiled(self, site).or_else(|why| any_size::selection(self, site, why.to_string()))
    }
}

impl Cuda for SelectionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        sparse(self, site).or_else(|why| any_size::selection_grad(self, site, why.to_string()))
    }
}

fn tiled(op: &Selection, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let (q, landmarks, start) = (Operand::Input(0), Operand::Input(1), Operand::Input(2));
    let [indices, count, weights, scores] = [0, 1, 2, 3].map(Operand::Output);
    let r = width(site, op.k, &[q, landmarks])?;
    [start, indices, count, weights, scores].into_iter().try_for_each(|at| site.contiguous(at))?;
    let (t, shape) = (site.dtype(q), &site.inputs[0].ty.shape);
    let pages = site.pages(3, landmarks)?;
    let chunks = match pages {
        Some(p) => Expr::from(p.entries) * LANDMARK_PAGE,
        None => Expr::from(&site.inputs[1].ty.shape[1]),
    };
    let h = site.int(q, 2)?;
    let order = match op.order {
        Order::Recent => "RECENT",
        Order::Score => "SCORE",
    };
    let blocks = Expr::from(&shape[1]).ceil_div(ROWS) * &shape[0] * h;
    let rows = Expr::from(&shape[0]) * &shape[1] * h;
    let config = |stub: Stub, tile: &SelectTile| {
        stub.element("T", t)
            .int("width", r)
            .int("chunk", op.chunk)
            .int("slots", op.k)
            .int("tile", tile.landmarks)
            .int("stages", tile.stages)
            .flag("warpgroups", tile.warpgroups)
            .float("scale", op.scale)
            .line(format!("static constexpr Order order = Order::{order};"))
            .line(rule(op.rule))
            .tag(format!("r{r}_s{}_k{}_c{}", op.chunk, op.k, tile.landmarks))
            .hashed()
    };
    let search = |template, tile: &SelectTile| {
        config(Stub::new("select", template, THREADS), tile)
            .int("shared", tile.shared)
            .shared(tile.shared)
            .blocks_per_sm(tile.blocks_per_sm)
    };
    let read = |s: Stub, whole: bool| -> Result<Stub, Unsupported> {
        let stored = pages.map_or(t, |p| p.stored);
        let mut s = s
            .read("q", t, q)
            .i64("q_stride", site.row_stride(q, 2)?)
            .read("landmarks", stored, landmarks)
            .i64("landmark_stride", site.row_stride(landmarks, 2)?);
        if let Some(p) = pages {
            s = s.element("Stored", stored).read("table", DType::I32, p.table);
            if !whole {
                s = s.read("window", DType::I32, WINDOW);
            }
        }
        Ok(s.read("start", DType::I32, start).i32("l", &shape[1]).i32("h", h).i32("chunks", chunks.clone()))
    };
    let write = |s: Stub| {
        s.write("indices", DType::I32, indices)
            .write("count", DType::I32, count)
            .write("weights", site.dtype(weights), weights)
            .write("scores", site.dtype(scores), scores)
    };
    let why = |tile: &SelectTile| {
        format!(
            "{ROWS} tokens score {} landmarks at a time by {}; {} stages, {} blocks per SM",
            tile.landmarks,
            if tile.warpgroups { "wgmma" } else { "mma" },
            tile.stages,
            tile.blocks_per_sm
        )
    };
    let whole = |name, tile: SelectTile| -> Result<Form, Unsupported> {
        let template = if pages.is_some() { "select_paged" } else { "select" };
        let launch = read(write(search(template, &tile)), true)?.launch((blocks.clone(), 1, 1));
        let form = Form::new(name, why(&tile), vec![launch.into()]);
        Ok(if pages.is_some() { form.needs(all_there()) } else { form })
    };
    let Some(narrow) = SelectTile::choose(site.target, t, op.k, 64) else {
        return because(format!("{} slots do not fit {} bytes", op.k, site.target.shared_per_block));
    };
    // Few tokens and many chunks: blocks share the chunks, at most SEGMENTS of them a row's.
    let tiles_each = chunks.clone().ceil_div(64 * SEGMENTS).max(1);
    let segments = chunks.clone().ceil_div(64).ceil_div_by(tiles_each.clone());
    let keys = Operand::Workspace(0);
    let template = if pages.is_some() { "select_part_paged" } else { "select_part" };
    let part = |segments: Expr, tiles_each: Expr| -> Result<Call, Unsupported> {
        Ok(read(search(template, &narrow).write("keys", DType::I32, keys), false)?
            .i32("segments", segments.clone())
            .i32("tiles_each", tiles_each)
            .i64("rows", rows.clone())
            .launch((blocks.clone() * segments, 1, 1))
            .into())
    };
    let merge = |segments: Expr| {
        write(config(Stub::new("select", "select_merge", ADD_THREADS), &narrow).int("threads", ADD_THREADS))
            .read("keys", DType::I32, keys)
            .i32("segments", segments)
            .i64("rows", rows.clone())
            .launch((rows.clone(), 1, 1))
    };
    let reason = format!("few tokens, many chunks: blocks share the chunks, then merge; {}", why(&narrow));
    let mut forms = vec![];
    if let Some(p) = pages {
        let scan = Scan { op, site, r, t, h, pages: p, rows: rows.clone(), keys };
        forms.extend(scan.form(&merge)?);
    }
    forms.push(
        Form::new("split", reason, vec![part(segments.clone(), tiles_each)?, merge(segments.clone()).into()])
            .with("keys", DType::I32, segments * rows.clone() * (2 * op.k))
            .when(Condition::Below(blocks.clone() * 4, Expr::int(site.target.sms)))
            .when(Condition::AtLeast(chunks.clone(), Expr::int(256))),
    );
    // Few landmarks would leave half of a wide tile empty.
    if let Some(wide) = SelectTile::choose(site.target, t, op.k, 128) {
        forms.push(whole("select_128", wide)?.when(Condition::AtLeast(chunks.clone(), Expr::int(256))));
    }
    forms.push(whole("select_64", narrow)?);
    if pages.is_some() {
        let why = format!("landmarks come to the device part by part: {}", why(&narrow));
        let tiles = chunks.clone().ceil_div(64);
        let calls = vec![part(Expr::int(1), tiles)?, merge(Expr::int(1)).into()];
        forms.push(Form::new("parts", why, calls).with("keys", DType::I32, rows.clone() * (2 * op.k)));
    }
    Ok(forms)
}

/// The choice of a few tokens among landmarks in pages.
struct Scan<'a> {
    op: &'a Selection,
    site: &'a Site<'a>,
    r: usize,
    t: DType,
    h: usize,
    pages: Pages<'a>,
    rows: Expr,
    keys: Operand,
}

impl Scan<'_> {
    const THREADS: usize = 256;
    /// Landmarks of a tile, as `SelectScan` has it.
    const TILE: usize = 32;
    /// Parts that the landmarks are cut in, at most.
    const SEGMENTS: usize = 512;
    /// Tokens per sequence from which on tiles of tokens are better.
    const TOKENS: usize = 8;

    /// Elements of a load and threads of a landmark.
    fn lanes(&self) -> Option<(usize, usize)> {
        let vec = 16 / self.pages.stored.size();
        // A lane holds at most 64 elements of the query.
        let fits = self.r.is_multiple_of(vec) && self.r <= 64 * 32;
        fits.then(|| (vec, (self.r / vec).next_power_of_two().clamp(8, 32)))
    }

    fn form(&self, merge: &dyn Fn(Expr) -> crate::cuda::Launch) -> Result<Option<Form>, Unsupported> {
        let (q, landmarks, start) = (Operand::Input(0), Operand::Input(1), Operand::Input(2));
        let (op, site, shape) = (self.op, self.site, &self.site.inputs[0].ty.shape);
        let Some((vec, lanes)) = self.lanes() else { return Ok(None) };
        if site.vector(&[q], vec) < vec {
            return Ok(None);
        }
        let chunks = Expr::from(self.pages.entries) * LANDMARK_PAGE;
        let tiles_each = chunks.clone().ceil_div(Self::TILE * Self::SEGMENTS).max(1);
        let segments = chunks.clone().ceil_div(Self::TILE).ceil_div_by(tiles_each.clone());
        let scan = Stub::new("select_scan", "select_scan", Self::THREADS)
            .element("T", self.t)
            .element("Stored", self.pages.stored)
            .int("width", self.r)
            .int("chunk", op.chunk)
            .int("slots", op.k)
            .float("scale", op.scale)
            .int("vec", vec)
            .int("lanes", lanes)
            .tag(format!("r{}_s{}_k{}", self.r, op.chunk, op.k))
            .hashed()
            .blocks_per_sm(2)
            .write("keys", DType::I32, self.keys)
            .read("q", self.t, q)
            .i64("q_stride", site.row_stride(q, 2)?)
            .read("landmarks", self.pages.stored, landmarks)
            .i64("landmark_stride", site.row_stride(landmarks, 2)?)
            .read("table", DType::I32, self.pages.table)
            .read("window", DType::I32, WINDOW)
            .read("start", DType::I32, start)
            .i32("l", &shape[1])
            .i32("h", self.h)
            .i32("chunks", chunks)
            .i32("segments", segments.clone())
            .i32("tiles_each", tiles_each)
            .i64("rows", self.rows.clone())
            .launch((self.rows.clone() * segments.clone(), 1, 1));
        let why = format!(
            "few tokens: each goes through the landmarks by itself; {lanes} lanes a landmark, {} a tile",
            Self::TILE
        );
        let form = Form::new("scan", why, vec![scan.into(), merge(segments.clone()).into()])
            .with("keys", DType::I32, segments * self.rows.clone() * (2 * op.k))
            .when(Condition::Below(Expr::from(&shape[1]), Expr::int(Self::TOKENS)));
        Ok(Some(form))
    }
}

fn sparse(op: &SelectionGrad, site: &Site) -> Result<Vec<Form>, Unsupported> {
    let [q, landmarks, indices, count, scores, weights, dweights] = [0, 1, 2, 3, 4, 5, 6].map(Operand::Input);
    let [dq, dlandmarks] = [0, 1].map(Operand::Output);
    let k = site.int(indices, 3)?;
    let r = width(site, k, &[q, landmarks, dq, dlandmarks])?;
    [indices, count, scores, weights, dweights].into_iter().try_for_each(|at| site.contiguous(at))?;
    let (t, shape) = (site.dtype(q), &site.inputs[0].ty.shape);
    let (h, chunks) = (site.int(q, 2)?, site.inputs[1].ty.shape[1].clone());
    let index = InvertedIndex::whole(shape, (h, k), &chunks, SLAB);
    let [ds, partial] = [0, 1].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
    let rows = index.lists() * &shape[1];
    let stub = |template, threads: usize| {
        Stub::new("select_grad", template, threads).element("T", t).int("slots", k).tag(format!("r{r}_k{k}")).hashed()
    };
    let wide = |template, threads: usize| {
        stub(template, threads).int("width", r).int("warps", GRAD_WARPS).int("slab", SLAB).float("scale", op.scale)
    };
    let mut calls = index.calls(indices, count);
    calls.push(slot_gradients(
        op.rule,
        site.dtype(dweights),
        k,
        [ds, scores, dweights, count],
        rows.clone(),
        site.target,
    )?);
    calls.push(
        wide("select_grad_queries", 32 * GRAD_WARPS)
            .write("dq", t, dq)
            .i64("dq_stride", site.row_stride(dq, 2)?)
            .read("landmarks", t, landmarks)
            .i64("landmark_stride", site.row_stride(landmarks, 2)?)
            .read("indices", DType::I32, indices)
            .read("count", DType::I32, count)
            .read("ds", DType::F32, ds)
            .i64("rows", rows.clone())
            .i32("l", &shape[1])
            .i32("h", h)
            .i32("chunks", &chunks)
            .launch((rows.clone().ceil_div(GRAD_WARPS), 1, 1))
            .into(),
    );
    let landmark_parts = wide("select_grad_landmarks", 32 * GRAD_WARPS)
        .write("partial", DType::F32, partial)
        .read("q", t, q)
        .i64("q_stride", site.row_stride(q, 2)?)
        .read("ds", DType::F32, ds);
    calls.push(index.read(landmark_parts).launch((index.lists() * index.max_slabs(), 1, 1)).into());
    let add = wide("select_grad_chunks", ADD_THREADS)
        .write("dlandmarks", t, dlandmarks)
        .i64("stride", site.row_stride(dlandmarks, 2)?)
        .read("partial", DType::F32, partial);
    calls.push(index.read_slabs(add).launch((index.lists() * &chunks, 1, 1)).into());
    let why = format!("through the inverted index, {SLAB} pairs a block; no array has tokens by chunks");
    let form = index.reserve(Form::new("sparse", why, calls)).with("ds", DType::F32, rows * k).with(
        "partial",
        DType::F32,
        index.lists() * index.max_slabs() * r,
    );
    Ok(vec![form])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_the_370m_shape() {
        let (a, h) = (Target::of(Arch::Sm80), Target::of(Arch::Sm90a));
        let tile = |t: &Target, landmarks| SelectTile::choose(t, DType::BF16, 8, landmarks).unwrap();
        // On an A100 one block takes the shared memory: then a third stage costs nothing.
        let want = SelectTile { landmarks: 64, stages: 3, warpgroups: false, shared: 124544, blocks_per_sm: 1 };
        assert_eq!(tile(&a, 64), want);
        let want = SelectTile { landmarks: 128, stages: 2, warpgroups: true, shared: 107136, blocks_per_sm: 2 };
        assert_eq!(tile(&h, 128), want);
    }

    #[test]
    fn every_number_of_slots_fits() {
        for (arch, slots) in Arch::ALL.into_iter().flat_map(|a| (1..=64).map(move |k| (a, k))) {
            let t = Target::of(arch);
            for dtype in [DType::F32, DType::BF16] {
                let tile = SelectTile::choose(&t, dtype, slots, 64);
                assert!(tile.is_some_and(|x| x.shared <= t.shared_per_block), "{slots} slots of {dtype} on {arch}");
            }
        }
    }
}
