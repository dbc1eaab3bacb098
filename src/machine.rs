//! What this machine is and how fast: what `bench` compares with and `doctor` prints.

use crate::error::{Result, warn};
use crate::show;
use miette::miette;
use rambac_cpu::kernels::gemm::{self, matmul};
use rambac_cpu::kernels::matvec::total;
use rambac_cpu::{Mat, MatMut, par, team};
use rambac_runtime::huge_pages;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Rates reached by plain work on all threads of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// FLOP/s of a 1024×1024×1024 product in f32.
    pub gemm: f64,
    /// Bytes read and written per second by copying 128 MiB.
    pub copy: f64,
}

/// Measures both, in about half a second: the best run counts, as others may be using the machine.
pub fn rates(pool: &rayon::ThreadPool) -> Rates {
    pool.install(|| Rates { gemm: gemm_rate(), copy: copy_rate() })
}

/// Seconds of the runs of `f` that fit in a quarter of a second, three at least, after one to warm up; ascending.
fn timed(mut f: impl FnMut()) -> Vec<f64> {
    f();
    let begin = Instant::now();
    let mut all = vec![];
    while all.len() < 3 || begin.elapsed() < Duration::from_millis(250) {
        let t = Instant::now();
        f();
        all.push(t.elapsed().as_secs_f64().max(1e-9));
    }
    all.sort_by(f64::total_cmp);
    all
}

fn shortest(f: impl FnMut()) -> f64 {
    timed(f)[0]
}

fn gemm_rate() -> f64 {
    let n = 1024;
    let fill = |k: usize| (0..n * n).map(|i| (i * k % 17) as f32 / 17.0 - 0.5).collect::<Vec<f32>>();
    let (a, b, mut c) = (fill(3), fill(5), vec![0.0f32; n * n]);
    let mut scratch = vec![0.0; gemm::scratch(n, n, n, false, false) + 16];
    let t = par::with_lent(&mut scratch, || {
        shortest(|| matmul(Mat::new(&a, n, n), false, Mat::new(&b, n, n), false, MatMut::new(&mut c, n, n), false))
    });
    2.0 * (n as f64).powi(3) / t
}

fn copy_rate() -> f64 {
    const LEN: usize = 32 << 20;
    const PART: usize = 1 << 16;
    let from = vec![1.0f32; LEN];
    let mut to = vec![0.0f32; LEN];
    let t = shortest(|| {
        to.par_chunks_mut(PART).zip(from.par_chunks(PART)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    black_box(&to);
    2.0 * (LEN * size_of::<f32>()) as f64 / t
}

/// Bytes ahead at which a stream asks for memory; which is best differs from machine to machine.
const AHEAD: [usize; 4] = [256, 512, 1024, 2048];

/// Bytes per second of reads.
#[derive(Clone, Copy, Debug)]
pub struct ReadRate {
    /// What a median is compared with.
    pub median: f64,
    pub best: f64,
}

/// How fast all threads of a pool read `bytes` of memory again and again, in large pages: as one stream a thread, asked for
/// ahead by several distances, and as decoding reads a weight, whatever is fastest.  At most 1 GiB, more than caches hold,
/// and half of the free memory.  Takes about two seconds.
pub fn read_rate(pool: &rayon::ThreadPool, bytes: usize) -> ReadRate {
    const PART: usize = 1 << 14;
    const COLS: usize = 1 << 10;
    let most = memory().map_or(1 << 30, |(_, free)| (free / 2).min(1 << 30));
    let parts = (bytes.min(most) / size_of::<f32>()).div_ceil(PART).max(1);
    let mut data = vec![0.0f32; parts * PART];
    huge_pages::prefer([(data.as_ptr().cast(), size_of_val(&*data))]);
    pool.install(|| data.par_chunks_mut(PART).for_each(|p| p.fill(1.0)));
    let (rows, x) = (data.len() / COLS, vec![1.0f32; COLS]);
    let mut y = vec![0.0f32; rows];
    let mut product =
        || matmul(Mat::new(&x, 1, COLS), false, Mat::new(&data, rows, COLS), true, MatMut::new(&mut y, 1, rows), false);
    let read = |ahead| {
        par::for_each(parts, data.len(), |i| {
            black_box(total(&data[i * PART..][..PART], ahead));
        });
    };
    // As decoding does: little is read in less time than a thread takes to wake.
    let ways: Vec<Vec<f64>> = team::awake(pool, || {
        let first = timed(&mut product);
        [first].into_iter().chain(AHEAD.map(|ahead| timed(|| read(ahead)))).collect()
    });
    let rate = |t: &dyn Fn(&[f64]) -> f64| {
        size_of_val(&*data) as f64 / ways.iter().map(|w| t(w)).fold(f64::INFINITY, f64::min)
    };
    ReadRate { median: rate(&|w| w[w.len() / 2]), best: rate(&|w| w[0]) }
}

/// Largest resident memory of this process so far, in bytes; 0 if the system does not tell.
pub fn peak_rss() -> usize {
    // SAFETY: all zeros is a valid rusage, and the call writes into it only.
    let (done, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &mut usage), usage)
    };
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    if done == 0 { usage.ru_maxrss as usize * unit } else { 0 }
}

/// Resident memory of this process now, in bytes; 0 if the system does not tell.
pub fn rss() -> usize {
    let field = |s: String| s.split_whitespace().nth(1)?.parse::<usize>().ok();
    // SAFETY: asks for a constant.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    std::fs::read_to_string("/proc/self/statm").ok().and_then(field).unwrap_or(0) * page.max(0) as usize
}

/// Bytes of memory in all and free for use, where the system tells: of the machine, or of the container if that is less.
pub fn memory() -> Option<(usize, usize)> {
    let (total, free) = of_machine()?;
    let limit = of_container().unwrap_or(usize::MAX);
    Some((total.min(limit), free.min(limit)))
}

/// The limit that a control group of version 2 or 1 sets.  A container sees its own as the root.
fn of_container() -> Option<usize> {
    let files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    // Without a limit it is no number, or one that no machine has.
    files.iter().find_map(|f| std::fs::read_to_string(f).ok()?.trim().parse().ok())
}

fn of_machine() -> Option<(usize, usize)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<usize> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// Refuses what needs `bytes` of memory if this machine has not that much in all, with `help`; warns if less is free.
///
/// # Errors
/// `what` needs more than there is.
pub fn room(what: impl std::fmt::Display, bytes: usize, help: &str) -> Result<()> {
    let Some((total, free)) = memory() else { return Ok(()) };
    let need = show::bytes(bytes);
    if bytes > total {
        return Err(miette!(
            help = help.to_string(),
            "{what} needs {need}, but this machine has {}",
            show::bytes(total)
        ));
    }
    if bytes > free {
        warn(format!("{what} needs {need}, but only {} are free", show::bytes(free)));
    }
    Ok(())
}

/// The processor's name, where the system tells.
pub fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Vector instructions that kernels can use here: (name, whether this machine has them).
pub fn simd() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        vec![
            ("AVX2 + FMA", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
            ("AVX-512", is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")),
            ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec![("NEON", true)]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        vec![]
    }
}
