//! Standard output and standard error whose readers may be gone, or whose disk may be full.
//!
//! The standard library's `println!` panics then.  The macros below stand in for it in the whole command, under its names: a
//! verb that only prints ends with an error, a run that [outlives](outlive) its reader says so once and goes on.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Whether the process goes on without its standard output.
static OUTLIVES: AtomicBool = AtomicBool::new(false);
/// Whether standard output is lost.
static LOST: AtomicBool = AtomicBool::new(false);

macro_rules! print {
    ($($t:tt)*) => { $crate::out::write(format_args!($($t)*)) };
}

macro_rules! println {
    () => { $crate::out::write(format_args!("\n")) };
    ($($t:tt)*) => { $crate::out::write(format_args!("{}\n", format_args!($($t)*))) };
}

macro_rules! eprintln {
    ($($t:tt)*) => { $crate::out::tell(format_args!("{}\n", format_args!($($t)*))) };
}

/// From now on a standard output that is lost does not end the process: what it does is worth more.
pub fn outlive() {
    OUTLIVES.store(true, Relaxed);
}

/// Writes to standard output.
pub fn write(text: Arguments) {
    if LOST.load(Relaxed) {
        return;
    }
    let Err(e) = io::stdout().lock().write_fmt(text) else { return };
    if !OUTLIVES.load(Relaxed) {
        // A reader that has left wants to hear nothing more.
        if e.kind() != ErrorKind::BrokenPipe {
            tell(format_args!("  × standard output: {e}\n"));
        }
        std::process::exit(1);
    }
    if !LOST.swap(true, Relaxed) {
        tell(format_args!("warning: standard output: {e}; this run goes on without it\n"));
    }
}

/// Writes to standard error; if that fails there is nobody left to tell.
pub fn tell(text: Arguments) {
    let _ = io::stderr().lock().write_fmt(text);
}
