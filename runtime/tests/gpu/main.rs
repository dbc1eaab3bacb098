//! GPU kernels on the simulator, or on the device that `RAMBAC_TEST_DEVICE` names: every form of every op against the reference, without findings, the same bits under
//! every schedule.
//!
//! Without NVRTC nothing here can run: every test is then counted as ignored and the reason printed.

mod ahead;
mod attend;
mod conv;
mod elementwise;
mod executables;
mod faults;
mod harness;
mod layer;
mod mutants;
mod norm;
mod pages;
mod products;
mod rig;
mod rows;
mod scan;
mod tune;
mod vocabulary;

use std::process::ExitCode;

fn main() -> ExitCode {
    harness::run(&[
        elementwise::ALL,
        rows::ALL,
        conv::ALL,
        norm::ALL,
        scan::ALL,
        attend::ALL,
        pages::ALL,
        vocabulary::ALL,
        products::ALL,
        layer::ALL,
        executables::ALL,
        faults::ALL,
        ahead::ALL,
        tune::ALL,
        mutants::ALL,
    ])
}
