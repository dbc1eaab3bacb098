//! One region over many tensors, and the sum of squares of many: a few launches, each with a table of its tensors.

use super::map::Region;
use super::{Cuda, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Operand, Param};
use crate::cuda::stub::{Stub, c_type, packed};
use rambac_ir::DType;
use rambac_ir::ops::*;

const THREADS: usize = 256;
/// Vectors of a thread.
const ROUNDS: usize = 4;
/// Words of a table: what a launch's arguments may take, less what goes beside it.
const WORDS: usize = 4000;

/// A tensor of a table: its elements, and where its arrays are.
struct Tensor {
    elements: Expr,
    arrays: Vec<Operand>,
}

/// A part of the tensors whose table fits a launch: the table, its blocks, and how many blocks come before them.
struct Piece {
    count: usize,
    table: Vec<Param>,
    blocks: Expr,
}

fn blocks(elements: &Expr, each: usize) -> Expr {
    match elements.as_int() {
        Some(n) => Expr::int(n.div_ceil(each)),
        None => elements.clone().ceil_div(each),
    }
}

/// Tables of equal length as far as that goes.  First blocks count from the launch's first, or from the first of all.
fn pieces(tensors: &[Tensor], each: usize, through: bool) -> Vec<Piece> {
    let most = (WORDS / (2 + tensors.first().map_or(1, |t| t.arrays.len()))).max(1);
    let size = tensors.len().div_ceil(tensors.len().div_ceil(most).max(1)).max(1);
    let mut first = Expr::int(0);
    let mut out = vec![];
    for part in tensors.chunks(size) {
        if !through {
            first = Expr::int(0);
        }
        let (mut table, mut all) = (vec![], Expr::int(0));
        for t in part {
            table.push(Param::Long(first.clone()));
            table.push(Param::Long(t.elements.clone()));
            table.extend(t.arrays.iter().map(|at| Param::Address(*at)));
            let n = blocks(&t.elements, each);
            (first, all) = (first + n.clone(), all + n);
        }
        out.push(Piece { count: part.len(), table, blocks: all });
    }
    out
}

/// Elements that can be moved at once.
fn width(site: &Site, all: &[Operand]) -> usize {
    let widest = all.iter().map(|&at| site.dtype(at).size()).max().unwrap_or(4);
    site.vector(all, 16 / widest)
}

impl Cuda for MapEach {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (own, outs) = (self.own, self.outs.len());
        let count = (site.inputs.len() - self.shared) / own;
        let mut tensors = vec![];
        for t in 0..count {
            let arrays = (0..own).map(|k| Operand::Input(t * own + k));
            let arrays: Vec<Operand> = arrays.chain((0..outs).map(|k| Operand::Output(t * outs + k))).collect();
            arrays.iter().try_for_each(|&at| site.contiguous(at))?;
            tensors.push(Tensor { elements: Expr::product(&site.inputs[t * own].ty.shape), arrays });
        }
        let all: Vec<Operand> = tensors.iter().flat_map(|t| t.arrays.iter().copied()).collect();
        let w = width(site, &all);
        let each = THREADS * w * ROUNDS;
        let scalars: Vec<Operand> = (0..self.shared).map(|k| Operand::Input(count * own + k)).collect();
        let operands = (0..own).map(Operand::Input).chain(scalars.iter().copied());
        let operands = operands.map(|at| (at, site.view(at))).collect();
        let region = Region { operands, shape: &[], body: &self.body, outs: &self.outs, ints: false };
        let mut calls: Vec<Call> = vec![];
        for p in pieces(&tensors, each, false) {
            let entry = 2 + own + outs;
            let mut stub = Stub::new("map_each", "map_each", THREADS).tag(p.count).hashed();
            stub = stub.table("table", p.table);
            for (k, at) in scalars.iter().enumerate() {
                stub = stub.read(&format!("s{k}"), site.dtype(*at), *at);
            }
            let mut text = format!(
                "    const u64* own = find_tensor<{}, {entry}>(table, blockIdx.x);\n    \
                 const i64 n = own[1], start = (blockIdx.x - (i64)own[0]) * {each};\n",
                p.count
            );
            let array = |k: usize, constant: &str| {
                let at = if k < own { Operand::Input(k) } else { Operand::Output(k - own) };
                format!("reinterpret_cast<{constant}{}*>(own[{}])", c_type(site.dtype(at)), 2 + k)
            };
            text += &format!("#pragma unroll\n    for (int k = 0; k < {ROUNDS}; k++) {{\n");
            text += &format!(
                "        const i64 i = start + (k * {THREADS} + threadIdx.x) * {w};\n        if (i >= n) break;\n        \
                 const int m = (int)min_of(n - i, (i64){w});\n"
            );
            let mut loads: Vec<String> =
                (0..own).map(|k| format!("auto a{k} = load_some<{w}>({}, i, m);", array(k, "const "))).collect();
            loads.extend((0..self.shared).map(|k| format!("auto a{} = load_scalar<{w}>(s{k});", own + k)));
            loads.extend((0..outs).map(|o| format!("Values<float, {w}> r{o};")));
            text += &packed("        ", "        ", &loads, " ", "");
            text += &format!("#pragma unroll\n        for (int e = 0; e < {w}; e++) {{\n");
            text += &packed("            ", "            ", &region.arithmetic(), " ", "");
            text += "        }\n";
            let stores: Vec<String> =
                (0..outs).map(|o| format!("store_some<{w}>({}, i, m, r{o});", array(own + o, ""))).collect();
            text += &packed("        ", "        ", &stores, " ", "");
            text += "    }\n";
            calls.push(stub.launch_body((p.blocks, 1, 1), text).into());
        }
        let n = calls.len();
        let why = format!("{count} tensors in {n} launches, {} instructions, {w} elements at a time", self.body.len());
        Ok(vec![Form::new("map_each", why, calls)])
    }
}

impl Cuda for SumSquares {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        const FINISH: usize = 512;
        let all: Vec<Operand> = (0..site.inputs.len()).map(Operand::Input).collect();
        let tensor = |at: &Operand| {
            site.contiguous(*at)?;
            Ok(Tensor { elements: Expr::product(&site.view(*at).ty.shape), arrays: vec![*at] })
        };
        let tensors = all.iter().map(tensor).collect::<Result<Vec<_>, Unsupported>>()?;
        let (w, t, y) = (width(site, &all), site.dtype(all[0]), Operand::Output(0));
        let each = THREADS * w * ROUNDS;
        let (mut calls, mut slots): (Vec<Call>, _) = (vec![], Expr::int(0));
        for p in pieces(&tensors, each, true) {
            let stub = Stub::new("map_each", "squares", THREADS)
                .element("T", t)
                .int("count", p.count)
                .tag(p.count)
                .int("words", p.table.len())
                .int("width", w)
                .tag(format!("v{w}"))
                .int("rounds", ROUNDS)
                .int("threads", THREADS)
                .table("table", p.table)
                .write("slots", DType::F32, Operand::Workspace(0))
                .i64("first", slots.clone());
            calls.push(stub.launch((p.blocks.clone(), 1, 1)).into());
            slots = slots + p.blocks;
        }
        let finish = Stub::new("map_each", "squares_of_slots", FINISH)
            .element("T", site.dtype(y))
            .int("threads", FINISH)
            .read("slots", DType::F32, Operand::Workspace(0))
            .i64("count", slots.clone())
            .write("y", site.dtype(y), y);
        calls.push(finish.launch((1, 1, 1)).into());
        let why = format!("{} tensors in {} launches, a slot per {each} elements", tensors.len(), calls.len());
        Ok(vec![Form::new("squares", why, calls).with("slots", DType::F32, slots)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_fit_a_launch() {
        let tensor = |n: usize| Tensor { elements: Expr::int(n), arrays: vec![Operand::Input(0); 8] };
        let some: Vec<Tensor> = (0..900).map(|i| tensor(i * 1000)).collect();
        let all = pieces(&some, 4096, false);
        assert_eq!(all.iter().map(|p| p.count).collect::<Vec<_>>(), [300, 300, 300]);
        assert!(all.iter().all(|p| p.table.len() <= WORDS && p.table[0] == Param::Long(Expr::int(0))));
        let through = pieces(&some, 4096, true);
        let before: usize = some[..300].iter().map(|t| t.elements.as_int().unwrap().div_ceil(4096)).sum();
        assert_eq!(through[1].table[0], Param::Long(Expr::int(before)));
    }
}
