//! Where the time of runs goes, step by step.
//!
//! A run that is watched starts its steps one by one with marks of the device between them; what each step took is the device's
//! own time.  The host starts a step more slowly than a GPU runs a short one: so the device first gets something to do for as
//! long as the host will need, and then never waits for it (where it has memory for that).  A device without a clock, such as the simulator, does all at once:
//! then the time is this machine's.

use super::machine::{Machine, Outcome, ProgramId, device};
use rambac_driver::{BufferId, Device, Error};
use rambac_ir::Bindings;
use std::time::Instant;

/// Where the time of one run went, in seconds.
#[derive(Clone, Debug)]
pub struct RunTimes {
    pub program: ProgramId,
    pub dims: Bindings,
    /// When it was begun.
    pub began: Instant,
    /// Bytes and seconds of its inputs' way to the device.
    pub inputs: (usize, f64),
    /// Of every step of the program.
    pub steps: Vec<f64>,
    /// Bringing what a step chose, between steps.
    pub gathering: f64,
    /// Bytes and seconds of its results' way back.
    pub results: (usize, f64),
    /// The times are the device's, not this machine's.
    pub of_device: bool,
    /// The host was ahead of the device all the time, so that no step's time is that of starting it.
    pub ahead: bool,
    /// Bytes of the device that values, inputs and the arena take.
    pub bytes: usize,
}

impl RunTimes {
    pub fn seconds(&self) -> f64 {
        self.inputs.1 + self.steps.iter().sum::<f64>() + self.gathering + self.results.1
    }
}

/// What ends at a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    Before,
    Inputs,
    Step(usize),
    Gathering,
    Results,
}

/// The runs that are watched.
pub(super) struct Profiling {
    left: usize,
    done: Vec<RunTimes>,
    /// Of the run that goes on.
    points: Vec<(Ends, Instant)>,
    /// What a device with a clock copies to and fro while the host starts the first steps.
    busy: Option<(BufferId, usize)>,
}

/// Bytes that are copied to keep the device busy, which takes it some 40 µs, and how many launches the host starts meanwhile.
const BUSY: usize = 64 << 20;
const LAUNCHES: usize = 5;

impl<D: Device> Machine<D> {
    /// Watches the next `runs` runs.
    ///
    /// # Errors
    /// The device fails.
    pub fn watch(&mut self, runs: usize) -> Outcome<()> {
        self.end_watch()?;
        let failed = || device("a profile", "a mark");
        self.device.mark().map_err(failed())?;
        let clock = self.device.laps().map_err(failed())?.is_some();
        // What has no memory of its own is no GPU, and there a copy is work of this machine.
        let own = self.device.space().map_err(failed())?.is_some();
        let bytes = if own { BUSY } else { 64 };
        let busy = match clock.then(|| self.device.alloc("a profile", 2 * bytes)) {
            Some(Ok(b)) => Some((b, bytes)),
            // Then it is not kept busy, which `RunTimes::ahead` tells.
            None | Some(Err(Error::OutOfMemory { .. })) => None,
            Some(Err(e)) => return Err(device("a profile", "room to keep it busy")(e)),
        };
        self.profiling = Some(Profiling { left: runs, done: vec![], points: vec![], busy });
        Ok(())
    }

    /// Watches no more runs.
    ///
    /// # Errors
    /// The device fails.
    pub fn end_watch(&mut self) -> Outcome<()> {
        self.unwatch();
        let busy = self.profiling.take().and_then(|p| p.busy);
        busy.map_or(Ok(()), |(b, _)| self.device.free(b)).map_err(device("a profile", "free"))
    }

    /// Runs that were watched since the last call, in order.
    pub fn watched(&mut self) -> Vec<RunTimes> {
        self.profiling.as_mut().map(|p| std::mem::take(&mut p.done)).unwrap_or_default()
    }

    /// Whether the next run is watched.
    pub(super) fn watching(&self) -> bool {
        self.profiling.as_ref().is_some_and(|p| p.left > 0)
    }

    /// Gives the device something to do before a run of `work` launches is watched.
    pub(super) fn busy(&mut self, work: usize) -> Outcome<()> {
        let Some((b, bytes)) = self.profiling.as_ref().filter(|p| p.left > 0).and_then(|p| p.busy) else {
            return Ok(());
        };
        let copies = (0..work.div_ceil(LAUNCHES)).map(|_| self.device.copy((b, 0), (b, bytes), bytes));
        copies.fold(Ok(()), Result::and).map_err(device("a profile", "a copy"))
    }

    /// A mark, if the run is watched.
    pub(super) fn point(&mut self, ends: Ends) -> Outcome<()> {
        let Some(p) = self.profiling.as_mut().filter(|p| p.left > 0) else { return Ok(()) };
        self.device.mark().map_err(device("a profile", "a mark"))?;
        p.points.push((ends, Instant::now()));
        Ok(())
    }

    /// Forgets the marks of a run that failed.
    pub(super) fn unwatch(&mut self) {
        if self.profiling.as_mut().is_some_and(|p| !std::mem::take(&mut p.points).is_empty()) {
            // What failed before is what counts.
            let _ = self.device.laps();
        }
    }

    /// Makes times of the marks of a run that has ended.
    pub(super) fn note(&mut self, id: ProgramId, dims: &Bindings, moved: [usize; 2]) -> Outcome<()> {
        let bytes = self.bytes();
        let Some(p) = self.profiling.as_mut().filter(|p| p.left > 0) else { return Ok(()) };
        let points = std::mem::take(&mut p.points);
        let laps = self.device.laps().map_err(device("a profile", "the times of steps"))?;
        let Some(&(_, began)) = points.first() else { return Ok(()) };
        let mut t = RunTimes {
            program: id,
            dims: dims.clone(),
            began,
            inputs: (moved[0], 0.0),
            steps: vec![0.0; self.programs[id.0].gpu.program.steps.len()],
            gathering: 0.0,
            results: (moved[1], 0.0),
            of_device: laps.is_some(),
            ahead: p.busy.is_some(),
            bytes,
        };
        for (i, pair) in points.windows(2).enumerate() {
            let seconds = match &laps {
                Some(laps) => laps[i],
                None => pair[1].1.duration_since(pair[0].1).as_secs_f64(),
            };
            match pair[1].0 {
                Ends::Before => {}
                Ends::Inputs => t.inputs.1 += seconds,
                Ends::Step(i) => t.steps[i] += seconds,
                Ends::Gathering => t.gathering += seconds,
                Ends::Results => t.results.1 += seconds,
            }
        }
        p.left -= 1;
        p.done.push(t);
        Ok(())
    }
}
