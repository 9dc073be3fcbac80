//! Refusals of the programs that measure.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::Process;

#[track_caller]
fn assert_refused(command: Command, says: &[&str]) {
    let ended = Process::start(command).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(says.iter().all(|part| ended.output.contains(part)), "{}", ended.output);
}

/// The error comes before hours of measuring, not after them.
#[test]
fn results_that_cannot_be_written_are_told_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.md");
    fs::write(&page, "by hand alone").unwrap();
    for program in [env!("CARGO_BIN_EXE_bench"), env!("CARGO_BIN_EXE_recovery")] {
        for (page, says) in
            [(page.as_path(), "no place for generated text"), (Path::new("/no/page.md"), "No such")]
        {
            let mut command = Command::new(program);
            command.arg("--page").arg(page);
            assert_refused(command, &["--page", page.to_str().unwrap(), says]);
        }
    }
    let mut pictures = Command::new(env!("CARGO_BIN_EXE_bench"));
    pictures.args(["--growth", "--pictures", "/no"]);
    assert_refused(pictures, &["--pictures /no", "No such"]);
}
