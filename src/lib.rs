//! The `rambac` command: parses arguments, calls the crates, renders what they return.
//!
//! A library so that the viewer's window resolves models and shows errors and numbers as the command does.

// First: what it defines is for all that follow.
#[macro_use]
mod out;

mod cli;
mod cmd;
mod curves;
mod dashboard;
mod device;
pub mod error;
mod loader;
mod machine;
mod metrics;
pub mod model;
mod page;
mod profile;
mod sample;
pub mod show;
mod trouble;
mod work;
mod workbench;

pub use cli::View as ViewArgs;
pub use cmd::view;

/// Runs the command that the process was called with.
pub fn main() -> std::process::ExitCode {
    let cli = cli::parse();
    // `rambac inspect … | head` ends quietly; a run that leaves something behind must not die with its reader.
    if cli.verb.outlives_reader() {
        out::outlive();
    } else {
        die_with_reader();
    }
    match cmd::run(cli) {
        Ok(code) => code,
        Err(e) => {
            error::report(e);
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(unix)]
fn die_with_reader() {
    // SAFETY: the default action for a signal; nothing else is running yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(not(unix))]
fn die_with_reader() {}
