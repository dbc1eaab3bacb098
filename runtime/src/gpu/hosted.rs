//! A GPU program that is run like one of the CPU: weights and states come from a store and go back there.
//!
//! Every run copies all of them both ways.  That is for simulators, where a copy costs nothing beside a launch; what is
//! to be fast keeps them on the device, with [`GpuExecutor`] alone.

use super::bytes::Bytes;
use super::code::Code;
use super::executor::{GpuError, GpuExecutor, Placement};
use crate::store::Store;
use crate::tensor::{Tensor, TensorRef};
use rambac_codegen::cuda::GpuProgram;
use rambac_ir::Bindings;
use rambac_ir::ops::SourceKind;
use rambac_simulator::device::Device;
use std::sync::Arc;

/// See the module's comment.
pub struct Hosted<D: Device> {
    gpu: GpuExecutor<D>,
}

impl<D: Device> Hosted<D>
where
    D::Error: std::error::Error,
{
    /// Loads a program's kernels.
    ///
    /// # Errors
    /// As [`GpuExecutor::new`].
    pub fn new(
        device: D,
        program: Arc<GpuProgram>,
        code: &Code,
        placement: Placement,
    ) -> Result<Self, GpuError<D::Error>> {
        Ok(Self { gpu: GpuExecutor::new(device, program, code, placement)? })
    }

    pub fn device(&mut self) -> &mut D {
        &mut self.gpu.device
    }

    pub fn program(&self) -> &GpuProgram {
        self.gpu.program()
    }

    /// Runs once: reads `inputs` and the store, updates the store, returns the other outputs in order.
    ///
    /// # Errors
    /// See [`GpuError`].
    pub fn run(
        &mut self,
        dims: &Bindings,
        inputs: &[(&str, TensorRef)],
        store: &mut Store,
    ) -> Result<Vec<(String, Tensor)>, GpuError<D::Error>> {
        let p = self.gpu.program().program.clone();
        for s in p.sources.iter().filter(|s| s.kind != SourceKind::Input) {
            if let Some(t) = store.get(&s.name) {
                self.gpu.set(&s.name, &Bytes::from_tensor(t.view()))?;
            }
        }
        let inputs: Vec<(&str, Bytes)> = inputs.iter().map(|(n, t)| (*n, Bytes::from_tensor(*t))).collect();
        let views: Vec<(&str, &Bytes)> = inputs.iter().map(|(n, b)| (*n, b)).collect();
        let out = self.gpu.run(dims, &views)?;
        for o in p.outputs.iter().filter(|o| o.update) {
            if let Some(b) = self.gpu.get(&o.name)? {
                store.insert(o.name.clone(), b.to_tensor());
            }
        }
        Ok(out.into_iter().map(|(n, b)| (n, b.to_tensor())).collect())
    }
}
