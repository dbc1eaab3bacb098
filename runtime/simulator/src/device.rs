//! The simulator as a device: modules, named buffers, launches.

use crate::check::{Finding, place_name};
use crate::count::Counts;
use crate::decode::{Image, decode};
use crate::error::Error;
use crate::exec::Options;
use crate::exec::launch::{Request, run};
use crate::exec::tensor_map::{Swizzle, TensorMap};
use crate::isa::{Param, Program};
use crate::memory::{Buffer, GlobalMemory, MAX_BYTES, address_of};
use crate::parse::ast::{Module, Space as At};
use crate::parse::parse;
use rambac_driver as driver;
pub use rambac_driver::{Arg, BufferId, Code, Device, Extent, ModuleId, Tensor};
use rambac_driver::{EventId, HostId, HostMemory, Product, Space};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

struct Loaded {
    text: Arc<Parsed>,
    image: Image,
    constants: Vec<u8>,
    /// Of a module with variables, whose addresses are in its instructions.
    programs: HashMap<String, Arc<Program>>,
}

/// A module's text, and its kernels as far as they have no variables.
struct Parsed {
    ast: Module,
    programs: Mutex<HashMap<String, Arc<Program>>>,
}

/// Executes PTX on this machine's processor.  Launches run at once; what they did wrong is kept until it is asked for.
#[derive(Default)]
pub struct Simulator {
    pub options: Options,
    /// A launch with findings fails with them.
    strict: bool,
    memory: GlobalMemory,
    modules: Vec<Loaded>,
    findings: Vec<Finding>,
    counts: Vec<Counts>,
    host: HostMemory,
    /// Texts that were parsed, by this simulator and those that are like it.
    parsed: Arc<Mutex<HashMap<String, Arc<Parsed>>>>,
    /// Counts of launches are kept for nobody.
    forgets: bool,
    /// Where counts go in place of `counts`.
    log: Option<Arc<Mutex<Vec<Counts>>>>,
}

impl Simulator {
    pub fn new(options: Options) -> Simulator {
        Simulator { options, ..Simulator::default() }
    }

    /// One that fails a launch with findings.
    pub fn strict(options: Options) -> Simulator {
        Simulator { strict: true, ..Simulator::new(options) }
    }

    /// Keeps no counts: a program that runs for long would pile them up.
    pub fn forgetful(self) -> Simulator {
        Simulator { forgets: true, ..self }
    }

    /// Another one under the same schedule, with nothing in it; texts that one of them has parsed no other parses again.
    pub fn like(&self) -> Simulator {
        let parsed = self.parsed.clone();
        Simulator { options: self.options, strict: self.strict, parsed, ..Simulator::default() }
    }

    /// Counts of launches go to `log`, which others may read while a machine owns this.
    pub fn logged(self, log: Arc<Mutex<Vec<Counts>>>) -> Simulator {
        Simulator { log: Some(log), ..self }
    }

    /// Findings of all launches since the last call.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings)
    }

    /// Counts of each launch since the last call.
    pub fn take_counts(&mut self) -> Vec<Counts> {
        std::mem::take(&mut self.counts)
    }

    /// Kernels of a module.
    pub fn kernels(&self, module: ModuleId) -> Vec<String> {
        self.modules[module.0].text.ast.functions.iter().filter(|f| f.entry).map(|f| f.name.clone()).collect()
    }

    /// Source files of a module, by the number that places have.
    pub fn files(&self, module: ModuleId) -> &[(u32, String)] {
        &self.modules[module.0].text.ast.files
    }

    /// Parameters of a kernel.
    ///
    /// # Errors
    /// No such kernel, or one with something unknown in it.
    pub fn params(&mut self, module: ModuleId, kernel: &str) -> Result<Vec<Param>, Error> {
        Ok(self.program(module, kernel)?.params.clone())
    }

    /// Kernels must not write this buffer from now on.
    pub fn protect(&mut self, buffer: BufferId) {
        self.memory.buffers[buffer.0].writable = false;
    }

    /// The address of a buffer's first byte.
    pub fn address(&self, buffer: BufferId) -> u64 {
        address_of(buffer.0)
    }

    /// A buffer by name; also the module's variables are buffers.
    pub fn buffer(&self, name: &str) -> Option<BufferId> {
        self.memory.buffers.iter().position(|b| b.name == name).map(BufferId)
    }

    pub fn bytes(&self, buffer: BufferId) -> usize {
        self.memory.buffers[buffer.0].bytes
    }

    /// A kernel, decoded.
    ///
    /// # Errors
    /// No such kernel, or one with something unknown in it.
    pub fn program(&mut self, module: ModuleId, kernel: &str) -> Result<Arc<Program>, Error> {
        let m = &mut self.modules[module.0];
        if m.image.globals.is_empty() && m.image.constants.is_empty() {
            let mut known = m.text.programs.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(p) = known.get(kernel) {
                return Ok(p.clone());
            }
            let p = Arc::new(decode(&m.text.ast, kernel, &m.image)?);
            known.insert(kernel.into(), p.clone());
            return Ok(p);
        }
        if let Some(p) = m.programs.get(kernel) {
            return Ok(p.clone());
        }
        let p = Arc::new(decode(&m.text.ast, kernel, &m.image)?);
        m.programs.insert(kernel.into(), p.clone());
        Ok(p)
    }

    fn range(&self, buffer: BufferId, at: usize, n: usize) -> Result<(), Error> {
        let b = &self.memory.buffers[buffer.0];
        if at.checked_add(n).is_some_and(|end| end <= b.bytes) {
            return Ok(());
        }
        let what = format!("{n} bytes from byte {at} on are more than its {}", b.bytes);
        Err(Error::Buffer { name: b.name.clone(), what })
    }

    fn params_of(&self, p: &Program, args: &[Arg]) -> Result<Vec<u8>, Error> {
        if args.len() != p.params.len() {
            return Err(Error::ParamCount {
                kernel: p.name.clone(),
                want: p.params.len(),
                got: args.len(),
                signature: signature(p),
            });
        }
        let mut out = vec![0u8; p.param_bytes];
        for (index, (param, arg)) in p.params.iter().zip(args).enumerate() {
            let bytes = bytes_of(arg).map_err(|what| Error::Argument { kernel: p.name.clone(), index, what })?;
            if bytes.len() != param.bytes {
                let kernel = p.name.clone();
                return Err(Error::ParamSize { kernel, index, want: param.bytes, got: bytes.len() });
            }
            out[param.offset..param.offset + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(out)
    }
}

/// An argument as a kernel sees it.
fn bytes_of(arg: &Arg) -> Result<Vec<u8>, String> {
    Ok(match arg {
        Arg::Bytes(b) => b.clone(),
        Arg::Buffer(b, more) => (address_of(b.0) + more).to_le_bytes().to_vec(),
        Arg::Table(all) => all.iter().map(bytes_of).collect::<Result<Vec<_>, _>>()?.concat(),
        Arg::Tensor(t) => tensor_map(t)?.encode().to_vec(),
    })
}

fn tensor_map(t: &Tensor) -> Result<TensorMap, String> {
    let bytes = t.float.bytes();
    let dims: Option<Vec<u32>> = t.dims.iter().map(|&d| d.try_into().ok()).collect();
    let tile: Option<Vec<u16>> = t.tile.iter().map(|&d| d.try_into().ok()).collect();
    let strides: Vec<u64> = t.strides.iter().map(|&s| (s * bytes) as u64).collect();
    let (Some(dims), Some(tile)) = (dims, tile) else { return Err("a side of more than 2^32 elements".into()) };
    TensorMap::new(address_of(t.buffer.0) + t.at, bytes as u8, &dims, &strides, &tile, Swizzle::B128)
}

/// `kernel(b64, b32, b8[128])`
pub fn signature(p: &Program) -> String {
    let one = |x: &Param| {
        let ty = format!("{:?}", x.ty).to_lowercase();
        if x.bytes == x.ty.bytes() { ty } else { format!("{ty}[{}]", x.bytes / x.ty.bytes().max(1)) }
    };
    format!("{}({})", p.name, p.params.iter().map(one).collect::<Vec<_>>().join(", "))
}

impl Simulator {
    fn load_ptx(&mut self, ptx: &str) -> Result<ModuleId, Error> {
        let text = self.parsed(ptx)?;
        let ast = &text.ast;
        let mut image = Image { globals: HashMap::new(), constants: HashMap::new() };
        let mut constants: Vec<u8> = vec![];
        for v in &ast.vars {
            match v.space {
                At::Global => {
                    let id = self.add_buffer(&v.name, v.bytes.max(v.init.len() as u64) as usize)?;
                    image.globals.insert(v.name.clone(), address_of(id.0));
                }
                At::Const => {
                    let at = constants.len().next_multiple_of(v.align.max(1) as usize);
                    image.constants.insert(v.name.clone(), at as u64);
                    constants.resize(at, 0);
                    constants.extend(&v.init);
                    constants.resize(at + v.bytes as usize, 0);
                }
                _ => {}
            }
        }
        for v in &ast.vars {
            let mut init = v.init.clone();
            for (at, name, more, generic) in &v.addresses {
                let address = match (image.globals.get(name), image.constants.get(name)) {
                    (Some(&a), _) => a,
                    (_, Some(&a)) => a + if *generic { crate::isa::window::CONST } else { 0 },
                    _ => return Err(Error::Unknown(format!("line {}: \"{name}\" is not a variable", v.line))),
                };
                let b = address.wrapping_add_signed(*more).to_le_bytes();
                let (at, n) = (*at as usize, v.ty.bytes());
                init[at..at + n].copy_from_slice(&b[..n]);
            }
            match v.space {
                // Variables are zero where nothing else is said.
                At::Global => {
                    if let Some(id) = image.globals.get(&v.name).map(|&a| crate::memory::locate(a).0) {
                        init.resize(self.memory.buffers[id].bytes, 0);
                        self.write(BufferId(id), 0, &init)?;
                    }
                }
                At::Const if !v.addresses.is_empty() => {
                    let at = image.constants[&v.name] as usize;
                    constants[at..at + init.len()].copy_from_slice(&init);
                }
                _ => {}
            }
        }
        self.modules.push(Loaded { text, image, constants, programs: HashMap::new() });
        Ok(ModuleId(self.modules.len() - 1))
    }

    fn parsed(&self, ptx: &str) -> Result<Arc<Parsed>, Error> {
        let mut known = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(p) = known.get(ptx) {
            return Ok(p.clone());
        }
        let p = Arc::new(Parsed { ast: parse(ptx)?, programs: Mutex::default() });
        known.insert(ptx.into(), p.clone());
        Ok(p)
    }

    fn add_buffer(&mut self, name: &str, bytes: usize) -> Result<BufferId, Error> {
        if bytes > MAX_BYTES {
            let what = format!("{bytes} bytes are more than {MAX_BYTES}");
            return Err(Error::Buffer { name: name.into(), what });
        }
        if self.memory.buffers.len() >= 1 << 20 {
            return Err(Error::Buffer { name: name.into(), what: "there are a million already".into() });
        }
        self.memory.buffers.push(Buffer::new(name, bytes));
        Ok(BufferId(self.memory.buffers.len() - 1))
    }

    fn write(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<(), Error> {
        self.range(buffer, at, data.len())?;
        self.memory.settle();
        let b = &mut self.memory.buffers[buffer.0];
        b.write(at, data);
        b.written[at..at + data.len()].fill(1);
        Ok(())
    }

    fn read(&self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<(), Error> {
        self.range(buffer, at, data.len())?;
        self.memory.buffers[buffer.0].read(at, data);
        Ok(())
    }

    fn run_kernel(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<(), Error> {
        let program = self.program(module, kernel)?;
        let params = self.params_of(&program, args)?;
        if !extent.early {
            self.memory.settle();
        }
        let request = Request {
            grid: extent.grid,
            block: extent.block,
            cluster: extent.cluster,
            dynamic_shared: extent.shared,
            early: extent.early,
            params: &params,
            constants: &self.modules[module.0].constants,
        };
        let mut outcome = run(&program, &mut self.memory, &request, self.options)?;
        for f in &mut outcome.findings {
            f.at = f.source(&self.modules[module.0].text.ast.files);
        }
        for h in outcome.counts.conflicting.iter_mut().chain(&mut outcome.counts.moved_again) {
            h.at = place_name(&h.place, &self.modules[module.0].text.ast.files);
        }
        match &self.log {
            Some(log) => log.lock().unwrap_or_else(PoisonError::into_inner).push(outcome.counts),
            None if self.forgets => {}
            None => self.counts.push(outcome.counts),
        }
        if self.strict && !outcome.findings.is_empty() {
            return Err(Error::Findings { kernel: kernel.into(), findings: outcome.findings });
        }
        self.findings.extend(outcome.findings);
        Ok(())
    }
}

impl Device for Simulator {
    fn name(&self) -> &str {
        "simulator"
    }
    fn capability(&self) -> Option<(u32, u32)> {
        None
    }
    fn space(&mut self) -> driver::Result<Option<Space>> {
        Ok(None)
    }
    fn load(&mut self, code: &Code) -> driver::Result<ModuleId> {
        Ok(self.load_ptx(code.ptx)?)
    }
    fn alloc(&mut self, name: &str, bytes: usize) -> driver::Result<BufferId> {
        Ok(self.add_buffer(name, bytes)?)
    }
    fn free(&mut self, buffer: BufferId) -> driver::Result<()> {
        let name = std::mem::take(&mut self.memory.buffers[buffer.0].name);
        self.memory.buffers[buffer.0] = Buffer::new(&name, 0);
        Ok(())
    }
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> driver::Result<()> {
        Ok(self.write(buffer, at, data)?)
    }
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> driver::Result<()> {
        Ok(self.read(buffer, at, data)?)
    }
    fn copy(&mut self, from: (BufferId, usize), to: (BufferId, usize), bytes: usize) -> driver::Result<()> {
        let mut data = vec![0; bytes];
        self.read(from.0, from.1, &mut data)?;
        let written = self.memory.buffers[from.0.0].written[from.1..from.1 + bytes].to_vec();
        self.write(to.0, to.1, &data)?;
        // What nothing has written stays so.
        self.memory.buffers[to.0.0].written[to.1..to.1 + bytes].copy_from_slice(&written);
        Ok(())
    }
    fn alloc_host(&mut self, _: &str, bytes: usize) -> driver::Result<HostId> {
        Ok(self.host.alloc(bytes))
    }
    fn free_host(&mut self, host: HostId) -> driver::Result<()> {
        self.host.free(host)
    }
    fn write_host(&mut self, host: HostId, at: usize, data: &[u8]) -> driver::Result<()> {
        self.host.part(host, at, data.len())?.copy_from_slice(data);
        Ok(())
    }
    fn read_host(&mut self, host: HostId, at: usize, data: &mut [u8]) -> driver::Result<()> {
        data.copy_from_slice(self.host.part(host, at, data.len())?);
        Ok(())
    }
    fn upload(&mut self, from: (HostId, usize), to: (BufferId, usize), bytes: usize) -> driver::Result<()> {
        let data = self.host.part(from.0, from.1, bytes)?.to_vec();
        Ok(self.write(to.0, to.1, &data)?)
    }
    fn download(&mut self, from: (BufferId, usize), to: (HostId, usize), bytes: usize) -> driver::Result<()> {
        let mut data = vec![0; bytes];
        self.read(from.0, from.1, &mut data)?;
        self.write_host(to.0, to.1, &data)
    }
    /// All that was started is done.
    fn event(&mut self) -> driver::Result<EventId> {
        Ok(EventId(0))
    }
    fn wait(&mut self, _: EventId) -> driver::Result<()> {
        Ok(())
    }
    fn release(&mut self, _: EventId) -> driver::Result<()> {
        Ok(())
    }
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> driver::Result<()> {
        Ok(self.run_kernel(module, kernel, extent, args)?)
    }
    fn product(&mut self, p: &Product) -> driver::Result<()> {
        self.memory.settle();
        Ok(crate::product::run(&mut self.memory, p)?)
    }
    fn synchronise(&mut self) -> driver::Result<()> {
        Ok(())
    }
}
