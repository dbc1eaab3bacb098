//! What must hold of a graph, all findings at once; and what is legal but probably not meant.
//!
//! [`verify`] — errors.  After it, passes, interpretation and lowering rely on:
//!
//! 1. every operand is a result, in range, of an earlier node;
//! 2. every node has one name slot per result, and its types are what its op infers from its operands' types (so:
//!    arity, ranks, element types, head divisibility, sizes in range);
//! 3. float attributes are finite (a constant's value excepted), `eps` and `off_by_one` not negative, `base` positive;
//! 4. symbols are declared once, are words that begin with a capital, and dims use no others;
//! 5. no dim is a fraction that no binding makes whole (`3/64`);
//! 6. sources have unique names; outputs have unique names and refer to existing results;
//! 7. an output with the name of a param or state, which it replaces, has its type;
//! 8. indices, count and weights used together come from one selection;
//! 9. `weigh` weighs scores that the choice of its indices was made from;
//! 10. ops that attend use the chunk size of the scores behind their indices, and have as many chunks of keys as
//!     there were landmarks.
//!
//! [`lint`] — warnings:
//!
//! - scores reach a choice of chunks without the causal mask, or through a function that undoes it;
//! - weights come from other scores than the choice was made from, though related;
//! - a learned scorer that no gradient reaches;
//! - `k` larger than the number of chunks.
//!
//! Selections are told apart by what they compute, not by node: a recomputed copy is the same selection.  Values from
//! outside (a carried state, an input) have unknown origin and pass.

mod selection;

use crate::attr::{Attr, AttrValue};
use crate::diagnostic::Diagnostic;
use crate::dim::{Dim, Sym};
use crate::graph::{Graph, Loc, NodeId, Value};
use crate::ops::Op;
use crate::text::dims_of;
use crate::ty::Ty;
use std::collections::{HashMap, HashSet};

/// Checks everything in the module's list.
///
/// # Errors
/// All violations, in the order of the nodes, then outputs, then selections.
pub fn verify(g: &Graph) -> Result<(), Vec<Diagnostic>> {
    let mut v = Verifier { g, errors: vec![], sound: true };
    v.symbols();
    v.nodes();
    v.sources();
    v.outputs();
    // The selections' rules follow operands; that needs them to exist.
    if v.sound {
        v.errors.extend(selection::check(g));
    }
    if v.errors.is_empty() { Ok(()) } else { Err(v.errors) }
}

/// What is probably not meant.  Nothing is said of graphs that [`verify`] refuses.
pub fn lint(g: &Graph) -> Vec<Diagnostic> {
    if verify(g).is_err() { vec![] } else { selection::lint(g, true) }
}

/// As [`lint`], of a graph that will not be trained.
pub fn lint_untrained(g: &Graph) -> Vec<Diagnostic> {
    if verify(g).is_err() { vec![] } else { selection::lint(g, false) }
}

struct Verifier<'g> {
    g: &'g Graph,
    errors: Vec<Diagnostic>,
    /// Whether the structure (1, 2) holds so far.
    sound: bool,
}

impl Verifier<'_> {
    fn on(&mut self, id: NodeId, message: impl std::fmt::Display) -> &mut Diagnostic {
        let n = &self.g.nodes[id.index()];
        let name = if n.tys.is_empty() { id.to_string() } else { self.g.label(id.result(0)) };
        let message = format!("{name} = {}: {message}", n.op.mnemonic());
        self.errors.push(Diagnostic::error(message).on(id, &n.loc));
        self.errors.last_mut().expect("BUG: just pushed")
    }

    fn exists(&self, v: Value) -> bool {
        self.g.nodes.get(v.node.index()).is_some_and(|n| (v.result as usize) < n.tys.len())
    }

    fn symbols(&mut self) {
        let mut seen = HashSet::new();
        for s in &self.g.syms {
            let word = s.as_str().starts_with(|c: char| c.is_ascii_uppercase())
                && s.as_str().chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !word {
                let d = Diagnostic::error(format!("the symbol {:?} is no capitalised word", s.as_str()));
                self.errors.push(d.help("name it like N, L or Ctx"));
            }
            if !seen.insert(s) {
                self.errors.push(Diagnostic::error(format!("the symbol {s} is declared twice")));
            }
        }
    }

    fn nodes(&mut self) {
        let g = self.g;
        let declared: HashSet<&Sym> = g.syms.iter().collect();
        for (id, n) in g.iter() {
            let mut operands_ok = true;
            for (i, v) in n.inputs.iter().enumerate() {
                if v.node >= id || !self.exists(*v) {
                    operands_ok = false;
                    let what = if v.node < id {
                        format!("operand {i} is result {} of {}, which has fewer", v.result, v.node)
                    } else {
                        format!("operand {i} is {}, which does not come before it", v.node)
                    };
                    self.on(id, what);
                }
            }
            if n.names.len() != n.tys.len() {
                self.on(id, format!("{} results but {} names", n.tys.len(), n.names.len()));
            }
            if operands_ok {
                let x: Vec<&Ty> = n.inputs.iter().map(|v| g.ty(*v)).collect();
                match n.op.def().infer(&x) {
                    Err(e) => {
                        self.sound = false;
                        self.on(id, e);
                    }
                    Ok(tys) if tys != n.tys => {
                        self.sound = false;
                        let list = |t: &[Ty]| t.iter().map(|t| t.to_string()).collect::<Vec<_>>().join(", ");
                        self.on(id, format!("has the types ({}), but its op gives ({})", list(&n.tys), list(&tys)));
                    }
                    Ok(_) => {}
                }
            } else {
                self.sound = false;
            }
            let attrs = n.op.attrs();
            let dims = n.tys.iter().flat_map(|t| &t.shape).chain(attrs.iter().flat_map(|(_, a)| dims_of(a)));
            // Each complaint once per node.
            let mut said: Vec<String> = vec![];
            for d in dims {
                for s in d.syms().iter().filter(|s| !declared.contains(s)) {
                    said.push(format!("the symbol {s} is not declared by the graph"));
                }
                if d.syms().is_empty() && d.divisor() != 1 {
                    said.push(format!("the dim {d} is no whole number for any binding"));
                }
            }
            for (name, a) in &attrs {
                said.extend(attr_error(&n.op, name, a));
            }
            let mut seen = HashSet::new();
            for message in said.into_iter().filter(|m| seen.insert(m.clone())) {
                self.on(id, message);
            }
        }
    }

    fn sources(&mut self) {
        let mut seen: HashMap<&str, NodeId> = HashMap::new();
        for (id, s) in self.g.sources() {
            if let Some(first) = seen.insert(&s.name, id) {
                let (name, first) = (s.name.to_attr(), self.g.label(first.result(0)));
                self.on(id, format!("{first} already is the source {name}")).help =
                    Some("use one, or rename one".into());
            }
        }
    }

    fn outputs(&mut self) {
        let g = self.g;
        let mut seen = HashSet::new();
        for o in &g.outputs {
            let name = o.name.to_string().to_attr();
            if !self.exists(o.value) {
                self.sound = false;
                self.errors
                    .push(Diagnostic::error(format!("output {name} is {}, which does not exist", g.label(o.value))));
                continue;
            }
            let at = |d: Diagnostic| d.on(o.value.node, &g.node(o.value.node).loc);
            if !seen.insert(&o.name) {
                self.errors.push(at(Diagnostic::error(format!("there are two outputs {name}"))));
            }
            if let Some((id, s)) = g.source(&o.name).filter(|_| g.is_update(o)) {
                let ty = g.ty(o.value);
                if *ty != s.ty {
                    let kind = g.node(id).op.mnemonic();
                    let d = format!("output {name} replaces the {kind} of its name, which is {}, but is {ty}", s.ty);
                    self.errors.push(at(Diagnostic::error(d)).help("give the output another name or that type"));
                }
            }
        }
    }
}

/// What is wrong with an attribute that no type shows.
fn attr_error(op: &Op, name: &str, a: &Attr) -> Option<String> {
    let Attr::Float(v) = a else { return None };
    let bad = match name {
        _ if matches!(op, Op::Constant(_)) => return None,
        _ if !v.is_finite() => "finite",
        "eps" | "off_by_one" if *v < 0.0 => "0 or more",
        "base" if *v <= 0.0 => "positive",
        _ => return None,
    };
    Some(format!("{name} must be {bad}, but is {v:?}"))
}

/// `%x (score)` and where it was written, for messages about another node.
fn mention(g: &Graph, id: NodeId) -> String {
    let n = g.node(id);
    let label = g.label(id.result(0));
    match &n.loc {
        Loc::Caller(l) => format!("{label} = {} ({}:{})", n.op.mnemonic(), l.file(), l.line()),
        _ => format!("{label} = {}", n.op.mnemonic()),
    }
}

/// `a / n` as a dim, if it is one.
fn chunks(tokens: &Dim, chunk: usize) -> Option<Dim> {
    tokens.checked_div(chunk as u64)
}
