//! Arithmetic of PTX.  [`round`]: exact results and their rounding; [`lanes`]: loops over a warp; [`approx`]: functions
//! that PTX only bounds; [`convert`]: `cvt`.

#[macro_use]
pub mod lanes;
pub mod approx;
pub mod convert;
pub mod round;
