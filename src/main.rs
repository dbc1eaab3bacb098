//! The `rambac` command: parses arguments, calls the crates, renders what they return.

mod cli;
mod cmd;
mod error;
mod machine;
mod model;
mod show;
mod work;

use clap::Parser;

fn main() -> std::process::ExitCode {
    let cli = cli::Cli::parse();
    match cmd::run(cli) {
        Ok(code) => code,
        Err(e) => {
            error::report(e);
            std::process::ExitCode::FAILURE
        }
    }
}
