//! Findings and counts as text.

use crate::check::{Finding, place_name};
use crate::count::Counts;
use std::fmt::Write;

/// `1,234,567`
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Findings with their places.  `files` are those of the module.
pub fn findings(all: &[Finding], files: &[(u32, String)]) -> String {
    let mut out = String::new();
    for f in all {
        let times = if f.count > 1 { format!(" ({} times)", grouped(f.count)) } else { String::new() };
        let _ = writeln!(out, "{}: {}{times}", f.kind.name(), f.message);
        let [x, y, z] = f.block;
        let [tx, ty, tz] = f.thread;
        let _ = writeln!(out, "    at {}, {} in {}", place_name(&f.place, files), f.mnemonic, f.kernel);
        let _ = write!(out, "    block ({x}, {y}, {z}), thread ({tx}, {ty}, {tz})");
        if let Some(a) = f.address {
            let _ = write!(out, ", address 0x{a:x}");
        }
        out.push('\n');
        if let Some(o) = &f.other {
            let _ = writeln!(out, "    the other access: {}", place_name(o, files));
        }
    }
    out
}

/// Counts of a launch as tables.
pub fn counts(c: &Counts) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{:<22} {:>16} {:>18}", "instructions", "of warps", "of threads");
    for (class, (warps, threads)) in &c.classes {
        let _ = writeln!(out, "  {:<20} {:>16} {:>18}", class.name(), grouped(*warps), grouped(*threads));
    }
    let _ =
        writeln!(out, "  {:<20} {:>16} {:>18}", "in all", grouped(c.warp_instructions), grouped(c.thread_instructions));
    let _ = writeln!(
        out,
        "{:<22} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "global memory", "B read", "sectors", "B written", "sectors", "atomics"
    );
    for (name, t) in &c.buffers {
        if *t == Default::default() {
            continue;
        }
        let all = [t.read_bytes, t.read_sectors, t.write_bytes, t.write_sectors, t.atomics].map(grouped);
        let _ =
            writeln!(out, "  {:<20} {:>12} {:>12} {:>12} {:>12} {:>12}", name, all[0], all[1], all[2], all[3], all[4]);
    }
    let _ = writeln!(
        out,
        "shared memory: {} passes, {} of them by bank conflicts ({:.1} %)",
        grouped(c.shared_passes),
        grouped(c.shared_conflicts),
        100.0 * c.shared_conflicts as f64 / c.shared_passes.max(1) as f64
    );
    for h in &c.conflicting {
        let (passes, more) = (grouped(h.count.passes), grouped(h.count.conflicts));
        let _ = writeln!(out, "    {more} of {passes} at {}: {}", h.at, h.mnemonic);
    }
    let _ = writeln!(out, "barriers: {} (passed by warps)", grouped(c.barriers));
    if c.tensor_flops > 0 {
        let _ = writeln!(out, "tensor cores: {} FLOP", grouped(c.tensor_flops));
    }
    out
}
