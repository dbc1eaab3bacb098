//! The kernels, one file per family.

pub mod conv;
pub mod cross_entropy;
pub mod embedding;
pub mod gemm;
pub mod norm;
pub mod reduce;
pub mod rotary;
pub mod scan;
mod scan_backward;
pub mod transpose;
pub mod vmath;
mod attn_micro;
pub mod chunk_attention;
pub mod dense_attention;
pub mod inverted_index;
pub mod selection;
