//! Folding: a layer is one box until it is opened, and layers that are alike are one box with their number.
//!
//! ```text
//! closed:   embeddings ─ 24 × layers.0–23 ─ layers.24 ─ …          a click opens the run into its layers,
//! opened:   embeddings ─ layers.0 ─ layers.1 ─ … ─ layers.24 ─ …   and a layer into its nodes
//! ```
//! Ensures: every node is in exactly one item, and items form no cycle: a box through which a path leaves and comes back is
//! opened, whatever was asked for.

use crate::scene::split_scope;
use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use rambac_ir::{Graph, Node, NodeId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// The name of a box: its first layer's scope, with `×` before it if it is a run of layers.
pub type BoxName = String;

/// What is drawn as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// `None` for a single node.
    pub folded: Option<Folded>,
    /// In the graph's order.
    pub nodes: Vec<NodeId>,
}

/// A box.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    pub name: BoxName,
    pub label: String,
    /// Layers in it.
    pub count: usize,
    /// Boxes that hold it, which a fold closes: itself alone or its run.
    pub within: Option<BoxName>,
}

/// Items and the edges between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub items: Vec<Item>,
    /// From, to, and the number of values that go this way; sorted.
    pub edges: Vec<(usize, usize, usize)>,
    /// The item of every node.
    pub item_of: Vec<usize>,
}

/// Which boxes are open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Open {
    Only(HashSet<BoxName>),
    All,
}

impl Default for Open {
    fn default() -> Self {
        Open::Only(HashSet::new())
    }
}

impl Open {
    fn is(&self, name: &str) -> bool {
        match self {
            Open::All => true,
            Open::Only(names) => names.contains(name),
        }
    }
}

/// The part of a scope that is folded: `layers.3`, `grad.layers.3`, `head`, `optim`.
pub fn layer(scope: &str) -> &str {
    let (back, inner) = split_scope(Some(scope));
    let parts = if inner.starts_with("layers.") { 2 } else { 1 };
    let end = inner.match_indices('.').nth(parts - 1).map_or(inner.len(), |(i, _)| i);
    let before = if back { scope.len() - inner.len() } else { 0 };
    &scope[..before + end]
}

/// The number of a layer, and what stands before it.
fn numbered(layer: &str) -> Option<(&str, i64)> {
    let (head, number) = layer.rsplit_once('.')?;
    Some((head, number.parse().ok()?))
}

/// What a layer does, without names and numbers: layers of one signature are alike.
fn signature(g: &Graph, nodes: &[NodeId]) -> u64 {
    let mut h = DefaultHasher::new();
    for &id in nodes {
        let n = g.node(id);
        n.op.mnemonic().hash(&mut h);
        n.op.attrs().iter().filter(|(k, _)| *k != "name").for_each(|(k, a)| (k, a.to_string()).hash(&mut h));
        n.tys.hash(&mut h);
    }
    h.finish()
}

/// A layer with its nodes.
struct Layer<'a> {
    name: &'a str,
    nodes: Vec<NodeId>,
    signature: u64,
}

fn layers(g: &Graph) -> Vec<Layer<'_>> {
    let mut at: HashMap<&str, usize> = HashMap::new();
    let mut all: Vec<Layer> = vec![];
    for (id, n) in g.iter() {
        let Some(name) = n.scope.as_deref().map(layer).filter(|s| !s.is_empty()) else { continue };
        let i = *at.entry(name).or_insert_with(|| {
            all.push(Layer { name, nodes: vec![], signature: 0 });
            all.len() - 1
        });
        all[i].nodes.push(id);
    }
    all.iter_mut().for_each(|l| l.signature = signature(g, &l.nodes));
    all
}

/// Groups layers of successive numbers that are alike.
fn runs<'a>(layers: Vec<Layer<'a>>) -> Vec<Vec<Layer<'a>>> {
    // Numbered layers of one kind by their number, so that what stands between two of them in the text does not matter.
    let mut kinds: BTreeMap<&str, Vec<Layer>> = BTreeMap::new();
    let mut out: Vec<Vec<Layer>> = vec![];
    for l in layers {
        match numbered(l.name) {
            Some((head, _)) => kinds.entry(head).or_default().push(l),
            None => out.push(vec![l]),
        }
    }
    for (_, mut all) in kinds {
        all.sort_by_key(|l| numbered(l.name).map(|n| n.1));
        for l in all {
            let follows = |r: &Vec<Layer>| {
                let last = &r[r.len() - 1];
                let next = numbered(last.name)
                    .zip(numbered(l.name))
                    .is_some_and(|(a, b)| a.0 == b.0 && a.1.checked_add(1) == Some(b.1));
                next && last.signature == l.signature
            };
            match out.last_mut() {
                Some(r) if follows(r) => r.push(l),
                _ => out.push(vec![l]),
            }
        }
    }
    out
}

/// A name for a box of these layers: `layers.0–23`.
fn label(run: &[Layer]) -> String {
    let (first, last) = (run[0].name, run[run.len() - 1].name);
    match numbered(last) {
        Some((_, n)) if run.len() > 1 => format!("{first}–{n}"),
        _ => first.to_string(),
    }
}

fn single(id: NodeId) -> Item {
    Item { folded: None, nodes: vec![id] }
}

/// Folds all of `g` but what is open.
pub fn fold(g: &Graph, open: &Open) -> View {
    let mut forced: HashSet<BoxName> = HashSet::new();
    let runs = runs(layers(g));
    loop {
        let v = folded(g, &runs, open, &forced);
        let cyclic = cycles(&v);
        if cyclic.is_empty() {
            return v;
        }
        for i in cyclic {
            forced.extend(v.items[i].folded.iter().map(|f| f.name.clone()));
        }
    }
}

fn folded(g: &Graph, runs: &[Vec<Layer>], open: &Open, forced: &HashSet<BoxName>) -> View {
    let is_open = |name: &str| open.is(name) || forced.contains(name);
    let mut items = vec![];
    let mut boxed = vec![false; g.nodes.len()];
    for run in runs {
        let name = format!("×{}", run[0].name);
        let run_is_open = run.len() == 1 || is_open(&name);
        let parts: Vec<&[Layer]> = if run_is_open { run.chunks(1).collect() } else { vec![run] };
        for part in parts {
            let nodes: Vec<NodeId> = part.iter().flat_map(|l| l.nodes.iter().copied()).collect();
            let single_box = if run_is_open { part[0].name.to_string() } else { name.clone() };
            if is_open(&single_box) || nodes.len() == 1 {
                continue;
            }
            nodes.iter().for_each(|n| boxed[n.index()] = true);
            let within = (run_is_open && run.len() > 1).then(|| name.clone());
            let folded = Folded { name: single_box, label: label(part), count: part.len(), within };
            items.push(Item { folded: Some(folded), nodes });
        }
    }
    items.extend(g.iter().filter(|(id, _)| !boxed[id.index()]).map(|(id, _)| single(id)));
    items.iter_mut().for_each(|i| i.nodes.sort());
    items.sort_by_key(|i| i.nodes[0]);
    view(g, items)
}

fn view(g: &Graph, items: Vec<Item>) -> View {
    let mut item_of = vec![0; g.nodes.len()];
    for (i, item) in items.iter().enumerate() {
        item.nodes.iter().for_each(|n| item_of[n.index()] = i);
    }
    let mut edges: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for (id, n) in g.iter() {
        for v in &n.inputs {
            let (from, to) = (item_of[v.node.index()], item_of[id.index()]);
            if from != to {
                *edges.entry((from, to)).or_default() += 1;
            }
        }
    }
    View { items, edges: edges.into_iter().map(|((f, t), n)| (f, t, n)).collect(), item_of }
}

/// Boxes that lie on a cycle.
fn cycles(v: &View) -> Vec<usize> {
    let mut d: DiGraph<(), ()> = DiGraph::with_capacity(v.items.len(), v.edges.len());
    for _ in &v.items {
        d.add_node(());
    }
    for (from, to, _) in &v.edges {
        d.add_edge(NodeIndex::new(*from), NodeIndex::new(*to), ());
    }
    let knots = tarjan_scc(&d).into_iter().filter(|c| c.len() > 1);
    let mut all: Vec<usize> = knots.flatten().map(NodeIndex::index).filter(|&i| v.items[i].folded.is_some()).collect();
    all.sort();
    all
}

/// The boxes that hold a node, outermost first: to see it, all must be open.
pub fn boxes_of(g: &Graph, id: NodeId) -> Vec<BoxName> {
    let Some(name) = g.node(id).scope.as_deref().map(layer) else { return vec![] };
    let runs = runs(layers(g));
    let run = runs.iter().find(|r| r.iter().any(|l| l.name == name));
    let outer = run.filter(|r| r.len() > 1).map(|r| format!("×{}", r[0].name));
    outer.into_iter().chain([name.to_string()]).collect()
}

/// A node's short name: its op, or a source's name.
pub fn node_label(n: &Node) -> String {
    match &n.op {
        rambac_ir::Op::Source(s) => short(&s.name),
        op => op.mnemonic().to_string(),
    }
}

/// The end of a dotted name, which tells most: `mixer.in_proj.weight` of `backbone.layers.3.mixer.in_proj.weight`.
fn short(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let keep = parts.iter().rposition(|p| p.parse::<u32>().is_ok()).map_or(0, |i| i + 1);
    let tail = if keep < parts.len() { parts[keep..].join(".") } else { name.to_string() };
    let tail = tail.strip_prefix("backbone.").map_or(tail.clone(), str::to_string);
    match name.starts_with("optim.") && !tail.starts_with("optim.") {
        true => format!("optim {tail}"),
        false => tail,
    }
}
