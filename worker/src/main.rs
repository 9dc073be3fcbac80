//! The `worker` program.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ganglion_worker::commands::program::main()
}
