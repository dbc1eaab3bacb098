//! What a GPU program needs of a device: modules, buffers, launches, dense products.
//!
//! The simulator is one, a CUDA device another; what runs programs knows only [`Device`].  Work of a device happens in the
//! order in which it was asked for; only [`Device::copy_out`], [`Device::wait`] and [`Device::synchronise`] wait for
//! it.  What goes to and fro without waiting goes through memory of this machine that the
//! device reaches by itself ([`Device::alloc_host`]; pinned pages, for a GPU): whoever writes or reads that waits first for the
//! copies that use it.
//!
//! Deliberately absent: several streams, memory that several devices share.

mod error;
mod host;
mod product;
mod tensor;
#[cfg(feature = "testing")]
pub mod testing;

pub use error::{Error, Result};
pub use host::HostMemory;
pub use product::{Float, Matrix, Product};
pub use tensor::Tensor;

/// A loaded module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModuleId(pub usize);

/// Launches, products and copies that were recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecordId(pub usize);

/// A buffer in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferId(pub usize);

/// Memory of this machine that a device copies from and to by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostId(pub usize);

/// A point in the order of a device's work that can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId(pub usize);

/// A kernel's argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A buffer's address, and bytes beyond it.
    Buffer(BufferId, u64),
    /// A value of the parameter's size, lowest byte first.
    Bytes(Vec<u8>),
    /// A struct of such, by value: addresses and words of 64 bits, one after another.
    Table(Vec<Arg>),
    /// A tensor map, by value: what copies of boxes need to know of a tensor.
    Tensor(Tensor),
}

macro_rules! scalars {
    ($($t:ty),*) => { $(
        impl From<$t> for Arg {
            fn from(v: $t) -> Arg {
                Arg::Bytes(v.to_le_bytes().to_vec())
            }
        }
    )* };
}
scalars!(i8, u8, i16, u16, i32, u32, i64, u64, f32, f64);

impl From<BufferId> for Arg {
    fn from(b: BufferId) -> Arg {
        Arg::Buffer(b, 0)
    }
}

/// Sizes of a launch, in blocks and threads, and when it may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks of a cluster; (1, 1, 1) for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// It may begin before kernels that were started before it have ended: it waits for them by itself.
    pub early: bool,
}

impl Extent {
    /// A launch along one axis.
    pub fn line(blocks: u32, threads: u32) -> Extent {
        Extent { grid: [blocks, 1, 1], block: [threads, 1, 1], cluster: [1; 3], shared: 0, early: false }
    }
}

/// What kernels were compiled to.
#[derive(Clone, Copy, Debug)]
pub struct Code<'a> {
    pub ptx: &'a str,
    /// Machine code and the architecture that it is for, such as `sm_90a`.
    pub cubin: Option<(&'a str, &'a [u8])>,
}

impl<'a> Code<'a> {
    /// PTX alone.
    pub fn ptx(ptx: &'a str) -> Code<'a> {
        Code { ptx, cubin: None }
    }
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free: usize,
    pub total: usize,
}

/// A device.  Of every call: the errors are those of [`Error`], and after [`Error::Lost`] every other call fails with it.
pub trait Device: Send {
    /// What it is, for people: `cuda:0 (NVIDIA H100 80GB HBM3)`.
    fn name(&self) -> &str;
    /// Its compute capability; `None`: it runs code of any.
    fn capability(&self) -> Option<(u32, u32)>;
    /// Its memory; `None`: as much as this machine has.
    fn space(&mut self) -> Result<Option<Space>>;
    /// Makes a module's kernels and variables known: from its machine code, where that is for this device, else from PTX.
    fn load(&mut self, code: &Code) -> Result<ModuleId>;
    /// A buffer of so many bytes, with no content.
    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId>;
    /// Gives a buffer's memory back; it must not be used again.
    fn free(&mut self, buffer: BufferId) -> Result<()>;
    /// Copies to a buffer from its byte `at` on; `data` is no longer read when this returns.
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<()>;
    /// Waits, then copies from a buffer, from its byte `at` on.
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<()>;
    /// Copies bytes between places (buffer, byte) that do not overlap.
    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> Result<()>;
    /// Memory of this machine that the device copies from and to by itself, with no content.
    fn alloc_host(&mut self, name: &str, bytes: usize) -> Result<HostId>;
    /// Gives such memory back; no copy of it may be under way.
    fn free_host(&mut self, host: HostId) -> Result<()>;
    /// Writes to such memory from its byte `at` on; no copy of these bytes may be under way.
    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> Result<()>;
    /// Reads such memory from its byte `at` on; what a copy brings is there once that has been waited for.
    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> Result<()>;
    /// Starts a copy from such memory to a buffer, places given as (memory, byte).
    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> Result<()>;
    /// Starts a copy from a buffer to such memory, places given as (memory, byte).
    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> Result<()>;
    /// The end of all that was started so far.
    fn event(&mut self) -> Result<EventId>;
    /// Waits until the device has come there.
    fn wait(&mut self, event: EventId) -> Result<()>;
    /// Gives an event back.
    fn release(&mut self, event: EventId) -> Result<()>;
    /// Starts a kernel.
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()>;
    /// Starts a dense product of the library that belongs to the device.
    fn product(&mut self, p: &Product) -> Result<()>;
    /// Waits for all that was started.
    fn synchronise(&mut self) -> Result<()>;
    /// From now on launches, products, and copies but [`copy_in`](Self::copy_in) and [`copy_out`](Self::copy_out) are kept, not
    /// started, until [`end_record`](Self::end_record); nothing else may be asked for in between.  `false`: the device does not record, or not now; they are to be started each time.
    fn begin_record(&mut self) -> Result<bool> {
        Ok(false)
    }
    /// What was kept, ready to be started at once.
    fn end_record(&mut self) -> Result<RecordId> {
        Err(Error::refused("this device does not record"))
    }
    /// Starts all of a record, in its order, with its arguments and places.
    fn replay(&mut self, _: RecordId) -> Result<()> {
        Err(Error::refused("this device does not record"))
    }
    /// Gives a record back.
    fn forget(&mut self, _: RecordId) -> Result<()> {
        Ok(())
    }
    /// Begins a range that tools which watch the device show; by itself it changes nothing.
    fn begin_range(&mut self, _name: &str) {}
    /// Ends the range that began last.
    fn end_range(&mut self) {}
    /// A point in its work at which it is to look at its clock.
    fn mark(&mut self) -> Result<()> {
        Ok(())
    }
    /// Waits, then the seconds between each mark and the one before it; the marks are forgotten.  `None`: it has no clock.
    fn laps(&mut self) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }
}

impl<D: Device + ?Sized> Device for Box<D> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn capability(&self) -> Option<(u32, u32)> {
        (**self).capability()
    }
    fn space(&mut self) -> Result<Option<Space>> {
        (**self).space()
    }
    fn load(&mut self, code: &Code) -> Result<ModuleId> {
        (**self).load(code)
    }
    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId> {
        (**self).alloc(name, bytes)
    }
    fn free(&mut self, buffer: BufferId) -> Result<()> {
        (**self).free(buffer)
    }
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<()> {
        (**self).copy_in(buffer, at, data)
    }
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<()> {
        (**self).copy_out(buffer, at, data)
    }
    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        (**self).copy(from, to, bytes)
    }
    fn alloc_host(&mut self, name: &str, bytes: usize) -> Result<HostId> {
        (**self).alloc_host(name, bytes)
    }
    fn free_host(&mut self, host: HostId) -> Result<()> {
        (**self).free_host(host)
    }
    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> Result<()> {
        (**self).write_host(host, at, data)
    }
    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> Result<()> {
        (**self).read_host(host, at, data)
    }
    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        (**self).upload(from, to, bytes)
    }
    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> Result<()> {
        (**self).download(from, to, bytes)
    }
    fn event(&mut self) -> Result<EventId> {
        (**self).event()
    }
    fn wait(&mut self, event: EventId) -> Result<()> {
        (**self).wait(event)
    }
    fn release(&mut self, event: EventId) -> Result<()> {
        (**self).release(event)
    }
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()> {
        (**self).launch(module, kernel, extent, args)
    }
    fn product(&mut self, p: &Product) -> Result<()> {
        (**self).product(p)
    }
    fn synchronise(&mut self) -> Result<()> {
        (**self).synchronise()
    }
    fn begin_record(&mut self) -> Result<bool> {
        (**self).begin_record()
    }
    fn end_record(&mut self) -> Result<RecordId> {
        (**self).end_record()
    }
    fn replay(&mut self, record: RecordId) -> Result<()> {
        (**self).replay(record)
    }
    fn forget(&mut self, record: RecordId) -> Result<()> {
        (**self).forget(record)
    }
    fn begin_range(&mut self, name: &str) {
        (**self).begin_range(name);
    }
    fn end_range(&mut self) {
        (**self).end_range();
    }
    fn mark(&mut self) -> Result<()> {
        (**self).mark()
    }
    fn laps(&mut self) -> Result<Option<Vec<f64>>> {
        (**self).laps()
    }
}
