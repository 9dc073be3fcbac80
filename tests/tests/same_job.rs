//! Which requests go on with a run, which are refused, and what a refusal leaves as it was.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use ganglion_tests::{Ended, Reference, Run, SMALL_MLP};
use nix::sys::signal::Signal;

const JOB: &[&str] = &["checkpoint.every_steps=2", "metrics.every_steps=1"];

#[track_caller]
fn assert_says(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for part in parts {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
}

/// Every record of a run by its path, but for the journal and who holds the directory.
fn records(run: &Run) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut records = BTreeMap::new();
    collect(&run.path(""), &mut records);
    let own = |path: &Path| path.starts_with(run.path("owners")) || path.ends_with("lock");
    records.retain(|path, _| !own(path) && !path.display().to_string().contains("journal.sqlite"));
    records
}

fn collect(folder: &Path, into: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, into)
        } else {
            into.extend([(path.clone(), fs::read(&path).unwrap())])
        }
    }
}

/// Names of the files that differ. A start adds an event file for TensorBoard's curves, which is empty until
/// something is trained.
fn changed(before: &BTreeMap<PathBuf, Vec<u8>>, after: &BTreeMap<PathBuf, Vec<u8>>) -> Vec<PathBuf> {
    let all = before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path));
    all.filter(|path| before.contains_key(*path) || !path.display().to_string().contains("tfevents"))
        .cloned()
        .collect()
}

fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

#[test]
fn a_refused_request_leaves_every_record_as_it_was() {
    let run = Run::new(&[SMALL_MLP, JOB]);
    assert_says(&run.start_with(&set(&["job.steps=6"])).wait(), 0, &["is complete"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let elsewhere = format!("checkpoint.url={}", run.beside("elsewhere").display());
    let before = records(&run);
    for (arguments, says) in [
        (set(&["job.steps=2"]), "the run has done 6 steps, and job.steps is 2; ask for 6 steps or more"),
        (set(&["job.steps=5"]), "the run has done 6 steps"),
        (
            set(&["job.seed=5", "job.steps=6"]),
            "to train this job as a run of its own, give it a name: --set job.name=mnist-mlp-2",
        ),
        (set(&["loss.kind=hinge", "job.steps=8"]), "--set job.name=mnist-mlp-2"),
        (set(&["data.kind=idx", "data.path=/no/such/file", "job.steps=6"]), "data.path"),
        (set(&["job.steps=many"]), "job.steps"),
        (set(&[&elsewhere, "job.steps=8"]), "the run's checkpoints are not there"),
        ([set(&["job.steps=6"]), vec!["--from-start"]].concat(), "the run has step-00000006"),
        // With work left, so that these are met.
        ([set(&["job.steps=8"]), vec!["--workers", "9"]].concat(), "--workers 9"),
        ([set(&["job.steps=8"]), vec!["--trace", "/no/such/folder/t.json"]].concat(), "--trace"),
        ([set(&["job.steps=8"]), vec!["--listen", &taken]].concat(), "choose another port"),
        ([set(&["job.steps=8"]), vec!["--http", &taken]].concat(), "--http"),
        ([set(&["job.steps=8"]), vec!["--mirror", "ftp://host/a"]].concat(), "--mirror"),
    ] {
        let ended = run.start_with(&arguments).wait();
        assert_says(&ended, 2, &[says]);
        assert_eq!(changed(&before, &records(&run)), Vec::<PathBuf>::new(), "{arguments:?}");
    }
    // The worker finds this one: what happened is told, and the job stays what ran.
    let ended = run.start_with(&set(&["job.steps=8", "data.exclude=99999999"])).wait();
    assert_says(&ended, 2, &["data.exclude: there is no sample"]);
    let told = run.path("events.jsonl");
    let after = records(&run);
    let others = changed(&before, &after).into_iter().filter(|path| *path != told);
    assert!(after[&told].starts_with(&before[&told]));
    assert_eq!(
        others.filter(|path| !path.ends_with("admin.json")).collect::<Vec<_>>(),
        Vec::<PathBuf>::new()
    );

    let ended = run.start_with(&set(&["job.steps=8"])).wait();
    assert_says(&ended, 0, &["is complete"]);
    Reference::of(&[SMALL_MLP, JOB, &["job.steps=8"]])
        .equals("a run that was given more steps", &run.digest());
    assert!(fs::read_to_string(run.path("job.toml")).unwrap().contains("steps = 8"));
    run.assert_audited();
}

/// Writes an IDX file with images of this many shades.
fn write_idx(file: &Path, shades: u8) {
    let header: Vec<u8> = [0x803, 200, 28, 28_u32].iter().flat_map(|size| size.to_be_bytes()).collect();
    let pixels = (0..200 * 784_u32).map(|at| u8::try_from(at % u32::from(shades)).unwrap());
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, [header, pixels.collect()].concat()).unwrap();
}

#[test]
fn data_that_moved_are_the_same_data_and_others_are_refused() {
    let small: &[&[&str]] = &[SMALL_MLP, JOB, &["data.kind=idx", "job.data_shards=4"]];
    let run = Run::new(small);
    let file = |folder: &str| run.beside(folder).join("digits-idx3-ubyte");
    let path = |folder: &str| format!("data.path={}", file(folder).display());
    let recorded = |folder: &str| {
        fs::read_to_string(run.path("job.toml")).unwrap().contains(&file(folder).display().to_string())
    };
    write_idx(&file("a"), 251);
    assert_says(&run.start_with(&set(&[&path("a"), "job.steps=6"])).wait(), 0, &["is complete"]);
    fs::rename(run.beside("a"), run.beside("b")).unwrap();
    write_idx(&file("other"), 249);

    let ended = run.start_with(&set(&[&path("other"), "job.steps=8"])).wait();
    assert_says(&ended, 2, &["data"]);
    assert!(recorded("a"), "nobody has accepted the other data");
    // Nothing is read of a finished run's data, so nothing of their place is recorded.
    assert_says(&run.start_with(&set(&[&path("other"), "job.steps=6"])).wait(), 0, &["is finished"]);
    assert!(recorded("a"));
    let ended = run.start_with(&set(&[&path("b"), "job.steps=8", "job.name=renamed"])).wait();
    assert_says(&ended, 0, &["the run goes on if the content is the same", "is complete"]);
    assert!(recorded("b"));
    let whole = Run::new(small);
    let fresh = whole.start_with(&set(&[&path("b"), "job.steps=8"])).wait();
    assert_says(&fresh, 0, &["is complete"]);
    Reference::new("a run whose data stayed", whole.digest()).equals("one whose data moved", &run.digest());
    run.assert_audited();
}

/// Members read at the old place until they rest.
#[test]
fn data_may_move_while_members_of_a_dead_coordinator_train_on() {
    let small: &[&[&str]] =
        &[SMALL_MLP, &["data.kind=idx", "job.data_shards=4", "job.steps=4000", "checkpoint.every_steps=500"]];
    let run = Run::new(small);
    let file = |folder: &str| run.beside(folder).join("digits-idx3-ubyte");
    let path = |folder: &str| format!("data.path={}", file(folder).display());
    write_idx(&file("a"), 251);
    let coordinator = run.start_with(&[set(&[&path("a")]), vec!["--workers", "2"]].concat());
    run.wait_for("checkpoint", |_| true);
    coordinator.signal(Signal::SIGKILL);
    coordinator.wait();
    fs::rename(run.beside("a"), run.beside("b")).unwrap();
    let ended = run.start_with(&[set(&[&path("b")]), vec!["--workers", "2"]].concat()).wait();
    assert_says(&ended, 0, &["is complete"]);
    let job = fs::read_to_string(run.path("job.toml")).unwrap();
    assert!(job.contains(&file("b").display().to_string()), "{job}");
    let whole = Run::new(small);
    assert_says(&whole.start_with(&set(&[&path("b")])).wait(), 0, &["is complete"]);
    Reference::new("a run whose data stayed", whole.digest()).equals("one whose data moved", &run.digest());
    run.assert_audited();
}

#[test]
fn networks_and_initial_weights_may_move_too() {
    let before = Run::new(&[&["model.kind=script", "model.latent_dim=8"]]);
    let networks = Path::new(env!("CARGO_MANIFEST_DIR")).join("networks");
    let [g, d] = ["G.pt", "D.pt"].map(|name| networks.join(name));
    let places = |g: &Path, d: &Path| {
        [("generator", g), ("discriminator", d)].map(|(key, file)| format!("model.{key}={}", file.display()))
    };
    let [g, d] = [g, d].map(|file| {
        let copy = before.beside(&format!("old-{}", file.file_name().unwrap().display()));
        fs::copy(file, &copy).unwrap();
        copy
    });
    let given = places(&g, &d);
    let more = ["job.data_shards=2", "job.shard_batch=2"];
    let start = |run: &Run, given: &[String; 2], more: &[&str]| {
        run.start_with(&[set(&[&given[0], &given[1]]), set(more)].concat()).wait()
    };
    let (short, long) = ([&more[..], &["job.steps=2"]].concat(), [&more[..], &["job.steps=4"]].concat());
    assert_says(&start(&before, &given, &short), 0, &["is complete"]);
    let whole = Run::new(&[&["model.kind=script", "model.latent_dim=8"]]);
    assert_says(&start(&whole, &given, &long), 0, &["is complete"]);
    let [new_g, new_d] = [&g, &d].map(|file| file.with_extension("moved.pt"));
    fs::rename(&g, &new_g).unwrap();
    fs::rename(&d, &new_d).unwrap();
    let moved = places(&new_g, &new_d);
    assert_says(&start(&before, &moved, &long), 0, &["is complete"]);
    Reference::new("networks that stayed", whole.digest()).equals("networks that moved", &before.digest());

    // Initial weights from that run, which moves.
    let first = before.newest_checkpoint();
    let run = Run::new(&[&["model.kind=script", "model.latent_dim=8"]]);
    let from = |folder: &Path| format!("model.init_from={}", folder.display());
    assert_says(&start(&run, &moved, &[&short[..], &[&from(&first)]].concat()), 0, &["is complete"]);
    let elsewhere = before.beside("weights");
    fs::rename(&first, &elsewhere).unwrap();
    let from = from(&elsewhere);
    assert_says(&start(&run, &moved, &[&long[..], &[&from]].concat()), 0, &["is complete"]);
    run.assert_audited();
}
