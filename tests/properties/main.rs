//! Properties of the compiler over grown graphs and over the models' graphs: what passes keep, what the memory plan
//! promises, what the CPU computes.
//!
//! The same graphs are grown in every run (fixed seeds), so a failure is never a matter of luck.

mod cpu;
mod each_op;
mod edges;
mod models;
mod passes;
mod plan;
mod session;
mod support;
mod train;
