//! Wrong input: a clear message, exit code 2 if the user must fix it, and nothing lost.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Run, SMALL_MLP, program};
use image::{GrayImage, ImageFormat};

#[track_caller]
fn assert_refused(ended: &Ended, code: i32, says: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for part in says {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
    assert!(!ended.output.contains("panicked"), "{}", ended.output);
}

/// Job file beside the run directory, and a coordinator's message about it.
fn with_config(run: &Run, text: &str) -> Ended {
    let file = run.beside("job.toml");
    fs::write(&file, text).unwrap();
    run.start_with(&["--config", file.to_str().unwrap()]).wait()
}

#[test]
fn all_mistakes_of_a_job_file_show_at_once_with_their_lines() {
    let run = Run::new(&[]);
    let ended = with_config(
        &run,
        "[job]\nname = \"mine\"\nsteps = \"many\"\nsede = 1\n\n[data]\nkind = \"idx\"\npath = \"nowhere\"\n\n[model]\nkind = \"mlp\"\n",
    );
    assert_refused(
        &ended,
        2,
        &["job.toml:3: job.steps", "job.toml:4: job.sede", "job.toml:8: data.path", "nowhere"],
    );
    assert_refused(&ended, 2, &["job.toml:11: model.kind", "mlp-28", "4 errors"]);
    assert!(!run.path("").exists(), "nothing was begun");
}

#[test]
fn a_wrong_override_is_named() {
    let run = Run::new(&[]);
    let ended =
        run.start_with(&["--set", "job.stepps=5", "--set", "loss.kind=wgan", "--set", "nonsense"]).wait();
    assert_refused(
        &ended,
        2,
        &["--set job.stepps=5", "--set loss.kind=wgan", "wasserstein-gp", "--set nonsense"],
    );
}

#[test]
fn a_config_that_is_not_there_is_named() {
    let run = Run::new(&[]);
    assert_refused(&run.start_with(&["--config", "/no/such.toml"]).wait(), 2, &["/no/such.toml"]);
}

/// Header of an IDX file of 28 x 28 images, with `pixels` bytes of pixels.
fn idx(magic: u32, count: u32, pixels: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = [magic, count, 28, 28].iter().flat_map(|size| size.to_be_bytes()).collect();
    bytes.resize(bytes.len() + pixels, 7);
    bytes
}

fn with_data(kind: &str, path: &Path, more: &[&str]) -> (Run, Ended) {
    let kind = format!("data.kind={kind}");
    let path = format!("data.path={}", path.display());
    let run = Run::new(&[&["job.steps=2"], &[kind.as_str(), path.as_str()], more]);
    let ended = run.start(1).wait();
    (run, ended)
}

#[test]
fn a_truncated_or_corrupt_idx_file_is_refused_and_a_mended_one_trains() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("digits-idx3-ubyte");
    for (bytes, says) in [
        (idx(0x803, 100, 99 * 784), "100"),
        (idx(0x801, 100, 100 * 784), "labels"),
        (b"\x1f\x8b\x08\x00garbage".to_vec(), "gzip"),
        (Vec::new(), "cut off"),
    ] {
        fs::write(&file, bytes).unwrap();
        let (_, ended) = with_data("idx", &file, &[]);
        assert_refused(&ended, 2, &["digits-idx3-ubyte", says]);
    }
    fs::write(&file, idx(0x803, 100, 100 * 784)).unwrap();
    let (run, ended) = with_data("idx", &file, &[]);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(run.newest_checkpoint().ends_with("step-00000002"));
}

#[test]
fn a_mistake_that_a_worker_found_may_be_mended_in_the_same_run_directory() {
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=2", "job.data_shards=100", "job.shard_batch=101"]]);
    let ended = run.start(1).wait();
    assert_refused(&ended, 2, &["10100", "10000", "job.shard_batch"]);
    run.set("job.shard_batch=1");
    run.complete(1);
}

#[test]
fn pictures_of_mixed_sizes_need_a_resize() {
    let folder = tempfile::tempdir().unwrap();
    for (index, side) in [28, 28, 32].into_iter().enumerate() {
        let picture = GrayImage::from_pixel(side, side, image::Luma([100]));
        picture.save_with_format(folder.path().join(format!("{index}.png")), ImageFormat::Png).unwrap();
    }
    let more = ["data.channels=1", "job.data_shards=1", "job.shard_batch=2"];
    let (_, ended) = with_data("folder", folder.path(), &more);
    assert_refused(&ended, 2, &["28", "32", "data.resize"]);
    let (_, ended) = with_data("folder", folder.path(), &[&more[..], &["data.resize=28"]].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.output);
}

#[test]
fn more_workers_than_data_shards_are_refused() {
    let run = Run::new(&[&["job.data_shards=2"]]);
    assert_refused(&run.start(3).wait(), 2, &["--workers 3", "2 data shards"]);
}

#[test]
fn a_number_of_workers_that_is_none_is_refused() {
    let run = Run::new(&[]);
    for wrong in ["many", "-1", "2.5"] {
        let argument = format!("--workers={wrong}");
        let ended = run.start_with(&[&argument]).wait();
        assert_refused(&ended, 2, &[wrong, "give a number of workers, such as 4, or auto"]);
    }
    assert!(!run.path("").exists(), "nothing was begun");
}

#[test]
fn auto_starts_one_worker_where_workers_can_use_no_gpu() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let mut command = run.command(&["--workers", "auto"]);
    command.env("CUDA_VISIBLE_DEVICES", "");
    let ended = Process::start(command).wait();
    assert_refused(&ended, 0, &["no GPU here, so 1 worker on the CPU"]);
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named() {
    let run = Run::new(&[]);
    let file = run.beside("a-file");
    fs::write(&file, "").unwrap();
    let below = file.join("run");
    let mut command = Command::new(program("coordinator"));
    command.arg("--run-dir").arg(&below);
    assert_refused(&Process::start(command).wait(), 2, &["--run-dir", below.to_str().unwrap()]);
}

#[test]
fn a_trace_that_cannot_be_written_is_named_before_anything_is_trained() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let (missing, other) = (run.beside("no/trace.json"), run.beside("other.json"));
    fs::write(&other, "{}").unwrap();
    for (file, says) in [(&missing, "No such file"), (&other, "no trace")] {
        let file = file.to_str().unwrap();
        assert_refused(&run.start_with(&["--trace", file]).wait(), 2, &["--trace", file, says]);
        let mut worker = Command::new(program("worker"));
        worker.args(["--coordinator", "http://127.0.0.1:1", "--trace", file]);
        assert_refused(&Process::start(worker).wait(), 2, &["--trace", file, says]);
    }
    assert!(run.rows().is_empty());
    run.complete(1);
}

#[test]
fn the_run_directory_of_another_job_is_left_alone() {
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let digest = run.complete(1);
    run.set("job.seed=5");
    run.set("loss.kind=hinge");
    run.set("job.steps=4");
    assert_refused(&run.start(1).wait(), 2, &["job.seed", "loss.kind", "another job", "--set job.name="]);
    assert_eq!(run.digest(), digest);
}

#[test]
fn a_finished_run_says_so() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let digest = run.complete(1);
    assert_refused(&run.start(2).wait(), 0, &["is finished", &digest]);
}

#[test]
fn a_port_in_use_and_an_open_address_are_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = Run::new(&[SMALL_MLP]);
    assert_refused(
        &run.start_with(&["--listen", &address]).wait(),
        2,
        &["--listen", &address, "another port"],
    );
    assert_refused(&run.start_with(&["--listen", "0.0.0.0:0"]).wait(), 2, &["--listen", "--insecure"]);
}

#[test]
fn a_second_coordinator_names_the_holder_and_disturbs_nothing() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=100000"]]);
    let first = run.start(1);
    run.wait_for_step(1);
    let holder = format!("process {}", first.pid());
    assert_refused(&run.start(1).wait(), 1, &["held by another coordinator", &holder]);
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 20);
}

#[test]
fn drawings_that_cannot_be_written_are_told_before_the_work() {
    // The error comes before the search for the checkpoint.
    for (command, option) in
        [("sample", "--out"), ("sample", "--folder"), ("interpolate", "--out"), ("export", "--out")]
    {
        let mut drawing = Command::new(program("worker"));
        drawing.args([command, "/no/checkpoint", option, "/proc/nothing/here"]);
        assert_refused(&Process::start(drawing).wait(), 2, &[&format!("{option} /proc/nothing/here")]);
    }
}

#[test]
fn samples_of_something_else_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("generator_ema.safetensors");
    fs::write(&file, "not weights").unwrap();
    let sample = |checkpoint: &Path| {
        let mut command = Command::new(program("worker"));
        command.args(["sample", "--out"]).arg(folder.path().join("out.png")).arg(checkpoint);
        Process::start(command).wait()
    };
    assert_refused(&sample(&file), 2, &["generator_ema.safetensors", "safetensors"]);
    assert_refused(
        &sample(Path::new("/no/such/run")),
        2,
        &["/no/such/run: neither a run nor a checkpoint is there"],
    );
}
