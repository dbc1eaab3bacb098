//! What CUDA has here, without opening a device.

use crate::api::check;
use crate::library::driver;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use rambac_driver::Result;
use std::ffi::CStr;

/// A GPU as the driver tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    /// Bytes.
    pub memory: usize,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: u32,
}

/// What is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The CUDA version that the driver knows, as (major, minor).
    pub driver: (i32, i32),
    /// In the order of `cuda:0`, `cuda:1`, …
    pub gpus: Vec<Gpu>,
}

/// Asks the driver.
///
/// # Errors
/// There is none, or none that works.
pub fn survey() -> Result<Survey> {
    let driver = driver()?;
    let mut n = 0;
    // SAFETY: a valid pointer; the driver is initialised.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut n) })?;
    Ok(Survey { driver, gpus: (0..n).map(gpu).collect::<Result<_>>()? })
}

/// The device of a number that the driver has.
pub(crate) fn handle(index: i32) -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: a valid pointer; the driver checks the number.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index) })?;
    Ok(device)
}

pub(crate) fn attribute(device: sys::CUdevice, which: Attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: a valid pointer and a device that the driver gave.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(value.max(0) as u32)
}

pub(crate) fn gpu(index: i32) -> Result<Gpu> {
    let device = handle(index)?;
    let mut name = [0; 256];
    // SAFETY: as long as it says, and the driver ends it with a zero.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device) })?;
    // SAFETY: it ends with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: a valid pointer.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) })?;
    Ok(Gpu {
        name,
        memory,
        capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}
