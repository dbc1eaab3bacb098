//! Rebuilding a graph node by node.

use rambac_ir::{Builder, Graph, Node, NodeId, Output, Value};

/// The graph being built from an old one.
pub struct Rewrite<'g> {
    pub old: &'g Graph,
    pub b: Builder,
    map: Vec<Option<Vec<Value>>>,
}

impl<'g> Rewrite<'g> {
    pub fn new(old: &'g Graph) -> Self {
        let empty = Graph { name: old.name.clone(), syms: old.syms.clone(), ..Graph::default() };
        Self { old, b: Builder::extend(empty), map: vec![None; old.nodes.len()] }
    }
    /// What an old value became.
    pub fn get(&self, v: Value) -> Value {
        self.map[v.node.index()].as_ref().expect("BUG: a rewrite used a value before it was made")[v.result as usize]
    }
    pub fn has(&self, id: NodeId) -> bool {
        self.map[id.index()].is_some()
    }
    /// Copies an old node onto the new operands.
    pub fn copy(&mut self, id: NodeId) {
        let node: &Node = self.old.node(id);
        let inputs: Vec<Value> = node.inputs.iter().map(|&v| self.get(v)).collect();
        let out = self.b.copy(node, &inputs);
        self.set(id, out);
    }
    /// Says what the results of an old node became.
    pub fn set(&mut self, id: NodeId, values: Vec<Value>) {
        self.map[id.index()] = Some(values);
    }
    /// The finished graph with the old outputs.
    pub fn finish(self) -> Graph {
        let outputs =
            self.old.outputs.iter().map(|o| Output { name: o.name.clone(), value: self.get(o.value) }).collect();
        let mut g = self.b.finish().unwrap_or_else(|e| panic!("BUG: a pass built an ill-typed graph: {e}"));
        g.outputs = outputs;
        g
    }
}

/// Rebuilds `g`: `f` may replace a node by values it builds from the new operands; `None` copies it.  What replaces a
/// node belongs to its scope.
pub fn rewrite(g: &Graph, mut f: impl FnMut(&mut Builder, NodeId, &Node, &[Value]) -> Option<Vec<Value>>) -> Graph {
    let mut r = Rewrite::new(g);
    for (id, node) in g.iter() {
        let inputs: Vec<Value> = node.inputs.iter().map(|&v| r.get(v)).collect();
        if let Some(scope) = &node.scope {
            r.b.enter(scope);
        }
        let out = f(&mut r.b, id, node, &inputs).unwrap_or_else(|| r.b.copy(node, &inputs));
        if node.scope.is_some() {
            r.b.leave();
        }
        r.set(id, out);
    }
    r.finish()
}
