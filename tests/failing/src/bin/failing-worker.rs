//! The `worker` program with failpoints.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ganglion_proto::failpoint::install(ganglion_tests::failpoint::obey);
    ganglion_worker::commands::program::main()
}
