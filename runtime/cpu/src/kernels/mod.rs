//! The kernels, one file per family.

mod attn_micro;
pub mod chunk_attention;
pub mod conv;
pub mod cross_entropy;
pub mod dense_attention;
pub mod embedding;
pub mod gemm;
mod gemm_micro;
pub mod inverted_index;
pub mod linear_cross_entropy;
pub mod matvec;
pub mod norm;
pub mod reduce;
pub mod rotary;
pub mod scan;
mod scan_backward;
mod scan_steps;
pub mod selection;
pub mod slots;
pub mod transpose;
pub mod vmath;
