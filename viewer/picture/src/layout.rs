//! A layered layout from left to right, after Sugiyama, Tagawa and Toda (1981).
//!
//! ```text
//! 1. a column per node: the longest path from the left; what has no operands stands just left of its first user
//! 2. short edges that pass columns get a joint in each, so that they find a way between the boxes; long ones do not, or a
//!    training step would be nothing but joints
//! 3. within a column: by the mean place of neighbours, a few sweeps
//! 4. heights: every node as near to its neighbours as boxes above and below let it (isotonic regression, exact)
//! ```
//! Ensures: boxes do not overlap, edges go to the right, and the same input gives the same places.

/// A box to place: its width and height.
pub type Size = [f64; 2];
/// A place: x to the right, y down.
pub type Point = [f64; 2];

/// Between columns.
pub const COLUMN_GAP: f64 = 46.0;
/// Between boxes of a column.
pub const ROW_GAP: f64 = 14.0;
/// Height that a joint takes.
const JOINT: f64 = 4.0;
/// Columns that an edge with joints may pass.
const SHORT: usize = 12;
/// Sweeps of steps 3 and 4.
const SWEEPS: usize = 4;

/// Where everything lies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    /// The middle of every box.
    pub centres: Vec<Point>,
    /// Points of every edge, from the right side of its first box to the left side of its last.
    pub paths: Vec<Vec<Point>>,
    /// Right and lower end; the upper left one is the origin.
    pub extent: Size,
    /// The column of every box.
    pub columns: Vec<usize>,
}

/// A box or a joint.
struct Cell {
    size: Size,
    /// Neighbours on the left and on the right.
    near: [Vec<usize>; 2],
    column: usize,
    y: f64,
}

/// Lays out boxes of these sizes with edges `(from, to)` that form no cycle.
///
/// # Panics
/// BUG: on a cycle.
pub fn layout(sizes: &[Size], edges: &[(usize, usize)]) -> Layout {
    if sizes.is_empty() {
        return Layout::default();
    }
    let columns = columns(sizes.len(), edges);
    let mut cells: Vec<Cell> =
        (0..sizes.len()).map(|i| Cell { size: sizes[i], near: [vec![], vec![]], column: columns[i], y: 0.0 }).collect();
    let mut joints: Vec<Vec<usize>> = vec![];
    for &(from, to) in edges {
        let between = columns[from] + 1..columns[to];
        let mut chain = vec![];
        let mut last = from;
        if between.len() < SHORT {
            for column in between {
                cells.push(Cell { size: [0.0, JOINT], near: [vec![], vec![]], column, y: 0.0 });
                let joint = cells.len() - 1;
                link(&mut cells, last, joint);
                chain.push(joint);
                last = joint;
            }
        }
        link(&mut cells, last, to);
        joints.push(chain);
    }
    let mut order = initial_order(&cells);
    (0..SWEEPS).for_each(|s| sort_columns(&mut cells, &mut order, s % 2));
    (0..2 * SWEEPS).for_each(|s| align(&mut cells, &order, s % 2));
    finish(&mut cells, &order, sizes.len(), edges, &joints, columns)
}

fn link(cells: &mut [Cell], from: usize, to: usize) {
    cells[to].near[0].push(from);
    cells[from].near[1].push(to);
}

/// Step 1.
fn columns(n: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut after: Vec<Vec<usize>> = vec![vec![]; n];
    let mut missing = vec![0; n];
    for &(f, t) in edges {
        after[f].push(t);
        missing[t] += 1;
    }
    let first: Vec<bool> = missing.iter().map(|m| *m == 0).collect();
    let mut ready: std::collections::BTreeSet<usize> = (0..n).filter(|&i| first[i]).collect();
    let mut column = vec![0usize; n];
    let mut seen = 0;
    while let Some(i) = ready.pop_first() {
        seen += 1;
        for &t in &after[i] {
            column[t] = column[t].max(column[i] + 1);
            missing[t] -= 1;
            if missing[t] == 0 {
                ready.insert(t);
            }
        }
    }
    assert_eq!(seen, n, "BUG: a layout of a graph with a cycle");
    for i in (0..n).filter(|&i| first[i]) {
        column[i] = after[i].iter().map(|&t| column[t]).min().map_or(0, |c| c.saturating_sub(1));
    }
    column
}

/// Cells of every column, in their order.
fn initial_order(cells: &[Cell]) -> Vec<Vec<usize>> {
    let n = cells.iter().map(|c| c.column).max().unwrap_or(0) + 1;
    let mut order = vec![vec![]; n];
    cells.iter().enumerate().for_each(|(i, c)| order[c.column].push(i));
    order
}

/// Step 3, by the neighbours on one side.
fn sort_columns(cells: &mut [Cell], order: &mut [Vec<usize>], side: usize) {
    let n = order.len();
    for c in 0..n {
        let c = if side == 0 { c } else { n - 1 - c };
        let column = &mut order[c];
        let mut keyed: Vec<(f64, usize)> = column
            .iter()
            .enumerate()
            .map(|(place, &i)| {
                let near = &cells[i].near[side];
                let mean = near.iter().map(|&j| cells[j].y).sum::<f64>() / near.len().max(1) as f64;
                (if near.is_empty() { place as f64 * 20.0 } else { mean }, i)
            })
            .collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        *column = keyed.into_iter().map(|k| k.1).collect();
        // Heights as if stacked, so that columns of different lengths compare.
        let total: f64 = column.iter().map(|&i| cells[i].size[1] + ROW_GAP).sum();
        let mut y = -total / 2.0;
        for &i in &*column {
            let h = cells[i].size[1] + ROW_GAP;
            cells[i].y = y + h / 2.0;
            y += h;
        }
    }
}

/// Step 4, by the neighbours on one side and, a little, on the other.
fn align(cells: &mut [Cell], order: &[Vec<usize>], side: usize) {
    let n = order.len();
    for c in 0..n {
        let column = &order[if side == 0 { c } else { n - 1 - c }];
        let wanted: Vec<f64> = column
            .iter()
            .map(|&i| {
                let mean = |near: &[usize]| near.iter().map(|&j| cells[j].y).sum::<f64>() / near.len() as f64;
                let [a, b] = [&cells[i].near[side], &cells[i].near[1 - side]];
                match (a.is_empty(), b.is_empty()) {
                    (false, false) => 0.75 * mean(a) + 0.25 * mean(b),
                    (false, true) => mean(a),
                    (true, false) => mean(b),
                    (true, true) => cells[i].y,
                }
            })
            .collect();
        let ys = spread(&wanted, &column.iter().map(|&i| cells[i].size[1]).collect::<Vec<_>>());
        column.iter().zip(ys).for_each(|(&i, y)| cells[i].y = y);
    }
}

/// The places nearest to `wanted` (least squares) at which boxes of these heights, in this order, keep their gap.
fn spread(wanted: &[f64], heights: &[f64]) -> Vec<f64> {
    // With the least distances taken off, places must only rise: pool neighbours that do not.
    let mut off = vec![0.0; wanted.len()];
    for i in 1..wanted.len() {
        off[i] = off[i - 1] + (heights[i - 1] + heights[i]) / 2.0 + ROW_GAP;
    }
    let mut pools: Vec<(f64, usize)> = vec![];
    for (w, o) in wanted.iter().zip(&off) {
        pools.push((w - o, 1));
        while let [.., (a, n), (b, m)] = pools[..]
            && a > b
        {
            pools.truncate(pools.len() - 2);
            pools.push(((a * n as f64 + b * m as f64) / (n + m) as f64, n + m));
        }
    }
    let places = pools.into_iter().flat_map(|(y, n)| std::iter::repeat_n(y, n));
    places.zip(off).map(|(y, o)| y + o).collect()
}

fn finish(
    cells: &mut [Cell],
    order: &[Vec<usize>],
    boxes: usize,
    edges: &[(usize, usize)],
    joints: &[Vec<usize>],
    columns: Vec<usize>,
) -> Layout {
    let top = cells.iter().map(|c| c.y - c.size[1] / 2.0).fold(f64::INFINITY, f64::min);
    cells.iter_mut().for_each(|c| c.y -= top);
    let mut middles = vec![];
    let mut x = 0.0;
    for column in order {
        let width = column.iter().map(|&i| cells[i].size[0]).fold(0.0, f64::max);
        middles.push(x + width / 2.0);
        x += width + COLUMN_GAP;
    }
    let at = |i: usize| [middles[cells[i].column], cells[i].y];
    let centres: Vec<Point> = (0..boxes).map(at).collect();
    let path = |(&(f, t), chain): (&(usize, usize), &Vec<usize>)| {
        let side = |i: usize, s: f64| [centres[i][0] + s * cells[i].size[0] / 2.0, centres[i][1]];
        let inner = chain.iter().map(|&j| at(j));
        [side(f, 1.0)].into_iter().chain(inner).chain([side(t, -1.0)]).collect()
    };
    let paths = edges.iter().zip(joints).map(path).collect();
    let bottom = cells.iter().map(|c| c.y + c.size[1] / 2.0).fold(0.0, f64::max);
    Layout { centres, paths, extent: [x - COLUMN_GAP, bottom], columns }
}
