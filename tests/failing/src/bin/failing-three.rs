//! An objective of three networks and phases of all kinds, with failpoints.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use ganglion_proto::dial::Credentials;
use ganglion_proto::trace::Trace;
use ganglion_worker::commands::join::run;
use ganglion_worker::device::DeviceChoice;
use ganglion_worker::objective::Objective;

#[path = "../../../../worker/tests/common/three.rs"]
#[allow(dead_code)] // a test of the worker uses all of it
mod three;

fn main() -> ExitCode {
    ganglion_proto::failpoint::install(ganglion_tests::failpoint::obey);
    let arguments: Vec<String> = std::env::args().collect();
    let [_, option, url] = arguments.as_slice() else { return ExitCode::from(2) };
    if option != "--coordinator" {
        return ExitCode::from(2);
    }
    let make = |_: &_, _: &_, _| Ok(Arc::new(three::Three) as Arc<dyn Objective>);
    match run(url, Credentials::default(), DeviceChoice::Cpu, &make, &Trace::off()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
