//! What a program needs of a device: modules, named buffers, launches.  The simulator is one; others can be.

use crate::check::Finding;
use crate::count::Counts;
use crate::decode::{Image, decode};
use crate::error::Error;
use crate::exec::Options;
use crate::exec::launch::{Request, run};
use crate::isa::{Param, Program};
use crate::memory::{Buffer, GlobalMemory, MAX_BYTES, address_of};
use crate::parse::ast::{Module, Space};
use crate::parse::parse;
use crate::product::Product;
use std::collections::HashMap;
use std::sync::Arc;

/// A loaded module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleId(usize);

/// A buffer in global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub(crate) usize);

/// A kernel's argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A buffer's address, and bytes beyond it.
    Buffer(BufferId, u64),
    /// A value of the parameter's size, lowest byte first.
    Bytes(Vec<u8>),
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

/// Sizes of a launch, in blocks and threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks of a cluster; (1, 1, 1) for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

impl Extent {
    /// A launch along one axis.
    pub fn line(blocks: u32, threads: u32) -> Extent {
        Extent { grid: [blocks, 1, 1], block: [threads, 1, 1], cluster: [1; 3], shared: 0 }
    }
}

/// A device that runs kernels given as PTX.
pub trait Device {
    type Error;

    /// Makes a module's kernels and variables known.
    fn load(&mut self, ptx: &str) -> Result<ModuleId, Self::Error>;
    /// A buffer of so many bytes, with no content.
    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId, Self::Error>;
    /// Gives a buffer's memory back; it must not be used again.
    fn free(&mut self, buffer: BufferId) -> Result<(), Self::Error>;
    /// Copies to a buffer from its byte `at` on.
    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<(), Self::Error>;
    /// Copies from a buffer, from its byte `at` on.
    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<(), Self::Error>;
    /// Starts a kernel.
    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<(), Self::Error>;
    /// Starts a dense product of the library that belongs to the device.
    fn product(&mut self, p: &Product) -> Result<(), Self::Error>;
    /// Waits for all launches.
    fn synchronise(&mut self) -> Result<(), Self::Error>;
}

struct Loaded {
    ast: Module,
    image: Image,
    constants: Vec<u8>,
    programs: HashMap<String, Arc<Program>>,
}

/// Executes PTX on this machine's processor.  Launches run at once; what they did wrong is kept until it is asked for.
#[derive(Default)]
pub struct Simulator {
    pub options: Options,
    memory: GlobalMemory,
    modules: Vec<Loaded>,
    findings: Vec<Finding>,
    counts: Vec<Counts>,
}

impl Simulator {
    pub fn new(options: Options) -> Simulator {
        Simulator { options, ..Simulator::default() }
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
        self.modules[module.0].ast.functions.iter().filter(|f| f.entry).map(|f| f.name.clone()).collect()
    }

    /// Source files of a module, by the number that places have.
    pub fn files(&self, module: ModuleId) -> &[(u32, String)] {
        &self.modules[module.0].ast.files
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
        if let Some(p) = m.programs.get(kernel) {
            return Ok(p.clone());
        }
        let p = Arc::new(decode(&m.ast, kernel, &m.image)?);
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
            let bytes = match arg {
                Arg::Bytes(b) => b.clone(),
                Arg::Buffer(b, more) => (address_of(b.0) + more).to_le_bytes().to_vec(),
            };
            if bytes.len() != param.bytes {
                let kernel = p.name.clone();
                return Err(Error::ParamSize { kernel, index, want: param.bytes, got: bytes.len() });
            }
            out[param.offset..param.offset + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(out)
    }
}

/// `kernel(b64, b32, b8[128])`
pub fn signature(p: &Program) -> String {
    let one = |x: &Param| {
        let ty = format!("{:?}", x.ty).to_lowercase();
        if x.bytes == x.ty.bytes() { ty } else { format!("{ty}[{}]", x.bytes / x.ty.bytes().max(1)) }
    };
    format!("{}({})", p.name, p.params.iter().map(one).collect::<Vec<_>>().join(", "))
}

impl Device for Simulator {
    type Error = Error;

    fn load(&mut self, ptx: &str) -> Result<ModuleId, Error> {
        let ast = parse(ptx)?;
        let mut image = Image { globals: HashMap::new(), constants: HashMap::new() };
        let mut constants: Vec<u8> = vec![];
        for v in &ast.vars {
            match v.space {
                Space::Global => {
                    let id = self.alloc(&v.name, v.bytes.max(v.init.len() as u64) as usize)?;
                    image.globals.insert(v.name.clone(), address_of(id.0));
                }
                Space::Const => {
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
                Space::Global => {
                    if let Some(id) = image.globals.get(&v.name).map(|&a| crate::memory::locate(a).0) {
                        init.resize(self.memory.buffers[id].bytes, 0);
                        self.copy_in(BufferId(id), 0, &init)?;
                    }
                }
                Space::Const if !v.addresses.is_empty() => {
                    let at = image.constants[&v.name] as usize;
                    constants[at..at + init.len()].copy_from_slice(&init);
                }
                _ => {}
            }
        }
        self.modules.push(Loaded { ast, image, constants, programs: HashMap::new() });
        Ok(ModuleId(self.modules.len() - 1))
    }

    fn alloc(&mut self, name: &str, bytes: usize) -> Result<BufferId, Error> {
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

    fn copy_in(&mut self, buffer: BufferId, at: usize, data: &[u8]) -> Result<(), Error> {
        self.range(buffer, at, data.len())?;
        let b = &mut self.memory.buffers[buffer.0];
        b.write(at, data);
        b.written[at..at + data.len()].fill(1);
        Ok(())
    }

    fn copy_out(&mut self, buffer: BufferId, at: usize, data: &mut [u8]) -> Result<(), Error> {
        self.range(buffer, at, data.len())?;
        self.memory.buffers[buffer.0].read(at, data);
        Ok(())
    }

    fn launch(&mut self, module: ModuleId, kernel: &str, extent: Extent, args: &[Arg]) -> Result<(), Error> {
        let program = self.program(module, kernel)?;
        let params = self.params_of(&program, args)?;
        let request = Request {
            grid: extent.grid,
            block: extent.block,
            cluster: extent.cluster,
            dynamic_shared: extent.shared,
            params: &params,
            constants: &self.modules[module.0].constants,
        };
        let outcome = run(&program, &mut self.memory, &request, self.options)?;
        self.findings.extend(outcome.findings);
        self.counts.push(outcome.counts);
        Ok(())
    }

    fn free(&mut self, buffer: BufferId) -> Result<(), Error> {
        let name = std::mem::take(&mut self.memory.buffers[buffer.0].name);
        self.memory.buffers[buffer.0] = Buffer::new(&name, 0);
        Ok(())
    }

    fn product(&mut self, p: &Product) -> Result<(), Error> {
        crate::product::run(&mut self.memory, p)
    }

    fn synchronise(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
