//! The `coordinator` program.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ganglion_coordinator::startup::program::main()
}
