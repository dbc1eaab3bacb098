//! Decoding over pages: choice of chunks among landmarks, and attention to keys and values, that a table finds.

use crate::attend::{check_attend, check_selection, shape};
use crate::harness::Case;
use crate::rig::Rig;
use rambac_codegen::cuda::Arch;
use rambac_ir::DType::{BF16, F16, F32};
use rambac_ir::ops::*;
use rambac_ir::testing::Rng;

pub const ALL: &[Case] = &[
    ("selection_in_pages", selection),
    ("selection_in_pages_of_drawn_shapes", drawn_selections),
    ("chunk_attention_in_pages", attention),
    ("chunk_attention_in_pages_of_drawn_shapes", drawn_attention),
];

fn selection(rig: &Rig) -> Result<String, String> {
    use Weighting::{One, Sigmoid, Softmax, StickBreaking};
    let mut rng = Rng(21);
    for (dtype, stored, sizes, chunk, k, start, order, rule) in [
        // A token of each of three sequences: of different lengths, of which one has no chunk.
        (F32, BF16, [3, 1, 256, 1, 64], 4, 8, vec![1000, 517, 3], Order::Recent, StickBreaking),
        (BF16, BF16, [2, 1, 384, 2, 128], 1, 5, vec![383, 129], Order::Score, Softmax),
        (F32, F32, [1, 3, 128, 1, 32], 2, 16, vec![140], Order::Recent, Sigmoid),
        // More slots than a tile has landmarks; a query wider than a warp's loads, and one that ends within them.
        (F16, F16, [1, 2, 256, 1, 48], 1, 40, vec![254], Order::Recent, StickBreaking),
        (F32, BF16, [1, 1, 128, 1, 520], 1, 3, vec![128], Order::Score, One),
    ] {
        let case = check_selection(&mut rng, (dtype, sizes, chunk, k, start, order, rule)).in_pages(stored);
        let seen = rig.check(&case)?;
        let name = seen.program.steps[0].forms[0].name;
        if name != "scan" {
            return Err(format!("{name} was chosen for {} tokens", sizes[1]));
        }
        for form in ["split", "select_64"] {
            rig.check(&case.clone().in_form(form))?;
        }
        // All landmarks are never there at once: the same, page by page and several together.
        let pages = sizes[0] * sizes[2] / 128;
        for (form, parts) in [("scan", pages), ("split", pages), ("parts", pages), ("parts", pages.div_ceil(2))] {
            rig.check(&case.clone().in_parts(parts).in_form(form))?;
        }
        if k <= 16 && sizes[4] <= 128 {
            rig.check(&case.clone().in_form("select_128"))?;
        }
    }
    // Tiles of tokens, by warps and by warpgroups; what no tile takes.
    let many = (BF16, [1, 200, 128, 1, 64], 3, 8, vec![5], Order::Recent, StickBreaking);
    rig.check(&check_selection(&mut rng, many.clone()).in_pages(BF16))?;
    rig.check(&check_selection(&mut rng, many).in_pages(BF16).on(Arch::Sm90a))?;
    // Landmarks that are not all there: by warps and by warpgroups.
    let long = (BF16, [2, 140, 384, 1, 64], 3, 8, vec![1000, 500], Order::Recent, StickBreaking);
    let long = check_selection(&mut rng, long).in_pages(BF16).in_parts(4).sms(4);
    for arch in [Arch::Sm80, Arch::Sm90a] {
        let seen = rig.check(&long.clone().on(arch))?;
        let name = seen.program.steps[0].forms[0].name;
        if name != "parts" {
            return Err(format!("{name} was chosen for landmarks that come in parts"));
        }
    }
    let odd = (F32, [2, 3, 128, 2, 7], 3, 4, vec![300, 20], Order::Recent, StickBreaking);
    let odd = check_selection(&mut rng, odd).in_pages(BF16).in_form("any_size");
    rig.check(&odd)?;
    rig.check(&odd.in_parts(2))?;
    // What a decoding step of the 370M model over 512 chunks moves.
    let long = (F32, [1, 1, 512, 1, 1024], 1, 8, vec![511], Order::Recent, StickBreaking);
    let seen = rig.check(&check_selection(&mut rng, long).in_pages(BF16))?;
    let least = (511 * 1024 * 2) as f64;
    let traffic = seen.counts.iter().flat_map(|c| c.buffers.iter().map(|b| &b.1));
    let moved: u64 = traffic.map(|t| 32 * (t.read_sectors + t.write_sectors)).sum();
    if moved as f64 > 1.3 * least {
        return Err(format!("{moved} bytes are moved where {least} must be"));
    }
    Ok(format!(": {:.2} of the least bytes", moved as f64 / least))
}

/// One fast case, for seeded defects.
pub fn quick_scan(rig: &Rig) -> Result<(), String> {
    let mut rng = Rng(25);
    let sizes = [2, 3, 256, 1, 64];
    let case = (F32, sizes, 1, 6, vec![250, 2], Order::Recent, Weighting::StickBreaking);
    let case = check_selection(&mut rng, case).in_pages(BF16);
    rig.check(&case)?;
    rig.check(&case.in_parts(4)).map(drop)
}

/// As [`quick_scan`], of attention.
pub fn quick_attention(rig: &Rig) -> Result<(), String> {
    let s = shape(F32, [2, 2, 5, 0], [1, 4], 32, 32, 3);
    rig.check(&check_attend(&mut Rng(26), &s, false).in_pages(BF16)).map(drop)?;
    quick_scan(rig)
}

fn drawn_selections(rig: &Rig) -> Result<String, String> {
    const SHAPES: usize = 10;
    let mut rng = Rng(22);
    for _ in 0..SHAPES {
        let (dtype, stored) = rng.pick(&[(F32, BF16), (F32, F32), (BF16, BF16), (F32, F16)]);
        let (n, l, c) = (1 + rng.below(3), 1 + rng.below(7), 128 * (1 + rng.below(3)));
        let (h, r) = (1 + rng.below(2), 8 * (1 + rng.below(20)));
        let chunk = 1 + rng.below(5);
        let start = (0..n).map(|_| rng.below(c * chunk) as i32).collect();
        let order = rng.pick(&[Order::Recent, Order::Score]);
        let case = (dtype, [n, l, c, h, r], chunk, 1 + rng.below(12), start, order, Weighting::StickBreaking);
        rig.check(&check_selection(&mut rng, case).in_pages(stored))?;
    }
    Ok(format!(": {SHAPES} shapes"))
}

fn attention(rig: &Rig) -> Result<String, String> {
    let mut rng = Rng(23);
    for (s, stored, form) in [
        (shape(BF16, [2, 1, 9, 0], [1, 16], 64, 64, 8), BF16, "pairs"),
        (shape(F32, [3, 1, 9, 0], [1, 4], 64, 64, 8), BF16, "pairs"),
        (shape(F32, [1, 3, 5, 1], [2, 4], 32, 32, 3), F32, "pairs"),
        (shape(F32, [2, 9, 16, 0], [1, 16], 64, 64, 4), BF16, "query_tile"),
        (shape(BF16, [1, 21, 20, 2], [2, 4], 32, 32, 3), BF16, "query_tile"),
        (shape(F32, [1, 3, 7, 1], [1, 5], 128, 96, 2), F16, "query_tile"),
        (shape(F32, [2, 3, 7, 1], [2, 5], 24, 10, 2), BF16, "any_size"),
        (shape(F16, [2, 2, 4, 1], [1, 2], 9, 3, 2), F16, "any_size"),
    ] {
        rig.check(&check_attend(&mut rng, &s, false).in_pages(stored).in_form(form))?;
    }
    // Hopper has no form of its own for pages.
    let s = shape(BF16, [1, 40, 3, 0], [1, 16], 64, 64, 2);
    rig.check(&check_attend(&mut rng, &s, false).in_pages(BF16).on(Arch::Sm90a))?;
    // What one token of four sequences moves: its chunks once.
    let s = shape(F32, [4, 1, 40, 0], [1, 8], 64, 64, 8);
    let seen = rig.check(&check_attend(&mut rng, &s, false).in_pages(BF16))?;
    // A device counts nothing.
    let Some(c) = seen.counts.first() else { return Ok(String::new()) };
    let share = c.shared_conflicts as f64 / c.shared_passes as f64;
    if share > 0.02 {
        return Err(format!("{share:.3} of shared accesses conflict"));
    }
    Ok(format!(": {:.2}% of shared accesses conflict", 100.0 * share))
}

fn drawn_attention(rig: &Rig) -> Result<String, String> {
    const SHAPES: usize = 6;
    let mut rng = Rng(24);
    for _ in 0..SHAPES {
        let (dtype, stored) = rng.pick(&[(F32, BF16), (F32, F32), (BF16, BF16), (F32, F16)]);
        let sizes = [1 + rng.below(3), 1 + rng.below(12), 1 + rng.below(9), rng.below(3)];
        let heads = [1 + rng.below(2), 1 + rng.below(17)];
        let (d, chunk) = (rng.pick(&[16, 32, 48]), rng.pick(&[16, 32, 48, 80]));
        let s = shape(dtype, sizes, heads, d, chunk, 1 + rng.below(6));
        for form in ["query_tile", "pairs"] {
            rig.check(&check_attend(&mut rng, &s, false).in_pages(stored).in_form(form))?;
        }
    }
    Ok(format!(": {SHAPES} shapes"))
}
