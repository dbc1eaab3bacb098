//! Attention and selection of sizes that tiles do not take: a warp per row.  What asks for it gives the reason, which the form
//! shows.

use super::inverted_index::InvertedIndex;
use super::selection::{WINDOW, rule};
use super::{Pages, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Operand};
use crate::cuda::pages::LANDMARK_PAGE;
use crate::cuda::stub::{Stub, c_type};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

const THREADS: usize = 128;
/// Pairs of a slab: nobody here works by slabs.
const SLAB: usize = 1 << 20;

fn input(i: usize) -> Operand {
    Operand::Input(i)
}

/// Attention: to the chunks that operands 3, 4 and 5 choose, or within the sequence.
pub(super) struct AnyAttention<'a> {
    pub site: &'a Site<'a>,
    /// Which keys a row sees; of chosen chunks the scale, and whether one softmax goes over all of them (`lse`).
    pub op: Attention,
    /// Tokens of a chunk, if chunks are chosen.
    pub chunk: Option<usize>,
    /// Operand 5 says what slots weigh.  Without it and without a joint softmax, slots stay apart.
    pub weighed: bool,
    pub off_by_one: f64,
    /// Where the output's gradient is, if gradients are wanted, and that of the log-sum-exp.
    pub dy: Option<Operand>,
    pub dlse: Option<Operand>,
    pub why: String,
}

impl AnyAttention<'_> {
    fn shape(&self, i: usize) -> &[Dim] {
        &self.site.inputs[i].ty.shape
    }
    fn dtype(&self) -> DType {
        self.site.dtype(input(0))
    }
    fn pages(&self) -> Result<Option<Pages<'_>>, Unsupported> {
        if self.chunk.is_some() && self.dy.is_none() {
            self.site.pages(5 + usize::from(self.weighed), input(1))
        } else {
            Ok(None)
        }
    }
    fn slots(&self) -> Result<usize, Unsupported> {
        if self.chunk.is_some() { self.site.int(input(3), 3) } else { Ok(1) }
    }
    /// Queries stand behind keys that came before.
    fn started(&self) -> bool {
        self.chunk.is_none() && self.dy.is_none() && self.site.inputs.len() > 3
    }
    fn apart(&self) -> bool {
        self.chunk.is_some() && !self.weighed && !self.op.lse
    }
    fn group(&self) -> Result<usize, Unsupported> {
        Ok(self.site.int(input(0), 2)? / self.site.int(input(1), 2)?)
    }
    fn stub(&self, template: &'static str) -> Result<Stub, Unsupported> {
        let mut stub = Stub::new("any_size", template, THREADS);
        if self.op.is_ranged() {
            stub = stub.int("window", self.op.window).int("local", self.op.local).int("unit", self.op.unit);
        }
        Ok(stub
            .element("T", self.dtype())
            .int("heads_per_kv", self.group()?)
            .int("slots", self.slots()?)
            .int("chunk", self.chunk.unwrap_or(0))
            .float("scale", self.op.scale)
            .float("off_by_one", self.off_by_one)
            .flag("causal", self.op.causal)
            .flag("weighed", self.weighed)
            .flag("joint", self.op.lse)
            .flag("apart", self.apart())
            .flag("gradient", self.dy.is_some())
            .hashed())
    }
    /// Launches `template` with `own` arguments, the operands, what is attended to, and `rest`.
    fn launch(&self, s: Stub, template: &str, own: &str, rest: &str, warps: Expr) -> Result<Call, Unsupported> {
        let (t, site, pages) = (self.dtype(), self.site, self.pages()?);
        let e = pages.map_or(t, |p| p.stored);
        let mut s = s
            .read("q", t, input(0))
            .i64("q_stride", site.row_stride(input(0), 2)?)
            .read("k", e, input(1))
            .i64("k_stride", site.row_stride(input(1), 2)?)
            .read("v", e, input(2))
            .i64("v_stride", site.row_stride(input(2), 2)?);
        let mut start = "nullptr";
        if self.started() {
            site.contiguous(input(3))?;
            s = s.read("start", DType::I32, input(3));
            start = "start";
        }
        let (mut dy, mut lse, mut dlse) = (("nullptr", "0"), "nullptr", "nullptr");
        if let Some(at) = self.dy {
            let stride = if self.apart() { site.contiguous(at).map(|()| Expr::int(0)) } else { site.row_stride(at, 2) };
            s = s.read("dy", t, at).i64("dy_stride", stride?);
            dy = ("dy", "dy_stride");
        }
        if let Some(at) = self.dlse.filter(|_| template == "any_stats") {
            site.contiguous(at)?;
            s = s.read("dlse", t, at);
            dlse = "dlse";
        }
        if self.op.lse && self.dy.is_none() && template == "any_stats" {
            site.contiguous(Operand::Output(1))?;
            s = s.write("lse", t, Operand::Output(1));
            lse = "lse";
        }
        // A pool is one sequence.
        let tokens_kv = if pages.is_some() { Expr::int(0) } else { Expr::from(&self.shape(1)[1]) };
        s = s
            .i32("l", &self.shape(0)[1])
            .i32("tokens_kv", tokens_kv)
            .i32("h", &self.shape(1)[2])
            .i32("d", &self.shape(0)[3]);
        let mut from = match &self.op {
            o if o.unit > 0 => "Units<Config>{tokens_kv}".into(),
            o if o.is_ranged() => format!("Ranged<Config>{{l, tokens_kv, h, {start}}}"),
            _ if self.started() => "Whole<Config>{tokens_kv}".into(),
            _ => "Whole<Config>{l}".into(),
        };
        let (mut w, mut weights) = ("float", "nullptr");
        if self.chunk.is_some() {
            s = s.read("indices", DType::I32, input(3)).read("count", DType::I32, input(4));
            if self.weighed {
                s = s.read("weights", site.dtype(input(5)), input(5));
                (w, weights) = (site.c_type(input(5)), "weights");
            }
            from = format!("Chosen<Config, {w}>{{indices, count, {weights}}}");
        }
        let mut operands = String::from("AnyOperands<Config>");
        if let Some(p) = pages {
            s = s.read("table", DType::I32, p.table).i32("chunks", p.entries);
            from = format!("ChosenPaged<Config, {w}>{{{{indices, count, {weights}}}, table, chunks, (i64)l * h}}");
            operands = format!("AnyOperands<Config, {}>", c_type(p.stored));
        }
        let body = format!(
            "    {operands} x{{q, k, v, {}, {lse}, {dlse}, {start}, q_stride, k_stride, v_stride, {}, l, tokens_kv, h, d}};\n    \
             {template}<Config>({own}, x, {from}{rest});\n",
            dy.0, dy.1
        );
        Ok(s.launch_body(((warps * 32).ceil_div(THREADS), 1, 1), body).into())
    }

    pub fn forms(&self) -> Result<Vec<Form>, Unsupported> {
        let site = self.site;
        if self.chunk.is_some() {
            (3..5 + usize::from(self.weighed)).try_for_each(|i| site.contiguous(input(i)))?;
        }
        let (q, k) = (self.shape(0), self.shape(1));
        let columns = Expr::from(&q[3]).ceil_div(32);
        let rows = Expr::product(&q[..3]);
        let out = Operand::Output(0);
        let gradient = self.dy.is_some();
        let apart = self.apart() && !gradient;
        if apart {
            site.contiguous(out)?;
        }
        // The index comes first where it is needed.
        let index = match self.chunk.filter(|_| gradient) {
            Some(chunk) => Some(InvertedIndex {
                n: q[0].clone().into(),
                l: q[1].clone().into(),
                h: site.int(input(1), 2)?,
                k: self.slots()?,
                chunks: k[1].checked_div(chunk as u64).ok_or(Unsupported::Because(self.why.clone()))?,
                slab: SLAB,
                first: 0,
                token: Expr::int(0),
            }),
            None => None,
        };
        let stats = Operand::Workspace(if index.is_some() { InvertedIndex::WORKSPACES } else { 0 });
        let mut calls = index.as_ref().map_or(vec![], |x| x.calls(input(3), input(4)));
        let s = self.stub("any_stats")?.write("stats", DType::F32, stats).i64("rows", rows.clone());
        calls.push(self.launch(s, "any_stats", "stats", ", rows", rows.clone())?);
        let s = self
            .stub("any_mix")?
            .write("out", self.dtype(), out)
            .i64("stride", if apart { Expr::int(0) } else { site.row_stride(out, 2)? })
            .read("stats", DType::F32, stats)
            .i64("rows", rows.clone());
        let each = if apart { self.slots()? } else { 1 };
        calls.push(self.launch(s, "any_mix", "out, stride, stats", ", rows", rows.clone() * columns.clone() * each)?);
        if gradient {
            let [dk, dv] = [1, 2].map(Operand::Output);
            let keys = Expr::product(&k[..3]);
            let mut s = self
                .stub("any_keys")?
                .write("dk", self.dtype(), dk)
                .i64("dk_stride", site.row_stride(dk, 2)?)
                .write("dv", self.dtype(), dv)
                .i64("dv_stride", site.row_stride(dv, 2)?)
                .read("stats", DType::F32, stats)
                .i64("keys", keys.clone());
            let mut rest = ", nullptr, nullptr, keys";
            if let Some(x) = &index {
                s = s.read("entries", DType::I32, x.entries()).read("offsets", DType::I32, x.offsets());
                rest = ", entries, offsets, keys";
            }
            calls.push(self.launch(s, "any_keys", "dk, dk_stride, dv, dv_stride, stats", rest, keys * columns)?);
        }
        if gradient && self.weighed {
            let dw = Operand::Output(3);
            site.contiguous(dw)?;
            let choosers = Expr::product(&self.shape(4)[..3]);
            let s = self
                .stub("any_heads")?
                .write("dw", site.dtype(dw), dw)
                .read("stats", DType::F32, stats)
                .read("count", DType::I32, input(4))
                .i64("choosers", choosers.clone());
            calls.push(s.launch(((choosers * self.slots()?).ceil_div(THREADS), 1, 1)).into());
        }
        let form = Form::new("any_size", format!("a warp per row, which is slow: {}", self.why), calls);
        let form = match &index {
            Some(x) => x.reserve(form),
            None => form,
        };
        Ok(vec![form.with("stats", DType::F32, rows * (3 * if self.op.lse { 1 } else { self.slots()? }))])
    }
}

/// The choice of chunks.
pub(super) fn selection(op: &Selection, site: &Site, why: String) -> Result<Vec<Form>, Unsupported> {
    let (q, landmarks, start) = (input(0), input(1), input(2));
    let [indices, count, weights, scores] = [0, 1, 2, 3].map(Operand::Output);
    [start, indices, count, weights, scores].into_iter().try_for_each(|at| site.contiguous(at))?;
    let (t, shape) = (site.dtype(q), &site.inputs[0].ty.shape);
    let rows = Expr::product(&shape[..3]);
    let order = match op.order {
        Order::Recent => "RECENT",
        Order::Score => "SCORE",
    };
    let why = format!("a warp per row, which is slow: {why}");
    let config = |header, template, threads: usize| {
        Stub::new(header, template, threads)
            .element("T", t)
            .int("slots", op.k)
            .int("chunk", op.chunk)
            .float("scale", op.scale)
            .line(format!("static constexpr Order order = Order::{order};"))
            .line(rule(op.rule))
            .hashed()
    };
    let write = |s: Stub| {
        s.write("indices", DType::I32, indices)
            .write("count", DType::I32, count)
            .write("weights", site.dtype(weights), weights)
            .write("scores", site.dtype(scores), scores)
    };
    let (q_stride, landmark_stride) = (site.row_stride(q, 2)?, site.row_stride(landmarks, 2)?);
    let Some(p) = site.pages(3, landmarks)? else {
        let launch = write(config("any_size", "any_select", 32))
            .read("q", t, q)
            .i64("q_stride", q_stride)
            .read("landmarks", t, landmarks)
            .i64("landmark_stride", landmark_stride)
            .read("start", DType::I32, start)
            .i64("rows", rows.clone())
            .i32("l", &shape[1])
            .i32("h", &shape[2])
            .i32("chunks", &site.inputs[1].ty.shape[1])
            .i32("r", &shape[3])
            .launch((rows, 1, 1));
        return Ok(vec![Form::new("any_size", why, vec![launch.into()])]);
    };
    // Landmarks may come part by part, so what was found is kept in between.
    let keys = Operand::Workspace(0);
    let part = config("any_size", "any_select_part", 32)
        .element("Stored", p.stored)
        .write("keys", DType::I32, keys)
        .read("q", t, q)
        .i64("q_stride", q_stride)
        .read("landmarks", p.stored, landmarks)
        .i64("landmark_stride", landmark_stride)
        .read("table", DType::I32, p.table)
        .read("window", DType::I32, WINDOW)
        .read("start", DType::I32, start)
        .i32("l", &shape[1])
        .i32("h", &shape[2])
        .i32("chunks", Expr::from(p.entries) * LANDMARK_PAGE)
        .i32("r", &shape[3])
        .launch((rows.clone(), 1, 1));
    let merge = write(config("select", "select_merge", THREADS).int("threads", THREADS))
        .read("keys", DType::I32, keys)
        .i32("segments", Expr::int(1))
        .i64("rows", rows.clone())
        .launch((rows.clone(), 1, 1));
    let form = Form::new("any_size", why, vec![part.into(), merge.into()]);
    Ok(vec![form.with("keys", DType::I32, rows * (2 * op.k))])
}

/// Its gradient.
pub(super) fn selection_grad(op: &SelectionGrad, site: &Site, why: String) -> Result<Vec<Form>, Unsupported> {
    let [q, landmarks, indices, count, scores, weights, dweights] = [0, 1, 2, 3, 4, 5, 6].map(input);
    let [dq, dlandmarks] = [0, 1].map(Operand::Output);
    [indices, count, scores, weights, dweights].into_iter().try_for_each(|at| site.contiguous(at))?;
    let (t, shape, k) = (site.dtype(q), &site.inputs[0].ty.shape, site.int(indices, 3)?);
    let (chunks, h) = (&site.inputs[1].ty.shape[1], site.int(q, 2)?);
    let index = InvertedIndex::whole(shape, (h, k), chunks, SLAB);
    let ds = Operand::Workspace(InvertedIndex::WORKSPACES);
    let rows = Expr::product(&shape[..3]);
    let stub = |template| {
        Stub::new("any_size", template, THREADS).element("T", t).int("slots", k).float("scale", op.scale).hashed()
    };
    let sized = |s: Stub| s.i32("l", &shape[1]).i32("h", h).i32("chunks", chunks).i32("r", &shape[3]);
    let mut calls = index.calls(indices, count);
    calls.push(super::selection::slot_gradients(
        op.rule,
        site.dtype(dweights),
        k,
        [ds, scores, dweights, count],
        rows.clone(),
        site.target,
    )?);
    let queries = stub("any_select_queries")
        .write("dq", t, dq)
        .i64("dq_stride", site.row_stride(dq, 2)?)
        .read("landmarks", t, landmarks)
        .i64("landmark_stride", site.row_stride(landmarks, 2)?)
        .read("indices", DType::I32, indices)
        .read("count", DType::I32, count)
        .read("ds", DType::F32, ds)
        .i64("rows", rows.clone());
    calls.push(sized(queries).launch(((rows.clone() * &shape[3]).ceil_div(THREADS), 1, 1)).into());
    let elements = Expr::product(&site.inputs[1].ty.shape);
    let chunk_sums = stub("any_select_landmarks")
        .write("dlandmarks", t, dlandmarks)
        .i64("stride", site.row_stride(dlandmarks, 2)?)
        .read("q", t, q)
        .i64("q_stride", site.row_stride(q, 2)?)
        .read("ds", DType::F32, ds)
        .read("entries", DType::I32, index.entries())
        .read("offsets", DType::I32, index.offsets())
        .i64("elements", elements.clone());
    calls.push(sized(chunk_sums).launch((elements.ceil_div(THREADS), 1, 1)).into());
    let form = Form::new("any_size", format!("an element a thread, which is slow: {why}"), calls);
    Ok(vec![index.reserve(form).with("ds", DType::F32, rows * k)])
}
