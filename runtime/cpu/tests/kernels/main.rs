//! Dense kernels against float64 references: odd sizes, strided operands, gradients, equal bits for any thread count.

mod common;
mod conv;
mod every_level;
mod gemm;
mod layers;
mod scan;
mod vmath;
