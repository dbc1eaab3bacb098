//! Dense scores of units for tokens, their gradients, and the mask alone.

use super::reduce::Group;
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// Tokens and units of a tile, and its threads, as `score.cuh` has them.
const TILE: usize = 64;
const THREADS: usize = 128;
/// Threads of kernels that take an element each.
const EACH: usize = 256;
/// Tokens whose part of the landmarks' gradient one block adds up.
const PART: usize = 1024;

/// The operands of a score and of its gradient alike.
struct Scoring<'a> {
    site: &'a Site<'a>,
    dtype: DType,
    n: Expr,
    l: Dim,
    heads: usize,
    h: usize,
    chunks: Dim,
    r: Dim,
    scale: f64,
}

impl<'a> Scoring<'a> {
    fn new(site: &'a Site<'a>, scale: f64) -> Result<Self, Unsupported> {
        let (q, landmarks) = (Operand::Input(0), Operand::Input(1));
        (0..site.inputs.len()).try_for_each(|i| site.contiguous(Operand::Input(i)))?;
        (0..site.outputs.len()).try_for_each(|i| site.contiguous(Operand::Output(i)))?;
        let (shape, lm) = (&site.view(q).ty.shape, &site.view(landmarks).ty.shape);
        Ok(Self {
            site,
            dtype: site.dtype(q),
            n: Expr::from(&shape[0]),
            l: shape[1].clone(),
            heads: site.int(q, 2)?,
            h: site.int(landmarks, 2)?,
            chunks: lm[1].clone(),
            r: shape[3].clone(),
            scale,
        })
    }
    /// The width, if tiles take it.
    ///
    /// # Errors
    /// Why they do not.
    fn width(&self, rows: &[Operand]) -> Result<usize, Unsupported> {
        let piece = 16 / self.dtype.size();
        match self.r.as_int() {
            Some(r) if r.is_multiple_of(16) && (16..=128).contains(&r) && self.site.vector(rows, piece) == piece => {
                Ok(r)
            }
            Some(r) if r.is_multiple_of(16) && (16..=128).contains(&r) => {
                because("rows of queries and landmarks must begin at multiples of 16 bytes")
            }
            _ => because(format!("the width is {}; tiles take multiples of 16 from 16 to 128", self.r)),
        }
    }
    fn stub(&self, template: &'static str, threads: usize) -> Stub {
        Stub::new("score", template, threads).element("T", self.dtype).float("scale", self.scale).hashed()
    }
    fn tiled(&self, template: &'static str, r: usize, shared: usize) -> Stub {
        // Registers let so many blocks be there that use tensor cores on f32 (seen: 160 of them at most).
        let blocks = (self.site.target.shared_per_sm / (shared + 1024)).clamp(1, 2);
        self.stub(template, THREADS)
            .int("width", r)
            .int("heads_per_kv", self.heads / self.h)
            .tag(format!("r{r}_g{}", self.heads / self.h))
            .shared(shared)
            .blocks_per_sm(blocks)
    }
    fn pitch(&self, cols: usize) -> usize {
        (cols + 16 / self.dtype.size()) * self.dtype.size()
    }
    fn sized(&self, s: Stub) -> Stub {
        s.i32("l", &self.l).i32("h", self.h).i32("chunks", &self.chunks)
    }
    /// Sizes of kernels that take an element each.
    fn each(&self, s: Stub, n: &Expr) -> Stub {
        s.i64("n", n.clone())
            .i32("l", &self.l)
            .i32("heads", self.heads)
            .i32("h", self.h)
            .i32("chunks", &self.chunks)
            .i32("r", &self.r)
    }
}

impl Cuda for Score {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (a, s) = (Scoring::new(site, self.scale)?, Operand::Output(0));
        let [q, landmarks, start] = [0, 1, 2].map(Operand::Input);
        let operands = |stub: Stub| {
            stub.int("chunk", self.chunk)
                .write("s", a.dtype, s)
                .read("q", a.dtype, q)
                .read("landmarks", a.dtype, landmarks)
                .read("start", DType::I32, start)
        };
        let why = match a.width(&[q, landmarks]) {
            Ok(r) => {
                let stub = a.sized(operands(a.tiled("score", r, 2 * TILE * a.pitch(r))));
                let tiles =
                    a.n.clone() * Expr::from(&a.l).ceil_div(TILE) * a.heads * Expr::from(&a.chunks).ceil_div(TILE);
                let why = format!("{TILE} tokens of a head by {TILE} units; what nobody sees costs no product");
                return Ok(vec![Form::new("score", why, vec![stub.launch((tiles, 1, 1)).into()])]);
            }
            Err(why) => why,
        };
        let n = Expr::product(&site.outputs[0].ty.shape);
        let stub = a.each(operands(a.stub("score_any", EACH)), &n);
        let launch = stub.launch((n.ceil_div(EACH), 1, 1));
        Ok(vec![Form::new("any_size", format!("an element a thread, which is slow: {why}"), vec![launch.into()])])
    }
}

impl Cuda for ScoreGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let a = Scoring::new(site, self.scale)?;
        let [q, landmarks, ds] = [0, 1, 2].map(Operand::Input);
        let [dq, dlandmarks] = [0, 1].map(Operand::Output);
        let queries =
            |s: Stub| s.write("dq", a.dtype, dq).read("landmarks", a.dtype, landmarks).read("ds", a.dtype, ds);
        let operands = |s: Stub| s.read("q", a.dtype, q).read("ds", a.dtype, ds);
        let elements = Expr::product(&site.outputs[1].ty.shape);
        let why = match a.width(&[q, landmarks, dq]) {
            Ok(r) => {
                let shared = TILE * (a.pitch(r) + a.pitch(TILE));
                let (l, c) = (Expr::from(&a.l), Expr::from(&a.chunks).ceil_div(TILE));
                let parts = l.clone().ceil_div(PART);
                let by_rows = a.sized(queries(a.tiled("score_queries", r, shared)));
                let by_units =
                    operands(a.tiled("score_landmarks", r, shared).write("partial", DType::F32, Operand::Workspace(0)));
                let by_units = a.sized(by_units.i64("sequences", a.n.clone())).i32("part", PART);
                let sum = Group { outer: Expr::int(1), mid: parts.clone(), inner: elements.clone() };
                let add = sum.pass(
                    "Sum",
                    (Operand::Workspace(0), DType::F32),
                    (dlandmarks, a.dtype),
                    parts.clone(),
                    Expr::int(1),
                    parts.clone().max(1),
                );
                let calls = vec![
                    by_rows.launch((l.ceil_div(TILE) * a.n.clone() * a.heads, 1, 1)).into(),
                    by_units.launch((c * a.n.clone() * a.h * parts.clone(), 1, 1)).into(),
                    add.into(),
                ];
                let why =
                    format!("by {TILE} tokens, then by {TILE} units and {PART} tokens; tiles of zeros are skipped");
                return Ok(vec![Form::new("score_grad", why, calls).with("partial", DType::F32, elements * parts)]);
            }
            Err(why) => why,
        };
        let rows = Expr::product(&site.outputs[0].ty.shape);
        let by_rows = a.each(queries(a.stub("score_queries_any", EACH)), &rows);
        let by_units = operands(a.stub("score_landmarks_any", EACH).write("dlandmarks", a.dtype, dlandmarks));
        let by_units = a.each(by_units, &elements);
        let calls = vec![
            by_rows.launch((rows.ceil_div(EACH), 1, 1)).into(),
            by_units.launch((elements.ceil_div(EACH), 1, 1)).into(),
        ];
        Ok(vec![Form::new("any_size", format!("an element a thread, which is slow: {why}"), calls)])
    }
}

impl Cuda for Mask {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (s, start, y) = (Operand::Input(0), Operand::Input(1), Operand::Output(0));
        [s, start, y].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (t, shape) = (site.dtype(s), &site.inputs[0].ty.shape);
        let n = Expr::product(shape);
        let launch = Stub::new("score", "mask", EACH)
            .element("T", t)
            .int("chunk", self.chunk)
            .tag(format!("s{}", self.chunk))
            .write("y", t, y)
            .read("s", t, s)
            .read("start", DType::I32, start)
            .i64("n", n.clone())
            .i32("l", &shape[1])
            .i32("h", &shape[2])
            .i32("chunks", &shape[3])
            .launch((n.ceil_div(EACH), 1, 1));
        Ok(vec![Form::new("mask", "an element a thread", vec![launch.into()])])
    }
}
