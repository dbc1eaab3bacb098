//! Why a GPU program can't run.

use rambac_ir::DimError;

#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    #[error(transparent)]
    Dim(#[from] DimError),
    #[error("{kind} \"{name}\" ({expected}) was not given to program {program}")]
    Missing { program: String, kind: &'static str, name: String, expected: String },
    #[error("{kind} \"{name}\" of program {program} must be {expected}, but {found} was given")]
    Wrong { program: String, kind: &'static str, name: String, expected: String, found: String },
    #[error("{program} has no compiled kernel {kernel}; compile it again for this target")]
    NoCode { program: String, kernel: String },
    /// `what`: a step, a buffer.
    #[error("{program}: {what}: {error}")]
    Device { program: String, what: String, error: rambac_driver::Error },
    #[error("{program}: step {step} ({op}) can't be launched: {what} is {value}, more than {most}; use smaller sizes")]
    TooLarge { program: String, step: usize, op: &'static str, what: &'static str, value: usize, most: usize },
}

impl GpuError {
    /// The device can't be used again.
    pub fn lost(&self) -> bool {
        matches!(self, GpuError::Device { error: rambac_driver::Error::Lost { .. }, .. })
    }
}
