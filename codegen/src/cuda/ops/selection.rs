//! The choice of chunks and its gradient.

use super::inverted_index::InvertedIndex;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Condition, Form, Operand};
use crate::cuda::stub::Stub;
use crate::cuda::target::Target;
use rambac_ir::DType;
use rambac_ir::ops::*;

/// Tokens of a block and its threads, as `Selecting` has them.
const ROWS: usize = 128;
const THREADS: usize = 256;
/// Pairs whose part of a landmark's gradient one block adds up.
const SLAB: usize = 64;
const GRAD_WARPS: usize = 4;
const ADD_THREADS: usize = 128;

/// How the selection's tiles are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectTile {
    /// Landmarks that are scored at a time: 64 or 128.
    pub landmarks: usize,
    /// Steps along r that are under way.
    pub stages: usize,
    /// Dynamic shared memory, in bytes.
    pub shared: usize,
    pub blocks_per_sm: usize,
}

impl SelectTile {
    /// Most blocks per multiprocessor (two hide each other's look through the scores), then three stages.
    pub fn choose(target: &Target, dtype: DType, slots: usize, landmarks: usize) -> Option<SelectTile> {
        // Rows of a stage are 128 bytes and 16 more.
        let shared = |stages: usize| {
            let search = stages * (ROWS + landmarks) * 144 + ROWS * 64 * 4;
            let found = 3 * slots * (if slots > 32 { ROWS } else { ROWS + 4 }) * 4;
            search.max(found) + slots * ROWS * 8 + ROWS * 4
        };
        // f32 with 128 landmarks needs more registers than two blocks leave.
        let most = if dtype == DType::F32 && landmarks == 128 { 1 } else { 2 };
        [3, 2]
            .into_iter()
            .filter(|&s| shared(s) <= target.shared_per_block)
            .map(|stages| {
                let shared = shared(stages);
                let blocks = (target.shared_per_sm / (shared + Target::SHARED_RESERVED)).min(most);
                SelectTile { landmarks, stages, shared, blocks_per_sm: blocks }
            })
            .filter(|t| t.blocks_per_sm > 0)
            .max_by_key(|t| (t.blocks_per_sm, t.stages))
    }
}

fn rule(w: Weighting) -> String {
    let name = match w {
        Weighting::StickBreaking => "STICK_BREAKING",
        Weighting::Softmax => "SOFTMAX",
        Weighting::Sigmoid => "SIGMOID",
        Weighting::One => "ONE",
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
    if r % piece != 0 || site.vector(rows, piece) < piece {
        return because(format!("rows of queries and landmarks, {r} wide, must be whole pieces of 16 bytes"));
    }
    Ok(r)
}

impl Cuda for Selection {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (q, landmarks, start) = (Operand::Input(0), Operand::Input(1), Operand::Input(2));
        let [indices, count, weights, scores] = [0, 1, 2, 3].map(Operand::Output);
        let r = width(site, self.k, &[q, landmarks])?;
        [start, indices, count, weights, scores].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (t, shape) = (site.dtype(q), &site.inputs[0].ty.shape);
        let (h, chunks) = (site.int(q, 2)?, Expr::from(&site.inputs[1].ty.shape[1]));
        let order = match self.order {
            Order::Recent => "RECENT",
            Order::Score => "SCORE",
        };
        let form = |tile: SelectTile| -> Result<Form, Unsupported> {
            let launch = Stub::new("select", "select", THREADS)
                .element("T", t)
                .int("width", r)
                .int("chunk", self.chunk)
                .int("slots", self.k)
                .int("tile", tile.landmarks)
                .int("stages", tile.stages)
                .int("shared", tile.shared)
                .float("scale", self.scale)
                .line(format!("static constexpr Order order = Order::{order};"))
                .line(rule(self.rule))
                .tag(format!("r{r}_s{}_k{}_c{}", self.chunk, self.k, tile.landmarks))
                .hashed()
                .shared(tile.shared)
                .blocks_per_sm(tile.blocks_per_sm)
                .write("indices", DType::I32, indices)
                .write("count", DType::I32, count)
                .write("weights", t, weights)
                .write("scores", t, scores)
                .read("q", t, q)
                .i64("q_stride", site.row_stride(q, 2)?)
                .read("landmarks", t, landmarks)
                .i64("landmark_stride", site.row_stride(landmarks, 2)?)
                .read("start", DType::I32, start)
                .i32("l", &shape[1])
                .i32("h", h)
                .i32("chunks", chunks.clone())
                .launch((Expr::from(&shape[1]).ceil_div(ROWS) * &shape[0] * h, 1, 1));
            let why = format!(
                "{ROWS} tokens score {} landmarks at a time; {} stages, {} blocks per SM",
                tile.landmarks, tile.stages, tile.blocks_per_sm
            );
            let name = if tile.landmarks == 64 { "select_64" } else { "select_128" };
            Ok(Form::new(name, why, vec![launch.into()]))
        };
        let mut forms = vec![];
        // Few landmarks would leave half of a wide tile empty.
        if let Some(wide) = SelectTile::choose(site.target, t, self.k, 128) {
            forms.push(form(wide)?.when(Condition::AtLeast(chunks.clone(), Expr::int(256))));
        }
        match SelectTile::choose(site.target, t, self.k, 64) {
            Some(tile) => forms.push(form(tile)?),
            None => return because(format!("{} slots do not fit {} bytes", self.k, site.target.shared_per_block)),
        }
        Ok(forms)
    }
}

impl Cuda for SelectionGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let [q, landmarks, indices, count, scores, weights, dweights] = [0, 1, 2, 3, 4, 5, 6].map(Operand::Input);
        let [dq, dlandmarks] = [0, 1].map(Operand::Output);
        let k = site.int(indices, 3)?;
        let r = width(site, k, &[q, landmarks, dq, dlandmarks])?;
        [indices, count, scores, weights, dweights].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (t, shape) = (site.dtype(q), &site.inputs[0].ty.shape);
        let (h, chunks) = (site.int(q, 2)?, site.inputs[1].ty.shape[1].clone());
        let index = InvertedIndex {
            n: shape[0].clone(),
            l: shape[1].clone(),
            h,
            k,
            chunks: chunks.clone(),
            slab: SLAB,
            first: 0,
        };
        let [ds, partial] = [0, 1].map(|i| Operand::Workspace(InvertedIndex::WORKSPACES + i));
        let rows = index.lists() * &shape[1];
        let stub = |template, threads: usize| {
            Stub::new("select_grad", template, threads)
                .element("T", t)
                .int("slots", k)
                .tag(format!("r{r}_k{k}"))
                .hashed()
        };
        let wide = |template, threads: usize| {
            stub(template, threads)
                .int("width", r)
                .int("warps", GRAD_WARPS)
                .int("slab", SLAB)
                .float("scale", self.scale)
        };
        let mut calls = index.calls(indices, count);
        calls.push(
            stub("select_grad_scores", ADD_THREADS)
                .int("threads", ADD_THREADS)
                .line(rule(self.rule))
                .shared(3 * k * (ADD_THREADS + 4) * 4)
                .write("ds", DType::F32, ds)
                .read("scores", t, scores)
                .read("dweights", t, dweights)
                .read("count", DType::I32, count)
                .i64("rows", rows.clone())
                .launch((rows.clone().ceil_div(ADD_THREADS), 1, 1))
                .into(),
        );
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
}
