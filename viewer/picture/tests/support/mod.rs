//! What must hold of every layout.

use proptest::prelude::*;
use rambac_picture::Picture;
use rambac_picture::layout::{COLUMN_GAP, Layout, ROW_GAP};

/// What must hold of boxes of these sizes with these edges.
pub fn holds(sizes: &[[f64; 2]], edges: &[(usize, usize)], l: &Layout) -> Result<(), TestCaseError> {
    const ROUNDING: f64 = 1e-6;
    prop_assert_eq!(l.centres.len(), sizes.len());
    let side = |i: usize, axis: usize, s: f64| l.centres[i][axis] + s * sizes[i][axis] / 2.0;
    // By columns: those apart in x cannot touch, so only neighbours within a column are compared.
    let mut columns: Vec<Vec<usize>> = vec![];
    for i in 0..sizes.len() {
        columns.resize(columns.len().max(l.columns[i] + 1), vec![]);
        columns[l.columns[i]].push(i);
        for axis in 0..2 {
            prop_assert!(
                side(i, axis, -1.0) >= -ROUNDING && side(i, axis, 1.0) <= l.extent[axis] + ROUNDING,
                "box {i} lies outside"
            );
        }
    }
    let mut right = f64::NEG_INFINITY;
    for c in &mut columns {
        c.sort_by(|a, b| l.centres[*a][1].total_cmp(&l.centres[*b][1]));
        for w in c.windows(2) {
            prop_assert!(side(w[0], 1, 1.0) + ROW_GAP <= side(w[1], 1, -1.0) + ROUNDING, "{w:?} overlap");
        }
        let left = c.iter().map(|&i| side(i, 0, -1.0)).fold(f64::INFINITY, f64::min);
        prop_assert!(c.is_empty() || right + COLUMN_GAP <= left + ROUNDING, "columns overlap");
        right = c.iter().map(|&i| side(i, 0, 1.0)).fold(right, f64::max);
    }
    for ((from, to), path) in edges.iter().zip(&l.paths) {
        prop_assert!(l.columns[*from] < l.columns[*to], "{from} to {to} goes back");
        prop_assert!(path.windows(2).all(|w| w[0][0] < w[1][0]), "{from} to {to} turns back: {path:?}");
    }
    Ok(())
}

/// The same of a picture.
pub fn picture_holds(p: &Picture) -> Result<(), TestCaseError> {
    let sizes: Vec<_> = p.cards.iter().map(|c| [c.width, c.height]).collect();
    let edges: Vec<_> = p.view.edges.iter().map(|e| (e.0, e.1)).collect();
    holds(&sizes, &edges, &p.layout)
}
