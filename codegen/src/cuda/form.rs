//! How a step runs on a GPU: kernels to compile, launches with sizes and arguments, workspace, library calls.

use super::expr::Expr;
use super::target::Target;
use crate::nvrtc::Usage;
use crate::plan::ALIGN;
use rambac_ir::{Bindings, DType, DimError};

/// A kernel to compile: a short text that instantiates a template of `codegen/kernels`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Its `extern "C"` name.
    pub name: String,
    /// The stub.
    pub source: String,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
    /// Blocks per multiprocessor that the choice of its tile counted on.
    pub blocks_per_sm: u32,
}

impl Kernel {
    /// Blocks that fit on a multiprocessor, by what ptxas says that the kernel takes.
    pub fn fit(&self, u: &Usage, target: &Target) -> usize {
        target.occupancy(self.threads as usize, u.registers as usize, (u.shared + self.shared) as usize)
    }
    /// Holds the compiler to what the choice of the tile counted on: no spills, and as many blocks on a multiprocessor.
    ///
    /// # Errors
    /// What does not hold, with the kernel's name.
    pub fn hold_to(&self, u: &Usage, target: &Target) -> Result<(), String> {
        let (name, arch) = (&self.name, target.arch);
        if u.spill_stores + u.spill_loads > 0 {
            return Err(format!("{name} for {arch} spills {} bytes", u.spill_stores + u.spill_loads));
        }
        let fit = self.fit(u, target);
        if fit < self.blocks_per_sm as usize {
            return Err(format!(
                "{name} for {arch}: {fit} blocks fit ({} registers, {} B shared), {} were counted on",
                u.registers,
                u.shared + self.shared,
                self.blocks_per_sm
            ));
        }
        Ok(())
    }
}

/// What a call reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    Input(usize),
    Output(usize),
    /// Of [`Form::workspace`].
    Workspace(usize),
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Param {
    /// The address of the operand's first element.
    Address(Operand),
    /// The address of a later element.
    Element { at: Operand, dtype: DType, first: Expr },
    /// An `i32`.
    Int(Expr),
    /// An `i64`, such as the distance of rows in elements.
    Long(Expr),
    /// An `f32`.
    Float(f32),
    /// Words of 64 bits by value: addresses and `i64`s.
    Table(Vec<Param>),
    /// A tensor map by value.
    Tensor(TensorParam),
}

/// A tensor that boxes are copied of; dims count from the innermost.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorParam {
    pub at: Operand,
    /// The first element.
    pub first: Expr,
    pub dtype: DType,
    pub dims: Vec<Expr>,
    /// Elements from one index to the next of every dim but the first.
    pub strides: Vec<Expr>,
    /// Elements of a box along each dim.
    pub tile: Vec<usize>,
}

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    pub kernel: Kernel,
    pub grid: [Expr; 3],
    pub params: Vec<Param>,
    /// What it reads before it waits for the launches before it, see `earlier.cuh`.
    pub ahead: Vec<Operand>,
}

/// A matrix of a product: rows `ld` elements apart, matrices of a batch `step` apart.
#[derive(Clone, Debug, PartialEq)]
pub struct GemmOperand {
    pub at: Operand,
    /// The first element.
    pub first: Expr,
    pub dtype: DType,
    pub ld: Expr,
    pub step: Expr,
    /// Its last two axes are exchanged in the product.
    pub trans: bool,
}

/// `c[i] = op(a[i]) · op(b[i]) + plus[i]` for every matrix of a batch, row-major, with f32 sums; what is added, if anything
/// is, has the type of `c` and may be it.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    pub batch: Expr,
    pub m: Expr,
    pub n: Expr,
    pub k: Expr,
    pub a: GemmOperand,
    pub b: GemmOperand,
    pub c: GemmOperand,
    pub plus: Option<GemmOperand>,
}

/// One call of a step, after the ones before it.
#[derive(Clone, Debug, PartialEq)]
// A step has a few of them: boxes would cost more than they save.
#[allow(clippy::large_enum_variant)]
pub enum Call {
    Launch(Launch),
    /// A dense product by the vendor's library.
    Gemm(Gemm),
}

/// Memory that a form needs while it runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Workspace {
    pub name: &'static str,
    pub dtype: DType,
    pub elements: Expr,
}

/// `left >= right` or `left < right`, on sizes known when symbols are bound.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    AtLeast(Expr, Expr),
    Below(Expr, Expr),
}

impl Condition {
    /// Whether it holds under `b`.
    ///
    /// # Errors
    /// As [`Expr::eval`].
    pub fn holds(&self, b: &Bindings) -> Result<bool, DimError> {
        Ok(match self {
            Condition::AtLeast(x, y) => x.eval(b)? >= y.eval(b)?,
            Condition::Below(x, y) => x.eval(b)? < y.eval(b)?,
        })
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Condition::AtLeast(x, y) => write!(f, "{x} >= {y}"),
            Condition::Below(x, y) => write!(f, "{x} < {y}"),
        }
    }
}

/// A way to run a step.  The first of a step's forms whose conditions, `needs` and `when`, all hold is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    pub name: &'static str,
    /// Why this form and this tile, in a line that `explain` prints.
    pub why: String,
    /// That it was measured to be the fastest, at the sizes of `when`.
    pub measured: bool,
    /// Sizes that it can run at.
    pub needs: Vec<Condition>,
    /// Sizes that it is thought to be the best at, if no form before it is.
    pub when: Vec<Condition>,
    pub workspace: Vec<Workspace>,
    pub calls: Vec<Call>,
}

impl Form {
    /// A form that always can run and needs nothing beside its operands.
    pub fn new(name: &'static str, why: impl Into<String>, calls: Vec<Call>) -> Form {
        Form { name, why: why.into(), measured: false, needs: vec![], when: vec![], workspace: vec![], calls }
    }
    pub fn needs(mut self, c: Condition) -> Form {
        self.needs.push(c);
        self
    }
    pub fn when(mut self, c: Condition) -> Form {
        self.when.push(c);
        self
    }
    /// Adds workspace; operands name it by its place.
    pub fn with(mut self, name: &'static str, dtype: DType, elements: impl Into<Expr>) -> Form {
        self.workspace.push(Workspace { name, dtype, elements: elements.into() });
        self
    }
    /// Where every piece of workspace begins, in bytes, and the bytes in all.
    ///
    /// # Errors
    /// A dim without a value, or a size that overflows.
    pub fn workspace_places(&self, b: &Bindings) -> Result<(Vec<usize>, usize), DimError> {
        let mut at = 0usize;
        let mut places = vec![];
        for w in &self.workspace {
            places.push(at);
            let bytes = w.elements.eval(b)?.checked_mul(w.dtype.size()).and_then(|n| n.checked_next_multiple_of(ALIGN));
            let overflow = || DimError::Overflow { dim: w.elements.to_string(), bindings: b.to_string() };
            at = bytes.and_then(|n| at.checked_add(n)).ok_or_else(overflow)?;
        }
        Ok((places, at))
    }
    /// Bytes of workspace.
    ///
    /// # Errors
    /// As [`workspace_places`](Self::workspace_places).
    pub fn workspace_bytes(&self, b: &Bindings) -> Result<usize, DimError> {
        Ok(self.workspace_places(b)?.1)
    }
    /// Whether it can run at these sizes: they divide as its grids and workspace want, and what it needs holds.
    pub fn has_sizes(&self, b: &Bindings) -> bool {
        self.needs.iter().all(|c| matches!(c.holds(b), Ok(true)))
            && self.workspace_places(b).is_ok()
            && self.launches().all(|l| l.grid.iter().all(|e| e.eval(b).is_ok()))
    }
    pub fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.calls.iter().filter_map(|c| match c {
            Call::Launch(l) => Some(l),
            Call::Gemm(_) => None,
        })
    }
}

impl From<Launch> for Call {
    fn from(l: Launch) -> Call {
        Call::Launch(l)
    }
}
