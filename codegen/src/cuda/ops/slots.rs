//! Sums over slots of a workspace, in a fixed order: what blocks leave of a sum over rows.

use super::Site;
use crate::cuda::expr::Expr;
use crate::cuda::form::{Launch, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::DType;

/// Slots: workspace `at` in f32, `count` of them `stride` elements apart, from element `first` on [rows, cols].
pub(super) struct Slots {
    pub at: Operand,
    pub first: usize,
    pub count: Expr,
    pub stride: Expr,
    pub rows: Expr,
    pub cols: Expr,
}

impl Slots {
    /// Slots of `cols` elements, one behind the other.
    pub fn of_row(at: Operand, count: Expr, cols: usize) -> Slots {
        Slots { at, first: 0, count, stride: Expr::int(cols), rows: Expr::int(1), cols: Expr::int(cols) }
    }

    /// Writes element (i, j) of the sum to `to[i · row_stride + j · col_stride]`.
    pub fn sum(self, site: &Site, to: Operand, row_stride: impl Into<Expr>, col_stride: impl Into<Expr>) -> Launch {
        // Sums are of hundreds of slots and of few columns: what bounds them is how many loads are under way.
        const LANES: usize = 32;
        let dtype = site.dtype(to);
        Stub::new("slots", "sum_slots", 32 * LANES)
            .element("T", dtype)
            .int("lanes", LANES)
            .read("slots", DType::F32, self.at)
            .i64("first", self.first)
            .i32("count", self.count)
            .i64("slot_stride", self.stride)
            .i64("cols", self.cols.clone())
            .write("out", dtype, to)
            .i64("row_stride", row_stride)
            .i64("col_stride", col_stride)
            .launch((self.cols.ceil_div(32) * self.rows, 1, 1))
    }
}
