//! Why a device refuses.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such device, or what it needs is not here; the text says what to do.
    #[error("{0}")]
    Absent(String),
    #[error("{}", memory(name, *asked, *free))]
    OutOfMemory { name: String, asked: usize, free: Option<usize> },
    /// A fault of a kernel, or of the hardware: the device can't be used again in this process.
    #[error("{what}; the device can't be used again in this process: start anew from the last checkpoint")]
    Lost {
        what: String,
        /// Launches and products that came to their end since the last [`synchronise`](crate::Device::synchronise), where that is
        /// known.
        finished: Option<usize>,
    },
    /// The device refuses this call; others may go on.
    #[error("{0}")]
    Refused(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// A refusal in words.
    pub fn refused(what: impl fmt::Display) -> Error {
        Error::Refused(what.to_string().into())
    }
}

fn memory(name: &str, asked: usize, free: Option<usize>) -> String {
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
    let free = free.map_or(String::new(), |f| format!(", {} are free", mib(f)));
    format!(
        "there is no memory for \"{name}\": {} asked{free}; use a shorter length, a smaller batch, or less of it by --memory-limit \
         (training) or --device-memory (inference)",
        mib(asked)
    )
}
