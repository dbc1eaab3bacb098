//! All tests of this binary on every instruction set of the processor.

#[test]
fn every_level() {
    rambac_cpu::simd::testing::rerun("every_level::every_level", "");
}
