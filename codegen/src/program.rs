//! A Program: steps in order over a table of buffers.
//!
//! Sizes are dims, so one Program serves every binding of the symbols.  A step reads and writes [`View`]s: a reshape
//! or a slice is a view, not a step.

use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{Bindings, Cost, Dim, DimError, Graph, NodeId, Sym, Ty};

/// A place in [`Program::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufferId(pub u32);

impl BufferId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Who owns a buffer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferKind {
    /// The program's arena, reused after its last use.
    Arena,
    /// Source `i` of [`Program::sources`].
    Source(usize),
}

/// A buffer; its type gives size and alignment.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub ty: Ty,
    pub kind: BufferKind,
}

/// Rows that do not touch: `cols` elements each, `stride` elements apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Strided {
    pub cols: Dim,
    pub stride: Dim,
}

/// A tensor inside a buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub buffer: BufferId,
    /// First element.
    pub offset: Dim,
    /// Type as the step sees it.
    pub ty: Ty,
    /// `None`: contiguous.
    pub strided: Option<Strided>,
}

/// One kernel call.
#[derive(Clone, Debug)]
pub struct Step {
    pub op: Op,
    /// The node it came from.
    pub node: NodeId,
    pub inputs: Vec<View>,
    /// The op's results, then those that are written in bf16 too (`Halves::copies`).
    pub outputs: Vec<View>,
}

/// A source and its buffer.
#[derive(Clone, Debug)]
pub struct SourceSlot {
    pub kind: SourceKind,
    pub name: String,
    pub ty: Ty,
    pub buffer: BufferId,
}

/// A result: a view to read after the run, or an update already written into its source's buffer.
#[derive(Clone, Debug)]
pub struct OutputSlot {
    pub name: String,
    pub view: View,
    pub update: bool,
}

/// See the module's comment.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: String,
    pub syms: Vec<Sym>,
    pub buffers: Vec<Buffer>,
    pub steps: Vec<Step>,
    pub sources: Vec<SourceSlot>,
    pub outputs: Vec<OutputSlot>,
    /// The graph it was lowered from.
    pub graph: Graph,
}

impl Program {
    pub fn source(&self, name: &str) -> Option<&SourceSlot> {
        self.sources.iter().find(|s| s.name == name)
    }
    /// Checks that every dim of every buffer has a value under `b`.
    ///
    /// # Errors
    /// The first unbound symbol or indivisible dim.
    pub fn check_dims(&self, b: &Bindings) -> Result<(), DimError> {
        self.buffers.iter().try_for_each(|x| x.ty.bind(b).map(drop))?;
        self.graph.nodes.iter().flat_map(|n| &n.tys).try_for_each(|t| t.bind(b).map(drop))
    }

    /// The work of every step under `b`, from its op's definition and the types it sees.
    ///
    /// # Errors
    /// As [`check_dims`](Self::check_dims).
    pub fn costs(&self, b: &Bindings) -> Result<Vec<Cost>, DimError> {
        let bind = |vs: &[View]| vs.iter().map(|v| v.ty.bind(b)).collect::<Result<Vec<_>, _>>();
        let cost = |s: &Step| {
            let (x, y) = (bind(&s.inputs)?, bind(&s.outputs)?);
            Ok(match s.op {
                // Free as a view; as a step it copies.
                Op::Reshape(_) => Cost { flops: 0.0, bytes: rambac_ir::ops::traffic(&x, &y) },
                _ => s.op.def().cost(&x, &y),
            })
        };
        self.steps.iter().map(cost).collect()
    }
}
