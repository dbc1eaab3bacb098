//! Whole GPU programs on the simulator, or on the device that `RAMBAC_TEST_DEVICE` names: grown graphs and models, through the code path that a GPU takes.
//!
//! Without NVRTC nothing here can run: every test is then counted as ignored and the reason printed.

mod checks;
#[path = "../properties/each_op.rs"]
mod each_op;
mod graphs;
#[path = "../../runtime/tests/gpu/harness.rs"]
mod harness;
mod kernels;
mod mixed;
mod models;
#[path = "../../runtime/tests/gpu/rig.rs"]
#[allow(dead_code)] // what checks of single ops need
mod rig;
mod sessions;
#[path = "../properties/support.rs"]
#[allow(dead_code)] // what other properties need
mod support;
mod train;
mod variants;

use std::process::ExitCode;

fn main() -> ExitCode {
    harness::run(&[
        graphs::ALL,
        models::ALL,
        mixed::ALL,
        train::ALL,
        kernels::ALL,
        checks::ALL,
        sessions::ALL,
        variants::ALL,
    ])
}
