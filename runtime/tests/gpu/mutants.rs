//! Seeded defects in the templates: `// MUT name: code` replaces the line above it.  Each must be found, by a check of the
//! simulator or by comparison with the op's definition.

use crate::harness::Case;
use crate::rig::{NOT_HERE, Rig};
use crate::{attend, conv, elementwise, layer, norm, pages, products, rows, scan, vocabulary};
use rambac_codegen::cuda::headers::HEADERS;
use rayon::prelude::*;

pub const ALL: &[Case] = &[("seeded_defects", every_defect)];

type Check = fn(&Rig) -> Result<(), String>;

/// Templates and the checks that must find what is wrong with them, one or the other.
const FAMILIES: &[(&str, &[Check])] = &[
    ("attend.cuh", &[attend::quick_query_tiles, vocabulary::quick_joint]),
    ("chunk_softmax.cuh", &[attend::quick_query_tiles, vocabulary::quick_joint]),
    ("attend_chunks.cuh", &[attend::quick_chunk_major, attend::quick_neighbours]),
    ("attend_tile_hopper.cuh", &[attend::quick_neighbours]),
    ("attend_grad.cuh", &[attend::quick_grad, vocabulary::quick_joint]),
    ("attend_chunks_hopper.cuh", &[attend::quick_hopper]),
    ("inverted_index.cuh", &[attend::quick_selection_grad]),
    ("select.cuh", &[attend::quick_selection]),
    ("select_scan.cuh", &[pages::quick_scan]),
    ("pages.cuh", &[pages::quick_attention]),
    ("few_rows.cuh", &[products::quick, layer::quick]),
    ("select_grad.cuh", &[attend::quick_selection_grad]),
    ("attention.cuh", &[vocabulary::quick_ranges]),
    ("score.cuh", &[vocabulary::quick_scores]),
    ("choose.cuh", &[vocabulary::quick_choice]),
    ("mix.cuh", &[vocabulary::quick_mix]),
    ("any_size.cuh", &[vocabulary::quick_any]),
    ("map_each.cuh", &[elementwise::quick_each]),
    ("move.cuh", &[elementwise::quick_append]),
    ("embedding.cuh", &[rows::quick_embedding]),
    ("cross_entropy.cuh", &[rows::quick_loss]),
    ("conv.cuh", &[conv::quick]),
    ("slots.cuh", &[conv::quick]),
    ("rms_norm.cuh", &[norm::quick]),
    ("rotary.cuh", &[norm::quick_rotary]),
    ("mma.cuh", &[scan::quick_forward]),
    ("scan.cuh", &[scan::quick_forward]),
    ("scan_backward.cuh", &[scan::quick_grad]),
    ("scan_hopper.cuh", &[scan::quick_hopper, scan::quick_grad_hopper]),
    ("scan_grad_hopper.cuh", &[scan::quick_grad_hopper]),
    ("scan_step.cuh", &[scan::quick_step, layer::quick]),
];

struct Mutant {
    header: &'static str,
    name: String,
    text: String,
    checks: &'static [Check],
}

fn mutation(line: &str) -> Option<(&str, &str)> {
    line.trim_start().strip_prefix("// MUT ")?.split_once(": ")
}

fn mutants() -> Vec<Mutant> {
    let mut all = vec![];
    for &(header, checks) in FAMILIES {
        let text = HEADERS.iter().find(|h| h.0 == header).expect("a family names a template").1;
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let Some((name, code)) = mutation(line) else { continue };
            let at = (0..i).rev().find(|&k| mutation(lines[k]).is_none()).expect("code above a defect");
            let mut lines = lines.clone();
            lines[at] = code;
            all.push(Mutant { header, name: name.into(), text: lines.join("\n"), checks });
        }
    }
    all
}

fn every_defect(rig: &Rig) -> Result<String, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} defects: they are for the simulator"));
    }
    // A defect is only found if the template without it passes; this compiles the kernels, too.
    for (header, checks) in FAMILIES {
        checks.iter().try_for_each(|c| c(rig)).map_err(|e| format!("{header} fails as it is: {e}"))?;
    }
    let all = mutants();
    let judge = |m: &Mutant| -> Result<(bool, String), String> {
        let with = rig.with_defect(m.header, m.text.clone())?;
        let how = m.checks.iter().try_for_each(|c| c(&with));
        let first = how.as_ref().err().map(|e| e.lines().next().unwrap_or_default().to_string());
        match first {
            Some(e) if e.contains("does not compile") => Err(format!("{} {}: {}", m.header, m.name, how.unwrap_err())),
            Some(e) => Ok((true, format!("    found  {:<26} {:<20} {e:.110}", m.header, m.name))),
            None => Ok((false, format!("    MISSED {:<26} {}", m.header, m.name))),
        }
    };
    let verdicts = all.par_iter().map(judge).collect::<Result<Vec<_>, _>>()?;
    let found = verdicts.iter().filter(|v| v.0).count();
    let lines: Vec<&str> = verdicts.iter().map(|v| v.1.as_str()).collect();
    let text = format!("\n{}\n    {found} of {} seeded defects found", lines.join("\n"), all.len());
    if found == all.len() { Ok(text) } else { Err(text) }
}
