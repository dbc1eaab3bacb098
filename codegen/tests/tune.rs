//! Measured choices: what is wrong is never kept, the fastest that is right is, and it outlives the process.

use rambac_codegen::cuda::choices::{Verdict, fingerprint};
use rambac_codegen::cuda::tune::{Measure, Trial, TuneError, chosen, measured, tune};
use rambac_codegen::cuda::{Arch, Cache, Form, GpuProgram, Target, emit};
use rambac_codegen::program::Step;
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::{Bindings, HostArray, text};
use std::collections::HashMap;
use tempfile::TempDir;

const GRAPH: &str = "graph scan(N, L) {
  %x = input \"x\" : f32[N, L, 2, 16]
  %dt = input \"dt\" : f32[N, L, 2]
  %a = input \"a\" : f32[2]
  %b = input \"b\" : f32[N, L, 1, 16]
  %c = input \"c\" : f32[N, L, 1, 16]
  %d = input \"d\" : f32[2]
  %h0 = input \"h0\" : f32[N, 2, 16, 16]
  %y, %h = selective_scan %x, %dt, %a, %b, %c, %d, %h0 {block = 16}
  %z, %g = selective_scan %y, %dt, %a, %b, %c, %d, %h {block = 16}
  return \"z\" = %z, \"g\" = %g
}
";

fn program() -> GpuProgram {
    let graph = text::parse(GRAPH).unwrap();
    emit(lower_for(&graph, Kernels::Gpu), Target::of(Arch::Sm80)).unwrap()
}

fn dims(l: usize) -> Bindings {
    Bindings::new([("N", 1), ("L", l)])
}

/// Gives what the definition says, in as many seconds as each form is said to take.
struct Fake {
    /// By the form's fingerprint: seconds, and what is added to the results.
    takes: HashMap<String, (f64, f64)>,
    trials: usize,
}

/// What tells forms apart.
fn key(f: &Form) -> String {
    fingerprint(f)
}

impl Measure for Fake {
    fn device(&self) -> String {
        "A fake/GPU".into()
    }
    fn trial(&mut self, s: &Step, f: &Form, b: &Bindings, operands: &[HostArray]) -> Result<Trial, String> {
        self.trials += 1;
        let (seconds, off) = self.takes.get(&key(f)).copied().unwrap_or((1.0, 0.0));
        if off.is_nan() {
            return Err("it does not run".into());
        }
        let tys: Vec<_> = s.outputs.iter().map(|v| v.ty.bind(b).unwrap()).collect();
        let mut results = s.op.def().eval(&operands.iter().collect::<Vec<_>>(), &tys);
        let mut first = results[0].to_f64();
        first[0] += off;
        results[0] = HostArray::from_f64(&tys[0], first);
        Ok(Trial { seconds, results })
    }
}

/// The candidates' keys at these sizes: what a measurer that refuses everything is asked.
fn keys(p: &GpuProgram, b: &Bindings) -> Vec<String> {
    struct Ask(Vec<String>);
    impl Measure for Ask {
        fn device(&self) -> String {
            "none".into()
        }
        fn trial(&mut self, _: &Step, f: &Form, _: &Bindings, _: &[HostArray]) -> Result<Trial, String> {
            self.0.push(key(f));
            Err("no".into())
        }
    }
    let mut ask = Ask(vec![]);
    let e = tune(&p.program.steps[0], &p.target, b, &mut ask, &Cache::none()).unwrap_err();
    assert!(matches!(&e, TuneError::NoneRight { candidates, .. } if candidates.len() == ask.0.len()), "{e}");
    assert!(e.to_string().contains("(no)"), "{e}");
    ask.0
}

#[test]
fn the_fastest_that_is_right_is_kept() {
    let (p, b, dir) = (program(), dims(40), TempDir::new().unwrap());
    let (step, cache) = (&p.program.steps[0], Cache::at(dir.path()));
    let all = keys(&p, &b);
    assert!(all.len() >= 4, "{all:?}");
    assert_eq!(all[0], key(p.steps[0].form(&b).unwrap()), "what is predicted comes first");
    // The last is the fastest but wrong, one does not run, one before is the fastest that is right.
    let mut takes: HashMap<_, _> = all.iter().map(|k| (k.clone(), (1e-3, 0.0))).collect();
    takes.insert(all[all.len() - 1].clone(), (1e-6, 0.5));
    takes.insert(all[1].clone(), (1e-7, f64::NAN));
    takes.insert(all[2].clone(), (1e-5, 0.0));
    let mut fake = Fake { takes, trials: 0 };
    let c = tune(step, &p.target, &b, &mut fake, &cache).unwrap();
    assert_eq!((c.chosen, c.best().1, c.candidates.len()), (2, 1e-5, all.len()));
    assert!((c.gain().unwrap() - 100.0).abs() < 1e-9);
    let refused = |i: usize| matches!(&c.candidates[i].verdict, Verdict::Refused(why) if !why.is_empty());
    assert!(refused(1) && refused(all.len() - 1), "{:?}", c.candidates);
    // Where it is refused it is not timed: two runs of what is right, one of what is wrong at the small sizes.
    assert_eq!(fake.trials, 2 * (all.len() - 2) + 2);

    // Another process finds it, and asks nothing.
    let again = Cache::at(dir.path());
    let mut silent = Fake { takes: HashMap::new(), trials: 0 };
    assert_eq!(tune(step, &p.target, &b, &mut silent, &again).unwrap(), c);
    assert_eq!(silent.trials, 0);
    let (_, form) = chosen(step, &p.target, &b, "A fake/GPU", &again).unwrap().unwrap();
    assert_eq!(key(&form), all[2]);
    assert!(
        form.measured && form.why.starts_with("measured on A fake/GPU: 10.0 µs, 100.00 times as fast"),
        "{}",
        form.why
    );
    // Not for other sizes, not for another device.
    assert!(chosen(step, &p.target, &dims(41), "A fake/GPU", &again).unwrap().is_none());
    assert!(chosen(step, &p.target, &b, "Another", &again).unwrap().is_none());
}

#[test]
fn a_program_takes_what_was_measured_at_these_sizes() {
    let (p, b, dir) = (program(), dims(40), TempDir::new().unwrap());
    let cache = Cache::at(dir.path());
    assert!(measured(&p, &b, "A fake/GPU", &cache).unwrap().is_none());
    let all = keys(&p, &b);
    let slow: HashMap<_, _> = all.iter().map(|k| (k.clone(), (2.0, 0.0))).collect();
    let mut fake = Fake { takes: slow, trials: 0 };
    fake.takes.insert(all[3].clone(), (1.0, 0.0));
    tune(&p.program.steps[0], &p.target, &b, &mut fake, &cache).unwrap();
    // Both steps are alike.
    let m = measured(&p, &b, "A fake/GPU", &cache).unwrap().unwrap();
    for s in &m.steps {
        assert_eq!(key(s.form(&b).unwrap()), all[3]);
        assert!(!s.form(&dims(80)).unwrap().measured);
    }
    for l in m.forms(&b).unwrap().iter().flat_map(|f| f.launches()) {
        assert!(m.kernels.contains(&l.kernel));
    }
    // Equals: what is predicted stays.
    let mut fake = Fake { takes: HashMap::new(), trials: 0 };
    assert_eq!(tune(&p.program.steps[0], &p.target, &dims(64), &mut fake, &cache).unwrap().chosen, 0);
}

#[test]
fn what_is_damaged_or_stale_is_measured_again() {
    let (p, b, dir) = (program(), dims(40), TempDir::new().unwrap());
    let (step, cache) = (&p.program.steps[0], Cache::at(dir.path()));
    let mut fake = Fake { takes: HashMap::new(), trials: 0 };
    let first = tune(step, &p.target, &b, &mut fake, &cache).unwrap();
    let kept = cache.choices().unwrap();
    assert_eq!((kept.len(), cache.devices()), (1, vec!["A fake/GPU".to_string()]));
    let text = std::fs::read_to_string(&kept[0].path).unwrap();
    assert!(text.contains("f32[1, 40, 2, 16]") && text.contains("\"seconds\": 1.0"), "{text}");
    // Any one character that is lost or changed.
    for at in (0..text.len()).step_by(37) {
        let mut cut = text.clone().into_bytes();
        cut[at] ^= 4;
        std::fs::write(&kept[0].path, &cut).unwrap();
        assert!(cache.choices().unwrap()[0].choice.is_err(), "byte {at}");
        assert!(chosen(step, &p.target, &b, "A fake/GPU", &cache).unwrap().is_none());
    }
    let before = fake.trials;
    assert_eq!(tune(step, &p.target, &b, &mut fake, &cache).unwrap(), first);
    assert!(fake.trials > before);
    // Other candidates than then: another number of multiprocessors makes other forms.
    let target = Target { sms: 1, shared_per_block: 40 * 1024, ..p.target.clone() };
    assert!(chosen(step, &target, &b, "A fake/GPU", &cache).unwrap().is_none_or(|(c, _)| c == first));
    assert_eq!(cache.clear().unwrap().choices, 1);
    assert!(cache.choices().unwrap().is_empty());
}
