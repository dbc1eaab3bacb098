//! Nothing is allocated in the steady state: after the first steps a training step and a decoding step take nothing from
//! the heap, on any number of threads, and no kernel took scratch that its plan did not have.

use rambac_codegen::{Memory, lower};
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, DType};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, init_tensor, preset};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, optimise};
use rambac_runtime::executor::Outputs;
use rambac_runtime::session::Segment;
use rambac_runtime::{Executor, MicroBatch, Session, SessionGraphs, SessionOptions, Store, Tensor, TensorRef, Trainer};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// The counter is the process's: tests take turns.
static TURN: Mutex<()> = Mutex::new(());

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTS.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's block.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of five calls of `f` after five that do not count.
fn allocations(mut f: impl FnMut()) -> usize {
    (0..5).for_each(|_| f());
    ALLOCATIONS.store(0, Ordering::Relaxed);
    COUNTS.store(true, Ordering::Relaxed);
    (0..5).for_each(|_| f());
    COUNTS.store(false, Ordering::Relaxed);
    ALLOCATIONS.load(Ordering::Relaxed)
}

fn pools() -> impl Iterator<Item = Arc<rayon::ThreadPool>> {
    [1, 2, 5].into_iter().map(|n| Arc::new(rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()))
}

fn weights(c: &Config) -> Store {
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 5)));
    }
    store
}

fn batch(n: usize, l: usize) -> MicroBatch {
    let ids = |by: usize| Tensor::i32(&[n, l], (0..n * l).map(|i| (i * by % 250) as i32).collect());
    let weights = Tensor::f32(&[n, l], vec![1.0; n * l]);
    let inputs = vec![("input_ids", ids(7)), ("labels", ids(11)), ("loss_weights", weights)];
    MicroBatch { dims: Bindings::new([("N", n), ("L", l)]), inputs }
}

#[test]
fn training_step() {
    let _turn = TURN.lock().unwrap();
    let c = preset("tiny").unwrap();
    let loss = stack::loss(&c, Carry::Zero, false).unwrap();
    for (parts, memory) in [(1, Memory::Keep), (1, Memory::Recompute), (2, Memory::Keep)] {
        for pool in pools() {
            let opt = AdamW::default();
            let decays = |n: &str| n.ends_with("proj.weight");
            let mut t = Trainer::new(&loss, &opt, decays, parts, &memory, weights(&c), pool.clone()).unwrap();
            let batches: Vec<MicroBatch> = (0..parts).map(|_| batch(2, 256)).collect();
            let mut step = 0;
            // Inside the pool: rayon's queue for work from outside it takes a block from the heap now and then.
            let count = pool.install(|| {
                allocations(|| {
                    t.step(step, &batches).unwrap();
                    step += 1;
                })
            });
            assert_eq!(count, 0, "{parts} parts, {memory:?}, {} threads", pool.current_num_threads());
        }
    }
    assert_eq!(rambac_cpu::par::heap_peak(), 0);
}

/// At sizes where a thread's stack holds no more than what tasks take, kernels tell all the rest.
#[test]
fn scratch_is_told() {
    let _turn = TURN.lock().unwrap();
    let c = preset("small").unwrap();
    let loss = stack::loss(&c, Carry::Zero, false).unwrap();
    let pool = pools().nth(1).unwrap();
    let opt = AdamW::default();
    let mut t = Trainer::new(&loss, &opt, |_| false, 1, &Memory::Keep, weights(&c), pool).unwrap();
    t.step(0, &[batch(1, 4096)]).unwrap();
    assert_eq!(rambac_cpu::par::heap_peak(), 0);
}

/// A session's next token: its hidden state, what it chose, its logits.
#[test]
fn session_step() {
    let _turn = TURN.lock().unwrap();
    let c = preset("tiny").unwrap();
    let graphs = SessionGraphs {
        lower: stack::lower(&c).unwrap(),
        chunks: stack::chunks(&c).unwrap(),
        upper: stack::upper(&c).unwrap(),
        upper_flash: stack::upper_flash(&c).unwrap(),
        head: stack::head(&c).unwrap(),
        chunk_size: c.chunk_size,
        hidden_size: c.hidden_size,
        kv: [c.num_kv_heads, c.attention_head_dim()],
        landmark: [c.num_kv_heads, c.retrieval_head_dim()],
    };
    for pool in pools() {
        for bf16_weights in [false, true] {
            let passes = Options { bf16_weights, ..Options::default() };
            let options = SessionOptions { sequences: 2, passes, ..SessionOptions::default() };
            let mut s = Session::new(&graphs, weights(&c), pool.clone(), &options).unwrap();
            let (mut segment, mut logits) = (Segment::default(), vec![]);
            // Until a chunk has just become whole: the tokens counted are of the next.
            let text: Vec<i32> = (0..5 * c.chunk_size).map(|i| (i * 7 % 250) as i32).collect();
            (0..2).for_each(|seq| drop(s.feed(seq, &text).unwrap()));
            assert!(c.chunk_size > 10);
            let count = pool.install(|| {
                allocations(|| {
                    s.step_into(&[7, 9], &mut segment).unwrap();
                    s.logits_into(&segment.hidden, &mut logits).unwrap();
                })
            });
            assert_eq!(count, 0, "{} threads, bf16: {bf16_weights}", pool.current_num_threads());
            assert!(logits.len() == 2 * c.vocab_size && logits.iter().all(|x| x.is_finite()));
            assert!(segment.retrieved.count.iter().any(|n| *n > 0));
        }
    }
    assert_eq!(rambac_cpu::par::heap_peak(), 0);
}

/// The programs of a session for one more token: the lower half, the upper one over a memory, the logits.
#[test]
fn decoding_step() {
    let _turn = TURN.lock().unwrap();
    let c = preset("tiny").unwrap();
    let dims = Bindings::new([("N", 1), ("L", 1), ("C", 12)]);
    let graphs = [stack::lower(&c).unwrap(), stack::upper(&c).unwrap().unwrap(), stack::head(&c).unwrap()];
    for pool in pools() {
        for g in &graphs {
            let (mut store, mut inputs) = (weights(&c), vec![]);
            let mut e = Executor::new(lower(&optimise(g, &Options::default())), pool.clone());
            for s in &e.program().sources {
                let ty = s.ty.bind(&dims).unwrap();
                let n = ty.elements();
                match s.kind {
                    SourceKind::Param => {}
                    SourceKind::State => store.insert(s.name.clone(), Tensor::zeros(&ty)),
                    // A token, or a position that sees the whole memory.
                    SourceKind::Input if ty.dtype == DType::I32 => {
                        inputs.push((s.name.clone(), Tensor::i32(&ty.shape, vec![(12 * c.chunk_size) as i32; n])));
                    }
                    SourceKind::Input => {
                        let values = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
                        inputs.push((s.name.clone(), Tensor::f32(&ty.shape, values)));
                    }
                }
            }
            if g.source("input_ids").is_some() {
                inputs.iter_mut().filter(|i| i.0 == "input_ids").for_each(|i| i.1 = Tensor::i32(&[1, 1], vec![7]));
            }
            let views: Vec<(&str, TensorRef)> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
            let mut out = Outputs::new();
            let count = pool.install(|| allocations(|| e.run_into(&dims, &views, &mut store, &mut out, None).unwrap()));
            assert_eq!(count, 0, "{}, {} threads", g.name, pool.current_num_threads());
            let finite = |t: &Tensor| t.as_f32().is_none_or(|v| v.iter().all(|x| x.is_finite()));
            assert!(!out.is_empty() && out.iter().all(|(_, t)| finite(t)), "{}", g.name);
        }
    }
    assert_eq!(rambac_cpu::par::heap_peak(), 0);
}
