//! Attention that selects, as text: fragments over the vocabulary of the IR that a stack takes in by name.
//!
//! A fragment is a graph over `N` sequences of `L` tokens with any of these inputs, and what it learns itself as params:
//!
//! ```text
//! "x" : f32[N, L, width]            the layer's input, normalised
//! "q" : f32[N, L, heads, dim]       queries, keys, values: projections of it
//! "k", "v" : f32[N, L, kv_heads, dim]
//! ```
//! It returns `"o" : f32[N, L, heads, dim]`, and may return a scalar `"aux"`, a loss of its own that is added to the model's.
//! Sizes are consts of the text; a stack sets those that it knows ([`Sizes`]) and leaves the others as they are written.

use crate::config::Config;
use rambac_ir::diagnostic::Diagnostic;
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::text::{Consts, parse_with};
use rambac_ir::{Builder, DType, Graph, NodeId, Sym, Ty, Value, verify};

/// A variant that comes with the command.
#[derive(Clone, Copy, Debug)]
pub struct BuiltIn {
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! built_in {
    ($($name:literal),* $(,)?) => {
        /// All of them, the plain ones first.
        pub const BUILT_IN: &[BuiltIn] =
            &[$(BuiltIn { name: $name, text: include_str!(concat!("../variants/", $name, ".ir")) }),*];
    };
}
built_in! {
    "full", "window", "block_sparse", "stick_breaking", "hsa", "hsa_softmax", "swa_hsa", "landmark", "moba", "quest", "infllm",
    "nsa", "dsa",
}

/// The built-in variant of that name.
pub fn built_in(name: &str) -> Option<&'static BuiltIn> {
    BUILT_IN.iter().find(|v| v.name == name)
}

/// Sizes that a stack gives to a fragment's consts of these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub width: usize,
    pub chunk: usize,
    pub k: usize,
}

impl Sizes {
    /// Those of a model.
    pub fn of(c: &Config) -> Self {
        Self {
            heads: c.num_attention_heads,
            kv_heads: c.num_kv_heads,
            dim: c.attention_head_dim(),
            width: c.hidden_size,
            chunk: c.chunk_size,
            k: c.chunk_topk,
        }
    }
    fn named(&self) -> [(&'static str, f64); 6] {
        let Sizes { heads, kv_heads, dim, width, chunk, k } = *self;
        [("heads", heads), ("kv_heads", kv_heads), ("dim", dim), ("width", width), ("chunk", chunk), ("k", k)]
            .map(|(n, v)| (n, v as f64))
    }
}

/// A fragment that was read and checked.
#[derive(Clone, Debug)]
pub struct Fragment {
    pub graph: Graph,
    /// Every const with its value.
    pub consts: Consts,
}

/// Rank and extents by name of an input or output.
fn interface(name: &str) -> Option<&'static [&'static str]> {
    Some(match name {
        "x" => &["N", "L", "width"],
        "q" | "o" => &["N", "L", "heads", "dim"],
        "k" | "v" => &["N", "L", "kv_heads", "dim"],
        "aux" => &[],
        _ => return None,
    })
}

impl Fragment {
    /// Reads a fragment with the consts as its text has them, except for `values`.
    ///
    /// # Errors
    /// Everything wrong with the text or the interface, with its place.
    pub fn read(text: &str, values: &[(&str, f64)]) -> Result<Fragment, Vec<Diagnostic>> {
        let (graph, consts) = parse_with(text, values)?;
        verify::verify(&graph)?;
        let f = Fragment { graph, consts };
        let problems = f.check();
        if problems.is_empty() { Ok(f) } else { Err(problems) }
    }

    /// Reads a fragment at the sizes of a stack, as far as it has consts for them; `values` count before those.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn at(text: &str, sizes: &Sizes, values: &[(&str, f64)]) -> Result<Fragment, Vec<Diagnostic>> {
        let (_, consts) = parse_with(text, &[])?;
        let known = sizes.named().into_iter().filter(|(n, _)| consts.iter().any(|(c, _)| c == n));
        let mut all: Vec<(&str, f64)> = values.to_vec();
        all.extend(known.filter(|(n, _)| !values.iter().any(|(v, _)| v == n)));
        Self::read(text, &all)
    }

    pub fn constant(&self, name: &str) -> Option<f64> {
        self.consts.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }
    /// Names and types of what it learns itself.
    pub fn params(&self) -> Vec<(&str, &Ty)> {
        let params = self.graph.sources().filter(|(_, s)| s.kind == SourceKind::Param);
        params.map(|(_, s)| (s.name.as_str(), &s.ty)).collect()
    }
    /// Its loss of its own, if it has one.
    pub fn aux(&self) -> Option<Value> {
        self.graph.output("aux")
    }
    /// Nodes that compute the attention: what `o` needs, without sources and constants.
    pub fn attention_nodes(&self) -> Vec<NodeId> {
        let g = &self.graph;
        let mut needed = vec![false; g.nodes.len()];
        if let Some(o) = g.output("o") {
            needed[o.node.index()] = true;
        }
        for (id, n) in g.iter().rev() {
            if needed[id.index()] {
                n.inputs.iter().for_each(|v| needed[v.node.index()] = true);
            }
        }
        let computes = |op: &Op| !matches!(op, Op::Source(_) | Op::Constant(_));
        g.iter().filter(|(id, n)| needed[id.index()] && computes(&n.op)).map(|(id, _)| id).collect()
    }

    fn check(&self) -> Vec<Diagnostic> {
        let g = &self.graph;
        let mut out = vec![];
        let known: Vec<&str> = g.syms.iter().map(Sym::as_str).collect();
        if known != ["N", "L"] {
            let d =
                Diagnostic::error(format!("a variant is a graph over (N, L), this one is over ({})", known.join(", ")));
            out.push(d.help(format!("N sequences of L tokens: graph {}(N, L) {{", g.name)));
        }
        for (id, s) in g.sources() {
            let at = |d: Diagnostic| d.on(id, &g.node(id).loc);
            match s.kind {
                SourceKind::Input => match interface(&s.name).filter(|_| !["o", "aux"].contains(&s.name.as_str())) {
                    Some(dims) => out.extend(self.mismatch(&s.name, &s.ty, dims).map(at)),
                    None => {
                        let d = Diagnostic::error(format!("a variant has no input \"{}\"", s.name));
                        out.push(at(d).help("its inputs are \"x\", \"q\", \"k\" and \"v\"; what it learns is a param"));
                    }
                },
                SourceKind::State => {
                    let d = Diagnostic::error("a variant carries no state: it sees whole sequences");
                    out.push(at(d).help("make it a param, if it is learned"));
                }
                SourceKind::Param => {}
            }
        }
        for (id, n) in g.iter() {
            let start = match n.op {
                Op::Score(_) => n.inputs[2],
                Op::Mask(_) => n.inputs[1],
                _ => continue,
            };
            if !matches!(&g.node(start.node).op, Op::Constant(c) if c.value == 0.0) {
                let (label, what) = (g.label(id.result(0)), n.op.mnemonic());
                let d = Diagnostic::error(format!(
                    "{label} = {what}: a text begins at token 0, but it starts at {}, so that chunks are seen before they are complete",
                    g.label(start)
                ));
                out.push(d.on(id, &n.loc).help("%t0 = constant 0 : i32[N]"));
            }
        }
        for o in &g.outputs {
            let at = |d: Diagnostic| d.on(o.value.node, &g.node(o.value.node).loc);
            match &*o.name {
                name @ ("o" | "aux") => {
                    let dims = interface(name).expect("BUG: just named");
                    out.extend(self.mismatch(name, g.ty(o.value), dims).map(at));
                }
                name => {
                    let d = Diagnostic::error(format!("a variant has no output \"{name}\""));
                    out.push(at(d).help("write: return \"o\" = %y (and \"aux\" = %loss, if it has a loss of its own)"));
                }
            }
        }
        if g.output("o").is_none() && out.is_empty() {
            let d = Diagnostic::error("the variant returns no \"o\", which is the attention's output");
            out.push(d.help("write: return \"o\" = %y"));
        }
        out
    }

    /// What is wrong with the type of an input or output; extents that are no const of the text may be anything.
    fn mismatch(&self, name: &str, ty: &Ty, dims: &[&str]) -> Option<Diagnostic> {
        let want: Vec<String> =
            dims.iter().map(|d| self.constant(d).map_or(d.to_string(), |v| v.to_string())).collect();
        let fits = |(i, d): (usize, &&str)| match *d {
            "N" | "L" => ty.shape[i].to_string() == *d,
            d => self.constant(d).is_none_or(|v| ty.shape[i].as_int() == Some(v as usize)),
        };
        let ok = ty.dtype == DType::F32 && ty.rank() == dims.len() && dims.iter().enumerate().all(fits);
        let written = dims.join(", ");
        (!ok).then(|| {
            Diagnostic::error(format!("\"{name}\" is {ty}, but must be f32[{}]", want.join(", ")))
                .help(format!("f32[{written}]: declare what is missing by const"))
        })
    }

    /// Adds the fragment to a graph; its params get `prefix`.  Returns `o`, and `aux` if it has one.
    pub fn inline(&self, b: &mut Builder, prefix: &str, x: Value, [q, k, v]: [Value; 3]) -> (Value, Option<Value>) {
        let mut made: Vec<Vec<Value>> = Vec::with_capacity(self.graph.nodes.len());
        for node in &self.graph.nodes {
            made.push(match &node.op {
                Op::Source(s) if s.kind == SourceKind::Input => match s.name.as_str() {
                    "x" => vec![x],
                    "q" => vec![q],
                    "k" => vec![k],
                    _ => vec![v],
                },
                Op::Source(s) => vec![b.param(&format!("{prefix}{}", s.name), s.ty.clone())],
                _ => {
                    let inputs: Vec<Value> =
                        node.inputs.iter().map(|v| made[v.node.index()][v.result as usize]).collect();
                    b.copy(node, &inputs)
                }
            });
        }
        let of = |v: Value| made[v.node.index()][v.result as usize];
        let o = self.graph.output("o").expect("BUG: a checked fragment has an output o");
        (of(o), self.aux().map(of))
    }
}

/// An attention variant that takes the place of hierarchical sparse attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub name: String,
    pub text: std::sync::Arc<str>,
}

impl Attention {
    /// A built-in one by its name, or any by its text.
    ///
    /// # Errors
    /// The names that there are.
    pub fn named(name: &str) -> Result<Self, String> {
        match built_in(name) {
            Some(v) => Ok(Self { name: name.into(), text: v.text.into() }),
            None => {
                let all = BUILT_IN.iter().map(|v| v.name);
                let near = crate::presets::nearest(name, all.clone()).map(|n| format!(" (did you mean {n}?)"));
                let all: Vec<&str> = all.collect();
                Err(format!("there is no attention {name:?}{}; known: {}", near.unwrap_or_default(), all.join(", ")))
            }
        }
    }
    /// One's own text; its name is the graph's.
    ///
    /// # Errors
    /// The first thing wrong with the text.
    pub fn own(text: &str) -> Result<Self, String> {
        let f = Fragment::read(text, &[]).map_err(|e| first(&e))?;
        Ok(Self { name: f.graph.name, text: text.into() })
    }
    /// As config.json holds it: the name, or the text of one's own.
    pub(crate) fn to_json(&self) -> &str {
        let built_in = built_in(&self.name).is_some_and(|v| *v.text == *self.text);
        if built_in { &self.name } else { &self.text }
    }
    pub(crate) fn from_json(v: &str) -> Result<Self, String> {
        if v.contains('{') { Self::own(v) } else { Self::named(v) }
    }
    /// The fragment at a model's sizes.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn fragment(&self, c: &Config) -> Result<Fragment, String> {
        Fragment::at(&self.text, &Sizes::of(c), &[]).map_err(|e| first(&e))
    }
}

fn first(e: &[Diagnostic]) -> String {
    let help = |d: &Diagnostic| d.help.as_ref().map(|h| format!("; {h}")).unwrap_or_default();
    e.first().map_or_else(String::new, |d| format!("{}{}", d.message, help(d)))
}
