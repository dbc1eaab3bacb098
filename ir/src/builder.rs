//! Makes graphs: one method per op, shapes inferred at once, the caller's source location recorded.
//!
//! A mistake doesn't stop the build: it is recorded, its result is a poison value that later ops ignore, and
//! [`Builder::finish`] returns every mistake with the line that made it.

use crate::dim::{Dim, Sym};
use crate::graph::{Graph, Loc, Node, NodeId, Output, Value};
use crate::ops::*;
use crate::ty::{DType, Ty};
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

/// One refused op.
#[derive(Clone, Debug)]
pub struct BuildError {
    pub what: String,
    pub error: OpError,
    pub loc: Loc,
}

/// Everything that went wrong in a build.
#[derive(Clone, Debug, thiserror::Error)]
pub struct BuildErrors(pub Vec<BuildError>);

impl fmt::Display for BuildErrors {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, e) in self.0.iter().enumerate() {
            let sep = if i == 0 { "" } else { "\n" };
            write!(f, "{sep}{}: {} (at {})", e.what, e.error, e.loc)?;
        }
        Ok(())
    }
}

const POISON: NodeId = NodeId(u32::MAX);

/// See the module's comment.
#[derive(Debug)]
pub struct Builder {
    graph: Graph,
    scope: Vec<String>,
    errors: Vec<BuildError>,
    poison: Ty,
}

impl Builder {
    pub fn new(name: &str, syms: &[&str]) -> Self {
        let syms = syms.iter().map(|s| Sym::new(s)).collect();
        Self::extend(Graph { name: name.into(), syms, ..Graph::default() })
    }
    /// Goes on with an existing graph.
    pub fn extend(graph: Graph) -> Self {
        Self { graph, scope: vec![], errors: vec![], poison: Ty::scalar(DType::F32) }
    }
    pub fn graph(&self) -> &Graph {
        &self.graph
    }
    /// The graph, or every mistake made.
    pub fn finish(self) -> Result<Graph, BuildErrors> {
        if self.errors.is_empty() { Ok(self.graph) } else { Err(BuildErrors(self.errors)) }
    }
    /// The type of `v`; a scalar for a poison value.
    pub fn ty(&self, v: Value) -> &Ty {
        if v.node == POISON { &self.poison } else { self.graph.ty(v) }
    }
    /// Runs `f` with `name` appended to the scope of the nodes it adds.
    pub fn scoped<T>(&mut self, name: &str, f: impl FnOnce(&mut Self) -> T) -> T {
        self.enter(name);
        let out = f(self);
        self.leave();
        out
    }
    /// Appends `name` to the scope of the nodes added until the matching [`leave`](Self::leave).
    pub fn enter(&mut self, name: &str) {
        self.scope.push(name.into());
    }
    /// Ends the innermost scope.
    pub fn leave(&mut self) {
        self.scope.pop();
    }
    /// Names a value for people.
    pub fn name(&mut self, v: Value, name: &str) -> Value {
        if v.node != POISON {
            self.graph.nodes[v.node.index()].names[v.result as usize] = Some(name.into());
        }
        v
    }
    pub fn output(&mut self, name: &str, v: Value) {
        if v.node != POISON {
            self.graph.outputs.push(Output { name: name.into(), value: v });
        }
    }

    /// Adds an op and returns all its results.
    #[track_caller]
    pub fn push_all(&mut self, op: impl Into<Op>, inputs: &[Value]) -> Vec<Value> {
        let loc = Loc::Caller(Location::caller());
        self.insert(op.into(), inputs, None, loc)
    }
    /// Adds an op and returns its first result.
    #[track_caller]
    pub fn push(&mut self, op: impl Into<Op>, inputs: &[Value]) -> Value {
        self.push_all(op, inputs)[0]
    }
    /// Adds a copy of `node` (another graph's) on operands of this one, keeping its names, scope and location.
    pub fn copy(&mut self, node: &Node, inputs: &[Value]) -> Vec<Value> {
        let out = self.insert(node.op.clone(), inputs, node.scope.clone(), node.loc.clone());
        if out[0].node != POISON {
            self.graph.nodes[out[0].node.index()].names = node.names.clone();
        }
        out
    }

    fn insert(&mut self, op: Op, inputs: &[Value], scope: Option<Arc<str>>, loc: Loc) -> Vec<Value> {
        // Enough poison results for any op.
        let poison = || (0..8).map(|i| POISON.result(i)).collect();
        if inputs.iter().any(|v| v.node == POISON) {
            return poison();
        }
        let tys: Vec<&Ty> = inputs.iter().map(|&v| self.graph.ty(v)).collect();
        match op.def().infer(&tys) {
            Ok(tys) => {
                let id = NodeId(self.graph.nodes.len() as u32);
                let n = tys.len();
                let scope = scope.or_else(|| (!self.scope.is_empty()).then(|| self.scope.join(".").into()));
                self.graph.nodes.push(Node { op, inputs: inputs.to_vec(), tys, names: vec![None; n], scope, loc });
                (0..n).map(|i| id.result(i)).collect()
            }
            Err(error) => {
                self.errors.push(BuildError { what: op.mnemonic().to_string(), error, loc });
                poison()
            }
        }
    }

    // Sources and constants.

    #[track_caller]
    pub fn source(&mut self, kind: SourceKind, name: &str, ty: Ty) -> Value {
        self.push(Source { kind, name: name.into(), ty }, &[])
    }
    #[track_caller]
    pub fn input(&mut self, name: &str, ty: Ty) -> Value {
        self.source(SourceKind::Input, name, ty)
    }
    #[track_caller]
    pub fn param(&mut self, name: &str, ty: Ty) -> Value {
        self.source(SourceKind::Param, name, ty)
    }
    #[track_caller]
    pub fn state(&mut self, name: &str, ty: Ty) -> Value {
        self.source(SourceKind::State, name, ty)
    }
    #[track_caller]
    pub fn constant(&mut self, value: f64, ty: Ty) -> Value {
        self.push(Constant { value, ty }, &[])
    }
    /// A scalar constant broadcast to the shape of `like`.
    #[track_caller]
    pub fn scalar_like(&mut self, value: f64, like: Value) -> Value {
        let ty = self.ty(like).clone();
        self.constant(value, ty)
    }

    // Elementwise; operands broadcast to a common shape.

    #[track_caller]
    pub fn unary(&mut self, f: UnaryFn, x: Value) -> Value {
        self.push(Unary { f }, &[x])
    }
    #[track_caller]
    pub fn binary(&mut self, f: BinaryFn, a: Value, c: Value) -> Value {
        let shape = common_shape(&self.ty(a).shape, &self.ty(c).shape);
        let (a, c) = match shape {
            Some(s) => (self.broadcast(a, s.clone()), self.broadcast(c, s)),
            None => (a, c),
        };
        self.push(Binary { f }, &[a, c])
    }
    #[track_caller]
    pub fn select_where(&mut self, cond: Value, a: Value, c: Value) -> Value {
        self.push(Where {}, &[cond, a, c])
    }
    #[track_caller]
    pub fn cast(&mut self, x: Value, to: DType) -> Value {
        if self.ty(x).dtype == to { x } else { self.push(Cast { to }, &[x]) }
    }
    /// `x * factor` for a number.
    #[track_caller]
    pub fn scale(&mut self, x: Value, factor: f64) -> Value {
        let c = self.scalar_like(factor, x);
        self.mul(x, c)
    }

    // Shapes.

    #[track_caller]
    pub fn broadcast(&mut self, x: Value, shape: Vec<Dim>) -> Value {
        if self.ty(x).shape == shape { x } else { self.push(Broadcast { shape }, &[x]) }
    }
    #[track_caller]
    pub fn reshape(&mut self, x: Value, shape: Vec<Dim>) -> Value {
        if self.ty(x).shape == shape { x } else { self.push(Reshape { shape }, &[x]) }
    }
    #[track_caller]
    pub fn transpose(&mut self, x: Value, perm: Vec<usize>) -> Value {
        self.push(Transpose { perm }, &[x])
    }
    #[track_caller]
    pub fn slice(&mut self, x: Value, axis: usize, start: usize, end: usize) -> Value {
        self.push(Slice { axis, start, end }, &[x])
    }
    #[track_caller]
    pub fn concat(&mut self, xs: &[Value], axis: usize) -> Value {
        self.push(Concat { axis }, xs)
    }
    /// All axes but the last become one.
    #[track_caller]
    pub fn flatten_rows(&mut self, x: Value) -> Value {
        let shape = self.ty(x).shape.clone();
        match shape.split_last() {
            Some((last, rows)) if rows.len() != 1 => match Dim::product(rows) {
                Some(r) => self.reshape(x, vec![r, last.clone()]),
                None => x,
            },
            _ => x,
        }
    }

    // Reductions and products.

    #[track_caller]
    pub fn sum(&mut self, x: Value, axes: Vec<usize>, keep: bool) -> Value {
        self.push(Reduce { f: ReduceFn::Sum, axes, keep }, &[x])
    }
    /// Sum over every axis, to a scalar.
    #[track_caller]
    pub fn sum_all(&mut self, x: Value) -> Value {
        let axes = (0..self.ty(x).rank()).collect();
        self.sum(x, axes, false)
    }
    /// Undoes a broadcast from `shape`: sums what was repeated.
    #[track_caller]
    pub fn sum_to(&mut self, x: Value, shape: &[Dim]) -> Value {
        let from = self.ty(x).shape.clone();
        if from == shape {
            return x;
        }
        let skip = from.len() - shape.len();
        let axes: Vec<usize> =
            (0..from.len()).filter(|&i| i < skip || (shape[i - skip].is_one() && !from[i].is_one())).collect();
        let s = self.sum(x, axes, false);
        self.reshape(s, shape.to_vec())
    }
    #[track_caller]
    pub fn matmul(&mut self, a: Value, c: Value, trans_a: bool, trans_b: bool) -> Value {
        self.push(MatMul { trans_a, trans_b }, &[a, c])
    }
    /// `x · wᵀ` with `w: [out, in]`, as checkpoints store linear layers.
    #[track_caller]
    pub fn linear(&mut self, x: Value, w: Value) -> Value {
        self.matmul(x, w, false, true)
    }
    #[track_caller]
    pub fn rms_norm(&mut self, x: Value, weight: Value, eps: f64) -> Value {
        self.push(RmsNorm { eps }, &[x, weight])
    }
}

macro_rules! shorthand {
    (unary: $($u:ident = $uf:ident),*; binary: $($b:ident = $bf:ident),*) => {
        /// Elementwise shorthands.
        impl Builder {
            $(#[track_caller] pub fn $u(&mut self, x: Value) -> Value { self.unary(UnaryFn::$uf, x) })*
            $(#[track_caller] pub fn $b(&mut self, a: Value, c: Value) -> Value { self.binary(BinaryFn::$bf, a, c) })*
        }
    };
}
shorthand! {
    unary: neg = Neg, exp = Exp, log = Log, sqrt = Sqrt, sigmoid = Sigmoid, silu = Silu, softplus = Softplus, square = Square;
    binary: add = Add, sub = Sub, mul = Mul, div = Div, max = Max, min = Min
}

/// NumPy's common shape; `None` where there is none.
fn common_shape(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
    let skip = long.len() - short.len();
    let mut out = long.to_vec();
    for (i, s) in short.iter().enumerate() {
        let l = &mut out[skip + i];
        if l.is_one() {
            *l = s.clone();
        } else if l != s && !s.is_one() {
            return None;
        }
    }
    Some(out)
}
