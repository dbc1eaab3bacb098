//! How a program's steps run on a GPU: the form of each at the given sizes with its reason, kernels, workspace.

use crate::error::{Result, warn, wrap};
use crate::show::{self, Table};
use crate::work;
use rambac_codegen::Program;
use rambac_codegen::cuda::join::join;
use rambac_codegen::cuda::ops::{Site, forms};
use rambac_codegen::cuda::tune;
use rambac_codegen::cuda::{Arch, Cache, Call, Form, GpuProgram, GpuStep, Kernel, Target};
use rambac_codegen::nvrtc::{Nvrtc, Usage};
use rambac_ir::{Bindings, Cost};
use rambac_runtime::gpu::Code;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Lines are this wide at most.
const WIDTH: usize = 98;

/// A step, as it runs at the given sizes.
pub struct Chosen {
    step: usize,
    pub op: &'static str,
    pub form: &'static str,
    why: String,
    measured: bool,
    others: usize,
    pub kernels: Vec<String>,
    pub products: usize,
    workspace: usize,
    pub cost: Cost,
}

impl Chosen {
    fn chosen(&self) -> &'static str {
        if self.measured { "measured" } else { "predicted" }
    }
}

/// A kernel and the steps that launch it.
pub struct Used {
    pub kernel: Kernel,
    steps: usize,
    pub usage: Option<Usage>,
}

/// See the module's comment.
pub struct Forms {
    target: Target,
    pub chosen: Vec<Chosen>,
    /// Steps without a kernel: (op, why) and their number.
    pub none: Vec<(&'static str, String, usize)>,
    pub kernels: BTreeMap<String, Used>,
    compiled: bool,
}

impl Forms {
    /// Chooses; with `compile` also compiles the kernels of the chosen forms.
    pub fn new(p: &Program, costs: &[Cost], dims: &Bindings, arch: Arch, compile: bool) -> Result<Forms> {
        let target = Target::of(arch);
        let mut f = Forms { target, chosen: vec![], none: vec![], kernels: BTreeMap::new(), compiled: compile };
        let mut steps = vec![];
        let (p, joined) = join(Arc::new(p.clone()), &f.target);
        let cache = Cache::standard();
        let measured = cache.devices();
        for (i, s) in p.steps.iter().enumerate() {
            let site = Site { inputs: &s.inputs, outputs: &s.outputs, target: &f.target, joined: &joined[i] };
            let step = match forms(&s.op, &site) {
                Ok(forms) => GpuStep { forms: Arc::new(forms), joined: joined[i].clone() },
                Err(why) => {
                    let (op, why) = (work::kind(s), why.to_string());
                    match f.none.iter_mut().find(|n| (n.0, &n.1) == (op, &why)) {
                        Some(n) => n.2 += 1,
                        None => f.none.push((op, why, 1)),
                    }
                    continue;
                }
            };
            // What was measured comes before what is predicted.
            let plain = measured.iter().filter(|_| joined[i].alone());
            let known = plain.into_iter().find_map(|d| tune::chosen(s, &f.target, dims, d, &cache).transpose());
            let form = match known.transpose().map_err(wrap)? {
                Some((_, form)) => form,
                None => step.form(dims).map_err(wrap)?.clone(),
            };
            f.add(i, work::kind(s), &form, step.forms.len() - 1, dims, costs[i])?;
            steps.push(GpuStep { forms: Arc::new(vec![form]), joined: joined[i].clone() });
        }
        if compile {
            f.compile(&p, steps)?;
        }
        Ok(f)
    }

    fn add(
        &mut self,
        i: usize,
        op: &'static str,
        form: &Form,
        others: usize,
        dims: &Bindings,
        cost: Cost,
    ) -> Result<()> {
        let workspace = form.workspace_bytes(dims).map_err(wrap)?;
        for l in form.launches() {
            let new = || Used { kernel: l.kernel.clone(), steps: 0, usage: None };
            self.kernels.entry(l.kernel.name.clone()).or_insert_with(new).steps += 1;
        }
        self.chosen.push(Chosen {
            step: i,
            op,
            form: form.name,
            why: form.why.clone(),
            measured: form.measured,
            others,
            kernels: form.launches().map(|l| l.kernel.name.clone()).collect(),
            products: form.calls.iter().filter(|c| matches!(c, Call::Gemm(_))).count(),
            workspace,
            cost,
        });
        Ok(())
    }

    fn compile(&mut self, p: &Program, steps: Vec<GpuStep>) -> Result<()> {
        let nvrtc = Nvrtc::open_any().map_err(wrap)?;
        let kernels = self.kernels.values().map(|u| u.kernel.clone()).collect();
        let gpu = GpuProgram { program: Arc::new(p.clone()), target: self.target.clone(), steps, kernels };
        let cache = Cache::standard();
        let code = Code::compile(&nvrtc, &[&gpu], &cache).map_err(wrap)?;
        if let Some(t) = cache.trouble() {
            warn(t);
        }
        for (name, u) in &mut self.kernels {
            u.usage = code.0.get(name).and_then(|c| c.usage.first().cloned());
        }
        Ok(())
    }

    /// Blocks that fit on a multiprocessor.
    pub fn blocks(&self, u: &Used) -> Option<usize> {
        Some(u.kernel.fit(u.usage.as_ref()?, &self.target))
    }

    pub fn print(&self) {
        let t = &self.target;
        println!("\nOn {}: {} multiprocessors, {} of shared memory each", t.arch, t.sms, show::bytes(t.shared_per_sm));
        // Steps that run alike are one line.
        let mut lines: Vec<(Vec<&Chosen>, Cost)> = vec![];
        for c in &self.chosen {
            let same = |l: &&mut (Vec<&Chosen>, Cost)| (l.0[0].op, l.0[0].form, &l.0[0].why) == (c.op, c.form, &c.why);
            match lines.iter_mut().find(same) {
                Some(l) => {
                    l.0.push(c);
                    l.1 = l.1 + c.cost;
                }
                None => lines.push((vec![c], c.cost)),
            }
        }
        let head =
            ["op", "form", "chosen", "steps", "other forms", "kernels", "products", "workspace", "FLOPs", "bytes"];
        let mut table = Table::new(3, &head);
        for (all, cost) in &lines {
            let kernels: std::collections::BTreeSet<&String> = all.iter().flat_map(|c| &c.kernels).collect();
            let workspace = all.iter().map(|c| c.workspace).max().unwrap_or(0);
            let products: usize = all.iter().map(|c| c.products).sum();
            table.row([
                all[0].op.to_string(),
                all[0].form.to_string(),
                all[0].chosen().to_string(),
                all.len().to_string(),
                all[0].others.to_string(),
                kernels.len().to_string(),
                products.to_string(),
                if workspace == 0 { "-".into() } else { show::bytes(workspace) },
                show::si(cost.flops, ""),
                show::si(cost.bytes, "B"),
            ]);
        }
        table.print();
        println!("\nWhy these forms");
        for (all, _) in &lines {
            let text = format!("{} {}: {}", all[0].op, all[0].form, all[0].why);
            println!("  {}", show::wrapped(&text, WIDTH - 4, "    "));
        }
        if !self.none.is_empty() {
            println!("\nCan't run on {}", t.arch);
            for (op, why, n) in &self.none {
                println!("  {}", show::wrapped(&format!("{n} {op}: {why}"), WIDTH - 4, "    "));
            }
        }
        self.print_kernels();
    }

    fn print_kernels(&self) {
        println!("\nKernels");
        let head = ["kernel", "steps", "threads", "shared", "registers", "spilled", "blocks/SM", "counted on"];
        let mut table = Table::new(1, &head);
        for (name, u) in &self.kernels {
            let of = |f: fn(&Usage) -> u32| u.usage.as_ref().map_or("?".to_string(), |u| f(u).to_string());
            let shared = u.usage.as_ref().map_or(0, |u| u.shared) + u.kernel.shared;
            table.row([
                show::fit(name, 52),
                u.steps.to_string(),
                u.kernel.threads.to_string(),
                shared.to_string(),
                of(|u| u.registers),
                of(|u| u.spill_stores + u.spill_loads),
                self.blocks(u).map_or("?".into(), |b| b.to_string()),
                u.kernel.blocks_per_sm.to_string(),
            ]);
        }
        table.print();
        if !self.compiled {
            println!("  --compile tells registers and spills, and static shared memory");
        }
    }

    pub fn json(&self) -> Vec<Json> {
        let arch = self.target.arch.name();
        let form = |c: &Chosen| {
            json!({
                "section": "form", "target": arch, "step": c.step, "op": c.op, "form": c.form, "chosen": c.chosen(), "why": c.why,
                "other_forms": c.others, "kernels": c.kernels, "products": c.products, "workspace_bytes": c.workspace,
                "flops": c.cost.flops, "bytes": c.cost.bytes,
            })
        };
        let none = |(op, why, n): &(&str, String, usize)| json!({ "section": "no_kernel", "target": arch, "op": op, "reason": why, "steps": n });
        let kernel = |(name, u): (&String, &Used)| {
            let usage = u.usage.as_ref();
            json!({
                "section": "kernel", "target": arch, "kernel": name, "steps": u.steps, "threads": u.kernel.threads,
                "dynamic_shared": u.kernel.shared, "shared": usage.map(|u| u.shared),
                "registers": usage.map(|u| u.registers), "spill_stores": usage.map(|u| u.spill_stores),
                "spill_loads": usage.map(|u| u.spill_loads), "blocks_per_sm": self.blocks(u),
                "blocks_counted_on": u.kernel.blocks_per_sm,
            })
        };
        self.chosen.iter().map(form).chain(self.none.iter().map(none)).chain(self.kernels.iter().map(kernel)).collect()
    }
}
