//! The memory of a program as planned: what it comes to, and what lies there when it is fullest.

use super::{Report, WIDTH, place};
use crate::show::{self, Table};
use crate::work;
use rambac_codegen::BufferKind;
use rambac_ir::ops::SourceKind;
use serde_json::{Value as Json, json};
use std::cmp::Reverse;

/// Buffers that are listed.
const LARGEST: usize = 10;
/// Part of the fullest moment below which buffers are told of in sum.
const SMALL: f64 = 0.005;

/// Buffers that are alike and live at the same time.
struct Alive {
    /// What makes them, and in which phase.
    by: (&'static str, &'static str),
    ty: String,
    count: usize,
    bytes: usize,
}

impl Report {
    /// The largest buffers of the arena: (index, maker's place, first step, last step).
    fn largest(&self) -> Vec<(usize, String, usize, usize)> {
        let arena = |b: &usize| self.program.buffers[*b].kind == BufferKind::Arena;
        let mut all: Vec<usize> = (0..self.plan.sizes.len()).filter(arena).collect();
        all.sort_by_key(|&b| (Reverse(self.plan.sizes[b]), b));
        let largest = all.into_iter().filter_map(|b| {
            let (first, last) = self.plan.lifetimes[b]?;
            let step = self.program.steps.get(first)?;
            let result = step.outputs.iter().position(|v| v.buffer.index() == b).unwrap_or(0);
            Some((b, place(self.graph(), step.node, result), first, last))
        });
        largest.take(LARGEST).collect()
    }

    /// Bytes of params and of states.
    fn persistent(&self) -> (usize, usize) {
        let of = |kind| {
            let all = self.program.sources.iter().filter(|s| s.kind == kind);
            all.map(|s| self.plan.sizes[s.buffer.index()]).sum()
        };
        (of(SourceKind::Param), of(SourceKind::State))
    }

    /// What of the arena lives at a step, by maker and type, the most first; the step's workspace is not in it.
    fn alive(&self, step: usize) -> Vec<Alive> {
        let mut all: Vec<Alive> = vec![];
        for (b, life) in self.plan.lifetimes.iter().enumerate() {
            let Some((first, last)) = life else { continue };
            let (buffer, maker) = (&self.program.buffers[b], self.program.steps.get(*first));
            let (Some(maker), BufferKind::Arena, true) = (maker, buffer.kind, (*first..=*last).contains(&step)) else {
                continue;
            };
            let by = (work::kind(maker), work::phase(self.scope(maker.node)));
            let (ty, bytes) = (buffer.ty.to_string(), self.plan.sizes[b]);
            match all.iter_mut().find(|a| a.by == by && a.ty == ty) {
                Some(a) => (a.count, a.bytes) = (a.count + 1, a.bytes + bytes),
                None => all.push(Alive { by, ty, count: 1, bytes }),
            }
        }
        all.sort_by_key(|a| Reverse(a.bytes));
        all
    }

    pub(super) fn print_memory(&self) {
        let p = &self.plan;
        let (params, states) = self.persistent();
        println!("\nMemory: {} at its peak", show::bytes(p.peak()));
        if let Some(why) = &self.uncounted {
            println!("  {}", show::wrapped(&format!("without the workspace of kernels: {why}"), WIDTH - 2, "  "));
        }
        let mut t = Table::new(1, &["", "bytes"]);
        t.row(["activations (the arena)".into(), show::bytes(p.arena)]);
        t.row(["  least possible in this order of steps".into(), show::bytes(p.floor)]);
        t.row(["params".into(), show::bytes(params)]);
        t.row(["states".into(), show::bytes(states)]);
        t.row(["inputs".into(), show::bytes(p.inputs)]);
        t.print();
        if let Some(s) = p.fullest() {
            let step = &self.program.steps[s];
            println!("  fullest at step {s} of {}: {}", self.program.steps.len(), place(self.graph(), step.node, 0));
        }
        self.print_alive();
        println!("\nLargest buffers");
        let mut t = Table::new(2, &["made by", "type", "bytes", "steps"]);
        for (b, made, first, last) in self.largest() {
            let ty = self.program.buffers[b].ty.to_string();
            let size = show::bytes(p.sizes[b]);
            t.row([show::fit(&made, 44), show::fit(&ty, 28), size, format!("{first}–{last}")]);
        }
        t.print();
    }

    fn print_alive(&self) {
        let Some(step) = self.plan.fullest() else { return };
        println!("\nAlive at the fullest step");
        let mut t = Table::new(2, &["made by", "type", "number", "bytes"]);
        let (mut rest, mut small) = (0, 0);
        for a in self.alive(step) {
            if (a.bytes as f64) < SMALL * self.plan.alive[step] as f64 {
                (rest, small) = (rest + a.count, small + a.bytes);
                continue;
            }
            let made = format!("{} {}", a.by.0, a.by.1);
            t.row([show::fit(&made, 44), show::fit(&a.ty, 28), a.count.to_string(), show::bytes(a.bytes)]);
        }
        let workspace = self.plan.scratch[step].1;
        if workspace > 0 {
            t.row(["workspace of the step".into(), String::new(), String::new(), show::bytes(workspace)]);
        }
        if rest > 0 {
            t.row(["smaller ones".into(), String::new(), rest.to_string(), show::bytes(small)]);
        }
        t.print();
    }

    pub(super) fn memory_json(&self) -> Vec<Json> {
        let (params, states) = self.persistent();
        let mut out = vec![json!({
            "section": "memory", "peak_bytes": self.plan.peak(), "arena_bytes": self.plan.arena,
            "floor_bytes": self.plan.floor, "param_bytes": params, "state_bytes": states,
            "input_bytes": self.plan.inputs, "fullest_step": self.plan.fullest(),
        })];
        for (b, made, first, last) in self.largest() {
            out.push(json!({
                "section": "buffer", "made_by": made, "type": self.program.buffers[b].ty.to_string(),
                "bytes": self.plan.sizes[b], "first_step": first, "last_step": last,
            }));
        }
        let fullest = self.plan.fullest();
        out.extend(fullest.into_iter().flat_map(|s| self.alive(s)).map(|a| {
            json!({
                "section": "alive", "op": a.by.0, "phase": a.by.1, "type": a.ty, "count": a.count, "bytes": a.bytes,
            })
        }));
        out
    }
}
