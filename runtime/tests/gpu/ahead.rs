//! What happens without the host: runs that nobody waits for, several programs as one record, copies through pinned memory; on a
//! device that does everything as late as may be.  And that of many sizes only the last ones are kept.

use crate::executables::layer;
use crate::harness::Case;
use crate::rig::{NOT_HERE, Rig};
use rambac_codegen::cuda::{Arch, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_driver::testing::{Faulty, Late, Seen};
use rambac_ir::testing::Rng;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, Builder, DType, Dim, Graph, HostArray, Ty};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{Options, optimise};
use rambac_runtime::gpu::{Bytes, Code, Device, GpuError, Link, Machine, Placement, ProgramId};
use rambac_simulator::device::Simulator;
use std::sync::Arc;

pub const ALL: &[Case] = &[
    ("runs_ahead_of_the_host", ahead),
    ("programs_run_as_one", chains),
    ("of_many_sizes_the_last_are_kept", many_sizes),
    ("copies_take_turns_in_pinned_memory", copies),
    ("steps_by_the_device's_clock", watched),
];

type Watched = Machine<Faulty<Late<Simulator>>>;

fn late() -> (Watched, Seen) {
    let device = Faulty::new(Late::new(Simulator::default()), None);
    let seen = device.seen();
    (Machine::new(device, Placement::Arena), seen)
}

fn plain() -> Machine<Simulator> {
    Machine::new(Simulator::default(), Placement::Apart)
}

fn text(e: GpuError) -> String {
    e.to_string()
}

/// Puts a graph's program on a machine, with its weights and states.
fn load<D: Device>(rig: &Rig, m: &mut Machine<D>, g: &Graph) -> Result<ProgramId, String> {
    if rig.cuda.is_some() {
        return Err(format!("{NOT_HERE} what is watched: it is for the simulator"));
    }
    let p = emit(lower_for(&optimise(g, &Options::default()), Kernels::Gpu), Target::of(Arch::Sm80));
    let p = Arc::new(p.map_err(|e| e.to_string())?);
    let code: Code = rig.compile(&p.kernels, &p.target)?;
    let mut rng = Rng(5);
    for s in p.program.sources.iter().filter(|s| s.kind != rambac_ir::ops::SourceKind::Input) {
        let ty = s.ty.bind(&Bindings::default()).map_err(|e| e.to_string())?;
        let zero = s.kind == rambac_ir::ops::SourceKind::State;
        let draw = |_| if zero { 0.0 } else { rng.uniform(-1.0, 1.0) };
        let a = HostArray::from_f64(&ty, (0..ty.elements()).map(draw).collect());
        m.set(&s.name, &Bytes::from_host(&a)).map_err(text)?;
    }
    m.load(p, &code).map_err(text)
}

/// Rows of 24 numbers of a round.
fn rows(n: usize, round: usize) -> Bytes {
    let mut rng = Rng(100 + round as u64);
    let ty = ConcreteTy { dtype: DType::F32, shape: vec![n, 24] };
    Bytes::from_host(&HostArray::from_f64(&ty, (0..n * 24).map(|_| rng.uniform(-1.0, 1.0)).collect()))
}

fn at(n: usize) -> Bindings {
    Bindings::new([("N", n)])
}

/// A step is begun before anyone looks at what the one before gave.
fn ahead(rig: &Rig) -> Result<String, String> {
    let g = train_step(&layer(), &AdamW::default(), |_| true).map_err(|e| e.to_string())?;
    let ((mut m, seen), mut p) = (late(), plain());
    let (id, plain_id) = (load(rig, &mut m, &g)?, load(rig, &mut p, &g)?);
    let mut flying = None;
    let (mut got, mut want) = (vec![], vec![]);
    for round in 0..8 {
        // Another batch size now and then: its first runs are waited for.
        let n = if round == 5 { 2 } else { 3 };
        let x = rows(n, round);
        let t = m.begin(id, &at(n), &[("x", &x)]).map_err(text)?;
        if let Some(before) = flying.replace(t) {
            got.push(m.finish(before).map_err(text)?);
        }
        want.push(p.run(plain_id, &at(n), &[("x", &x)]).map_err(text)?);
        if round == 7 && m.device().seen().calls().last() == Some(&"synchronise") {
            return Err("a step that was recorded was waited for".into());
        }
    }
    got.push(m.finish(flying.ok_or("nothing was begun")?).map_err(text)?);
    if got != want {
        return Err(format!("other results:\n{got:?}\n{want:?}"));
    }
    // Some that nobody finishes.
    for round in 0..3 {
        let _ = m.begin(id, &at(3), &[("x", &rows(3, round))]).map_err(text)?;
    }
    drop(m);
    let (live, records) = (seen.live(), seen.records());
    if live + records > 0 { Err(format!("{live} and {records} records live on")) } else { Ok(String::new()) }
}

/// `y = x·wᵀ`, and what is made of it.
fn halves() -> [Graph; 2] {
    let n = Dim::sym("N");
    let mut b = Builder::new("first", &["N"]);
    let x = b.input("x", Ty::f32([n.clone(), Dim::int(24)]));
    let w = b.param("w", Ty::f32([8, 24]));
    let y = b.linear(x, w);
    b.output("y", y);
    let first = b.finish().expect("the test's graph is well-formed");
    let mut b = Builder::new("second", &["N"]);
    let y = b.input("y", Ty::f32([n.clone(), Dim::int(8)]));
    let more = b.input("more", Ty::f32([n, Dim::int(8)]));
    let z = b.square(y);
    let z = b.add(z, more);
    b.output("z", z);
    let sum = b.sum_all(z);
    b.output("sum", sum);
    [first, b.finish().expect("the test's graph is well-formed")]
}

fn chains(rig: &Rig) -> Result<String, String> {
    let [first, second] = halves();
    let ((mut m, seen), mut p) = (late(), plain());
    let ids = [load(rig, &mut m, &first)?, load(rig, &mut m, &second)?];
    let plain_ids = [load(rig, &mut p, &first)?, load(rig, &mut p, &second)?];
    let more = |n: usize, round: usize| {
        let ty = ConcreteTy { dtype: DType::F32, shape: vec![n, 8] };
        Bytes::from_host(&HostArray::from_f64(&ty, (0..8 * n).map(|i| (i + round) as f64).collect()))
    };
    let mut run = |n: usize, round: usize| -> Result<(), String> {
        let (x, more, dims) = (rows(n, round), more(n, round), at(n));
        let (of_first, of_second) = ([("x", &x)], [("more", &more)]);
        let links = |ids: [ProgramId; 2]| {
            let keep: &[(&str, &str)] = &[("y", "y")];
            let dims = &dims;
            [
                Link { program: ids[0], dims, inputs: &of_first, keep, wanted: None },
                Link { program: ids[1], dims, inputs: &of_second, keep: &[], wanted: Some(&["sum", "z"]) },
            ]
        };
        let (mut got, mut want) = (vec![], vec![]);
        let links_of = (links(ids), links(plain_ids));
        m.run_chain(&links_of.0, &mut |i, name, ty, b| got.push((i, name.to_string(), ty.clone(), b.to_vec())))
            .map_err(text)?;
        p.run_chain(&links_of.1, &mut |i, name, ty, b| want.push((i, name.to_string(), ty.clone(), b.to_vec())))
            .map_err(text)?;
        if got.len() != 3 || got != want {
            return Err(format!("N={n}, round {round}: {got:?}\nwanted: {want:?}"));
        }
        Ok(())
    };
    for round in 0..5 {
        run(3, round)?;
    }
    let calls = seen.calls();
    let last = ["write_host", "write_host", "replay", "synchronise", "read_host"];
    if !calls.ends_with(&last) {
        return Err(format!("the host did more than start a record: {:?}", &calls[calls.len().saturating_sub(9)..]));
    }
    // Ever other sizes, and back.
    for n in 1..2 * Watched::CHAINS {
        for round in 0..3 {
            run(n, round)?;
        }
    }
    run(3, 9)?;
    if seen.records() > Watched::CHAINS {
        return Err(format!("{} records are kept", seen.records()));
    }
    // What is wrong is said, and what was kept goes on.
    let (bad, dims) = (more(3, 0), at(3));
    let wrong = [("x", &bad)];
    let links = [Link { program: ids[0], dims: &dims, inputs: &wrong, keep: &[("y", "y")], wanted: None }];
    match m.run_chain(&links, &mut |_, _, _, _| {}) {
        Err(e) if e.to_string().contains("\"x\" of program first must be f32[3, 24]") => {}
        other => return Err(format!("an input of another type: {other:?}")),
    }
    drop(m);
    let (live, records) = (seen.live(), seen.records());
    if live + records > 0 { Err(format!("{live} and {records} records live on")) } else { Ok(String::new()) }
}

fn many_sizes(rig: &Rig) -> Result<String, String> {
    let [first, _] = halves();
    let ((mut m, seen), mut p) = (late(), plain());
    let (id, plain_id) = (load(rig, &mut m, &first)?, load(rig, &mut p, &first)?);
    let most = Watched::KEPT;
    // The largest first, so that no arena moves.
    for n in (1..=most + 9).rev() {
        for round in 0..3 {
            let x = rows(n, round);
            let (got, want) = (m.run(id, &at(n), &[("x", &x)]), p.run(plain_id, &at(n), &[("x", &x)]));
            if got.map_err(text)? != want.map_err(text)? {
                return Err(format!("other results at N={n}"));
            }
            // What is used again stays.
            let x = rows(2, round);
            m.run(id, &at(2), &[("x", &x)]).map_err(text)?;
        }
        if m.kept(id) > most || seen.records() > most {
            return Err(format!("{} sizes and {} records are kept, {most} at most", m.kept(id), seen.records()));
        }
    }
    let before = seen.calls().len();
    m.run(id, &at(2), &[("x", &rows(2, 0))]).map_err(text)?;
    if !seen.calls()[before..].contains(&"replay") {
        return Err("what was used all the time was forgotten".into());
    }
    Ok(format!(", {} kept", m.kept(id)))
}

/// More bytes than pinned memory has, one value after another, before the device does anything.
fn copies(_: &Rig) -> Result<String, String> {
    const MIB: usize = 1 << 20;
    let (mut m, seen) = late();
    let value = |i: usize, n: usize| {
        let data = (0..n).map(|k| (k * 31 + i * 7 + (k >> 12)) as u8).collect();
        Bytes { ty: ConcreteTy { dtype: DType::Bool, shape: vec![n] }, data }
    };
    let sizes = [3 * MIB, MIB, 2 * MIB, 5 * MIB, 1, 0, 3 * MIB];
    for (i, &n) in sizes.iter().enumerate() {
        m.set(&format!("v{i}"), &value(i, n)).map_err(text)?;
    }
    if !seen.calls().contains(&"wait") || !seen.calls().contains(&"copy_in") {
        return Err("nothing had to wait for its turn, or to go its own way".into());
    }
    for (i, &n) in sizes.iter().enumerate() {
        if m.get(&format!("v{i}")).map_err(text)? != Some(value(i, n)) {
            return Err(format!("v{i} of {n} bytes is another"));
        }
    }
    Ok(String::new())
}

/// Every step takes as long as it has launches, and copies are told apart; a record has no steps to tell of.
fn watched(rig: &Rig) -> Result<String, String> {
    const TICK: f64 = 0.25;
    let g = train_step(&layer(), &AdamW::default(), |_| true).map_err(|e| e.to_string())?;
    let device = Faulty::new(Late::ticking(Simulator::default(), TICK), None);
    let seen = device.seen();
    let mut m = Machine::new(device, Placement::Arena);
    let (id, mut p) = (load(rig, &mut m, &g)?, plain());
    let plain_id = load(rig, &mut p, &g)?;
    m.watch(2).map_err(text)?;
    let (mut want, mut times) = (vec![], vec![]);
    for round in 0..4 {
        let x = rows(3, round);
        let got = m.run(id, &at(3), &[("x", &x)]).map_err(text)?;
        want.push(p.run(plain_id, &at(3), &[("x", &x)]).map_err(text)?);
        if want.last() != Some(&got) {
            return Err(format!("a run that is watched gives other results: {got:?}"));
        }
        times.extend(m.watched());
    }
    let gpu = m.program(id).clone();
    let forms = gpu.forms(&at(3)).map_err(|e| e.to_string())?;
    // A launch of nothing is left out.
    let most: Vec<f64> = forms.iter().map(|f| f.calls.len() as f64 * TICK).collect();
    for t in &times {
        let off = t.steps.iter().zip(&most).any(|(a, b)| a > b || (*b > 0.0 && *a == 0.0));
        if off || t.inputs != (3 * 24 * 4, TICK) || !t.of_device || !t.ahead {
            return Err(format!("{t:?}, steps {most:?} wanted"));
        }
    }
    let x = rows(3, 9);
    let mut sums = vec![];
    m.run_timed(id, &at(3), &[("x", &x)], &[], &mut sums).map_err(text)?;
    let sum: f64 = sums.iter().map(|t| t.as_secs_f64()).sum();
    if times.len() != 2 || (sum - times[0].steps.iter().sum::<f64>()).abs() > 1e-9 {
        return Err(format!("{} runs were watched; {sum} s of {:?}", times.len(), times.first()));
    }
    drop(m);
    if seen.live() > 0 { Err(format!("{} live on", seen.live())) } else { Ok(String::new()) }
}
