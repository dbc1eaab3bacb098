//! The `rambac` command: parses arguments, calls the crates, renders what they return.
//!
//! A library so that the viewer's window resolves models and shows errors and numbers as the command does.

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
mod work;
mod workbench;

pub use cli::View as ViewArgs;
pub use cmd::view;

use clap::Parser;

/// Runs the command that the process was called with.
pub fn main() -> std::process::ExitCode {
    let cli = cli::Cli::parse();
    // `rambac inspect … | head` ends quietly; a run that trains must not die with its reader.
    #[cfg(unix)]
    if !matches!(cli.verb, cli::Verb::Train(_) | cli::Verb::Demo(_)) {
        // SAFETY: the default action for a signal; nothing else is running yet.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    match cmd::run(cli) {
        Ok(code) => code,
        Err(e) => {
            error::report(e);
            std::process::ExitCode::FAILURE
        }
    }
}
