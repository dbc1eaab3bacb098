//! Devices for tests of everything above them: one that fails when it is told to, and one that does all as late as may be.

mod late;

pub use late::Late;

use crate::{Arg, BufferId, Code, Device, Error, EventId, Extent, HostId, ModuleId, Product, RecordId, Result, Space};
use std::collections::{HashMap, HashSet};
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
    live: HashMap<BufferId, usize>,
    /// Bytes of the device that were in use at once, at most.
    peak: usize,
    hosts: HashSet<HostId>,
    events: usize,
    records: usize,
    lost: bool,
    /// Launches and products since the last synchronise, as a device counts them: not while it records, nor once it replayed.
    started: Option<usize>,
    recording: bool,
}

impl Seen {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    /// The names of all calls so far but those that give something back, which never fail of themselves.
    pub fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }
    /// Buffers, pieces of this machine's memory and events that were given and not given back.
    pub fn live(&self) -> usize {
        let s = self.state();
        s.live.len() + s.hosts.len() + s.events
    }
    /// Bytes of the device that were in use at once, at most.
    pub fn peak(&self) -> usize {
        self.state().peak
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
}

/// What an injected error says.
pub const INJECTED: &str = "injected for a test";

impl<D: Device> Faulty<D> {
    pub fn new(inner: D, fails: Option<(usize, Fault)>) -> Faulty<D> {
        let seen = Seen::default();
        seen.state().started = Some(0);
        Faulty { inner, fails, seen }
    }

    pub fn seen(&self) -> Seen {
        self.seen.clone()
    }

    fn lost(finished: Option<usize>) -> Error {
        Error::Lost { what: format!("a fault, {INJECTED}"), finished }
    }

    fn call(&mut self, name: &'static str) -> Result<()> {
        let mut s = self.seen.state();
        if s.lost {
            return Err(Self::lost(s.started.filter(|_| !s.recording)));
        }
        s.calls.push(name);
        match self.fails {
            Some((n, fault)) if n + 1 == s.calls.len() => {
                s.lost = fault == Fault::Lost;
                return Err(if s.lost {
                    Self::lost(s.started.filter(|_| !s.recording))
                } else {
                    Error::refused(format!("a refused {name}, {INJECTED}"))
                });
            }
            _ => {}
        }
        match name {
            "launch" | "product" if !s.recording => s.started = s.started.map(|n| n + 1),
            "replay" => s.started = None,
            "synchronise" => s.started = Some(0),
            "begin_record" => s.recording = true,
            _ => {}
        }
        Ok(())
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
        let mut s = self.seen.state();
        assert!(s.live.insert(b, bytes).is_none(), "BUG: a buffer that is in use was given again");
        s.peak = s.peak.max(s.live.values().sum());
        Ok(b)
    }
    fn free(&mut self, buffer: BufferId) -> Result<()> {
        let mut s = self.seen.state();
        assert!(s.live.remove(&buffer).is_some(), "BUG: a buffer is given back that is not in use");
        // Of a lost device all memory is gone.
        if s.lost { Err(Self::lost(s.started)) } else { self.inner.free(buffer) }
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
    fn alloc_host(&mut self, name: &str, bytes: usize) -> Result<HostId> {
        self.call("alloc_host")?;
        let h = self.inner.alloc_host(name, bytes)?;
        assert!(self.seen.state().hosts.insert(h), "BUG: memory that is in use was given again");
        Ok(h)
    }
    fn free_host(&mut self, host: HostId) -> Result<()> {
        assert!(self.seen.state().hosts.remove(&host), "BUG: memory is given back that is not in use");
        if self.seen.state().lost { Err(Self::lost(None)) } else { self.inner.free_host(host) }
    }
    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> Result<()> {
        self.call("write_host")?;
        self.inner.write_host(host, at, data)
    }
    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> Result<()> {
        self.call("read_host")?;
        self.inner.read_host(host, at, data)
    }
    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.call("upload")?;
        self.inner.upload(from, to, bytes)
    }
    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> Result<()> {
        self.call("download")?;
        self.inner.download(from, to, bytes)
    }
    fn event(&mut self) -> Result<EventId> {
        self.call("event")?;
        let e = self.inner.event()?;
        self.seen.state().events += 1;
        Ok(e)
    }
    fn wait(&mut self, event: EventId) -> Result<()> {
        self.call("wait")?;
        self.inner.wait(event)
    }
    fn release(&mut self, event: EventId) -> Result<()> {
        self.seen.state().events -= 1;
        self.inner.release(event)
    }
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()> {
        self.call("launch")?;
        self.inner.launch(module, kernel, extent, args)
    }
    fn product(&mut self, p: &Product) -> Result<()> {
        self.call("product")?;
        self.inner.product(p)
    }
    fn synchronise(&mut self) -> Result<()> {
        self.call("synchronise")?;
        self.inner.synchronise()
    }
    fn begin_record(&mut self) -> Result<bool> {
        self.call("begin_record")?;
        self.inner.begin_record()
    }
    fn end_record(&mut self) -> Result<RecordId> {
        // Whatever comes of it, it no longer records.
        self.seen.state().recording = false;
        let record = self.inner.end_record()?;
        if let Err(e) = self.call("end_record") {
            self.inner.forget(record)?;
            return Err(e);
        }
        self.seen.state().records += 1;
        Ok(record)
    }
    fn replay(&mut self, record: RecordId) -> Result<()> {
        self.call("replay")?;
        self.inner.replay(record)
    }
    fn forget(&mut self, record: RecordId) -> Result<()> {
        self.seen.state().records -= 1;
        self.inner.forget(record)
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
