//! A team: the threads of a pool kept awake for one run of many short loops.
//!
//! Waking a sleeping thread costs tens of microseconds, as much as a whole step of decoding.  In a team one thread runs
//! the program and the others wait, spinning, for the loops of [`par::for_each`](crate::par::for_each).  A loop's tasks
//! are dealt in runs of neighbours, so that a thread streams contiguous memory; who is done takes tasks from the end of
//! another's run.  A thread that does not come at once is not waited for, and not let in later: it might be inside a task
//! that the program itself waits for.  Who has waited long sleeps until the next loop.  A program of many runs, such as
//! the tokens of a text, gathers its team once, with [`awake`]: the runs inside are then its loops.
//! Who waits asks memory for what the program says it reads [next](ahead): steps between two products of decoding leave
//! memory idle, and their weights are too many for any cache to keep.
//! Invariants: as in `par`, what a task computes depends on its index alone.  A loop inside a task is no business of the
//! team: it runs on the pool as ever.

use crate::kernels::matvec::prefetch_far;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Condvar, Mutex};

/// Looks at the next loop before a waiting thread lets others run: about 100 µs.
const PATIENCE: usize = 2000;
/// Looks before it sleeps: a few hundred µs more, which no step of decoding takes.
const ASLEEP: usize = PATIENCE + 500;

/// Looks for helpers that are missing, before a run and before many of them: a tenth of a millisecond and some.
const RUN: usize = PATIENCE;
const MANY_RUNS: usize = 20 * PATIENCE;

/// Bytes of what is read next that a thread asks its own cache (L2) for, at most and at a time.
const AHEAD: usize = 768 << 10;
const ASKED: usize = 16 * LINE;
const LINE: usize = 64;

/// Threads that a team can have.
const MOST: usize = 128;

/// Tasks that a loop can have.
const MAX_TASKS: usize = u32::MAX as usize;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Tasks first..end of one thread, packed so that both ends change at once; alone in its cache lines.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn deal(&self, first: usize, end: usize) {
        self.0.store((first as u64) << 32 | end as u64, Relaxed);
    }
    /// Takes one task from the front or the back.
    fn take(&self, front: bool) -> Option<usize> {
        let mut now = self.0.load(Relaxed);
        loop {
            let (first, end) = (now >> 32, now & u64::from(u32::MAX));
            if first >= end {
                return None;
            }
            let (task, next) = if front { (first, now + (1 << 32)) } else { (end - 1, now - 1) };
            match self.0.compare_exchange_weak(now, next, Relaxed, Relaxed) {
                Ok(_) => return Some(task as usize),
                Err(other) => now = other,
            }
        }
    }
}

/// See the module's comment.
pub(crate) struct Team {
    /// Odd while a loop is open.
    epoch: AtomicUsize,
    /// The open loop's body.
    job: UnsafeCell<*const Task<'static>>,
    shares: [Share; MOST],
    /// Shares in use.
    threads: usize,
    /// Twice the number of helpers that have come; odd when nobody is let in any more.
    door: AtomicUsize,
    /// Threads that are, or may be, inside the open loop.
    helping: AtomicUsize,
    over: AtomicBool,
    /// Memory that a loop after this one reads in the order of its tasks, and its bytes.  The two need not belong together:
    /// what is asked for in vain does no harm.
    next: AtomicPtr<u8>,
    next_bytes: AtomicUsize,
    /// Threads that sleep, or are about to; changed under `bed`.
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    call: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only while no loop is open and nobody helps, see `each` and `help`; the rest is Sync.
unsafe impl Sync for Team {}

thread_local! {
    /// The team whose program this thread runs, outside of its tasks.
    static CURRENT: Cell<*const Team> = const { Cell::new(null()) };
    /// Whether this thread is in a team, in a task or out of it.
    static MEMBER: Cell<bool> = const { Cell::new(false) };
}

/// The team of this thread, for the length of the call; `None` inside a task.
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Team>) -> R) -> R {
    // SAFETY: set by `run` while its team lives, on the thread that it blocks.
    f(unsafe { CURRENT.get().as_ref() })
}

/// Sets this thread's team and puts the old one back when dropped.
struct Entered(*const Team);

impl Entered {
    fn new(team: *const Team) -> Self {
        Self(CURRENT.replace(team))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Makes this thread a member until it is dropped.
struct Member;

impl Member {
    /// `None`: it is one already.
    fn join() -> Option<Self> {
        (!MEMBER.replace(true)).then_some(Self)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        MEMBER.set(false);
    }
}

/// Sends the helpers home, also when the program panics.
struct Over<'a>(&'a Team);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, SeqCst);
        self.0.wake();
    }
}

/// Runs `f` on one thread of `pool`, with the others as its team; inside a team's program, with that team.  Nothing is
/// allocated.
pub fn run<R: Send>(pool: &rayon::ThreadPool, f: impl FnOnce() -> R + Send) -> R {
    gathered(pool, RUN, f)
}

/// As [`run`], for an `f` that calls it many times: waits longer for helpers, which would be missed longer.
pub fn awake<R: Send>(pool: &rayon::ThreadPool, f: impl FnOnce() -> R + Send) -> R {
    gathered(pool, MANY_RUNS, f)
}

/// See [`run`]; looks `patience` times for those that are missing.
fn gathered<R: Send>(pool: &rayon::ThreadPool, patience: usize, f: impl FnOnce() -> R + Send) -> R {
    if with_current(|team| team.is_some()) {
        return f();
    }
    let threads = pool.current_num_threads().min(MOST);
    if threads == 1 {
        return pool.install(f);
    }
    let team = Team {
        epoch: AtomicUsize::new(0),
        job: UnsafeCell::new(null::<fn(usize)>() as *const Task<'static>),
        shares: [const { Share(AtomicU64::new(0)) }; MOST],
        threads,
        door: AtomicUsize::new(0),
        helping: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        next: AtomicPtr::new(null_mut()),
        next_bytes: AtomicUsize::new(0),
        sleepers: AtomicUsize::new(0),
        bed: Mutex::new(()),
        call: Condvar::new(),
        panic: Mutex::new(None),
    };
    let program = || {
        let _over = Over(&team);
        // A program inside a team's task is none of that team's loops.
        let _member = Member::join();
        team.close_door(patience);
        let _entered = Entered::new(&team);
        f()
    };
    pool.install(|| rayon::join(program, || team.gather(1)).0)
}

/// Tells this thread's team, if it has one, that a loop will soon read these bytes, task after task.
pub fn ahead(at: *const u8, bytes: usize) {
    with_current(|team| {
        if let Some(team) = team {
            team.next_bytes.store(bytes, Relaxed);
            team.next.store(at.cast_mut(), Relaxed);
        }
    });
}

/// What a thread has asked for of the memory that is read next.
struct Asked {
    of: *mut u8,
    bytes: usize,
}

/// A panic while one of these is held is passed on elsewhere.
fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Default for Asked {
    fn default() -> Self {
        Self { of: null_mut(), bytes: 0 }
    }
}

impl Team {
    /// Waits for loops as member `me` and leaves it to the pool to bring the members after it.
    fn gather(&self, me: usize) {
        if me + 1 < self.threads {
            rayon::join(|| self.help(me), || self.gather(me + 1));
        } else {
            self.help(me);
        }
    }

    /// Waits a little for the helpers, then goes without those that are missing.
    fn close_door(&self, patience: usize) {
        let mut looks = 0;
        while looks < patience && self.door.load(Relaxed) / 2 + 1 < self.threads {
            wait(&mut looks);
        }
        self.door.fetch_add(1, SeqCst);
    }

    /// Whether a helper that comes now is let in.
    fn enter(&self) -> bool {
        let open = |door: usize| door.is_multiple_of(2).then_some(door + 2);
        self.door.fetch_update(SeqCst, SeqCst, open).is_ok()
    }

    /// Calls `f` for every index below `tasks`, on this thread and on whoever helps; false if it is not for a team.
    pub(crate) fn each(&self, tasks: usize, f: &Task<'_>) -> bool {
        if tasks > MAX_TASKS {
            return false;
        }
        let n = self.threads;
        let cut = |i: usize| (tasks as u64 * i as u64 / n as u64) as usize;
        self.shares[..n].iter().enumerate().for_each(|(i, s)| s.deal(cut(i), cut(i + 1)));
        // SAFETY: no loop is open and nobody helps.  The lifetime is forgotten only until the end of this function,
        // which does not return, nor unwind, before every thread has left the loop.
        unsafe { *self.job.get() = std::mem::transmute::<*const Task<'_>, *const Task<'static>>(f) };
        self.epoch.fetch_add(1, SeqCst);
        self.wake();
        let mine = catch_unwind(AssertUnwindSafe(|| {
            let _entered = Entered::new(null());
            self.work(0, f);
        }));
        // No task is left, or this thread panicked; the tasks of others may still run.
        self.epoch.fetch_add(1, SeqCst);
        let (mut looks, mut asked) = (0, Asked::default());
        while self.helping.load(SeqCst) > 0 {
            if !self.ask(0, &mut asked) {
                wait(&mut looks);
            }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        if let Some(panic) = lock(&self.panic).take() {
            resume_unwind(panic);
        }
        true
    }

    /// Tasks from the front of the own share, then from the back of others'.
    fn work(&self, me: usize, f: &Task<'_>) {
        while let Some(t) = self.shares[me].take(true) {
            f(t);
        }
        let n = self.threads;
        for other in (1..n).map(|k| (me + k) % n) {
            while let Some(t) = self.shares[other].take(false) {
                f(t);
            }
        }
    }

    /// Asks for a little more of the memory that member `me` will read next; false where it has asked for enough.
    fn ask(&self, me: usize, asked: &mut Asked) -> bool {
        let (of, bytes) = (self.next.load(Relaxed), self.next_bytes.load(Relaxed));
        if of != asked.of {
            *asked = Asked { of, bytes: 0 };
        }
        let share = bytes / self.threads;
        if of.is_null() || asked.bytes >= share.min(AHEAD) {
            return false;
        }
        let at = of.wrapping_add(share.wrapping_mul(me).wrapping_add(asked.bytes));
        (0..ASKED).step_by(LINE).for_each(|line| prefetch_far(at.wrapping_add(line)));
        asked.bytes += ASKED;
        true
    }

    /// Until a loop is open that is not `done`, or the program is over.
    fn sleep(&self, done: usize) {
        let mut bed = lock(&self.bed);
        // Either `wake`, which comes after a change, sees this thread, or this thread sees the change.
        self.sleepers.fetch_add(1, SeqCst);
        while !self.over.load(SeqCst) {
            let epoch = self.epoch.load(SeqCst);
            if !epoch.is_multiple_of(2) && epoch != done {
                break;
            }
            bed = self.call.wait(bed).unwrap_or_else(|e| e.into_inner());
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    fn wake(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(lock(&self.bed));
            self.call.notify_all();
        }
    }

    /// What the other threads do until the program is over.
    fn help(&self, me: usize) {
        // A member that waits for a loop of its own may meet this call in its queue: it must not wait here for others.
        let Some(_member) = Member::join() else { return };
        if !self.enter() {
            return;
        }
        let (mut done, mut looks, mut asked) = (0, 0, Asked::default());
        while !self.over.load(SeqCst) {
            let epoch = self.epoch.load(SeqCst);
            if epoch.is_multiple_of(2) || epoch == done {
                if self.ask(me, &mut asked) {
                    continue;
                }
                wait(&mut looks);
                if looks > ASLEEP {
                    self.sleep(done);
                    looks = 0;
                }
                continue;
            }
            self.helping.fetch_add(1, SeqCst);
            // If the loop is still open now, it stays until this thread no longer counts as helping: `each` closes it
            // first and looks at the count after.
            if self.epoch.load(SeqCst) == epoch {
                // SAFETY: written before the epoch became odd.
                let f = unsafe { &**self.job.get() };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(me, f))) {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
            self.helping.fetch_sub(1, SeqCst);
            (done, looks) = (epoch, 0);
        }
    }
}

/// Spins at first, then lets other threads have the processor.
fn wait(looks: &mut usize) {
    *looks += 1;
    if *looks < PATIENCE { std::hint::spin_loop() } else { std::thread::yield_now() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn team_runs_every_task_once() {
        for threads in [1, 2, 5] {
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            let sum = run(&pool(threads), || {
                for round in 0..300 {
                    let tasks = round * 7 % 1000;
                    par::for_each(tasks, usize::MAX, |i| {
                        counts[i].fetch_add(1, Relaxed);
                    });
                }
                (0..300).map(|round| round * 7 % 1000).sum::<usize>()
            });
            let each: Vec<usize> = counts.iter().map(|c| c.load(Relaxed)).collect();
            assert_eq!(each.iter().sum::<usize>(), sum);
            // Task i runs in every round that has more than i tasks.
            let want = |i: usize| (0..300).filter(|round| round * 7 % 1000 > i).count();
            each.iter().enumerate().for_each(|(i, n)| assert_eq!(*n, want(i), "task {i}, {threads} threads"));
        }
    }

    #[test]
    fn team_of_many_runs() {
        let (p, count) = (pool(3), AtomicUsize::new(0));
        let ids = awake(&p, || {
            let run_once = |_| {
                run(&p, || {
                    par::for_each(100, usize::MAX, |_| {
                        count.fetch_add(1, Relaxed);
                    });
                    std::thread::current().id()
                })
            };
            (0..200).map(run_once).collect::<Vec<_>>()
        });
        assert_eq!(count.into_inner(), 200 * 100);
        assert!(ids.iter().all(|id| *id == ids[0]), "a run inside is on its team's thread");
    }

    #[test]
    fn team_loops_inside_tasks() {
        let count = AtomicUsize::new(0);
        run(&pool(3), || {
            par::for_each(50, usize::MAX, |_| {
                par::for_each(20, usize::MAX, |_| {
                    count.fetch_add(1, Relaxed);
                });
            });
        });
        assert_eq!(count.into_inner(), 1000);
    }

    /// Loops of rayon itself inside a program, as long as threads still come: nobody waits for ever.
    #[test]
    fn team_beside_loops_of_the_pool() {
        use rayon::prelude::*;
        let p = pool(5);
        for _ in 0..2000 {
            let sum: usize = run(&p, || (0..64usize).into_par_iter().with_max_len(1).map(|i| i + 1).sum());
            assert_eq!(sum, 65 * 32);
        }
    }

    /// Whatever is said to be read next, even what no memory is at, loops give what they give without.
    #[test]
    fn team_asks_ahead_of_any_memory() {
        let data = vec![1u8; 3 << 20];
        let count = AtomicUsize::new(0);
        run(&pool(3), || {
            for (at, bytes) in
                [(data.as_ptr(), data.len()), (null(), 100), (std::ptr::without_provenance(usize::MAX), usize::MAX)]
            {
                ahead(at, bytes);
                for _ in 0..50 {
                    par::for_each(7, usize::MAX, |_| {
                        count.fetch_add(1, Relaxed);
                    });
                }
            }
        });
        ahead(data.as_ptr(), data.len());
        assert_eq!(count.into_inner(), 3 * 50 * 7);
    }

    /// Loops come so seldom that helpers sleep in between.
    #[test]
    fn team_wakes_who_sleeps() {
        let count = AtomicUsize::new(0);
        run(&pool(3), || {
            for _ in 0..5 {
                std::thread::sleep(std::time::Duration::from_millis(30));
                par::for_each(300, usize::MAX, |_| {
                    std::thread::sleep(std::time::Duration::from_micros(20));
                    count.fetch_add(1, Relaxed);
                });
            }
        });
        assert_eq!(count.into_inner(), 1500);
    }

    #[test]
    fn team_passes_panics_on() {
        let p = pool(3);
        for bad in [0, 13, 99] {
            let r = catch_unwind(AssertUnwindSafe(|| {
                run(&p, || par::for_each(100, usize::MAX, |i| assert!(i != bad, "task {i}")));
            }));
            let message = *r.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("task {bad}"));
        }
        // And the pool still works.
        assert_eq!(run(&p, || 7), 7);
    }
}
