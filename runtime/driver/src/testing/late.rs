//! A device that does nothing before someone waits for it, and that records as a GPU does: what is read too early is old, and
//! what is overwritten too early is lost.

use crate::{Arg, BufferId, Code, Device, Error, EventId, Extent, HostId, ModuleId, Product, RecordId, Result, Space};
use std::collections::{HashMap, VecDeque};

/// Something that was asked for.
#[derive(Clone)]
enum Asked {
    CopyIn(BufferId, usize, Vec<u8>),
    Copy((BufferId, usize), (BufferId, usize), usize),
    Upload((HostId, usize), (BufferId, usize), usize),
    Download((BufferId, usize), (HostId, usize), usize),
    Launch(ModuleId, String, Extent, Vec<Arg>),
    Product(Product),
}

/// See the module's comment.
pub struct Late<D> {
    inner: D,
    queue: VecDeque<Asked>,
    /// How many have left the queue.
    done: usize,
    recording: Option<Vec<Asked>>,
    records: Vec<Option<Vec<Asked>>>,
    /// How many stood before each event.
    events: HashMap<usize, usize>,
    next_event: usize,
    /// Seconds that each launch, product and copy takes by its clock, if it has one.
    tick: Option<f64>,
    /// How many were asked for, and how many before each mark.
    asked: usize,
    marks: Vec<usize>,
}

impl<D: Device> Late<D> {
    pub fn new(inner: D) -> Late<D> {
        let (queue, events) = (VecDeque::new(), HashMap::new());
        let (tick, asked, marks) = (None, 0, vec![]);
        Late { inner, queue, done: 0, recording: None, records: vec![], events, next_event: 0, tick, asked, marks }
    }

    /// One with a clock, by which everything that is asked for takes so many seconds.
    pub fn ticking(inner: D, tick: f64) -> Late<D> {
        Late { tick: Some(tick), ..Late::new(inner) }
    }

    pub fn inner(&mut self) -> &mut D {
        &mut self.inner
    }

    /// What was asked for and is not done.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    fn ask(&mut self, a: Asked) {
        match &mut self.recording {
            Some(all) => all.push(a),
            None => {
                self.asked += 1;
                self.queue.push_back(a);
            }
        }
    }

    fn until(&mut self, done: usize) -> Result<()> {
        while self.done < done
            && let Some(a) = self.queue.pop_front()
        {
            self.done += 1;
            match a {
                Asked::CopyIn(b, at, data) => self.inner.copy_in(b, at, &data)?,
                Asked::Copy(from, to, bytes) => self.inner.copy(from, to, bytes)?,
                Asked::Upload(from, to, bytes) => self.inner.upload(from, to, bytes)?,
                Asked::Download(from, to, bytes) => self.inner.download(from, to, bytes)?,
                Asked::Launch(m, kernel, extent, args) => self.inner.launch(m, &kernel, extent, &args)?,
                Asked::Product(p) => self.inner.product(&p)?,
            }
        }
        Ok(())
    }

    fn all(&mut self) -> Result<()> {
        assert!(self.recording.is_none(), "BUG: a record is being made, and something is waited for");
        self.until(usize::MAX)
    }
}

impl<D: Device> Device for Late<D> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn capability(&self) -> Option<(u32, u32)> {
        self.inner.capability()
    }
    fn space(&mut self) -> Result<Option<Space>> {
        self.inner.space()
    }
    fn load(&mut self, code: &Code) -> Result<ModuleId> {
        self.inner.load(code)
    }
    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId> {
        self.inner.alloc(name, bytes)
    }
    fn free(&mut self, buffer: BufferId) -> Result<()> {
        self.all()?;
        self.inner.free(buffer)
    }
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<()> {
        assert!(self.recording.is_none(), "BUG: a copy in can't be recorded");
        self.ask(Asked::CopyIn(buffer, at, data.to_vec()));
        Ok(())
    }
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<()> {
        self.all()?;
        self.inner.copy_out(buffer, at, data)
    }
    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.ask(Asked::Copy(from, to, bytes));
        Ok(())
    }
    fn alloc_host(&mut self, name: &str, bytes: usize) -> Result<HostId> {
        self.inner.alloc_host(name, bytes)
    }
    fn free_host(&mut self, host: HostId) -> Result<()> {
        self.all()?;
        self.inner.free_host(host)
    }
    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> Result<()> {
        self.inner.write_host(host, at, data)
    }
    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> Result<()> {
        self.inner.read_host(host, at, data)
    }
    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.ask(Asked::Upload(from, to, bytes));
        Ok(())
    }
    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> Result<()> {
        self.ask(Asked::Download(from, to, bytes));
        Ok(())
    }
    fn event(&mut self) -> Result<EventId> {
        assert!(self.recording.is_none(), "BUG: an event can't be recorded");
        self.next_event += 1;
        self.events.insert(self.next_event, self.done + self.queue.len());
        Ok(EventId(self.next_event))
    }
    fn wait(&mut self, event: EventId) -> Result<()> {
        let done = self.events.get(&event.0).copied().ok_or_else(|| Error::refused("there is no such event"))?;
        self.until(done)
    }
    fn release(&mut self, event: EventId) -> Result<()> {
        self.events.remove(&event.0).map(drop).ok_or_else(|| Error::refused("an event is given back twice"))
    }
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()> {
        self.ask(Asked::Launch(module, kernel.into(), extent, args.to_vec()));
        Ok(())
    }
    fn product(&mut self, p: &Product) -> Result<()> {
        self.ask(Asked::Product(*p));
        Ok(())
    }
    fn synchronise(&mut self) -> Result<()> {
        self.all()
    }
    fn begin_record(&mut self) -> Result<bool> {
        self.recording = Some(vec![]);
        Ok(true)
    }
    fn end_record(&mut self) -> Result<RecordId> {
        let all = self.recording.take().ok_or_else(|| Error::refused("nothing is being recorded"))?;
        self.records.push(Some(all));
        Ok(RecordId(self.records.len() - 1))
    }
    fn replay(&mut self, record: RecordId) -> Result<()> {
        let all =
            self.records.get(record.0).cloned().flatten().ok_or_else(|| Error::refused("there is no such record"))?;
        self.asked += all.len();
        self.queue.extend(all);
        Ok(())
    }
    fn forget(&mut self, record: RecordId) -> Result<()> {
        let known = self.records.get_mut(record.0).and_then(Option::take);
        known.map(drop).ok_or_else(|| Error::refused("a record is given back twice"))
    }
    fn mark(&mut self) -> Result<()> {
        assert!(self.recording.is_none(), "BUG: a mark can't be recorded");
        self.marks.push(self.asked);
        Ok(())
    }
    fn laps(&mut self) -> Result<Option<Vec<f64>>> {
        self.all()?;
        let marks = std::mem::take(&mut self.marks);
        Ok(self.tick.map(|tick| marks.windows(2).map(|w| (w[1] - w[0]) as f64 * tick).collect()))
    }
}
