//! The example of an objective of one's own, with failpoints.
#![forbid(unsafe_code)]

use std::process::ExitCode;

#[path = "../../../../worker/examples/regression.rs"]
mod regression;

fn main() -> ExitCode {
    ganglion_proto::failpoint::install(ganglion_tests::failpoint::obey);
    regression::main()
}
