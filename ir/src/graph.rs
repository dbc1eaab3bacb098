//! The graph: append-only nodes in topological order.
//!
//! A node's operands have smaller ids, so the order of nodes is an execution order.  Facts that are not meaning
//! (cost, layout, device) live in side tables of whoever needs them.  Equality ignores source locations.

use crate::dim::Sym;
use crate::ops::{Op, Source, SourceKind};
use crate::ty::Ty;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A node's place in its graph.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
    /// Result `i` of this node.
    pub fn result(self, i: usize) -> Value {
        Value { node: self, result: i as u32 }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// One result of one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Value {
    pub node: NodeId,
    pub result: u32,
}

/// Where a node was written.
#[derive(Clone, Debug, Default)]
pub enum Loc {
    #[default]
    Unknown,
    /// The call of the builder.
    Caller(&'static std::panic::Location<'static>),
    /// Bytes of the parsed text.
    Text(Range<usize>),
}

impl fmt::Display for Loc {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Loc::Unknown => f.write_str("(unknown place)"),
            Loc::Caller(l) => write!(f, "{}:{}", l.file(), l.line()),
            Loc::Text(r) => write!(f, "bytes {}..{}", r.start, r.end),
        }
    }
}

/// One operation, its operands and result types.
#[derive(Clone, Debug)]
pub struct Node {
    pub op: Op,
    pub inputs: Vec<Value>,
    pub tys: Vec<Ty>,
    /// A name per result, for people.
    pub names: Vec<Option<Arc<str>>>,
    /// The part of the model it belongs to, e.g. `layers.3`; passes may use it to find layers.
    pub scope: Option<Arc<str>>,
    pub loc: Loc,
}

impl PartialEq for Node {
    fn eq(&self, o: &Self) -> bool {
        (&self.op, &self.inputs, &self.tys, &self.names, &self.scope) == (&o.op, &o.inputs, &o.tys, &o.names, &o.scope)
    }
}

/// A named result of the graph.  One that has the name of a `param` or `state` replaces its value after a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub name: Arc<str>,
    pub value: Value,
}

/// A graph.  Made by [`Builder`](crate::Builder) or [`text::parse`](crate::text::parse).
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Graph {
    pub name: String,
    pub syms: Vec<Sym>,
    pub nodes: Vec<Node>,
    pub outputs: Vec<Output>,
}

impl Graph {
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
    pub fn ty(&self, v: Value) -> &Ty {
        &self.node(v.node).tys[v.result as usize]
    }
    /// Nodes with their ids, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> + ExactSizeIterator {
        self.nodes.iter().enumerate().map(|(i, n)| (NodeId(i as u32), n))
    }
    /// The sources (inputs, params, states), in order.
    pub fn sources(&self) -> impl Iterator<Item = (NodeId, &Source)> {
        self.iter().filter_map(|(id, n)| match &n.op {
            Op::Source(s) => Some((id, s)),
            _ => None,
        })
    }
    pub fn source(&self, name: &str) -> Option<(NodeId, &Source)> {
        self.sources().find(|(_, s)| s.name == name)
    }
    pub fn output(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|o| &*o.name == name).map(|o| o.value)
    }
    /// Whether output `o` replaces a persistent source.
    pub fn is_update(&self, o: &Output) -> bool {
        self.source(&o.name).is_some_and(|(_, s)| s.kind != SourceKind::Input)
    }
    /// Users of each node, in order, each once.
    pub fn users(&self) -> Vec<Vec<NodeId>> {
        let mut users = vec![vec![]; self.nodes.len()];
        for (id, n) in self.iter() {
            for v in &n.inputs {
                let u: &mut Vec<NodeId> = &mut users[v.node.index()];
                if u.last() != Some(&id) {
                    u.push(id);
                }
            }
        }
        users
    }
    /// A value's name for people: `%name`, or `%7`, or `%7_1`.
    pub fn label(&self, v: Value) -> String {
        match self.nodes.get(v.node.index()) {
            None => format!("%?{}", v.node.0),
            Some(n) => match n.names.get(v.result as usize) {
                Some(Some(name)) => format!("%{name}"),
                _ if n.tys.len() > 1 => format!("%{}_{}", v.node.0, v.result),
                _ => format!("%{}", v.node.0),
            },
        }
    }
}
