//! Candidates of a step on a device: what [`tune`](rambac_codegen::cuda::tune) measures with.

use super::bytes::Bytes;
use super::code::Code;
use super::error::GpuError;
use super::machine::{Machine, Placement, ProgramId};
use rambac_codegen::cuda::tune::{Alone, Measure, Trial};
use rambac_codegen::cuda::{Cache, Form, Target};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::program::Step;
use rambac_driver::{Device, Error as DriverError};
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
    pub placement: Placement,
    /// Opens the device: every candidate begins on an empty one, so that none finds what another left.
    pub open: F,
    /// Runs the program on the given operands.  A device without a clock may count instead; that a candidate did something
    /// wrong is an error, and it is refused.
    pub clock: C,
    /// The device was lost by a candidate.
    pub lost: bool,
}

/// Runs that [`clock`] times, and the seconds after which it times no more.
const RUNS: usize = 10;
const ENOUGH: f64 = 0.5;

/// Runs a program as often as its time is worth, with operands and results that stay on the device; the seconds of the
/// shortest run by the device's clock.  A clock for [`Measurer`].
///
/// # Errors
/// The program can't run; the device has no clock.
pub fn clock<D: Device>(
    m: &mut Machine<D>,
    id: ProgramId,
    dims: &Bindings,
    inputs: &[(&str, &Bytes)],
) -> Result<Timed, GpuError> {
    let out = m.run(id, dims, inputs)?;
    inputs.iter().try_for_each(|(n, b)| m.set(n, b))?;
    let names: Vec<String> = out.iter().map(|(n, _)| format!("kept.{n}")).collect();
    let keep: Vec<(&str, &str)> = out.iter().zip(&names).map(|((n, _), k)| (n.as_str(), k.as_str())).collect();
    m.watch(RUNS)?;
    let (mut shortest, mut all) = (f64::INFINITY, 0.0);
    for _ in 0..RUNS {
        m.run_keeping(id, dims, &[], &keep)?;
        for t in m.watched() {
            if !t.of_device {
                let error = DriverError::refused("it has no clock, so there is nothing to time");
                return Err(GpuError::Device {
                    program: m.device().name().into(),
                    what: "a measurement".into(),
                    error,
                });
            }
            let seconds: f64 = t.steps.iter().sum();
            (shortest, all) = (shortest.min(seconds), all + seconds);
        }
        if all > ENOUGH {
            break;
        }
    }
    m.end_watch()?;
    Ok((out, shortest))
}

impl<D, F, C> Measure for Measurer<'_, F, C>
where
    D: Device,
    F: FnMut() -> Result<D, String>,
    C: FnMut(&mut Machine<D>, ProgramId, &Bindings, &[(&str, &Bytes)]) -> Result<Timed, GpuError>,
{
    fn device(&self) -> String {
        self.name.clone()
    }

    fn lost(&self) -> bool {
        self.lost
    }

    fn trial(&mut self, step: &Step, form: &Form, dims: &Bindings, operands: &[HostArray]) -> Result<Trial, String> {
        let alone = Alone::new(step).ok_or("rows of an operand have no number")?;
        let gpu = Arc::new(alone.gpu(form, &self.target));
        let code = Code::compile(self.nvrtc, &[&gpu], self.cache).map_err(|e| e.to_string())?;
        let mut machine = Machine::new((self.open)()?, self.placement);
        let id = machine.load(gpu, &code).map_err(|e| e.to_string())?;
        let given = operands.iter().enumerate().map(|(i, a)| Ok((format!("x{i}"), alone.given(i, a, dims)?)));
        let given = given.collect::<Result<Vec<_>, DimError>>().map_err(|e| e.to_string())?;
        let given: Vec<(String, Bytes)> = given.into_iter().map(|(n, a)| (n, Bytes::from_host(&a))).collect();
        let inputs: Vec<(&str, &Bytes)> = given.iter().map(|(n, b)| (n.as_str(), b)).collect();
        let clocked = (self.clock)(&mut machine, id, dims, &inputs);
        self.lost |= clocked.as_ref().is_err_and(GpuError::lost);
        let (out, seconds) = clocked.map_err(|e| e.to_string())?;
        let taken = out.iter().enumerate().map(|(i, (_, b))| alone.taken(i, &b.to_host(), dims));
        let results = taken.collect::<Result<Vec<_>, DimError>>().map_err(|e| e.to_string())?;
        Ok(Trial { seconds, results })
    }
}
