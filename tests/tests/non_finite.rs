//! Phases that are not finite: skipped on any number of workers alike, or the end of the run.
#![allow(clippy::unwrap_used)] // a test may panic

use ganglion_tests::{Run, SMALL_MLP};

/// Without a second moment's memory and with a huge rate, a gradient that vanishes throws the weights out of
/// range within a few steps, and nothing is finite from there on.
const EXPLODING: &[&str] = &[
    "optimizer.learning_rate=10",
    "optimizer.beta2=0",
    "optimizer.epsilon=1e-16",
    "job.data_shards=4",
    "metrics.every_steps=1",
    "sample.every_steps=0",
];

fn exploding(settings: &[&str]) -> Run {
    Run::new(&[SMALL_MLP, EXPLODING, settings])
}

/// Skipped update indexes, in the order of the coordinator's events.
fn skipped(run: &Run) -> Vec<u64> {
    let events = run.events().into_iter().filter(|event| event["kind"] == "phase_skipped");
    events.map(|event| event["position"].as_u64().unwrap()).collect()
}

/// First non-finite phase; its number depends on the machine's arithmetic.
fn first_skipped(run: &Run) -> u64 {
    let first = skipped(run)[0];
    assert!((2..20).contains(&first), "the job explodes at position {first}");
    first
}

#[test]
fn skips_have_the_same_bits_on_1_and_3_workers_and_are_told_once() {
    let (one, three) = (exploding(&["job.steps=20"]), exploding(&["job.steps=20"]));
    assert_eq!(one.complete(1), three.complete(3), "3 workers differ from 1");
    for run in [&one, &three] {
        let first = first_skipped(run);
        assert_eq!(skipped(run), (first..40).collect::<Vec<u64>>());
        let event = run.wait_for("phase_skipped", |_| true);
        assert_eq!(event["step"], first / 2 + 1);
        assert!(
            event["reason"].as_str().unwrap().ends_with(&format!("step {} is not finite", first / 2 + 1))
        );
        for row in run.rows() {
            let end = 2 * row["step"].as_u64().unwrap();
            assert_eq!(row.get("skipped").and_then(|n| n.as_u64()).unwrap_or(0), end.saturating_sub(first));
        }
    }
}

/// The count of skips is in the checkpoint and reaches all members, so it continues.
#[test]
fn more_than_100_skips_in_a_row_end_the_run_also_across_a_resume() {
    for (before, after) in [(1, 3), (3, 1)] {
        let mut run = exploding(&["job.steps=20"]);
        let digest = run.complete(before);
        run.set("job.steps=1000");
        let ended = run.start(after).wait();
        assert_eq!(ended.code, Some(1), "{}", ended.output);
        let last = first_skipped(&run) + 100;
        let message = format!("gradient of step {} is not finite, as in 100 phases before it", last / 2 + 1);
        assert!(ended.output.contains(&message), "{message:?} is not in:\n{}", ended.output);
        assert_eq!(skipped(&run).last(), Some(&(last - 1)));
        assert_eq!(run.digest(), digest, "the checkpoint before it is intact");
    }
}

/// Each non-finite phase rolls all members back to the start once; then it may be skipped.
#[test]
fn rolling_back_comes_to_the_same_bits_as_skipping() {
    let reference = exploding(&["job.steps=10"]);
    let digest = reference.complete(1);
    for workers in [1, 3] {
        let run = exploding(&["job.steps=10", "job.non_finite=roll-back"]);
        assert_eq!(run.complete(workers), digest, "{workers} workers");
        let allowed = run.events().into_iter().filter(|event| event["kind"] == "skip_allowed");
        let allowed: Vec<u64> = allowed.map(|event| event["position"].as_u64().unwrap()).collect();
        assert_eq!(allowed, skipped(&reference));
        run.assert_audited();
    }
}

#[test]
fn a_run_that_shall_stop_says_why_and_stops_there_again() {
    let probe = exploding(&["job.steps=20"]);
    probe.complete(1);
    let step = first_skipped(&probe) / 2 + 1;
    let steps_before = format!("job.steps={}", step - 1);
    let mut run = exploding(&["job.non_finite=stop", &steps_before]);
    let digest = run.complete(2);
    run.set("job.steps=1000");
    for workers in [3, 1] {
        let ended = run.start(workers).wait();
        assert_eq!(ended.code, Some(1), "{}", ended.output);
        let message = format!("gradient of step {step} is not finite, and job.non_finite is \"stop\"");
        assert!(ended.output.contains(&message), "{message:?} is not in:\n{}", ended.output);
        assert_eq!(run.digest(), digest, "the checkpoint before it is intact");
    }
    let fault = run.wait_for("fault", |_| true);
    assert_eq!(fault["fault"], "non_finite");
    run.set("job.non_finite=skip");
    let refused = run.start(1).wait();
    assert_eq!(refused.code, Some(2), "{}", refused.output);
    assert!(
        refused.output.contains("job.non_finite: the run was started with \"stop\""),
        "{}",
        refused.output
    );
}
