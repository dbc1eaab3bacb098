//! A grid over threads: clusters are taken in order (or in the seed's), run for a while, put aside if they must wait for
//! others, and taken up again.

use super::cluster::{Cluster, Progress};
use super::{Env, Options, Random, Sink};
use crate::check::global::{MAX_CLUSTERS, Releases, Shadows};
use crate::check::shared::MAX_PC;
use crate::check::{Finding, Findings};
use crate::count::{Counts, PcCount, Traffic};
use crate::error::Error;
use crate::isa::Program;
use crate::memory::GlobalMemory;
use std::collections::VecDeque;
use std::sync::Mutex;

/// What a launch needs beside its program.
pub struct Request<'a> {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// Earlier launches may still run.
    pub early: bool,
    /// As laid out by the program's `params`.
    pub params: &'a [u8],
    pub constants: &'a [u8],
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    pub findings: Vec<Finding>,
    pub counts: Counts,
}

/// Instructions of warps until a cluster is put aside for another.
const TURN: u64 = 1 << 18;
/// Clusters begun and not ended, at most: as many as a large device holds.  Few while they end by themselves.
const RESIDENT: usize = 4096;
/// Times that clusters are put aside until one more may begin: those may wait for one that has not.
const PATIENCE: usize = 4;
/// Shared memory of a block at most, in bytes (sm_90 allows 227 KiB).
const MOST_SHARED: u64 = 227 << 10;

fn check(p: &Program, r: &Request) -> Result<(), Error> {
    let bad = |what: String| Err(Error::Launch { kernel: p.name.clone(), what });
    let threads = r.block.iter().map(|&b| u64::from(b)).product::<u64>();
    if threads == 0 || threads > 1024 {
        return bad(format!("blocks of {threads} threads: 1 to 1024 are possible"));
    }
    if let Some(max) = p.max_threads.filter(|&m| threads > u64::from(m)) {
        return bad(format!("blocks of {threads} threads: the kernel says at most {max}"));
    }
    if let Some(want) = p.required_block.filter(|&w| w != r.block) {
        return bad(format!("blocks of {:?}: the kernel requires {want:?}", r.block));
    }
    if r.grid.contains(&0) || r.cluster.contains(&0) {
        return bad("a side of 0 blocks".into());
    }
    if (0..3).any(|i| !r.grid[i].is_multiple_of(r.cluster[i])) {
        return bad(format!("a grid of {:?} blocks in clusters of {:?}: it must be a multiple", r.grid, r.cluster));
    }
    if let Some(want) = p.cluster.filter(|&w| w != r.cluster) {
        return bad(format!("clusters of {:?}: the kernel requires {want:?}", r.cluster));
    }
    let size = r.cluster.iter().map(|&b| u64::from(b)).product::<u64>();
    if size > 16 {
        return bad(format!("clusters of {size} blocks: at most 16 are possible"));
    }
    let clusters = r.grid.iter().map(|&b| u64::from(b)).product::<u64>() / size;
    if clusters >= MAX_CLUSTERS {
        return bad(format!("{clusters} blocks: fewer than {MAX_CLUSTERS} can be watched"));
    }
    let shared = u64::from(p.shared_bytes) + u64::from(r.dynamic_shared);
    if shared > MOST_SHARED {
        return bad(format!("{shared} bytes of shared memory: a block has at most {MOST_SHARED}"));
    }
    if p.code.len() > MAX_PC {
        return bad(format!("{} instructions: at most {MAX_PC} can be watched", p.code.len()));
    }
    Ok(())
}

/// Runs a kernel to its end.  Findings and counts are deterministic where the kernel's own order of execution is; with
/// races, what is found may differ with the number of threads.
pub fn run(
    program: &Program,
    memory: &mut GlobalMemory,
    request: &Request,
    options: Options,
) -> Result<Outcome, Error> {
    check(program, request)?;
    let held: &GlobalMemory = memory;
    let shadows = Shadows::new(held, program.grain_global, options.races);
    let releases = Releases::default();
    let env = Env {
        program,
        memory: held,
        shadows: &shadows,
        constants: request.constants,
        params: request.params,
        releases: &releases,
        options,
        grid: request.grid,
        block: request.block,
        cluster: request.cluster,
        dynamic_shared: request.dynamic_shared,
        early: request.early,
    };
    let size: u32 = request.cluster.iter().product();
    let n = (request.grid.iter().map(|&b| u64::from(b)).product::<u64>() / u64::from(size)) as u32;
    let mut order: Vec<u32> = (0..n).collect();
    if options.seed != 0 {
        Random(options.seed).shuffle(&mut order);
    }
    let queue = Mutex::new(Queue { fresh: order.into(), aside: VecDeque::new(), resident: 0, most: 0, asides: 0 });
    lock(&queue).most = 2 * rayon::current_num_threads();
    let workers = rayon::current_num_threads().min(n as usize).max(1);
    let sinks: Vec<Sink> = if workers == 1 {
        vec![work(&env, &queue)]
    } else {
        let mut sinks: Vec<Option<Sink>> = (0..workers).map(|_| None).collect();
        rayon::scope(|s| {
            for sink in &mut sinks {
                let (env, queue) = (&env, &queue);
                s.spawn(move |_| *sink = Some(work(env, queue)));
            }
        });
        sinks.into_iter().flatten().collect()
    };
    let mut pcs = vec![PcCount::default(); program.code.len()];
    let mut traffic = vec![Traffic::default(); memory.buffers.len()];
    let mut findings = Findings::default();
    for sink in sinks {
        for (a, b) in pcs.iter_mut().zip(&sink.pcs) {
            a.warps += b.warps;
            a.threads += b.threads;
            a.sectors += b.sectors;
            a.again += b.again;
            a.passes += b.passes;
            a.conflicts += b.conflicts;
        }
        for (a, b) in traffic.iter_mut().zip(&sink.traffic) {
            a.read_bytes += b.read_bytes;
            a.read_sectors += b.read_sectors;
            a.write_bytes += b.write_bytes;
            a.write_sectors += b.write_sectors;
            a.atomics += b.atomics;
            a.moved_sectors += b.moved_sectors;
            a.least_sectors += b.least_sectors;
        }
        findings.merge(sink.findings);
    }
    let touched: Vec<_> = shadows.into_touched().collect();
    for (shadow, buffer) in touched.iter().zip(&mut memory.buffers) {
        shadow.iter().for_each(|s| s.finish(buffer));
    }
    let names: Vec<String> = memory.buffers.iter().map(|b| b.name.clone()).collect();
    Ok(Outcome { findings: findings.list(), counts: Counts::new(program, &pcs, &names, &traffic) })
}

struct Queue {
    fresh: VecDeque<u32>,
    aside: VecDeque<Box<Cluster>>,
    resident: usize,
    most: usize,
    asides: usize,
}

fn lock(queue: &Mutex<Queue>) -> std::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

enum Next {
    Fresh(u32),
    Again(Box<Cluster>),
    /// Others have all that is left.
    Nothing,
}

fn next(queue: &Mutex<Queue>) -> Next {
    let mut q = lock(queue);
    if q.resident < (q.most + q.asides / PATIENCE).min(RESIDENT)
        && let Some(id) = q.fresh.pop_front()
    {
        q.resident += 1;
        return Next::Fresh(id);
    }
    match q.aside.pop_front() {
        Some(c) => Next::Again(c),
        None => Next::Nothing,
    }
}

fn work(env: &Env, queue: &Mutex<Queue>) -> Sink {
    let mut sink = Sink {
        pcs: vec![PcCount::default(); env.program.code.len()],
        traffic: vec![Traffic::default(); env.memory.buffers.len()],
        findings: Findings::default(),
    };
    // Memory of the last cluster that ended, to be used again.
    let mut spare: Option<Box<Cluster>> = None;
    loop {
        let mut cluster = match next(queue) {
            Next::Fresh(id) => match spare.take() {
                Some(mut c) => {
                    c.reset(env, id);
                    c
                }
                None => Box::new(Cluster::new(env, id)),
            },
            Next::Again(c) => c,
            // Clusters that others run may come back, but they go on with them themselves.
            Next::Nothing => return sink,
        };
        let progress = cluster.run(env, &mut sink, TURN);
        let mut q = lock(queue);
        match progress {
            Progress::More => {
                q.asides += 1;
                q.aside.push_back(cluster);
            }
            Progress::Done => {
                q.resident -= 1;
                drop(q);
                spare = Some(cluster);
            }
        }
    }
}
