//! Candidates of a step on a device: what [`tune`](rambac_codegen::cuda::tune) measures with.

use super::bytes::Bytes;
use super::code::Code;
use super::machine::{Machine, Placement, ProgramId};
use rambac_codegen::cuda::tune::{Alone, Measure, Trial};
use rambac_codegen::cuda::{Cache, Form, Target};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::program::Step;
use rambac_driver::Device;
use rambac_ir::{Bindings, DimError, HostArray};
use std::sync::Arc;

/// What a clock gives: the program's outputs, and the seconds that the device was busy with a run.
pub type Timed = (Vec<(String, Bytes)>, f64);

/// Compiles a candidate, runs it alone and takes the time as `clock` says.
pub struct Measurer<'a, F, C> {
    /// The device's name; choices are kept by it.
    pub name: String,
    pub target: Target,
    pub nvrtc: &'a Nvrtc,
    pub cache: &'a Cache,
    /// Opens the device: every candidate begins on an empty one, so that none finds what another left.
    pub open: F,
    /// Runs the program on the given operands.  A device without a clock may count instead; that a candidate did something
    /// wrong is an error, and it is refused.
    pub clock: C,
}

impl<D, F, C> Measure for Measurer<'_, F, C>
where
    D: Device,
    F: FnMut() -> Result<D, String>,
    C: FnMut(&mut Machine<D>, ProgramId, &Bindings, &[(&str, &Bytes)]) -> Result<Timed, String>,
{
    fn device(&self) -> String {
        self.name.clone()
    }

    fn trial(&mut self, step: &Step, form: &Form, dims: &Bindings, operands: &[HostArray]) -> Result<Trial, String> {
        let alone = Alone::new(step).ok_or("rows of an operand have no number")?;
        let gpu = Arc::new(alone.gpu(form, &self.target));
        let code = Code::compile(self.nvrtc, &[&gpu], self.cache).map_err(|e| e.to_string())?;
        let mut machine = Machine::new((self.open)()?, Placement::Apart);
        let id = machine.load(gpu, &code).map_err(|e| e.to_string())?;
        let given = operands.iter().enumerate().map(|(i, a)| Ok((format!("x{i}"), alone.given(i, a, dims)?)));
        let given = given.collect::<Result<Vec<_>, DimError>>().map_err(|e| e.to_string())?;
        let given: Vec<(String, Bytes)> = given.into_iter().map(|(n, a)| (n, Bytes::from_host(&a))).collect();
        let inputs: Vec<(&str, &Bytes)> = given.iter().map(|(n, b)| (n.as_str(), b)).collect();
        let (out, seconds) = (self.clock)(&mut machine, id, dims, &inputs)?;
        let taken = out.iter().enumerate().map(|(i, (_, b))| alone.taken(i, &b.to_host(), dims));
        let results = taken.collect::<Result<Vec<_>, DimError>>().map_err(|e| e.to_string())?;
        Ok(Trial { seconds, results })
    }
}
