//! Running one program, waited for or not.
//!
//! A run that is begun ([`Machine::begin`]) goes on by itself: its inputs were copied to memory that the device reads by itself,
//! its results come to such memory, and [`Machine::finish`] waits for them alone.  So the host can make the next inputs, and
//! begin the next run, meanwhile; runs happen one after another all the same.  While a program's work is not recorded, its runs
//! are waited for at once: an error then names the step.

use super::bound::{Bound, Place, Stop, What, Work};
use super::bytes::Bytes;
use super::error::GpuError;
use super::machine::{Machine, Outcome, Pager, Placement, ProgramId, Record, blame, device, span};
use super::profile::Ends;
use super::stage::Pinned;
use crate::executor::StepTimes;
use rambac_codegen::cuda::GpuProgram;
use rambac_codegen::program::SourceSlot;
use rambac_driver::{BufferId, Device, Error, EventId, HostId};
use rambac_ir::Bindings;
use rambac_ir::ops::SourceKind;
use rambac_ir::ty::ConcreteTy;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Results of a run by name, in the program's order.
pub type Results = Vec<(String, Bytes)>;

/// A run whose results are still to come.
#[derive(Debug, PartialEq, Eq, Hash)]
#[must_use = "results are asked for with `finish`"]
pub struct Ticket(u64);

/// What a run is asked to do.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub dims: &'a Bindings,
    pub inputs: &'a [(&'a str, &'a Bytes)],
    /// Results that become values, and the values' names.
    pub keep: &'a [(&'a str, &'a str)],
    /// What is kept is returned, too.
    pub both: bool,
}

/// Results on their way to this machine.
struct Landing {
    /// Where they come, and how much that holds.
    to: Option<(HostId, usize)>,
    /// With the first byte of each.
    parts: Vec<(String, ConcreteTy, usize)>,
    /// Results that are too large for that.
    here: Results,
    bytes: usize,
}

/// A run that was begun.
pub(super) struct Flight {
    program: Arc<GpuProgram>,
    /// All of it, where it was started as one.
    whole: Option<Arc<Bound>>,
    landing: Landing,
    end: EventId,
}

/// A run as far as the host has to do with it.
struct Begun {
    gpu: Arc<GpuProgram>,
    bound: Arc<Bound>,
    landing: Landing,
    /// All of it was started as one: what goes wrong can't be told by its step anyway.
    whole: bool,
}

impl<D: Device> Machine<D> {
    /// Runs once: reads `inputs` (those not given are values of their name), updates params and states, returns the
    /// other outputs in order.
    ///
    /// # Errors
    /// See [`GpuError`].  Params and states may be half updated after an error of the device, not after any other.
    pub fn run(&mut self, id: ProgramId, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<Results> {
        self.run_keeping(id, dims, inputs, &[])
    }

    /// As [`run`](Self::run); the outputs named in `keep` become values of the name that stands beside them, and are not
    /// returned.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_keeping(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
    ) -> Outcome<Results> {
        self.run_asked(id, &Ask { dims, inputs, keep, both: false }, None)
    }

    /// As [`run`](Self::run); what steps are about to read in pages, `pager` brings before.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_paged(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        pager: &mut dyn Pager<D>,
    ) -> Outcome<Results> {
        self.run_asked(id, &Ask { dims, inputs, keep: &[], both: false }, Some(pager))
    }

    /// As [`run_keeping`](Self::run_keeping); adds the seconds of every step of the program to `times`, by the device's
    /// clock, see [`watch`](Self::watch).  They stay empty where a device has no clock.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_timed(
        &mut self,
        id: ProgramId,
        dims: &Bindings,
        inputs: &[(&str, &Bytes)],
        keep: &[(&str, &str)],
        times: &mut StepTimes,
    ) -> Outcome<Results> {
        let others = self.profiling.take();
        let result = self.watch(1).and_then(|()| self.run_keeping(id, dims, inputs, keep));
        let watched = self.watched();
        let ended = self.end_watch();
        self.profiling = others;
        let out = result?;
        ended?;
        for t in watched.iter().filter(|t| t.of_device) {
            times.resize(t.steps.len(), Duration::ZERO);
            times.iter_mut().zip(&t.steps).for_each(|(sum, s)| *sum += Duration::from_secs_f64(s.max(0.0)));
        }
        Ok(out)
    }

    /// As [`run`](Self::run) without its end, which [`finish`](Self::finish) waits for.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn begin(&mut self, id: ProgramId, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<Ticket> {
        let mut temporary = vec![];
        let ask = Ask { dims, inputs, keep: &[], both: false };
        if self.waits() {
            let here = self.run_asked(id, &ask, None)?;
            let landing = Landing { to: None, parts: vec![], here, bytes: 0 };
            return self.fly(self.programs[id.0].gpu.clone(), None, landing);
        }
        let name = self.programs[id.0].gpu.program.name.clone();
        self.device.begin_range(&name);
        let begun = self.run_with(id, &ask, &mut temporary, None);
        self.device.end_range();
        let begun = begun?;
        assert!(temporary.is_empty(), "BUG: only operands that lie apart are given back after a run");
        if !begun.whole {
            let ended = self.device.synchronise();
            self.landed(ended.map_err(|e| blame(&begun.gpu, &begun.bound, "its end".into(), e)), &begun.landing)?;
        }
        let whole = begun.whole.then_some(begun.bound);
        self.fly(begun.gpu, whole, begun.landing)
    }

    /// A run that is begun now comes to its end at once: nothing runs ahead.
    pub fn waits(&self) -> bool {
        self.placement == Placement::Apart || self.watching()
    }

    fn fly(&mut self, program: Arc<GpuProgram>, whole: Option<Arc<Bound>>, landing: Landing) -> Outcome<Ticket> {
        let end = self.device.event().map_err(|e| ending(&program, whole.as_deref(), e));
        let end = self.landed(end, &landing)?;
        self.tick += 1;
        self.flights.insert(self.tick, Flight { program, whole, landing, end });
        Ok(Ticket(self.tick))
    }

    /// Waits for a run that was begun; its results.
    ///
    /// # Errors
    /// The device failed meanwhile.
    pub fn finish(&mut self, ticket: Ticket) -> Outcome<Results> {
        let f = self.flights.remove(&ticket.0).expect("BUG: a ticket is of this machine, and finished once");
        let waited = self.device.wait(f.end);
        let ended = waited.and(self.device.release(f.end));
        let ended = ended.map_err(|e| ending(&f.program, f.whole.as_deref(), e));
        self.landed(ended, &f.landing)?;
        self.read(&f.program.program.name, f.landing)
    }

    /// Gives up runs whose results nobody wants.
    ///
    /// # Errors
    /// The device failed.
    pub fn give_up(&mut self) -> Outcome<()> {
        let mut first = Ok(());
        while let Some((&at, _)) = self.flights.first_key_value() {
            first = first.and(self.finish(Ticket(at)).map(drop));
        }
        first
    }

    pub(super) fn run_asked(&mut self, id: ProgramId, ask: &Ask, pager: Option<&mut dyn Pager<D>>) -> Outcome<Results> {
        let mut temporary = vec![];
        let name = self.programs[id.0].gpu.program.name.clone();
        self.device.begin_range(&name);
        let begun = self.run_with(id, ask, &mut temporary, pager);
        let result = begun.and_then(|b| self.end(id, ask, b));
        self.device.end_range();
        self.unwatch();
        let mut freed = Ok(());
        for b in temporary {
            freed = freed.and(self.device.free(b).map_err(device(&name, "free")));
        }
        result.and_then(|out| freed.map(|()| out))
    }

    /// Waits for a run and reads its results.
    fn end(&mut self, id: ProgramId, ask: &Ask, b: Begun) -> Outcome<Results> {
        let late = |e| match b.whole {
            true => ending(&b.gpu, Some(&b.bound), e),
            false => blame(&b.gpu, &b.bound, "its end".into(), e),
        };
        let ended = self.device.synchronise().map_err(late);
        let ended = ended.and_then(|()| self.note(id, ask.dims, [given(ask), b.landing.bytes]));
        self.landed(ended, &b.landing)?;
        self.read(&b.gpu.program.name, b.landing)
    }

    /// Takes the memory of results back if there will be none.
    fn landed<T>(&mut self, result: Outcome<T>, landing: &Landing) -> Outcome<T> {
        if let (Err(_), Some(to)) = (&result, landing.to) {
            self.pinned.give(to);
        }
        result
    }

    fn read(&mut self, program: &str, l: Landing) -> Outcome<Results> {
        let Some(to) = l.to else { return Ok(l.here) };
        let mut out = vec![];
        let mut read = Ok(());
        for (name, ty, at) in l.parts {
            let mut data = vec![0; ty.bytes()];
            read = read.and(self.device.read_host(to.0, at, &mut data).map_err(device(program, name.as_str())));
            out.push((name, Bytes { ty, data }));
        }
        self.pinned.give(to);
        read.map(|()| out)
    }

    fn run_with(
        &mut self,
        id: ProgramId,
        ask: &Ask,
        temporary: &mut Vec<BufferId>,
        pager: Option<&mut dyn Pager<D>>,
    ) -> Outcome<Begun> {
        let gpu = self.programs[id.0].gpu.clone();
        let name = gpu.program.name.as_str();
        self.check(&gpu, ask.dims, ask.inputs)?;
        let sources = self.sources(id, ask, temporary)?;
        let bound = self.bound(id, ask.dims, &sources, temporary)?;
        self.busy(bound.work.len())?;
        self.point(Ends::Before)?;
        for (slot, b) in gpu.program.sources.iter().zip(&sources) {
            if let Some(v) = find(ask, slot.kind, &slot.name) {
                self.bring(&v.data, (*b, 0)).map_err(device(name, &slot.name))?;
            }
        }
        self.point(Ends::Inputs)?;
        let whole = match pager {
            // The host looks in between.
            Some(p) if !bound.stops.is_empty() => {
                let parts = p.parts();
                let done = self.stopping((id, ask.dims), &gpu, &bound, (parts, p));
                let late = |e| blame(&gpu, &bound, "its end".into(), e);
                // Launches are counted up to here: some of them several times.
                let done = done.and_then(|()| if parts > 0 { self.device.synchronise().map_err(late) } else { Ok(()) });
                done.map_err(|e| match e {
                    GpuError::Device { error: Error::Lost { what, finished: Some(n) }, .. } if parts > 0 => {
                        late(Error::Lost { what, finished: Some(once(&bound, parts, n)) })
                    }
                    e => e,
                })?;
                false
            }
            _ => self.start((id, ask.dims), &gpu, &bound, 0, 0..bound.work.len())?,
        };
        let landing = self.land(&gpu, &bound, ask)?;
        Ok(Begun { gpu, bound, landing, whole })
    }

    /// Work between stops is a stretch that is recorded like a whole run.
    fn stopping(
        &mut self,
        (id, dims): (ProgramId, &Bindings),
        gpu: &GpuProgram,
        bound: &Bound,
        (parts, pager): (usize, &mut dyn Pager<D>),
    ) -> Outcome<()> {
        let mut from = 0;
        for (i, stop) in bound.stops.iter().enumerate() {
            // A stop has a stretch before it, and one of its own where it is gone through several times.
            let nth = 1 + 2 * i;
            match stop {
                Stop::Landmarks { .. } if parts == 0 => {}
                Stop::Landmarks { work } => {
                    self.start((id, dims), gpu, bound, nth, from..*work)?;
                    for part in 0..parts {
                        pager.landmarks(self, part)?;
                        self.point(Ends::Gathering)?;
                        self.start((id, dims), gpu, bound, nth + 1, *work..work + 1)?;
                    }
                    from = work + 1;
                }
                Stop::Choice { work, indices, count } => {
                    self.start((id, dims), gpu, bound, nth, from..*work)?;
                    let read = self.integers(indices).and_then(|indices| Ok((indices, self.integers(count)?)));
                    let (indices, count) = read.map_err(|e| {
                        let next = bound.work.get(*work).map_or("its end".into(), |w| w.describe(gpu));
                        blame(gpu, bound, format!("the choice of chunks for {next}, or a step before it"), e)
                    })?;
                    pager.chosen(self, &indices, &count)?;
                    self.point(Ends::Gathering)?;
                    from = *work;
                }
            }
        }
        self.start((id, dims), gpu, bound, 1 + 2 * bound.stops.len(), from..bound.work.len()).map(drop)
    }

    fn integers(&mut self, (ty, at): &(ConcreteTy, Place)) -> Result<Vec<i32>, rambac_driver::Error> {
        let mut data = vec![0; ty.bytes()];
        self.device.copy_out(at.0, at.1, &mut data)?;
        Ok(data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
    }

    /// The buffer of every source: that of its value, or one for an input that is given.
    pub(super) fn sources(
        &mut self,
        id: ProgramId,
        ask: &Ask,
        temporary: &mut Vec<BufferId>,
    ) -> Outcome<Vec<BufferId>> {
        let gpu = self.programs[id.0].gpu.clone();
        let one = |slot: &SourceSlot| match find(ask, slot.kind, &slot.name) {
            None => Ok(self.values[&slot.name].1),
            Some(v) => self.input(id, &slot.name, v.data.len(), temporary),
        };
        gpu.program.sources.iter().map(one).collect()
    }

    /// Starts the way of results to values and to this machine.
    fn land(&mut self, gpu: &GpuProgram, bound: &Bound, ask: &Ask) -> Outcome<Landing> {
        let (mut parts, mut from, mut bytes) = (vec![], vec![], 0usize);
        for (o, (ty, place)) in gpu.program.outputs.iter().filter(|o| !o.update).zip(&bound.outputs) {
            if let Some((_, value)) = ask.keep.iter().find(|(output, _)| *output == o.name) {
                let to = self.room(value, ty)?;
                let late = |e| blame(gpu, bound, o.name.clone(), e);
                self.device.copy(*place, (to, 0), ty.bytes()).map_err(late)?;
                if !ask.both {
                    continue;
                }
            }
            parts.push((o.name.clone(), ty.clone(), bytes));
            from.push(*place);
            bytes += ty.bytes().next_multiple_of(64);
        }
        let mut landing = Landing { to: None, parts, here: vec![], bytes };
        if bytes == 0 || bytes > Pinned::MOST {
            for ((name, ty, _), place) in std::mem::take(&mut landing.parts).into_iter().zip(from) {
                let mut data = vec![0; ty.bytes()];
                let late = |e| blame(gpu, bound, name.clone(), e);
                self.device.copy_out(place.0, place.1, &mut data).map_err(late)?;
                landing.here.push((name, Bytes { ty, data }));
            }
        } else {
            let to = self.pinned.take(&mut self.device, bytes).map_err(|e| blame(gpu, bound, "results".into(), e))?;
            landing.to = Some(to);
            let mut started = Ok(());
            for ((name, ty, at), place) in landing.parts.iter().zip(from) {
                let late = |e| blame(gpu, bound, name.clone(), e);
                started = started.and_then(|()| self.device.download(place, (to.0, *at), ty.bytes()).map_err(late));
            }
            self.landed(started, &landing)?;
        }
        let pointed = self.point(Ends::Results);
        self.landed(pointed, &landing)?;
        Ok(landing)
    }

    /// Starts a stretch of a run's work, the `nth` that is recorded by itself; whether it was started as a whole.
    fn start(
        &mut self,
        (id, dims): (ProgramId, &Bindings),
        gpu: &GpuProgram,
        bound: &Bound,
        nth: usize,
        stretch: Range<usize>,
    ) -> Outcome<bool> {
        let work = &bound.work[stretch];
        if self.watching() {
            for (i, w) in work.iter().enumerate() {
                let first = i == 0 || work[i - 1].step != w.step;
                if first {
                    self.device.begin_range(gpu.program.steps[w.step].op.mnemonic());
                }
                let started = self.one(id, gpu, bound, w);
                let last = work.get(i + 1).is_none_or(|next| next.step != w.step);
                if last || started.is_err() {
                    self.device.end_range();
                }
                started?;
                if last {
                    self.point(Ends::Step(w.step))?;
                }
            }
            return Ok(false);
        }
        if work.is_empty() {
            return Ok(false);
        }
        let kept = self.programs[id.0].bound.get(dims);
        let record = kept.map_or(Record::Never, |k| k.records.get(nth).copied().unwrap_or(Record::First));
        let whole = |e| device(&gpu.program.name, span(gpu, work))(e);
        let next = match record {
            Record::Made(r) => return self.device.replay(r).map(|()| true).map_err(whole),
            Record::First => Record::Second,
            Record::Second => {
                let all = |m: &mut Self| work.iter().try_for_each(|w| m.one(id, gpu, bound, w));
                if let Some(r) = self.record(whole, all)? {
                    self.keep_record(id, dims, nth, Record::Made(r));
                    return self.device.replay(r).map(|()| true).map_err(whole);
                }
                Record::Never
            }
            Record::Never => Record::Never,
        };
        work.iter().try_for_each(|w| self.one(id, gpu, bound, w))?;
        self.keep_record(id, dims, nth, next);
        Ok(false)
    }

    fn keep_record(&mut self, id: ProgramId, dims: &Bindings, nth: usize, record: Record) {
        if let Some(k) = self.programs[id.0].bound.get_mut(dims) {
            let n = k.records.len().max(nth + 1);
            k.records.resize(n, Record::First);
            k.records[nth] = record;
        }
    }

    pub(super) fn each(&mut self, id: ProgramId, gpu: &GpuProgram, bound: &Bound) -> Outcome<()> {
        bound.work.iter().try_for_each(|w| self.one(id, gpu, bound, w))
    }

    fn one(&mut self, id: ProgramId, gpu: &GpuProgram, bound: &Bound, w: &Work) -> Outcome<()> {
        let started = match &w.what {
            What::Launch(k, extent, args) => {
                let module = self.programs[id.0].modules[*k];
                self.device.launch(module, &gpu.kernels[*k].name, *extent, args)
            }
            What::Product(x) => self.device.product(x),
        };
        started.map_err(|e| blame(gpu, bound, w.describe(gpu), e))
    }

    /// Every source is there and of the right type.
    pub(super) fn check(&self, gpu: &GpuProgram, dims: &Bindings, inputs: &[(&str, &Bytes)]) -> Outcome<()> {
        for slot in &gpu.program.sources {
            let expected = slot.ty.bind(dims)?;
            let kind = slot.kind.name();
            let given = inputs.iter().find(|(n, _)| slot.kind == SourceKind::Input && *n == slot.name);
            let found = given.map(|(_, b)| &b.ty).or_else(|| self.ty(&slot.name));
            let (program, name) = (gpu.program.name.clone(), slot.name.clone());
            match found {
                None => return Err(GpuError::Missing { program, kind, name, expected: expected.to_string() }),
                Some(found) if *found != expected => {
                    let (expected, found) = (expected.to_string(), found.to_string());
                    return Err(GpuError::Wrong { program, kind, name, expected, found });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// The number of a launch among work, of which some was started once per part.
fn once(bound: &Bound, parts: usize, mut launch: usize) -> usize {
    for stop in &bound.stops {
        if let Stop::Landmarks { work } = stop
            && launch > *work
        {
            launch -= (launch - work).min(parts - 1);
        }
    }
    launch
}

/// The error of a run's end, which tells of any of its steps where they were started as one.
fn ending(gpu: &GpuProgram, whole: Option<&Bound>, e: rambac_driver::Error) -> GpuError {
    device(&gpu.program.name, whole.map_or("its end".into(), |b| span(gpu, &b.work)))(e)
}

/// The value of an input, if it was given.
pub(super) fn find<'a>(ask: &Ask<'a>, kind: SourceKind, name: &str) -> Option<&'a Bytes> {
    ask.inputs.iter().find(|(n, _)| kind == SourceKind::Input && *n == name).map(|(_, b)| *b)
}

/// Bytes of all inputs that were given.
fn given(ask: &Ask) -> usize {
    ask.inputs.iter().map(|(_, b)| b.data.len()).sum()
}
