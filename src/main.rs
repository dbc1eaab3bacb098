//! The `rambac` command.

fn main() -> std::process::ExitCode {
    rambac::main()
}
