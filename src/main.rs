//! The `rambac` command: parses arguments, calls the crates, renders what they return.

mod cli;
mod cmd;
mod device;
mod error;
mod machine;
mod model;
mod sample;
mod show;
mod work;
mod workbench;

use clap::Parser;

fn main() -> std::process::ExitCode {
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
