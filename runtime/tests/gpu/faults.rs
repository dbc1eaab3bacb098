//! Every call that a program makes of its device fails once, and the device is lost by every one: each time the error says
//! what was being done, nothing is left allocated, and a device that is still there goes on.

use crate::harness::Case;
use crate::rig::{NOT_HERE, Rig};
use rambac_codegen::cuda::{Arch, GpuProgram, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_driver::testing::{Fault, Faulty, INJECTED, Late};
use rambac_ir::ops::SourceKind;
use rambac_ir::testing::Rng;
use rambac_ir::{Bindings, Builder, Dim, Graph, HostArray, Ty};
use rambac_passes::train_step::{AdamW, accumulate, apply, train_step};
use rambac_passes::{Options, optimise};
use rambac_runtime::gpu::{Bytes, Code, GpuError, Link, Machine, Placement, ProgramId};
use rambac_simulator::Options as Schedule;
use rambac_simulator::device::Simulator;
use std::sync::{Arc, Mutex};

pub const ALL: &[Case] = &[
    ("faults_of_a_step", step),
    ("faults_of_two_programs", two_programs),
    ("a_fault_of_a_chain_names_its_link", links),
];

type Faults = Machine<Faulty<Late<Simulator>>>;

/// How programs are run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// Each is waited for.
    Waiting,
    /// All of a round are begun before the first is waited for.
    Ahead,
    /// As one.
    Chained,
    /// Each is waited for, step by step, with a look at the device's clock.
    Watched,
}

/// Programs that share one machine; a round runs each, in order, at these sizes.
struct Work {
    programs: Vec<(Arc<GpuProgram>, Code)>,
    dims: Vec<Bindings>,
}

/// Values of a program's sources of a kind.
fn values(p: &GpuProgram, dims: &Bindings, input: bool) -> Result<Vec<(String, Bytes)>, String> {
    let mut rng = Rng(9);
    let wanted = |k: SourceKind| (k == SourceKind::Input) == input;
    let all = p.program.sources.iter().filter(|s| wanted(s.kind));
    all.map(|s| {
        let ty = s.ty.bind(dims).map_err(|e| e.to_string())?;
        let a = match s.kind {
            SourceKind::State => HostArray::filled(&ty, 0.0),
            _ => HostArray::from_f64(&ty, (0..ty.elements()).map(|_| rng.uniform(-1.0, 1.0)).collect()),
        };
        Ok((s.name.clone(), Bytes::from_host(&a)))
    })
    .collect()
}

impl Work {
    /// Loads all, sets values, runs every program at every size, and reads all values back.
    fn run(&self, m: &mut Faults, how: How) -> Result<Vec<(String, Bytes)>, GpuError> {
        let text = |e: String| -> ! { panic!("BUG: {e}") };
        let mut ids: Vec<ProgramId> = vec![];
        for (p, code) in &self.programs {
            ids.push(m.load(p.clone(), code)?);
            for (name, v) in values(p, &self.dims[0], false).unwrap_or_else(|e| text(e)) {
                m.set(&name, &v)?;
            }
        }
        let mut out = vec![];
        for d in &self.dims {
            let given: Vec<_> =
                self.programs.iter().map(|(p, _)| values(p, d, true).unwrap_or_else(|e| text(e))).collect();
            let given: Vec<Vec<(&str, &Bytes)>> =
                given.iter().map(|g| g.iter().map(|(n, b)| (n.as_str(), b)).collect()).collect();
            // One result stays on the device, too.
            let first = |p: &GpuProgram| p.program.outputs.iter().find(|o| !o.update).map(|o| o.name.to_string());
            let firsts: Vec<_> = self.programs.iter().map(|(p, _)| first(p)).collect();
            let names = ["kept", "also kept"];
            let keep: Vec<Vec<(&str, &str)>> =
                firsts.iter().zip(names).map(|(f, n)| f.iter().map(|f| (f.as_str(), n)).collect()).collect();
            let all = || ids.iter().zip(&given).zip(&keep);
            match how {
                How::Waiting | How::Watched => {
                    for ((id, given), keep) in all() {
                        if how == How::Watched {
                            m.watch(1)?;
                        }
                        out.extend(m.run_keeping(*id, d, given, keep)?);
                        if how == How::Watched && m.watched().len() != 1 {
                            text("a run that was watched has times".into());
                        }
                    }
                    m.end_watch()?;
                }
                How::Ahead => {
                    let tickets =
                        all().map(|((id, given), _)| m.begin(*id, d, given)).collect::<Result<Vec<_>, _>>()?;
                    for t in tickets {
                        out.extend(m.finish(t)?);
                    }
                }
                How::Chained => {
                    let links: Vec<Link> = all()
                        .map(|((id, inputs), keep)| Link { program: *id, dims: d, inputs, keep, wanted: None })
                        .collect();
                    m.run_chain(&links, &mut |_, name, ty, data| {
                        out.push((name.to_string(), Bytes { ty: ty.clone(), data: data.to_vec() }));
                    })?;
                }
            }
        }
        let mut names: Vec<String> = m.names().map(String::from).collect();
        names.sort();
        for n in names {
            let value = m.get(&n)?;
            out.extend(value.map(|v| (n, v)));
        }
        Ok(out)
    }

    /// See the module's comment.
    fn check(&self) -> Result<String, String> {
        let mut total = 0;
        // What is tested is the host: kernels need not be watched.
        let first = Simulator::new(Schedule { races: false, ..Schedule::default() });
        let ways = [How::Waiting, How::Ahead, How::Chained, How::Watched].map(|how| (Placement::Arena, how));
        for (placement, how) in ways.into_iter().chain([(Placement::Apart, How::Waiting)]) {
            let machine = |fails| {
                let device = Faulty::new(Late::new(first.like()), fails);
                let seen = device.seen();
                let mut m = Machine::new(device, placement);
                let warnings = Arc::new(Mutex::new(vec![]));
                let to = warnings.clone();
                m.on_warning(Box::new(move |w| to.lock().unwrap().push(w)));
                (m, seen, warnings)
            };
            let (mut m, seen, _) = machine(None);
            let want = self.run(&mut m, how).map_err(|e| e.to_string())?;
            // What a machine asks for when it goes may fail: nobody hears it.
            let calls = seen.calls();
            drop(m);
            if seen.live() > 0 {
                return Err(format!("{} buffers live on without a fault", seen.live()));
            }
            let always = ["alloc_host", "upload", "launch", "product", "download", "copy", "copy_out", "synchronise"];
            let replayed = ["begin_record", "end_record", "replay"];
            let records = placement == Placement::Arena && how != How::Watched;
            let expected = always.iter().chain(replayed.iter().filter(|_| records));
            let expected = expected.chain(["mark", "laps"].iter().filter(|_| how == How::Watched));
            let ahead = ["event", "wait"].iter().filter(|_| how == How::Ahead);
            // What is begun keeps nothing.
            let expected = expected.chain(ahead).filter(|c| **c != "copy" || how != How::Ahead);
            if let Some(call) = expected.into_iter().find(|c| !calls.contains(c)) {
                return Err(format!("{placement:?}, {how:?}: there was no {call}"));
            }
            total += calls.len();
            for (n, call) in calls.iter().enumerate() {
                for fault in [Fault::Once, Fault::Lost] {
                    let at = format!("{placement:?}, {how:?}, call {n} ({call}), {fault:?}");
                    let (mut m, seen, warnings) = machine(Some((n, fault)));
                    let told = || warnings.lock().unwrap().len();
                    match self.run(&mut m, how) {
                        // What can't be recorded runs all the same, and somebody hears of it once.
                        Ok(got) if fault == Fault::Once && recorded(&calls, n) && got == want && told() == 1 => {}
                        Ok(_) => return Err(format!("{at}: it went well, {} warnings", told())),
                        Err(e) if told() > 0 => return Err(format!("{at}: a warning beside {e}")),
                        Err(e) => self.judge(&e, call, fault).map_err(|why| format!("{at}: {why}: {e}"))?,
                    }
                    match (self.run(&mut m, how), fault) {
                        (Ok(got), Fault::Once) if got == want => {}
                        (Ok(_), Fault::Once) => return Err(format!("{at}: other results afterwards")),
                        (Err(e), Fault::Once) => return Err(format!("{at}: it does not go on: {e}")),
                        (Err(e), Fault::Lost) if e.lost() => {}
                        (other, Fault::Lost) => {
                            return Err(format!("{at}: then {:?}", other.err().map(|e| e.to_string())));
                        }
                    }
                    drop(m);
                    if seen.live() + seen.records() > 0 {
                        let (live, records) = (seen.live(), seen.records());
                        return Err(format!("{at}: {live} buffers and {records} records live on"));
                    }
                }
            }
        }
        Ok(format!(", {total} calls"))
    }

    /// The error is the one that was asked for, and says what was being done.
    fn judge(&self, e: &GpuError, call: &str, fault: Fault) -> Result<(), &'static str> {
        let text = e.to_string();
        if e.lost() != (fault == Fault::Lost) {
            return Err("another kind of error");
        }
        let told = match (call, fault) {
            ("alloc", Fault::Once) => text.contains("there is no memory for \""),
            // Of several launches that one record starts, the error tells from which step to which.
            ("replay", Fault::Lost) => text.contains("of a record, step ") && text.contains(INJECTED),
            ("launch", _) => text.contains("step ") && text.contains("kernel ") && text.contains(INJECTED),
            ("product", _) => text.contains("step ") && text.contains("a product ") && text.contains(INJECTED),
            ("load", _) => text.contains("kernel ") && text.contains(INJECTED),
            _ => text.contains(INJECTED),
        };
        if told { Ok(()) } else { Err("it does not say what was being done") }
    }
}

/// Whether call `n` makes a record, or is a part of one.
fn recorded(calls: &[&str], n: usize) -> bool {
    let last = calls[..=n].iter().rposition(|c| ["begin_record", "end_record"].contains(c));
    last.is_some_and(|i| i == n || calls[i] == "begin_record")
}

fn work(rig: &Rig, graphs: &[Graph], dims: &[Bindings]) -> Result<Work, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} injected faults: they are for the simulator"));
    }
    let mut programs = vec![];
    for g in graphs {
        let p = emit(lower_for(&optimise(g, &Options::default()), Kernels::Gpu), Target::of(Arch::Sm80))
            .map_err(|e| e.to_string())?;
        let code = rig.compile(&p.kernels, &p.target)?;
        programs.push((Arc::new(p), code));
    }
    Ok(Work { programs, dims: dims.to_vec() })
}

fn sizes() -> [Bindings; 4] {
    // The second needs a larger arena; its third run replays what the second recorded.
    let [small, large] = [Bindings::new([("N", 3)]), Bindings::new([("N", 40)])];
    [small, large.clone(), large.clone(), large]
}

/// As few steps as train anything: a run is made for every call that can fail.
fn adamw() -> AdamW {
    AdamW { clip: 0.0, ..AdamW::default() }
}

/// `Σ(x·wᵀ)²`, with the outputs of a whole batch or of a part of one.
fn layer(part: bool) -> Graph {
    let mut b = Builder::new("layer", &["N"]);
    let x = b.input("x", Ty::f32([Dim::sym("N"), Dim::int(4)]));
    let w = b.param("w", Ty::f32([4, 4]));
    let y = b.linear(x, w);
    let y = b.square(y);
    let y = b.sum_all(y);
    b.output(if part { "loss_sum" } else { "loss" }, y);
    if part {
        let tokens = b.sum_all(x);
        b.output("tokens", tokens);
    }
    b.finish().expect("the test's graph is well-formed")
}

fn step(rig: &Rig) -> Result<String, String> {
    let g = train_step(&layer(false), &adamw(), |_| true).map_err(|e| e.to_string())?;
    work(rig, &[g], &sizes())?.check()
}

/// Gradients are added up by one program and applied by another.
fn two_programs(rig: &Rig) -> Result<String, String> {
    let loss = layer(true);
    let all = [accumulate(&loss), apply(&loss, &adamw(), |_| true, &[])];
    let all = all.into_iter().collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    work(rig, &all, &sizes())?.check()
}

/// A fault that shows at the end of a chain is told of the link whose work had not ended, where that was counted; of a record, of
/// all links.
fn links(rig: &Rig) -> Result<String, String> {
    let loss = layer(true);
    let all = [accumulate(&loss), apply(&loss, &adamw(), |_| true, &[])];
    let all = all.into_iter().collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let w = work(rig, &all, &sizes())?;
    let names: Vec<String> = w.programs.iter().map(|(p, _)| p.program.name.clone()).collect();
    let first = Simulator::new(Schedule { races: false, ..Schedule::default() });
    let run = |fails| {
        let device = Faulty::new(Late::new(first.like()), fails);
        let seen = device.seen();
        let mut m = Machine::new(device, Placement::Arena);
        (w.run(&mut m, How::Chained), seen.calls())
    };
    let calls = run(None).1;
    let text = |n: usize| match run(Some((n, Fault::Lost))).0 {
        Ok(_) => Err(format!("call {n} did not fail")),
        Err(e) => Ok(e.to_string()),
    };
    // The copies behind the last launch of the first chain are of its last link; all that was started had ended before.
    let replay = calls.iter().position(|c| *c == "replay").ok_or("no chain was replayed")?;
    let end = calls.iter().position(|c| *c == "synchronise").ok_or("no chain was waited for")?;
    let launches: Vec<usize> = (0..end).filter(|&i| calls[i] == "launch" || calls[i] == "product").collect();
    let copy = calls[..end].iter().position(|c| *c == "copy").ok_or("no link kept anything")?;
    for (n, wanted) in [(launches[0], &names[0]), (launches[launches.len() - 1], &names[1]), (end, &names[1])] {
        let e = text(n)?;
        if !e.starts_with(&format!("{wanted}: ")) {
            return Err(format!("call {n} ({}) is told of another link than {wanted}: {e}", calls[n]));
        }
    }
    // What the first link keeps is copied when its launches have ended, so the next work is the second's.
    let e = text(copy)?;
    if !e.starts_with(&format!("{}: step 0", names[1])) {
        return Err(format!("a copy between links: {e}"));
    }
    for n in [replay, replay + 1] {
        let e = text(n)?;
        if !names.iter().all(|name| e.contains(name.as_str())) || !e.contains("of a record, step ") {
            return Err(format!("call {n} ({}): {e}", calls[n]));
        }
    }
    Ok(String::new())
}
