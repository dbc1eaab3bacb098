//! The device: a context, a stream, buffers, modules.

use crate::api::check;
use crate::gemm::Gemm;
use crate::host::Pinned;
use crate::library::driver;
use crate::ranges::Ranges;
use crate::survey::{Gpu, gpu, handle};
use cudarc::driver::sys::{self, CUresult};
use rambac_driver::{
    Arg, BufferId, Code, Device, Error, EventId, Extent, HostId, Matrix, ModuleId, Product, RecordId, Result, Space,
};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;

/// Makes every launch wait, so that a fault is told where it happens.
pub const BLOCKING: &str = "RAMBAC_CUDA_BLOCKING";

/// Oldest compute capability that kernels are made for.
const OLDEST: (u32, u32) = (8, 0);

/// The first driver that tells the time between events in the way that is called here.
const CLOCK: (i32, i32) = (12, 8);

struct Buffer {
    name: String,
    address: sys::CUdeviceptr,
    bytes: usize,
}

struct Module {
    handle: sys::CUmodule,
    functions: HashMap<String, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it was allowed, in bytes.
    shared: u32,
}

/// See the crate's comment.
pub struct CudaDevice {
    /// `cuda:0 (NVIDIA H100 80GB HBM3)`
    name: String,
    about: Gpu,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    buffers: Vec<Option<Buffer>>,
    modules: Vec<Module>,
    /// Where cuBLASLt may lie; it is loaded for the first product.
    libraries: Vec<PathBuf>,
    gemm: Option<Gemm>,
    progress: Option<Progress>,
    blocking: bool,
    /// Launches are kept in place of being started.
    recording: bool,
    /// What was recorded last is a launch.
    after_launch: bool,
    /// Something was replayed since the last synchronise: launches are not counted one by one.
    replayed: bool,
    records: Vec<Option<sys::CUgraphExec>>,
    pinned: Pinned,
    events: Vec<sys::CUevent>,
    /// Events that were given back.
    free_events: Vec<EventId>,
    /// Where a tool shows what was being done; asked for with [`RANGES`].
    ranges: Option<Ranges>,
    marks: Marks,
    /// The fault that ended it.
    lost: Option<(String, Option<usize>)>,
}

// SAFETY: the handles are the driver's, which may be used from any thread; every call makes the context current first, and
// `&mut self` keeps calls apart.
unsafe impl Send for CudaDevice {}

/// Events of the stream, made when they are first needed.
#[derive(Default)]
struct Marks {
    clock: bool,
    events: Vec<sys::CUevent>,
    /// How many were recorded since the last reading.
    used: usize,
}

/// A word of pinned memory where the stream writes how many launches came to their end: it can be read after a fault.
struct Progress {
    word: *mut u32,
    address: sys::CUdeviceptr,
    started: u32,
}

impl CudaDevice {
    /// Opens a device by its number; cuBLASLt is looked for in `libraries` (files) before the linker's places.
    ///
    /// # Errors
    /// No driver, or too old a one; no such device, or one that is too old; no memory for a context.
    pub fn open(index: usize, libraries: &[PathBuf]) -> Result<CudaDevice> {
        let version = driver()?;
        let mut n = 0;
        // SAFETY: a valid pointer; the driver is initialised.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut n) })?;
        if index >= n.max(0) as usize {
            let have = match n {
                0 => "the driver sees no GPU; in a container give it one, and look at CUDA_VISIBLE_DEVICES".into(),
                1 => "there is one GPU, cuda:0".into(),
                n => format!("there are {n} GPUs, cuda:0 to cuda:{}", n - 1),
            };
            return Err(Error::Absent(format!("there is no device cuda:{index}: {have}")));
        }
        let about = gpu(index as i32)?;
        let name = format!("cuda:{index} ({})", about.name);
        if about.capability < OLDEST {
            let ((major, minor), (a, b)) = (about.capability, OLDEST);
            return Err(Error::Absent(format!(
                "{name} is too old: its compute capability is {major}.{minor}, kernels need {a}.{b} (an A100, an RTX 30 or \
                 later)"
            )));
        }
        let device = handle(index as i32)?;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: valid pointers and a device that the driver gave; the context is released in `drop`.
        unsafe {
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut context, device))?;
            let made = check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context)).and_then(|()| {
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                check("cuStreamCreate", sys::cuStreamCreate(&raw mut stream, flags))
            });
            if let Err(e) = made {
                sys::cuDevicePrimaryCtxRelease_v2(device);
                return Err(e);
            }
        }
        let progress = Progress::new();
        let blocking = std::env::var_os(BLOCKING).is_some_and(|v| !v.is_empty() && v != "0");
        Ok(CudaDevice {
            name,
            about,
            device,
            context,
            stream,
            buffers: vec![],
            modules: vec![],
            libraries: libraries.to_vec(),
            gemm: None,
            progress,
            blocking,
            recording: false,
            after_launch: false,
            replayed: false,
            records: vec![],
            pinned: Pinned::default(),
            events: vec![],
            free_events: vec![],
            ranges: Ranges::wanted(),
            marks: Marks { clock: version >= CLOCK, ..Marks::default() },
            lost: None,
        })
    }

    /// What the driver tells of it.
    pub fn about(&self) -> &Gpu {
        &self.about
    }

    /// Makes the context current on this thread.
    fn enter(&self) -> Result<()> {
        if let Some((what, finished)) = &self.lost {
            return Err(Error::Lost { what: what.clone(), finished: *finished });
        }
        // SAFETY: the context lives as long as `self`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// An error is kept if the device is lost by it.
    fn keep<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|e| match e {
            Error::Lost { what, .. } => {
                // What is recorded is not started, and what was replayed not counted.
                let counted = self.progress.as_ref().filter(|_| !self.replayed && !self.recording);
                let finished = counted.map(Progress::finished);
                let what = match finished {
                    None => format!("{what} (with {BLOCKING}=1 the step would be known)"),
                    Some(_) => what,
                };
                self.lost = Some((what.clone(), finished));
                Error::Lost { what, finished }
            }
            e => e,
        })
    }

    fn call(&mut self, name: &str, code: CUresult) -> Result<()> {
        let result = check(name, code);
        self.keep(result)
    }

    fn known(&self, event: EventId) -> Result<sys::CUevent> {
        self.events.get(event.0).copied().ok_or_else(|| Error::refused(format!("there is no event {}", event.0)))
    }

    /// Address of `bytes` bytes of a buffer from byte `at` on.
    fn place(&self, b: BufferId, at: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
        let buffer = self.buffers.get(b.0).and_then(Option::as_ref);
        let buffer = buffer.ok_or_else(|| Error::refused(format!("there is no buffer {}", b.0)))?;
        match at.checked_add(bytes).is_some_and(|end| end <= buffer.bytes) {
            true => Ok(buffer.address + at as u64),
            false => {
                let Buffer { name, bytes: have, .. } = buffer;
                Err(Error::refused(format!("{bytes} bytes from byte {at} of \"{name}\" are more than its {have}")))
            }
        }
    }

    fn function(&mut self, module: ModuleId, kernel: &str, shared: u32) -> Result<sys::CUfunction> {
        // What is allowed without asking, in bytes.
        const FREE: u32 = 48 << 10;
        let m = self.modules.get_mut(module.0).ok_or_else(|| Error::refused("there is no such module"))?;
        let mut f = match m.functions.get(kernel) {
            Some(f) => *f,
            None => {
                let name = CString::new(kernel).map_err(|_| Error::refused("a kernel's name holds a zero byte"))?;
                let mut handle = std::ptr::null_mut();
                // SAFETY: a live module, valid pointers.
                check("cuModuleGetFunction", unsafe {
                    sys::cuModuleGetFunction(&raw mut handle, m.handle, name.as_ptr())
                })?;
                Function { handle, shared: FREE }
            }
        };
        let known = m.functions.contains_key(kernel);
        if known && shared <= f.shared {
            return Ok(f.handle);
        }
        if shared > f.shared {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a live module.
            let code = unsafe { sys::cuFuncSetAttribute(f.handle, which, shared as i32) };
            check(&format!("{shared} bytes of shared memory"), code)?;
            f.shared = shared;
        }
        m.functions.insert(kernel.into(), f);
        Ok(f.handle)
    }

    /// After a launch or product that was started.
    fn started(&mut self) -> Result<()> {
        if self.recording {
            return Ok(());
        }
        if let Some(p) = &mut self.progress {
            p.started += 1;
            // SAFETY: the word is mapped for the device and lives as long as `self`.
            let code = unsafe { sys::cuStreamWriteValue32_v2(self.stream, p.address, p.started, 0) };
            if code == CUresult::CUDA_ERROR_NOT_SUPPORTED {
                self.progress = None;
            } else {
                self.call("cuStreamWriteValue32", code)?;
            }
        }
        if self.blocking { self.drain() } else { Ok(()) }
    }

    fn drain(&mut self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { sys::cuStreamSynchronize(self.stream) };
        self.call("cuStreamSynchronize", code)
    }
}

/// Whether machine code for `arch` runs on a device: of the same major version and no newer, with an `a` on that very one.
fn runs(arch: &str, (major, minor): (u32, u32)) -> bool {
    let Some(v) = arch.strip_prefix("sm_") else { return false };
    let (v, exact) = v.strip_suffix('a').map_or((v, false), |v| (v, true));
    let Ok(v) = v.parse::<u32>() else { return false };
    if exact { (v / 10, v % 10) == (major, minor) } else { v / 10 == major && v % 10 <= minor }
}

impl Progress {
    /// `None` where the driver gives no pinned memory: then faults are told without their step.
    fn new() -> Option<Progress> {
        let (mut word, mut address) = (std::ptr::null_mut(), 0);
        // SAFETY: valid pointers; a context is current.
        unsafe {
            if sys::cuMemHostAlloc(&raw mut word, 64, sys::CU_MEMHOSTALLOC_DEVICEMAP) != CUresult::CUDA_SUCCESS {
                return None;
            }
            if sys::cuMemHostGetDevicePointer_v2(&raw mut address, word, 0) != CUresult::CUDA_SUCCESS {
                sys::cuMemFreeHost(word);
                return None;
            }
            word.cast::<u32>().write_volatile(0);
        }
        Some(Progress { word: word.cast(), address, started: 0 })
    }
    fn finished(&self) -> usize {
        // SAFETY: pinned memory of this process, which stays readable after a fault.
        unsafe { self.word.read_volatile() as usize }
    }
    /// Begins anew, when the stream has nothing to do.
    fn reset(&mut self) {
        self.started = 0;
        // SAFETY: as above; nothing in the stream writes it now.
        unsafe { self.word.write_volatile(0) }
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn capability(&self) -> Option<(u32, u32)> {
        Some(self.about.capability)
    }

    fn space(&mut self) -> Result<Option<Space>> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid pointers.
        let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.call("cuMemGetInfo", code)?;
        Ok(Some(Space { free, total }))
    }

    fn load(&mut self, code: &Code) -> Result<ModuleId> {
        self.enter()?;
        let mut handle = std::ptr::null_mut();
        let mut log = vec![0u8; 8192];
        let ptx = CString::new(code.ptx).map_err(|_| Error::refused("the PTX holds a zero byte"))?;
        let image = match code.cubin {
            Some((arch, cubin)) if runs(arch, self.about.capability) => cubin.as_ptr().cast::<c_void>(),
            _ => ptx.as_ptr().cast(),
        };
        let mut options =
            [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(log.len())];
        // SAFETY: an image that is complete, options and their values as the driver wants them, alive until after the call.
        let result =
            unsafe { sys::cuModuleLoadDataEx(&raw mut handle, image, 2, options.as_mut_ptr(), values.as_mut_ptr()) };
        let result = check("cuModuleLoadDataEx", result).map_err(|e| match e {
            Error::Refused(e) => {
                let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
                let log = String::from_utf8_lossy(&log[..end]).trim().to_string();
                Error::refused(if log.is_empty() { e.to_string() } else { format!("{e}:\n{log}") })
            }
            e => e,
        });
        self.keep(result)?;
        self.modules.push(Module { handle, functions: HashMap::new() });
        Ok(ModuleId(self.modules.len() - 1))
    }

    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: a valid pointer; nothing of 0 bytes is asked for.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let free = self.space().ok().flatten().map(|s| s.free);
            return Err(Error::OutOfMemory { name: name.into(), asked: bytes, free });
        }
        self.call("cuMemAlloc", code)?;
        let buffer = Some(Buffer { name: name.into(), address, bytes });
        let free = self.buffers.iter().position(Option::is_none);
        match free {
            Some(i) => self.buffers[i] = buffer,
            None => self.buffers.push(buffer),
        }
        Ok(BufferId(free.unwrap_or(self.buffers.len() - 1)))
    }

    fn free(&mut self, buffer: BufferId) -> Result<()> {
        let Some(b) = self.buffers.get_mut(buffer.0).and_then(Option::take) else {
            return Err(Error::refused(format!("there is no buffer {}", buffer.0)));
        };
        self.enter()?;
        // SAFETY: it was given by `cuMemAlloc` and is freed once; the call waits for work that uses it.
        let code = unsafe { sys::cuMemFree_v2(b.address) };
        self.call("cuMemFree", code)
    }

    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<()> {
        self.enter()?;
        let to = self.place(buffer, at, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges are whole; pageable memory is read before the call returns.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, data.as_ptr().cast(), data.len(), self.stream) };
        self.call("cuMemcpyHtoDAsync", code)
    }

    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<()> {
        self.enter()?;
        let from = self.place(buffer, at, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: both ranges are whole, and `data` is borrowed until the stream has been waited for.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), from, data.len(), self.stream) };
        self.call("cuMemcpyDtoHAsync", code)?;
        self.drain()
    }

    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.enter()?;
        let (from, to) = (self.place(from.0, from.1, bytes)?, self.place(to.0, to.1, bytes)?);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are whole.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) };
        self.after_launch = false;
        self.call("cuMemcpyDtoDAsync", code)
    }

    fn alloc_host(&mut self, name: &str, bytes: usize) -> Result<HostId> {
        self.enter()?;
        let made = self.pinned.alloc(name, bytes);
        self.keep(made)
    }

    fn free_host(&mut self, host: HostId) -> Result<()> {
        self.enter()?;
        let freed = self.pinned.free(host);
        self.keep(freed)
    }

    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> Result<()> {
        self.enter()?;
        let to = self.pinned.place(host, at, data.len())?;
        // SAFETY: the range is whole and this process's; no copy of it is under way, says the caller.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> Result<()> {
        self.enter()?;
        let from = self.pinned.place(host, at, data.len())?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> Result<()> {
        self.enter()?;
        let (from, to) = (self.pinned.place(from.0, from.1, bytes)?, self.place(to.0, to.1, bytes)?);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are whole; pinned memory is given back only when no copy of it is under way.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream) };
        self.after_launch = false;
        self.call("cuMemcpyHtoDAsync", code)
    }

    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> Result<()> {
        self.enter()?;
        let (from, to) = (self.place(from.0, from.1, bytes)?, self.pinned.place(to.0, to.1, bytes)?);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream) };
        self.after_launch = false;
        self.call("cuMemcpyDtoHAsync", code)
    }

    fn event(&mut self) -> Result<EventId> {
        self.enter()?;
        let id = match self.free_events.pop() {
            Some(id) => id,
            None => {
                let mut event = std::ptr::null_mut();
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: a valid pointer; the event is given back in `drop`.
                let code = unsafe { sys::cuEventCreate(&raw mut event, flags) };
                self.call("cuEventCreate", code)?;
                self.events.push(event);
                EventId(self.events.len() - 1)
            }
        };
        // SAFETY: both live as long as `self`.
        let code = unsafe { sys::cuEventRecord(self.events[id.0], self.stream) };
        if code != CUresult::CUDA_SUCCESS {
            self.free_events.push(id);
        }
        self.call("cuEventRecord", code)?;
        Ok(id)
    }

    fn wait(&mut self, event: EventId) -> Result<()> {
        self.enter()?;
        let event = self.known(event)?;
        // SAFETY: it lives as long as `self`.
        let code = unsafe { sys::cuEventSynchronize(event) };
        self.call("cuEventSynchronize", code)
    }

    fn release(&mut self, event: EventId) -> Result<()> {
        self.known(event)?;
        self.free_events.push(event);
        Ok(())
    }

    fn begin_range(&mut self, name: &str) {
        if let Some(r) = &self.ranges {
            r.begin(name);
        }
    }

    fn end_range(&mut self) {
        if let Some(r) = &self.ranges {
            r.end();
        }
    }

    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<()> {
        self.enter()?;
        let function = self.function(module, kernel, extent.shared);
        let function = self.keep(function)?;
        let mut bytes: Vec<u8> = vec![];
        let mut starts = vec![];
        for a in args {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            starts.push(bytes.len());
            let words = if let Arg::Table(words) = a { &words[..] } else { std::slice::from_ref(a) };
            for word in words {
                match word {
                    // Of nothing at all, such as rows of an empty array, it may lie outside: no kernel looks there.
                    Arg::Buffer(b, more) => bytes.extend((self.place(*b, 0, 0)? + more).to_ne_bytes()),
                    Arg::Bytes(b) => bytes.extend(b),
                    Arg::Tensor(t) => bytes.extend(crate::tensor::encode(t, self.place(t.buffer, 0, 0)? + t.at)?),
                    Arg::Table(_) => return Err(Error::refused("a table in a table")),
                }
            }
        }
        let mut pointers: Vec<*mut c_void> = starts.iter().map(|&at| bytes[at..].as_mut_ptr().cast()).collect();
        let attribute =
            |id| sys::CUlaunchAttribute { id, pad: [0; 4], value: sys::CUlaunchAttributeValue { pad: [0; 64] } };
        let mut attributes = vec![];
        if extent.cluster != [1; 3] {
            let [x, y, z] = extent.cluster;
            let mut a = attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
            a.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
            attributes.push(a);
        }
        // In a record alone, where no word of progress stands between launches, and right behind another launch.
        if extent.early && self.after_launch {
            let mut a = attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
            a.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(a);
        }
        let config = sys::CUlaunchConfig {
            gridDimX: extent.grid[0],
            gridDimY: extent.grid[1],
            gridDimZ: extent.grid[2],
            blockDimX: extent.block[0],
            blockDimY: extent.block[1],
            blockDimZ: extent.block[2],
            sharedMemBytes: extent.shared,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the function lives; the arguments are those that its kernel declares, and are copied before this returns.
        let code =
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        self.call("cuLaunchKernelEx", code)?;
        self.after_launch = self.recording;
        self.started()
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        self.enter()?;
        if p.batch * p.m * p.n == 0 {
            return Ok(());
        }
        self.after_launch = false;
        let place = |x: &Matrix, m: usize, n: usize| {
            let (rows, cols) = if x.trans { (n, m) } else { (m, n) };
            match rows * cols {
                0 => self.place(x.buffer, 0, 0),
                _ => {
                    let elements = (p.batch - 1) * x.step + (rows - 1) * x.ld + cols;
                    self.place(x.buffer, x.at, elements * x.float.bytes())
                }
            }
        };
        let addresses = [place(&p.a, p.m, p.k)?, place(&p.b, p.k, p.n)?, place(&p.c, p.m, p.n)?];
        let plus = p.plus.map(|x| place(&x, p.m, p.n)).transpose()?;
        if self.gemm.is_none() {
            let made = Gemm::new(&self.libraries);
            self.gemm = Some(self.keep(made)?);
        }
        let gemm = self.gemm.as_mut().expect("BUG: made above");
        // SAFETY: the ranges were checked above; the context is current.
        let result = unsafe { gemm.start(p, addresses, plus, self.stream) };
        self.keep(result)?;
        self.started()
    }

    fn synchronise(&mut self) -> Result<()> {
        self.enter()?;
        self.drain()?;
        if let Some(p) = &mut self.progress {
            p.reset();
        }
        self.replayed = false;
        Ok(())
    }

    fn begin_record(&mut self) -> Result<bool> {
        self.enter()?;
        if self.blocking {
            return Ok(false);
        }
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) };
        self.call("cuStreamBeginCapture", code)?;
        (self.recording, self.after_launch) = (true, false);
        Ok(true)
    }

    fn end_record(&mut self) -> Result<RecordId> {
        (self.recording, self.after_launch) = (false, false);
        self.enter()?;
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream records since `begin_record`; the pointers are valid.
        let code = unsafe { sys::cuStreamEndCapture(self.stream, &raw mut graph) };
        self.call("cuStreamEndCapture", code)?;
        // SAFETY: a graph that the driver gave, given back once.
        let code = unsafe {
            let code = sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            code
        };
        self.call("cuGraphInstantiate", code)?;
        let free = self.records.iter().position(Option::is_none);
        match free {
            Some(i) => self.records[i] = Some(exec),
            None => self.records.push(Some(exec)),
        }
        Ok(RecordId(free.unwrap_or(self.records.len() - 1)))
    }

    fn replay(&mut self, record: RecordId) -> Result<()> {
        self.enter()?;
        let exec = self.records.get(record.0).copied().flatten();
        let exec = exec.ok_or_else(|| Error::refused(format!("there is no record {}", record.0)))?;
        self.replayed = true;
        // SAFETY: the record lives; its arguments are addresses that its owner keeps.
        let code = unsafe { sys::cuGraphLaunch(exec, self.stream) };
        self.call("cuGraphLaunch", code)
    }

    fn forget(&mut self, record: RecordId) -> Result<()> {
        let Some(exec) = self.records.get_mut(record.0).and_then(Option::take) else {
            return Err(Error::refused(format!("there is no record {}", record.0)));
        };
        self.enter()?;
        // SAFETY: given back once; the driver waits for launches of it.
        let code = unsafe { sys::cuGraphExecDestroy(exec) };
        self.call("cuGraphExecDestroy", code)
    }

    fn mark(&mut self) -> Result<()> {
        if !self.marks.clock {
            return Ok(());
        }
        self.enter()?;
        if self.marks.used == self.marks.events.len() {
            let mut event = std::ptr::null_mut();
            // SAFETY: a valid pointer; the event is given back in `drop`.
            let code = unsafe { sys::cuEventCreate(&raw mut event, sys::CUevent_flags::CU_EVENT_DEFAULT as u32) };
            self.call("cuEventCreate", code)?;
            self.marks.events.push(event);
        }
        // SAFETY: the event and the stream live as long as `self`.
        let code = unsafe { sys::cuEventRecord(self.marks.events[self.marks.used], self.stream) };
        self.call("cuEventRecord", code)?;
        self.marks.used += 1;
        Ok(())
    }

    fn laps(&mut self) -> Result<Option<Vec<f64>>> {
        self.synchronise()?;
        if !self.marks.clock {
            return Ok(None);
        }
        let mut laps = vec![];
        for k in 1..std::mem::take(&mut self.marks.used) {
            let mut ms = 0.0;
            let [from, to] = [k - 1, k].map(|i| self.marks.events[i]);
            // SAFETY: both were recorded and waited for.
            let code = unsafe { sys::cuEventElapsedTime_v2(&raw mut ms, from, to) };
            self.call("cuEventElapsedTime", code)?;
            laps.push(f64::from(ms) / 1e3);
        }
        Ok(Some(laps))
    }
}

impl Drop for CudaDevice {
    /// What fails now has no one to hear it.
    fn drop(&mut self) {
        // SAFETY: all handles are the driver's and are given back once; after a fault these calls fail and do nothing.
        unsafe {
            if sys::cuCtxSetCurrent(self.context) != CUresult::CUDA_SUCCESS {
                return;
            }
            sys::cuStreamSynchronize(self.stream);
            self.gemm = None;
            for r in self.records.iter().flatten() {
                sys::cuGraphExecDestroy(*r);
            }
            for e in &self.marks.events {
                sys::cuEventDestroy_v2(*e);
            }
            for b in self.buffers.iter().flatten() {
                sys::cuMemFree_v2(b.address);
            }
            for e in &self.events {
                sys::cuEventDestroy_v2(*e);
            }
            self.pinned.clear();
            for m in &self.modules {
                sys::cuModuleUnload(m.handle);
            }
            if let Some(p) = &self.progress {
                sys::cuMemFreeHost(p.word.cast());
            }
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_runs_on_its_own_kind() {
        let on = |arch, major, minor| runs(arch, (major, minor));
        assert!(on("sm_80", 8, 0) && on("sm_80", 8, 6) && !on("sm_80", 9, 0) && !on("sm_86", 8, 0));
        assert!(on("sm_90a", 9, 0) && !on("sm_90a", 9, 1) && !on("sm_90a", 10, 0));
        assert!(on("sm_90", 9, 0) && on("sm_100", 10, 3) && !on("compute_80", 8, 0) && !on("sm_", 8, 0));
    }
}
