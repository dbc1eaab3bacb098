//! How each op runs on a GPU: one file per family, one answer per op of the list.

mod any_size;
mod attention;
mod choose;
mod chunk_attention;
mod chunk_attention_forms;
mod chunk_attention_sizes;
mod conv;
mod few_rows;
mod inverted_index;
mod loss;
mod map;
mod map_each;
mod matmul;
mod mix;
mod move_;
mod norm;
mod reduce;
mod rows;
mod scan;
mod scan_grad;
mod score;
mod selection;
mod slots;

use super::expr::Expr;
use super::form::{Form, Operand};
use super::join::Joined;
use super::stub::c_type;
use super::target::Target;
use crate::View;
pub use few_rows::takes_few_rows;
pub(super) use map::is_element;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim, for_each_op};

/// Why no kernel takes a step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    #[error("there is no GPU kernel for it")]
    NoKernel,
    #[error("{0}")]
    Because(String),
}

pub(crate) fn because<T>(why: impl Into<String>) -> Result<T, Unsupported> {
    Err(Unsupported::Because(why.into()))
}

/// Where a step stands: its operands and results, and the GPU.
pub struct Site<'a> {
    pub inputs: &'a [View],
    pub outputs: &'a [View],
    pub target: &'a Target,
    pub joined: &'a Joined,
}

impl Site<'_> {
    pub fn view(&self, at: Operand) -> &View {
        match at {
            Operand::Input(i) => &self.inputs[i],
            Operand::Output(i) => &self.outputs[i],
            Operand::Workspace(_) => panic!("BUG: workspace has no view"),
        }
    }
    /// Size of an axis that must be an integer.
    pub fn int(&self, at: Operand, axis: usize) -> Result<usize, Unsupported> {
        let ty = &self.view(at).ty;
        match ty.shape[axis].as_int() {
            Some(v) => Ok(v),
            None => because(format!("axis {axis} of {ty} must have an integer size")),
        }
    }
    /// The map that makes the op's operand `k`, and that map's operands, where it is joined.
    pub fn made(&self, k: usize) -> Option<(&FusedMap, Vec<(Operand, &View)>)> {
        let mut at = self.inputs.len() - self.joined.maps.iter().map(|m| m.inputs).sum::<usize>();
        for m in &self.joined.maps {
            if m.operand == k {
                return Some((&m.map, (at..at + m.inputs).map(|i| (Operand::Input(i), &self.inputs[i])).collect()));
            }
            at += m.inputs;
        }
        None
    }
    /// As [`row_stride`], of an operand.
    pub fn row_stride(&self, at: Operand, axis: usize) -> Result<Expr, Unsupported> {
        row_stride(self.view(at), axis)
    }
    /// Refuses a strided operand.
    pub fn contiguous(&self, at: Operand) -> Result<(), Unsupported> {
        match &self.view(at).strided {
            None => Ok(()),
            Some(s) => because(format!("a contiguous operand is wanted, this one has rows of {}", s.cols)),
        }
    }
    /// As [`vector`], of operands.
    pub fn vector(&self, all: &[Operand], most: usize) -> usize {
        vector(all.iter().map(|&at| self.view(at)), most)
    }
    /// The table of a step that reads pages: the operand behind the `arity` of its op.
    ///
    /// # Errors
    /// Elements that kernels do not widen.
    pub fn pages(&self, arity: usize, pool: Operand) -> Result<Option<Pages<'_>>, Unsupported> {
        let Some(table) = self.inputs.get(arity) else { return Ok(None) };
        let (stored, dtype) = (self.dtype(pool), self.dtype(Operand::Input(0)));
        if stored != dtype && (dtype != DType::F32 || stored.size() != 2) {
            return because(format!(
                "pages of {stored} under queries of {dtype}; kernels take the same, or 16 bits under f32"
            ));
        }
        Ok(Some(Pages { table: Operand::Input(arity), entries: &table.ty.shape[1], stored }))
    }
    pub fn dtype(&self, at: Operand) -> DType {
        self.view(at).ty.dtype
    }
    pub fn c_type(&self, at: Operand) -> &'static str {
        c_type(self.dtype(at))
    }
}

/// A memory in pages, see [`crate::cuda::pages`].
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    pub table: Operand,
    /// Entries of the table per sequence.
    pub entries: &'a Dim,
    pub stored: DType,
}

/// The distance, in elements, of rows that hold axes `axis..` of the view.
///
/// # Errors
/// It is strided by other rows.
pub fn row_stride(v: &View, axis: usize) -> Result<Expr, Unsupported> {
    let cols = Expr::product(&v.ty.shape[axis..]);
    match &v.strided {
        None => Ok(cols),
        Some(s) if Expr::from(&s.cols) == cols => Ok(Expr::from(&s.stride)),
        Some(s) => because(format!("rows of {cols} wanted, the view has rows of {}", s.cols)),
    }
}

/// The largest number of elements, a power of two of at most `most`, that every row and row distance is a multiple of:
/// so many can be moved at once.
pub fn vector<'a>(views: impl Iterator<Item = &'a View> + Clone, most: usize) -> usize {
    let fits = |w: usize| {
        views.clone().all(|v| {
            let even = |d: &Dim| d.is_multiple_of(w as u64);
            v.strided.as_ref().is_none_or(|s| even(&s.cols) && even(&s.stride)) && even(&v.offset)
        })
    };
    std::iter::successors(Some(most.max(1)), |w| (*w > 1).then_some(w / 2)).find(|&w| fits(w)).unwrap_or(1)
}

/// Implemented for every op.
pub trait Cuda {
    /// The ways to run it, best first; the last has no conditions.
    ///
    /// # Errors
    /// No kernel takes these types or this layout.
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported>;

    /// What can be measured against each other: the forms, and after them the same with other tiles.
    ///
    /// # Errors
    /// As [`forms`](Self::forms).
    fn candidates(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        self.forms(site)
    }
}

macro_rules! dispatch {
    ($($op:ident),* $(,)?) => {
        /// The ways to run any op.
        ///
        /// # Errors
        /// As [`Cuda::forms`].
        pub fn forms(op: &Op, site: &Site) -> Result<Vec<Form>, Unsupported> {
            let mut all = match op { $(Op::$op(o) => o.forms(site)),* }?;
            if let Some(needs) = &site.joined.within {
                let within = Form::new("within", "the steps that read it, or make its operand, do it too", vec![]);
                all.insert(0, Form { needs: needs.clone(), ..within });
            }
            Ok(all)
        }

        /// The ways to run any op that can be measured against each other.
        ///
        /// # Errors
        /// As [`Cuda::forms`].
        pub fn candidates(op: &Op, site: &Site) -> Result<Vec<Form>, Unsupported> {
            match op { $(Op::$op(o) => o.candidates(site)),* }
        }
    };
}
for_each_op!(dispatch);

macro_rules! none_yet {
    ($($op:ident),* $(,)?) => {
        $(impl Cuda for $op {
            fn forms(&self, _: &Site) -> Result<Vec<Form>, Unsupported> {
                Err(Unsupported::NoKernel)
            }
        })*
    };
}
// A source is no step.
none_yet! { Source }
