//! The choice among dense scores, the weights of what was chosen, and their gradient.

use super::selection::{rule, slot_gradients, slot_pitch};
use super::{Cuda, Site, Unsupported, because};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::DType;
use rambac_ir::ops::*;

const WARPS: usize = 4;

impl Cuda for Select {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let s = Operand::Input(0);
        let [indices, count] = [0, 1].map(Operand::Output);
        [s, indices, count].into_iter().try_for_each(|at| site.contiguous(at))?;
        let shape = &site.inputs[0].ty.shape;
        let rows = Expr::product(&shape[..3]);
        // Best first, the chosen of a row are sorted in shared memory.
        let (order, kept) = match self.order {
            Order::Recent => ("RECENT", 8),
            Order::Score => ("SCORE", 8 * self.k),
        };
        let shared = |warps: usize| warps * (256 * 4) + if self.order == Order::Score { warps * kept } else { kept };
        let fits = |w: &usize| shared(*w) <= site.target.shared_per_block;
        let Some(warps) = [WARPS, 2, 1].into_iter().find(fits) else {
            return because(format!("{} units best first do not fit {} bytes", self.k, site.target.shared_per_block));
        };
        let launch = Stub::new("choose", "choose", 32 * warps)
            .int("slots", self.k)
            .int("sinks", self.sinks)
            .int("recent", self.recent)
            .int("warps", warps)
            .line(format!("static constexpr Order order = Order::{order};"))
            .tag(site.dtype(s))
            .tag(format!("k{}", self.k))
            .hashed()
            .shared(shared(warps))
            .write("indices", DType::I32, indices)
            .write("count", DType::I32, count)
            .read("s", site.dtype(s), s)
            .i64("rows", rows.clone())
            .i32("chunks", &shape[3])
            .launch((rows.ceil_div(warps), 1, 1));
        Ok(vec![Form::new(
            "choose",
            "a warp per row finds the k-th best by radix, then writes in order",
            vec![launch.into()],
        )])
    }
}

/// Threads whose rows' numbers fit shared memory, so many floats a slot.
fn row_threads(site: &Site, slots: usize, floats: usize) -> Result<usize, Unsupported> {
    let fits = |t: &usize| floats * slots * slot_pitch(*t, slots) * 4 <= site.target.shared_per_block;
    match [128, 64, 32].into_iter().find(fits) {
        Some(t) => Ok(t),
        None => because(format!(
            "{slots} slots of 32 rows do not fit {} bytes of shared memory",
            site.target.shared_per_block
        )),
    }
}

/// `w` of the chosen scores.
fn weigh(site: &Site, by: Weighting, w: (Operand, DType), rows: &Expr) -> Result<Call, Unsupported> {
    let [s, indices, count] = [0, 1, 2].map(Operand::Input);
    [s, indices, count].into_iter().try_for_each(|at| site.contiguous(at))?;
    let k = site.int(indices, 3)?;
    let threads = row_threads(site, k, 2)?;
    Ok(Stub::new("choose", "weigh_chosen", threads)
        .int("slots", k)
        .int("threads", threads)
        .line(rule(by))
        .tag(site.dtype(s))
        .tag(format!("k{k}"))
        .hashed()
        .shared(2 * k * slot_pitch(threads, k) * 4)
        .write("w", w.1, w.0)
        .read("s", site.dtype(s), s)
        .read("indices", DType::I32, indices)
        .read("count", DType::I32, count)
        .i64("rows", rows.clone())
        .i32("chunks", &site.inputs[0].ty.shape[3])
        .launch((rows.clone().ceil_div(threads), 1, 1))
        .into())
}

impl Cuda for Weigh {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let w = Operand::Output(0);
        site.contiguous(w)?;
        let rows = Expr::product(&site.inputs[0].ty.shape[..3]);
        let call = weigh(site, self.rule, (w, site.dtype(w)), &rows)?;
        Ok(vec![Form::new("weigh", "a thread per row weighs what was chosen", vec![call])])
    }
}

impl Cuda for WeighGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let [_, indices, count, dw] = [0, 1, 2, 3].map(Operand::Input);
        let y = Operand::Output(0);
        [dw, y].into_iter().try_for_each(|at| site.contiguous(at))?;
        let (k, rows) = (site.int(indices, 3)?, Expr::product(&site.inputs[0].ty.shape[..3]));
        // The chosen scores in the gradient's type, as the kernel that takes both wants them.
        let [chosen, ds] = [0, 1].map(Operand::Workspace);
        let scatter = Stub::new("choose", "scatter_slots", 32 * WARPS)
            .int("slots", k)
            .int("warps", WARPS)
            .tag(site.dtype(y))
            .tag(format!("k{k}"))
            .write("y", site.dtype(y), y)
            .read("ds", DType::F32, ds)
            .read("indices", DType::I32, indices)
            .read("count", DType::I32, count)
            .i64("rows", rows.clone())
            .i32("chunks", &site.inputs[0].ty.shape[3])
            .launch((rows.clone().ceil_div(WARPS), 1, 1));
        let t = site.dtype(dw);
        let calls = vec![
            weigh(site, Weighting::Logit, (chosen, t), &rows)?,
            slot_gradients(self.rule, t, k, [ds, chosen, dw, count], rows.clone(), site.target)?,
            scatter.into(),
        ];
        let form = Form::new("weigh_grad", "a thread per row, then zeros and what was chosen", calls);
        Ok(vec![form.with("chosen", t, rows.clone() * k).with("ds", DType::F32, rows * k)])
    }
}
