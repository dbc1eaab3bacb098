//! Tensor maps, as the driver makes them.

use crate::api::check;
use cudarc::driver::sys;
use rambac_driver::{Error, Float, Result, Tensor};

/// The 128 bytes of a kernel's parameter, for a tensor that begins at `address`.
///
/// # Errors
/// What the hardware does not allow.
pub(crate) fn encode(t: &Tensor, address: u64) -> Result<Vec<u8>> {
    let n = t.dims.len();
    if !(2..=5).contains(&n) || t.strides.len() != n - 1 || t.tile.len() != n {
        return Err(Error::refused("a tensor map has 2 to 5 dims, one stride fewer and a box of as many"));
    }
    let ty = match t.float {
        Float::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Float::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Float::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let dims: Vec<u64> = t.dims.iter().map(|&d| d as u64).collect();
    let strides: Vec<u64> = t.strides.iter().map(|&s| (s * t.float.bytes()) as u64).collect();
    let tile: Vec<u32> = t.tile.iter().map(|&d| d.min(u32::MAX as usize) as u32).collect();
    let each = vec![1u32; n];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays have as many elements as the driver reads for so many dims; it only writes `map`.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            ty,
            n as u32,
            address as *mut _,
            dims.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            each.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", code)?;
    Ok(map.opaque.iter().flat_map(|w| w.to_ne_bytes()).collect())
}
