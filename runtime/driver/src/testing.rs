//! A device that fails when it is told to, for tests of everything above it.

use crate::{Arg, BufferId, Code, Device, Error, Extent, ModuleId, Product, RecordId, Result, Space};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This call alone: an allocation for want of memory, any other with a refusal.
    Once,
    /// The device is lost by it.
    Lost,
}

/// What a [`Faulty`] device has seen; it outlives the device.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    calls: Vec<&'static str>,
    live: HashSet<BufferId>,
    records: usize,
    lost: bool,
}

impl Seen {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    /// The names of all calls so far but `free`, which never fails of itself.
    pub fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }
    /// Buffers that were given and not given back.
    pub fn live(&self) -> usize {
        self.state().live.len()
    }
    /// Records that were made and not given back.
    pub fn records(&self) -> usize {
        self.state().records
    }
}

/// See the module's comment.
pub struct Faulty<D> {
    inner: D,
    /// The number of the call that fails, from 0 on.
    fails: Option<(usize, Fault)>,
    seen: Seen,
    recording: Option<Vec<Recorded>>,
    records: Vec<Option<Vec<Recorded>>>,
}

/// It records as a GPU does, and what it replays is launched again.
#[derive(Clone)]
enum Recorded {
    Launch(ModuleId, String, Extent, Vec<Arg>),
    Product(Product),
}

/// What an injected error says.
pub const INJECTED: &str = "injected for a test";

impl<D: Device> Faulty<D> {
    pub fn new(inner: D, fails: Option<(usize, Fault)>) -> Faulty<D> {
        Faulty { inner, fails, seen: Seen::default(), recording: None, records: vec![] }
    }

    pub fn seen(&self) -> Seen {
        self.seen.clone()
    }

    fn lost() -> Error {
        Error::Lost { what: format!("a fault, {INJECTED}"), finished: None }
    }

    fn call(&mut self, name: &'static str) -> Result<()> {
        let mut s = self.seen.state();
        if s.lost {
            return Err(Self::lost());
        }
        s.calls.push(name);
        match self.fails {
            Some((n, fault)) if n + 1 == s.calls.len() => {
                s.lost = fault == Fault::Lost;
                Err(if s.lost { Self::lost() } else { Error::refused(format!("a refused {name}, {INJECTED}")) })
            }
            _ => Ok(()),
        }
    }
}

impl<D: Device> Device for Faulty<D> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn capability(&self) -> Option<(u32, u32)> {
        self.inner.capability()
    }
    fn space(&mut self) -> Result<Option<Space>> {
        self.call("space")?;
        self.inner.space()
    }
    fn load(&mut self, code: &Code) -> Result<ModuleId> {
        self.call("load")?;
        self.inner.load(code)
    }
    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId> {
        self.call("alloc").map_err(|e| match e {
            Error::Refused(_) => Error::OutOfMemory { name: name.into(), asked: bytes, free: Some(0) },
            e => e,
        })?;
        let b = self.inner.alloc(name, bytes)?;
        assert!(self.seen.state().live.insert(b), "BUG: a buffer that is in use was given again");
        Ok(b)
    }
    fn free(&mut self, buffer: BufferId) -> Result<()> {
        let mut s = self.seen.state();
        assert!(s.live.remove(&buffer), "BUG: a buffer is given back that is not in use");
        // Of a lost device all memory is gone.
        if s.lost { Err(Self::lost()) } else { self.inner.free(buffer) }
    }
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<()> {
        self.call("copy_in")?;
        self.inner.copy_in(buffer, at, data)
    }
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<()> {
        self.call("copy_out")?;
        self.inner.copy_out(buffer, at, data)
    }
    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.call("copy")?;
        self.inner.copy(from, to, bytes)
    }
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()> {
        self.call("launch")?;
        match &mut self.recording {
            Some(all) => all.push(Recorded::Launch(module, kernel.into(), extent, args.to_vec())),
            None => self.inner.launch(module, kernel, extent, args)?,
        }
        Ok(())
    }
    fn product(&mut self, p: &Product) -> Result<()> {
        self.call("product")?;
        match &mut self.recording {
            Some(all) => all.push(Recorded::Product(*p)),
            None => self.inner.product(p)?,
        }
        Ok(())
    }
    fn synchronise(&mut self) -> Result<()> {
        self.call("synchronise")?;
        self.inner.synchronise()
    }
    fn begin_record(&mut self) -> Result<bool> {
        self.call("begin_record")?;
        self.recording = Some(vec![]);
        Ok(true)
    }
    fn end_record(&mut self) -> Result<RecordId> {
        // Whatever comes of it, it no longer records.
        let all = self.recording.take();
        self.call("end_record")?;
        self.records.push(all);
        self.seen.state().records += 1;
        Ok(RecordId(self.records.len() - 1))
    }
    fn replay(&mut self, record: RecordId) -> Result<()> {
        self.call("replay")?;
        for r in self.records[record.0].clone().expect("BUG: a record is replayed that was given back") {
            match r {
                Recorded::Launch(module, kernel, extent, args) => self.inner.launch(module, &kernel, extent, &args)?,
                Recorded::Product(p) => self.inner.product(&p)?,
            }
        }
        Ok(())
    }
    fn forget(&mut self, record: RecordId) -> Result<()> {
        assert!(self.records[record.0].take().is_some(), "BUG: a record is given back twice");
        self.seen.state().records -= 1;
        Ok(())
    }
    fn mark(&mut self) -> Result<()> {
        self.call("mark")?;
        self.inner.mark()
    }
    fn laps(&mut self) -> Result<Option<Vec<f64>>> {
        self.call("laps")?;
        self.inner.laps()
    }
}
