//! Runs one op on the simulator, or on the device that `RAMBAC_TEST_DEVICE` names, and compares it with its definition.
//!
//! The simulator runs it under several schedules and must have no finding; a device runs it several times and must give the
//! same bits.

use rambac_codegen::cuda::compile::OPTIONS;
use rambac_codegen::cuda::headers::included;
use rambac_codegen::cuda::pages::{LANDMARK_PAGE, LANDMARK_PAGES, LANDMARK_TABLE, LANDMARK_WINDOW, LANDMARKS_AWAY};
use rambac_codegen::cuda::{Arch, Cache, Form, GpuProgram, Kernel, Target, emit, paged};
use rambac_codegen::libraries::installed;
use rambac_codegen::nvrtc::{Compiled, Nvrtc, NvrtcError};
use rambac_codegen::{Kernels, lower_for};
use rambac_cuda::{CUBLASLT, CudaDevice};
use rambac_ir::ops::Op;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, DType, Dim, HostArray, Ty, Value};
use rambac_passes::mixed::halves;
use rambac_runtime::gpu::{Bytes, Code, Device, GpuError, Machine, Pager, Placement, archs};
use rambac_simulator::Options as Schedule;
use rambac_simulator::count::Counts;
use rambac_simulator::device::Simulator;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// Names a device in place of the simulator: `cuda:0`.
pub const DEVICE: &str = "RAMBAC_TEST_DEVICE";

/// A device under test.
pub trait Tested: Device {
    /// Of every launch since the last call, where the device counts.
    fn counts(&mut self) -> Vec<Counts> {
        vec![]
    }
}

impl Tested for Simulator {
    fn counts(&mut self) -> Vec<Counts> {
        self.take_counts()
    }
}

impl Tested for CudaDevice {}

/// The compiler and what it has compiled.
pub struct Rig {
    pub nvrtc: Nvrtc,
    /// The number of a CUDA device; `None`: the simulator.
    pub cuda: Option<usize>,
    /// Its compute capability.
    capability: Option<(u32, u32)>,
    /// Open all the time: the driver would make and end the device's context for each check.
    _open: Option<Mutex<Box<dyn Tested>>>,
    /// A template with a defect: its name and text.
    defect: Option<(&'static str, String)>,
    compiled: Mutex<HashMap<(String, Arch), Compiled>>,
    /// What earlier runs compiled of the same texts.
    cache: Cache,
}

/// Compares a graph's outputs with what its definition gives: differences as a part of each output's largest magnitude.
pub fn near(want: &[(String, HostArray)], got: &[HostArray], tolerance: f64) -> Result<(), String> {
    for ((name, w), g) in want.iter().zip(got) {
        let most = (0..w.len()).map(|i| w.get(i).abs()).fold(1e-30, f64::max);
        let far = |&i: &usize| {
            let off = (w.get(i) - g.get(i)).abs();
            off.is_nan() || off > tolerance * most
        };
        if let Some(i) = (0..w.len()).find(far) {
            return Err(format!("{name}, element {i}: {}, {} wanted", g.get(i), w.get(i)));
        }
    }
    Ok(())
}

/// An operand: its type with symbols, and its value.
#[derive(Clone)]
pub struct Input {
    pub ty: Ty,
    pub value: HostArray,
    /// Given as a part of wider rows: axes from this one on are a row.
    pub wide: Option<usize>,
}

/// One op on given operands.
#[derive(Clone)]
pub struct Check {
    pub op: Op,
    pub inputs: Vec<Input>,
    pub dims: Bindings,
    pub arch: Arch,
    /// Multiprocessors of the target, where the choice of a form is meant to see others.
    pub sms: Option<usize>,
    /// Largest difference from the definition, as a part of the largest magnitude of each result.
    pub tolerance: f64,
    /// The form to run, whatever its conditions; else the one that would be chosen.
    pub form: Option<&'static str>,
    /// Elements of the pages that keys, values or landmarks lie in, if they do.
    pub pages: Option<DType>,
    /// Parts in which pages of landmarks come; 0: all are there.
    pub parts: usize,
    /// Results are read in bf16, too, where the op's kernels write them so (`Halves::copies`).
    pub copies: bool,
}

/// How the error of a check begins whose code the device does not run: the test is then counted as skipped.
pub const NOT_HERE: &str = "this device does not run";

/// What was seen.
pub struct Seen {
    pub program: GpuProgram,
    pub code: Code,
    /// Of every launch, in order, where the device counts.
    pub counts: Vec<Counts>,
    /// The largest difference, as `tolerance` counts it.
    pub worst: f64,
}

/// Schedules: warps and blocks in order or mixed, asynchronous copies early or late.
pub fn schedules() -> Vec<Schedule> {
    let o = Schedule::default();
    vec![
        Schedule { seed: 0, lazy: false, ..o },
        Schedule { seed: 1, lazy: true, ..o },
        Schedule { seed: 2, lazy: false, ..o },
    ]
}

/// Numbers in `low..high`, rounded to the type.
pub fn random(rng: &mut Rng, ty: &Ty, dims: &Bindings, low: f64, high: f64) -> HostArray {
    let ty = ty.bind(dims).expect("the test binds every symbol");
    let n = ty.elements();
    let mut a = HostArray::from_f64(&ty, (0..n).map(|_| rng.uniform(low, high)).collect());
    a.round_to_dtype();
    a
}

impl Input {
    pub fn new(rng: &mut Rng, ty: Ty, dims: &Bindings, low: f64, high: f64) -> Input {
        let value = random(rng, &ty, dims, low, high);
        Input { ty, value, wide: None }
    }
    pub fn of(ty: Ty, value: HostArray) -> Input {
        Input { ty, value, wide: None }
    }
    /// See [`Input::wide`].
    pub fn wide(mut self, axis: usize) -> Input {
        self.wide = Some(axis);
        self
    }
}

/// Beside what else these tests build: a key says everything that decides what comes out.
pub fn cache() -> Cache {
    Cache::at(concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels"))
}

/// Elements before and after a row that is a part of a wider one; multiples of 8 keep vectors whole.
const MARGIN: [usize; 2] = [8, 16];

impl Rig {
    /// # Errors
    /// There is no such device.
    pub fn new(nvrtc: Nvrtc) -> Result<Rig, String> {
        let named = std::env::var(DEVICE).ok().filter(|v| !v.is_empty() && v != "simulator");
        let number = |v: &str| v.strip_prefix("cuda:").and_then(|i| i.parse().ok());
        let cuda = match named {
            Some(v) => Some(number(&v).ok_or_else(|| format!("{DEVICE}={v}: it is simulator, cuda:0, cuda:1, …"))?),
            None => None,
        };
        let compiled = Mutex::new(HashMap::new());
        let mut rig = Rig { nvrtc, cuda, capability: None, _open: None, defect: None, compiled, cache: cache() };
        let open = rig.device(Schedule::default())?;
        rig.capability = open.capability();
        rig._open = Some(Mutex::new(open));
        Ok(rig)
    }

    /// A device under a schedule, as far as it knows schedules.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn device(&self, o: Schedule) -> Result<Box<dyn Tested>, String> {
        Ok(match self.cuda {
            None => Box::new(Simulator::strict(o)),
            Some(i) => {
                let libraries = installed(CUBLASLT, "RAMBAC_CUBLASLT");
                Box::new(CudaDevice::open(i, &libraries).map_err(|e| e.to_string())?)
            }
        })
    }

    /// A machine under a schedule, as far as the device knows schedules.
    pub fn machine(&self, o: Schedule, placement: Placement) -> Result<Machine<Box<dyn Tested>>, String> {
        Ok(Machine::new(self.device(o)?, placement))
    }

    /// What code is made for where a test does not say: of a device the best that it runs.
    pub fn arch(&self) -> Arch {
        archs(self.capability).first().copied().unwrap_or(Arch::Sm80)
    }

    /// Whether the device runs code of an architecture.
    pub fn runs(&self, arch: Arch) -> bool {
        archs(self.capability).contains(&arch)
    }

    /// A rig whose kernels are made of a template with a defect; kernels without it are not compiled again.
    pub fn with_defect(&self, header: &'static str, text: String) -> Result<Rig, String> {
        let nvrtc = Nvrtc::open(&self.nvrtc.path).map_err(|e| e.to_string())?;
        let mut compiled = self.compiled.lock().unwrap().clone();
        compiled.retain(|(source, _), _| included(source).iter().all(|h| h.0 != header));
        let (cuda, capability, compiled) = (self.cuda, self.capability, Mutex::new(compiled));
        Ok(Rig { nvrtc, cuda, capability, _open: None, defect: Some((header, text)), compiled, cache: cache() })
    }

    fn compile_one(&self, k: &Kernel, target: &Target) -> Result<Compiled, String> {
        let failed = |e: NvrtcError| format!("{e}\n{}", k.source);
        let kept = || self.cache.compile(&self.nvrtc, k, target.arch).map_err(|e| e.to_string());
        let Some((name, text)) = &self.defect else { return kept() };
        // What has no defect in it is known from before.
        if included(&k.source).iter().all(|h| h.0 != *name) {
            return kept();
        }
        let headers: Vec<(&str, &str)> =
            included(&k.source).into_iter().map(|h| if h.0 == *name { (h.0, text.as_str()) } else { h }).collect();
        let arch = format!("--gpu-architecture={}", target.arch);
        let options: Vec<&str> = std::iter::once(arch.as_str()).chain(OPTIONS.iter().copied()).collect();
        self.nvrtc.compile(&format!("{}.cu", k.name), &k.source, &headers, &options).map_err(failed)
    }

    /// Compiles kernels, each text once.
    pub fn compile(&self, kernels: &[Kernel], target: &Target) -> Result<Code, String> {
        let mut all = BTreeMap::new();
        for k in kernels {
            let key = (k.source.clone(), target.arch);
            let known = self.compiled.lock().unwrap().get(&key).cloned();
            let c = match known {
                Some(c) => c,
                None => self.compile_one(k, target)?,
            };
            // What a defect makes of registers is not what it is there for.
            for u in c.usage.iter().filter(|_| self.defect.is_none()) {
                k.hold_to(u, target).map_err(|e| format!("{e}\n{}", k.source))?;
            }
            self.compiled.lock().unwrap().insert(key, c.clone());
            all.insert(k.name.clone(), c);
        }
        Ok(Code(all))
    }

    /// Runs `c` under every schedule: within tolerance of the definition, no finding, always the same bits.
    pub fn check(&self, c: &Check) -> Result<Seen, String> {
        if !self.runs(c.arch) {
            return Err(format!("{NOT_HERE} code for {}", c.arch));
        }
        let (graph, given) = c.graph();
        let want = c.want();
        let mut target = Target::of(c.arch);
        target.sms = c.sms.unwrap_or(target.sms);
        let (dims, states, mut parts) = c.pools();
        let mut program = lower_for(&graph, Kernels::Gpu);
        if let Some(stored) = c.pages {
            let names: Vec<&str> = states.iter().map(|s| s.0).filter(|n| n.starts_with('x')).collect();
            program = paged(program, &names, stored).map_err(|e| e.to_string())?;
        }
        let mut program = emit(program, target).map_err(|e| e.to_string())?;
        if let Some(name) = c.form {
            let op = program.program.steps.iter().position(|s| s.op.mnemonic() == c.op.mnemonic());
            let forms = Arc::make_mut(&mut program.steps[op.ok_or("the op is no step")?].forms);
            forms.retain(|f| f.name == name);
            let form = forms.first_mut().ok_or_else(|| format!("there is no form {name}\n{}", c.describe()))?;
            form.when.clear();
        }
        let inputs: Vec<(String, Bytes)> = given.into_iter().filter(|(n, _)| states.iter().all(|s| s.0 != n)).collect();
        let states: Vec<(String, Bytes)> = states.into_iter().map(|(n, b)| (n.to_string(), b)).collect();
        let (program, code, outputs, counts) =
            self.run_in(program, &dims, &states, &inputs, &mut parts).map_err(|e| format!("{e}\n{}", c.describe()))?;
        let (results, copies) = outputs.split_at(want.len());
        let worst = c.compare(results, &want)?;
        for (&i, copy) in c.copied().iter().zip(copies) {
            let mut rounded = HostArray::float(DType::BF16, &results[i].shape, results[i].f().to_vec());
            rounded.round_to_dtype();
            if *copy != rounded {
                return Err(format!("the copy of result {i} is not what rounding it gives\n{}", c.describe()));
            }
        }
        let steps = &program.program.steps;
        if c.copies && steps.iter().any(|s| matches!(s.op, Op::Cast(_))) {
            return Err(format!("a copy is a step of its own\n{}", c.describe()));
        }
        Ok(Seen { program, code, counts, worst })
    }

    /// Runs a program in the forms that these sizes take under every schedule: no finding, always the same bits.
    #[allow(clippy::type_complexity)] // what it is called once for
    pub fn run(
        &self,
        program: GpuProgram,
        dims: &Bindings,
        states: &[(String, Bytes)],
        inputs: &[(String, Bytes)],
    ) -> Result<(GpuProgram, Code, Vec<HostArray>, Vec<Counts>), String> {
        self.run_in(program, dims, states, inputs, &mut Parts(vec![]))
    }

    #[allow(clippy::type_complexity)] // as above
    fn run_in(
        &self,
        mut program: GpuProgram,
        dims: &Bindings,
        states: &[(String, Bytes)],
        inputs: &[(String, Bytes)],
        parts: &mut Parts,
    ) -> Result<(GpuProgram, Code, Vec<HostArray>, Vec<Counts>), String> {
        // Forms that these sizes don't take need not be compiled.
        for s in &mut program.steps {
            let taken = s.form(dims).map_err(|e| e.to_string())?.clone();
            s.forms = Arc::new(vec![Form { when: vec![], ..taken }]);
        }
        program.kernels = program
            .steps
            .iter()
            .flat_map(|s| s.forms.iter())
            .flat_map(Form::launches)
            .map(|l| l.kernel.clone())
            .collect();
        let code = self.compile(&program.kernels, &program.target)?;
        let program = Arc::new(program);
        let mut first: Option<Vec<Bytes>> = None;
        let mut counts = vec![];
        for o in schedules() {
            let at = format!("seed {}, lazy {}", o.seed, o.lazy);
            let mut e = self.machine(o, Placement::Apart)?;
            let id = e.load(program.clone(), &code).map_err(|e| e.to_string())?;
            for (name, value) in states {
                e.set(name, value).map_err(|e| e.to_string())?;
            }
            let inputs: Vec<(&str, &Bytes)> = inputs.iter().map(|(n, b)| (n.as_str(), b)).collect();
            let out = e.run_paged(id, dims, &inputs, parts).map_err(|e| format!("{at}: {e}"))?;
            counts = e.device().counts();
            let out: Vec<Bytes> = out.into_iter().map(|(_, b)| b).collect();
            match &first {
                None => first = Some(out),
                Some(f) if *f == out => {}
                Some(_) => return Err(format!("{at}: other bits than under the first schedule")),
            }
        }
        let outputs: Vec<HostArray> = first.unwrap_or_default().iter().map(Bytes::to_host).collect();
        Ok((Arc::unwrap_or_clone(program), code, outputs, counts))
    }
}

/// Values that are set before each part of the landmarks is looked through.
struct Parts(Vec<Vec<(&'static str, Bytes)>>);

impl<D: Device> Pager<D> for Parts {
    fn parts(&self) -> usize {
        self.0.len()
    }
    fn landmarks(&mut self, m: &mut Machine<D>, part: usize) -> Result<(), GpuError> {
        self.0[part].iter().try_for_each(|(name, value)| m.set(name, value))
    }
    fn chosen(&mut self, _: &mut Machine<D>, _: &[i32], _: &[i32]) -> Result<(), GpuError> {
        Ok(())
    }
}

impl Check {
    pub fn new(op: impl Into<Op>, inputs: Vec<Input>, dims: &Bindings, tolerance: f64) -> Check {
        Check {
            op: op.into(),
            inputs,
            dims: dims.clone(),
            arch: Arch::Sm80,
            sms: None,
            tolerance,
            form: None,
            pages: None,
            parts: 0,
            copies: false,
        }
    }
    pub fn with_copies(mut self) -> Check {
        self.copies = true;
        self
    }
    /// Results that are read in bf16, too.
    fn copied(&self) -> &'static [usize] {
        if self.copies { halves(&self.op).copies } else { &[] }
    }
    /// With keys and values, or landmarks, in pages of `stored` elements, to which they are rounded.
    pub fn in_pages(mut self, stored: DType) -> Check {
        let last = if self.op.mnemonic() == "selection" { 1 } else { 2 };
        for x in &mut self.inputs[1..=last] {
            let mut a = HostArray::float(stored, &x.value.shape, x.value.f().to_vec());
            a.round_to_dtype();
            x.value = HostArray::float(x.value.dtype, &a.shape, a.f().to_vec());
            x.wide = None;
        }
        self.pages = Some(stored);
        self
    }
    pub fn on(mut self, arch: Arch) -> Check {
        self.arch = arch;
        self
    }
    pub fn in_form(mut self, name: &'static str) -> Check {
        self.form = Some(name);
        self
    }
    pub fn sms(mut self, sms: usize) -> Check {
        self.sms = Some(sms);
        self
    }

    /// Pages of landmarks come in so many parts.
    pub fn in_parts(mut self, parts: usize) -> Check {
        self.parts = parts;
        self
    }

    /// Pools in place of the operands that are to lie in pages, with their tables, and all sizes; the parts in which they come.
    fn pools(&self) -> (Bindings, Vec<(&'static str, Bytes)>, Parts) {
        let mut dims = self.dims.clone();
        let Some(stored) = self.pages else { return (dims, vec![], Parts(vec![])) };
        let (names, rows, symbol, table) = match &self.op {
            Op::ChunkAttention(a) => (&["x1", "x2"][..], a.chunk, "kv_slots", "chunk_table"),
            _ => (&["x1"][..], LANDMARK_PAGE, LANDMARK_PAGES, LANDMARK_TABLE),
        };
        let mut rng = Rng(77);
        let shape = &self.inputs[1].value.shape;
        let (entries, row) = (shape[1] / rows, shape[2] * shape[3]);
        let used = shape[0] * entries;
        let slots = used + 3;
        // Every page somewhere.
        let mut places: Vec<i32> = (0..slots as i32).collect();
        (0..used).for_each(|i| places.swap(i, i + rng.below(slots - i)));
        let mut out = vec![];
        for (i, name) in names.iter().enumerate() {
            let x = self.inputs[1 + i].value.f();
            // What no table points to must not matter.
            let mut pool = vec![1e4; slots * rows * row];
            for (page, part) in x.chunks_exact(rows * row).enumerate() {
                pool[places[page] as usize * rows * row..][..rows * row].copy_from_slice(part);
            }
            out.push((*name, Bytes::from_host(&HostArray::float(stored, &[slots, rows, shape[2], shape[3]], pool))));
        }
        places.truncate(used);
        out.push((table, Bytes::from_host(&HostArray::i32(&[shape[0], entries], places))));
        dims.assign(&[(symbol, slots)]);
        if table != LANDMARK_TABLE {
            return (dims, out, Parts(vec![]));
        }
        let window = |all: Vec<i32>| (LANDMARK_WINDOW, Bytes::from_host(&HostArray::i32(&[shape[0], 2], all)));
        out.push(window([0, entries as i32].repeat(shape[0])));
        dims.assign(&[(LANDMARKS_AWAY, usize::from(self.parts > 0))]);
        // As many pages a part, of one sequence after another, in places of their own.
        let (each, mut parts) = (used.div_ceil(self.parts.max(1)), vec![]);
        for part in 0..self.parts {
            let (mut at, mut ends) = (vec![-1; used], vec![]);
            let mut pool = vec![1e4; slots * rows * row];
            for s in 0..shape[0] {
                let (first, end) = (s * entries, (s + 1) * entries);
                let pages = (part * each).clamp(first, end)..((part + 1) * each).clamp(first, end);
                for page in pages.clone() {
                    at[page] = (page % each) as i32;
                    let from = &self.inputs[1].value.f()[page * rows * row..][..rows * row];
                    pool[page % each * rows * row..][..rows * row].copy_from_slice(from);
                }
                // Behind the first part, nothing of a sequence is no beginning.
                let none = if part > 0 { [1, 1] } else { [0, 0] };
                ends.extend(
                    if pages.is_empty() { none } else { [pages.start - first, pages.end - first] }.map(|x| x as i32),
                );
            }
            parts.push(vec![
                ("x1", Bytes::from_host(&HostArray::float(stored, &[slots, rows, shape[2], shape[3]], pool))),
                (table, Bytes::from_host(&HostArray::i32(&[shape[0], entries], at))),
                window(ends),
            ]);
        }
        (dims, out, Parts(parts))
    }

    /// The op alone, with its operands as inputs.
    fn graph(&self) -> (rambac_ir::Graph, Vec<(String, Bytes)>) {
        let syms: Vec<&str> = self.dims.iter().map(|(s, _)| s.as_str()).collect();
        let mut b = Builder::new("check", &syms);
        let (mut values, mut given): (Vec<Value>, _) = (vec![], vec![]);
        for (i, x) in self.inputs.iter().enumerate() {
            let name = format!("x{i}");
            let Some(axis) = x.wide else {
                values.push(b.input(&name, x.ty.clone()));
                given.push((name, Bytes::from_host(&x.value)));
                continue;
            };
            let cols: usize = x.value.shape[axis..].iter().product();
            let rows: usize = x.value.shape[..axis].iter().product();
            let whole = MARGIN[0] + cols + MARGIN[1];
            let wide = |cols: usize| Ty::new(x.ty.dtype, x.ty.shape[..axis].iter().cloned().chain([Dim::int(cols)]));
            let source = b.input(&name, wide(whole));
            let part = b.slice(source, axis, MARGIN[0], MARGIN[0] + cols);
            values.push(b.reshape(part, x.ty.shape.clone()));
            let mut bound = x.value.shape[..axis].to_vec();
            bound.push(whole);
            let at = |i: usize| match (i % whole).checked_sub(MARGIN[0]).filter(|&j| j < cols) {
                Some(j) => x.value.get(i / whole * cols + j),
                // Must not matter.
                None => 1e4,
            };
            let ty = rambac_ir::ty::ConcreteTy { dtype: x.ty.dtype, shape: bound };
            let mut a = HostArray::from_f64(&ty, (0..rows * whole).map(at).collect());
            a.round_to_dtype();
            given.push((name, Bytes::from_host(&a)));
        }
        let results = b.push_all(self.op.clone(), &values);
        for (i, y) in results.iter().enumerate() {
            b.output(&format!("y{i}"), *y);
        }
        for &i in self.copied() {
            let copy = b.cast(results[i], DType::BF16);
            b.output(&format!("copy{i}"), copy);
        }
        (b.finish().expect("a check's operands fit its op"), given)
    }

    fn want(&self) -> Vec<HostArray> {
        let tys: Vec<&Ty> = self.inputs.iter().map(|x| &x.ty).collect();
        let y = self.op.def().infer(&tys).expect("a check's operands fit its op");
        let y: Vec<_> = y.iter().map(|t| t.bind(&self.dims).expect("the test binds every symbol")).collect();
        self.op.def().eval(&self.inputs.iter().map(|x| &x.value).collect::<Vec<_>>(), &y)
    }

    fn compare(&self, got: &[HostArray], want: &[HostArray]) -> Result<f64, String> {
        let mut worst = 0f64;
        for (r, (g, w)) in got.iter().zip(want).enumerate() {
            if g.ty() != w.ty() {
                return Err(format!("result {r} is {}, {} wanted", g.ty(), w.ty()));
            }
            let exact = matches!(w.dtype, DType::I32 | DType::Bool);
            let finite = (0..w.len()).map(|i| w.get(i).abs()).filter(|v| v.is_finite());
            let scale = finite.fold(0f64, f64::max).max(1e-30);
            for i in 0..w.len() {
                let (a, b) = (g.get(i), w.get(i));
                if a == b || (a.is_nan() && b.is_nan()) {
                    continue;
                }
                let off = (a - b).abs() / scale;
                if exact || off.is_nan() || off > self.tolerance {
                    let shape = &w.shape;
                    return Err(format!(
                        "result {r} {shape:?}, element {i}: {a}, {b} wanted ({off:.2e} of the largest, {:.1e} allowed)\n{}",
                        self.tolerance,
                        self.describe()
                    ));
                }
                worst = worst.max(off);
            }
        }
        Ok(worst)
    }

    pub fn describe(&self) -> String {
        let tys: Vec<String> =
            self.inputs.iter().map(|x| format!("{}{}", x.ty, if x.wide.is_some() { " (wide)" } else { "" })).collect();
        format!(
            "  {} {:?} of {} at {} on {}",
            self.op.mnemonic(),
            self.op.attrs(),
            tys.join(", "),
            self.dims,
            self.arch
        )
    }
}
