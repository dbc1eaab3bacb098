//! Elementwise ops: the region's arithmetic is written into the stub, reading and writing is `map.cuh`.

use super::{Cuda, Site, Unsupported, because, vector};
use crate::View;
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Form, Launch, Operand};
use crate::cuda::stub::{Stub, c_float, c_type, packed};
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

const THREADS: usize = 256;

/// How an operand's place follows from an element's.
#[derive(Clone, Debug, PartialEq)]
enum Index {
    Same,
    Rows { cols: Dim, stride: Dim },
    Suffix(Dim),
    Prefix(Dim),
    Scalar,
}

fn index(v: &View, shape: &[Dim]) -> Result<Index, Unsupported> {
    let from = &v.ty.shape;
    if from == shape || v.ty.elements() == Dim::product(shape) {
        return Ok(match &v.strided {
            None => Index::Same,
            Some(s) => Index::Rows { cols: s.cols.clone(), stride: s.stride.clone() },
        });
    }
    if v.strided.is_some() {
        return because("an operand that broadcasts can't be strided");
    }
    let lead = from.iter().take_while(|d| d.is_one()).count();
    let rest = &from[lead..];
    if rest.is_empty() {
        return Ok(Index::Scalar);
    }
    let cols = |d: &[Dim]| Dim::product(d).ok_or_else(|| Unsupported::Because("a size overflows".into()));
    if shape.ends_with(rest) {
        return Ok(Index::Suffix(cols(rest)?));
    }
    // A prefix of the shape, then ones.
    let ones = from.iter().rev().take_while(|d| d.is_one()).count();
    let full = from.len() == shape.len() && from[..from.len() - ones] == shape[..from.len() - ones];
    if full {
        return Ok(Index::Prefix(cols(&shape[shape.len() - ones..])?));
    }
    because(format!("an operand of shape {from:?} broadcasts to {shape:?} neither as a suffix nor as a prefix"))
}

/// A row's length as the template's number (0: it is the argument `name`) and as text.
fn row_length(stub: &mut Stub, d: &Dim, name: &str) -> (usize, String) {
    match d.as_int().filter(|&c| c > 0 && c < 1 << 31) {
        Some(c) => (c, c.to_string()),
        None => {
            stub.add_i64(name, d);
            (0, name.into())
        }
    }
}

/// A region: registers `v0..` are the operands, then one per instruction.
pub(super) struct Region<'a> {
    pub operands: Vec<(Operand, &'a View)>,
    pub shape: &'a [Dim],
    pub body: &'a [MapInst],
    pub outs: &'a [usize],
    /// Registers of i32 operands stay integers.
    pub ints: bool,
}

impl Region<'_> {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let n = Expr::product(self.shape);
        let indices = self.operands.iter().map(|(_, v)| index(v, self.shape)).collect::<Result<Vec<_>, _>>()?;
        let results = site.outputs.iter().map(|v| index(v, self.shape)).collect::<Result<Vec<_>, _>>()?;
        let moved: Vec<&View> = (0..self.operands.len())
            .filter(|&i| indices[i] != Index::Scalar)
            .map(|i| self.operands[i].1)
            .chain(site.outputs)
            .collect();
        // 16 bytes of the widest element at a time, where all rows allow it.
        let widest = moved.iter().map(|v| v.ty.dtype.size()).max().unwrap_or(4).max(2);
        let even = |w: usize| {
            let fits = |d: &Dim| d.is_multiple_of(w as u64);
            let row = |i: &Index| match i {
                Index::Suffix(c) | Index::Prefix(c) => fits(c),
                _ => true,
            };
            Dim::product(self.shape).is_some_and(|d| fits(&d)) && indices.iter().chain(&results).all(row)
        };
        let mut w = vector(moved.iter().copied(), 16 / widest);
        while w > 1 && !even(w) {
            w /= 2;
        }

        let mut stub = Stub::new("map", "map", THREADS);
        let mut body = vec![];
        for (i, ix) in indices.iter().enumerate() {
            let name = format!("x{i}");
            stub = stub.read(&name, self.operands[i].1.ty.dtype, self.operands[i].0);
            let load = match ix {
                Index::Same => format!("load_same<{w}>({name}, i)"),
                Index::Scalar => format!("load_scalar<{w}>({name})"),
                Index::Suffix(d) => {
                    let (c, arg) = row_length(&mut stub, d, &format!("c{i}"));
                    format!("load_suffix<{w}, {c}>({name}, i, n, {arg})")
                }
                Index::Prefix(d) => {
                    let (c, arg) = row_length(&mut stub, d, &format!("c{i}"));
                    format!("load_prefix<{w}, {c}>({name}, i, n, {arg})")
                }
                Index::Rows { cols: d, stride } => {
                    let (c, arg) = row_length(&mut stub, d, &format!("c{i}"));
                    stub.add_i64(&format!("s{i}"), stride);
                    format!("load_rows<{w}, {c}>({name}, s{i}, i, n, {arg})")
                }
            };
            body.push(format!("auto a{i} = {load};"));
        }
        let kind = |o: usize| if self.integer(self.outs[o]) { "i32" } else { "float" };
        for o in 0..self.outs.len() {
            body.push(format!("Values<{}, {w}> r{o};", kind(o)));
        }
        let inner = self.arithmetic();
        let mut stores = vec![];
        for (o, ix) in results.iter().enumerate() {
            let name = format!("y{o}");
            stub = stub.write(&name, site.dtype(Operand::Output(o)), Operand::Output(o));
            stores.push(match ix {
                Index::Rows { cols, stride } => {
                    let (c, arg) = row_length(&mut stub, cols, &format!("d{o}"));
                    stub.add_i64(&format!("t{o}"), stride);
                    format!("store_rows<{w}, {c}>({name}, t{o}, i, n, {arg}, r{o});")
                }
                _ => format!("store_same<{w}>({name}, i, r{o});"),
            });
        }
        stub = stub.i64("n", n.clone());
        let mut text =
            format!("    i64 i = ((i64)blockIdx.x * {THREADS} + threadIdx.x) * {w};\n    if (i >= n) return;\n");
        text += &packed("    ", "    ", &body, " ", "");
        text += &format!("#pragma unroll\n    for (int e = 0; e < {w}; e++) {{\n");
        text += &packed("        ", "        ", &inner, " ", "");
        text += "    }\n";
        text += &packed("    ", "    ", &stores, " ", "");
        let why = format!("{} instructions in one pass, {w} elements a thread", self.body.len());
        let grid = (n.ceil_div(THREADS * w), 1, 1);
        Ok(vec![Form::new("map", why, vec![stub.hashed().launch_body(grid, text).into()])])
    }

    /// Statements that make element `e` of the results `r0..` from that of the operands `a0..`.
    pub fn arithmetic(&self) -> Vec<String> {
        let mut inner = vec![];
        for i in 0..self.operands.len() {
            let ty = if self.integer(i) { "i32" } else { "float" };
            inner.push(format!("{ty} v{i} = a{i}[e];"));
        }
        for (k, inst) in self.body.iter().enumerate() {
            let r = self.operands.len() + k;
            let ty = if self.integer(r) { "i32" } else { "float" };
            inner.push(format!("{ty} v{r} = {};", self.expression(inst)));
        }
        for (o, r) in self.outs.iter().enumerate() {
            inner.push(format!("r{o}[e] = v{r};"));
        }
        inner
    }

    fn integer(&self, r: usize) -> bool {
        if !self.ints {
            return false;
        }
        match r.checked_sub(self.operands.len()) {
            None => self.operands[r].1.ty.dtype == DType::I32,
            Some(k) => match self.body[k].f {
                MapFn::Cast(d) => d == DType::I32,
                MapFn::Binary(f) => !f.is_comparison() && self.integer(self.body[k].args[0] as usize),
                MapFn::Where => self.integer(self.body[k].args[1] as usize),
                MapFn::Unary(_) | MapFn::Const(_) => false,
            },
        }
    }

    fn expression(&self, inst: &MapInst) -> String {
        let args: Vec<String> = inst.args.iter().map(|a| format!("v{a}")).collect();
        let call = |f: &str| format!("fn::{f}({})", args.join(", "));
        match inst.f {
            MapFn::Unary(f) => call(f.name()),
            MapFn::Binary(f) => call(f.name()),
            MapFn::Where => call("where"),
            MapFn::Cast(DType::Bool) => call("truth"),
            // A whole number that f32 can't hold is written as it is.
            MapFn::Cast(DType::I32) if self.ints => {
                let made_by = (inst.args[0] as usize).checked_sub(self.operands.len()).map(|k| self.body[k].f);
                match made_by {
                    Some(MapFn::Const(c)) => format!("{}", c as i32),
                    _ => format!("(i32){}", args[0]),
                }
            }
            MapFn::Cast(DType::I32) => call("trunc"),
            MapFn::Cast(_) if self.integer(inst.args[0] as usize) => format!("(float){}", args[0]),
            MapFn::Cast(_) => args[0].clone(),
            MapFn::Const(c) => c_float(c),
        }
    }
}

/// The step's operands.
fn inputs<'a>(site: &Site<'a>) -> Vec<(Operand, &'a View)> {
    site.inputs.iter().enumerate().map(|(i, v)| (Operand::Input(i), v)).collect()
}

/// The launch of a region whose first operand is the product in workspace and whose others follow a product's two.
pub(super) fn of_product(map: &FusedMap, product: &View, at: Operand, site: &Site) -> Result<Vec<Call>, Unsupported> {
    let mut own = inputs(site);
    own.truncate(own.len() - site.joined.operands());
    let operands = std::iter::once((at, product)).chain(own.into_iter().skip(2)).collect();
    let r = Region { operands, shape: &map.shape, body: &map.body, outs: &map.outs, ints: false };
    Ok(r.forms(site)?.remove(0).calls)
}

/// A map's element at (row, column of the last axis), as text of device code.
struct Element {
    /// Members of a struct and the same as arguments of the kernel, in order.
    members: Vec<String>,
    values: Vec<String>,
    /// What loads each operand.
    loads: Vec<String>,
    /// Statements that make the result of `v0..`, and the result.
    body: Vec<String>,
    result: String,
}

/// `given` registers come from elsewhere; the operands follow.  `None`: an operand's place does not follow from row and column, or
/// the map has several results.
fn element(
    m: &FusedMap,
    operands: &[(Operand, &View)],
    given: usize,
    prefix: &str,
    s: Stub,
) -> Option<(Element, Stub)> {
    let ([out], Some(last)) = (&m.outs[..], m.shape.last()) else { return None };
    let mut e = Element { members: vec![], values: vec![], loads: vec![], body: vec![], result: format!("v{out}") };
    let mut s = s;
    for (i, (at, v)) in operands.iter().enumerate() {
        let r = given + i;
        let row = |stride| (format!("(i64)r * s{r} + c"), Some(stride));
        let (place, stride) = match index(v, &m.shape).ok()? {
            Index::Same => row(last.clone()),
            Index::Rows { cols, stride } if cols == *last => row(stride),
            Index::Suffix(d) if d == *last => ("c".into(), None),
            Index::Prefix(d) if d == *last => ("r".into(), None),
            Index::Scalar => ("0".into(), None),
            _ => return None,
        };
        let (name, dtype) = (format!("{prefix}x{r}"), v.ty.dtype);
        s = s.read(&name, dtype, *at);
        e.members.push(format!("const {}* x{r};", c_type(dtype)));
        e.values.push(name);
        if let Some(stride) = stride {
            let name = format!("{prefix}s{r}");
            s.add_i64(&name, &stride);
            e.members.push(format!("i64 s{r};"));
            e.values.push(name);
        }
        e.loads.push(format!("to_f32(x{r}[{place}])"));
    }
    let first = given + operands.len();
    let region = Region { operands: vec![], shape: &m.shape, body: &m.body, outs: &m.outs, ints: false };
    for (k, inst) in m.body.iter().enumerate() {
        e.body.push(format!("float v{} = {};", first + k, region.expression(inst)));
    }
    if let Some(half) = m.dtypes.first().filter(|d| d.size() == 2) {
        e.result = format!("to_f32(from_f32<{}>({}))", c_type(*half), e.result);
    }
    Some((e, s))
}

/// A map as a hook `name` that gives its element at (row, column): the hook's text and value, and the stub with its arguments.
pub(super) fn element_hook(
    name: &str,
    m: &FusedMap,
    operands: &[(Operand, &View)],
    s: Stub,
) -> Option<(String, String, Stub)> {
    let (e, s) = element(m, operands, 0, &format!("{}_", name.to_lowercase()), s)?;
    let loads = e.loads.iter().enumerate().map(|(i, l)| format!("float v{i} = {l};"));
    let all: Vec<String> = loads.chain(e.body).chain([format!("return {};", e.result)]).collect();
    let mut text = packed(&format!("struct {name} {{ "), "    ", &e.members, " ", "");
    text += "    __device__ __forceinline__ float operator()(i64 r, i64 c) const {\n";
    text += &packed("        ", "        ", &all, " ", "");
    text += "    }\n};\n";
    Some((text, format!("{name}{{{}}}", e.values.join(", ")), s))
}

/// Whether a map of these operands has an [`element_hook`].
pub(in crate::cuda) fn is_element(m: &FusedMap, operands: &[View]) -> bool {
    let operands: Vec<_> = operands.iter().enumerate().map(|(i, v)| (Operand::Input(i), v)).collect();
    element_hook("", m, &operands, Stub::new("map", "map", THREADS)).is_some()
}

/// A map of a product as a hook of few_rows.cuh: its text and value, and the stub with its arguments.
pub(super) fn end_hook(m: &FusedMap, operands: &[(Operand, &View)], s: Stub) -> Option<(String, String, Stub)> {
    let (e, s) = element(m, operands, 1, "end_", s)?;
    let held: Vec<String> = (1..=operands.len()).map(|i| format!("float v{i};")).collect();
    let loads: Vec<String> = e.loads.iter().enumerate().map(|(i, l)| format!("h.v{} = {l};", i + 1)).collect();
    let own = (1..=operands.len()).map(|i| format!("float v{i} = h.v{i};"));
    let all: Vec<String> = own.chain(e.body).chain([format!("return {};", e.result)]).collect();
    let mut text = packed("struct End { ", "    ", &e.members, " ", "");
    text += &format!("    struct Held {{ {} }};\n", held.join(" "));
    text += "    __device__ __forceinline__ Held ahead(int, int) const { return {}; }\n";
    text += "    __device__ __forceinline__ void beside(Held& h, int r, int c) const {\n";
    text += &packed("        ", "        ", &loads, " ", "");
    text += "    }\n    __device__ __forceinline__ float operator()(float v0, int, int, const Held& h) const {\n";
    text += &packed("        ", "        ", &all, " ", "");
    text += "    }\n};\n";
    Some((text, format!("End{{{}}}", e.values.join(", ")), s))
}

impl Cuda for FusedMap {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        Region { operands: inputs(site), shape: &self.shape, body: &self.body, outs: &self.outs, ints: false }
            .forms(site)
    }
}

/// A region of one instruction on whole operands.
fn single(site: &Site, f: MapFn) -> Result<Vec<Form>, Unsupported> {
    let n = site.inputs.len();
    let body = [MapInst { f, args: (0..n as u32).collect() }];
    Region { operands: inputs(site), shape: &site.outputs[0].ty.shape, body: &body, outs: &[n], ints: true }.forms(site)
}

/// A region without instructions: the operand as it is, broadcast if it is smaller.
pub(super) fn copy(site: &Site) -> Result<Vec<Form>, Unsupported> {
    Region { operands: inputs(site), shape: &site.outputs[0].ty.shape, body: &[], outs: &[0], ints: true }.forms(site)
}

/// `n` elements as another type.
pub(super) fn cast(from: Operand, x: DType, to: Operand, y: DType, n: Expr) -> Launch {
    let body = format!(
        "    i64 i = (i64)blockIdx.x * {THREADS} + threadIdx.x;\n    \
         if (i < n) store_same<1>(y, i, load_same<1>(x, i));\n"
    );
    let stub = Stub::new("map", "cast", THREADS).tag(x).tag(y).read("x", x, from).write("y", y, to).i64("n", n.clone());
    stub.launch_body((n.ceil_div(THREADS), 1, 1), body)
}

impl Cuda for Unary {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        single(site, MapFn::Unary(self.f))
    }
}
impl Cuda for Binary {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        single(site, MapFn::Binary(self.f))
    }
}
impl Cuda for Where {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        single(site, MapFn::Where)
    }
}
impl Cuda for Cast {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        single(site, MapFn::Cast(self.to))
    }
}
impl Cuda for Constant {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let mut body = vec![MapInst { f: MapFn::Const(self.value), args: vec![] }];
        if site.dtype(Operand::Output(0)) == DType::I32 {
            body.push(MapInst { f: MapFn::Cast(DType::I32), args: vec![0] });
        }
        let outs = [body.len() - 1];
        Region { operands: inputs(site), shape: &site.outputs[0].ty.shape, body: &body, outs: &outs, ints: true }
            .forms(site)
    }
}
