//! Phases that are not finite: the judged values, the policies, and the state after a skip.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::{Bench, job};
use ganglion_membership::Position;
use ganglion_proto::job::{LossKind, ModelKind, NonFinite as Policy};
use ganglion_worker::checkpoint::{Snapshot, state_digest};
use ganglion_worker::engine::commit::{commit, skip};
use ganglion_worker::engine::finite::{LIMIT, NonFinite, Rules, Verdict, judge};
use ganglion_worker::nn::tensor_bytes::to_bytes;
use ganglion_worker::objective::gan::{DISCRIMINATOR, GENERATOR};
use ganglion_worker::objective::{GradLayout, NetworkId, Objective, Phase, ScalarRole};
use tch::{Device, Kind, Tensor};

/// With batch normalisation, so that a shard gradient has buffer updates.
fn bench(policy: Policy) -> Bench {
    let mut job = job(ModelKind::Dcgan28, LossKind::NonSaturating);
    job.job.non_finite = policy;
    Bench::new(job)
}

/// Shard gradient with `value` at one place.
fn leaf(layout: &GradLayout, at: usize, value: f32) -> Tensor {
    let mut leaf = vec![0.5_f32; layout.len()];
    leaf[at] = value;
    Tensor::from_slice(&leaf)
}

fn of(network: NetworkId, bench: &Bench) -> Phase {
    bench.gan.phases().into_iter().find(|phase| phase.updates.contains(network)).unwrap()
}

fn layout(network: NetworkId, bench: &Bench) -> &GradLayout {
    bench.model.gradient(of(network, bench))
}

fn verdict(
    bench: &Bench,
    network: NetworkId,
    mean: &Tensor,
    skips: &[Position],
) -> Result<Verdict, NonFinite> {
    let rules = Rules { policy: bench.job.job.non_finite, skips };
    match judge(rules, &bench.model, of(network, bench), bench.state.counters, mean).unwrap() {
        Verdict::End(fault) => Err(fault),
        verdict => Ok(verdict),
    }
}

/// The gradient, the buffer updates and the loss all count, at their first and last element. The
/// padding behind a shard gradient does not.
#[test]
fn every_part_of_a_leaf_is_judged_and_named() {
    let mut bench = bench(Policy::Skip);
    // The second discriminator phase of step 8.
    bench.state.counters.position = Position(22);
    for (network, whose) in [(GENERATOR, "generator"), (DISCRIMINATOR, "discriminator")] {
        let layout = layout(network, &bench);
        let gradient = layout.gradient();
        let (first, last) = (layout.statistics().next().unwrap(), layout.statistics().last().unwrap());
        for (at, part) in [
            (gradient.start, "gradient of step 8 is"),
            (gradient.end - 1, "gradient of step 8 is"),
            (first.start, "batch statistics of step 8 are"),
            (last.end - 1, "batch statistics of step 8 are"),
            (layout.losses().start, "loss of step 8 is"),
        ] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let found = verdict(&bench, network, &leaf(layout, at, value), &[]).unwrap();
                assert_eq!(found, Verdict::Skip(format!("the {whose}'s {part} not finite")));
            }
            let largest = leaf(layout, at, f32::MAX);
            assert_eq!(verdict(&bench, network, &largest, &[]), Ok(Verdict::Commit));
        }
        let behind = Tensor::full([16], f64::NAN, (Kind::Float, Device::Cpu));
        let roomy = Tensor::cat(&[leaf(layout, 0, 1.0), behind], 0);
        assert_eq!(verdict(&bench, network, &roomy, &[]), Ok(Verdict::Commit));
        // Scores are diagnostic only: a non-finite one decides nothing.
        for (at, scalar) in layout.scalar_range().zip(layout.scalars()) {
            let found = verdict(&bench, network, &leaf(layout, at, f32::NAN), &[]);
            assert_eq!(found == Ok(Verdict::Commit), scalar.role != ScalarRole::Loss, "{scalar:?}");
        }
    }
}

#[test]
fn each_policy_has_its_verdict() {
    let judged = |policy, at, skips: &[Position]| {
        let mut bench = bench(policy);
        bench.state.counters.position = Position(at);
        let mean = leaf(layout(GENERATOR, &bench), 0, f32::NAN);
        verdict(&bench, GENERATOR, &mean, skips)
    };
    assert!(matches!(judged(Policy::Skip, 5, &[]), Ok(Verdict::Skip(_))));
    let stopped = judged(Policy::Stop, 5, &[Position(5)]).unwrap_err();
    assert!(stopped.stop && stopped.position == Position(5), "{stopped:?}");
    assert!(stopped.detail.contains("gradient of step 2 is not finite, and job.non_finite is \"stop\""));
    let rolled_back = judged(Policy::RollBack, 5, &[Position(4), Position(6)]).unwrap_err();
    assert!(!rolled_back.stop && rolled_back.position == Position(5), "{rolled_back:?}");
    assert!(matches!(judged(Policy::RollBack, 5, &[Position(4), Position(5)]), Ok(Verdict::Skip(_))));
}

/// Module invariant 3: an update that once failed is committed if it is finite the second time.
#[test]
fn a_finite_phase_is_committed_even_where_a_skip_is_allowed() {
    let bench = bench(Policy::RollBack);
    let finite = leaf(layout(GENERATOR, &bench), 0, 1.0);
    assert_eq!(verdict(&bench, GENERATOR, &finite, &[Position(0)]), Ok(Verdict::Commit));
}

#[test]
fn too_many_skips_in_a_row_end_the_run() {
    for (policy, skips) in [(Policy::Skip, &[][..]), (Policy::RollBack, &[Position(0)])] {
        let mut bench = bench(policy);
        let phase = layout(DISCRIMINATOR, &bench).clone();
        let mean = leaf(&phase, phase.losses().start, f32::INFINITY);
        bench.state.counters.skipped = LIMIT - 1;
        assert!(matches!(verdict(&bench, DISCRIMINATOR, &mean, skips), Ok(Verdict::Skip(_))));
        bench.state.counters.skipped = LIMIT;
        let fault = verdict(&bench, DISCRIMINATOR, &mean, skips).unwrap_err();
        assert!(fault.stop && fault.detail.contains("as in 100 phases before it"), "{fault:?}");
        assert_eq!(verdict(&bench, DISCRIMINATOR, &leaf(&phase, 0, 0.0), skips), Ok(Verdict::Commit));
    }
}

/// The average moves after the generator's phase; all else of the buffer keeps its bits.
#[test]
fn a_skip_leaves_parameters_moments_and_statistics_alone() {
    let mut bench = bench(Policy::Skip);
    // So that the average differs from the generator, and the moments from zero.
    for phase in bench.gan.phases() {
        let mean = leaf(bench.model.gradient(phase), 0, 2.0);
        commit(&bench.model, &mut bench.state, phase, &mean, 5).unwrap();
    }
    let average = bench.model.layout.network(GENERATOR).average_range().unwrap().start;
    for (skips, network) in [(1, DISCRIMINATOR), (2, GENERATOR)] {
        let (before, counters) = (to_bytes(&bench.state.flat), bench.state.counters);
        let phase = of(network, &bench);
        let mean = leaf(bench.model.gradient(phase), 0, f32::NAN);
        skip(&bench.model, &mut bench.state, phase, &mean, 7).unwrap();
        let after = to_bytes(&bench.state.flat);
        assert!(before[..4 * average] == after[..4 * average], "{network:?}");
        let average_moved = before[4 * average..] != after[4 * average..];
        assert_eq!(average_moved, network == GENERATOR);
        assert_eq!(bench.state.counters.position.0, counters.position.0 + 1);
        assert_eq!(bench.state.counters.ledger, counters.ledger + 7);
        assert_eq!(bench.state.counters.skipped, skips);
    }
}

#[test]
fn a_commit_ends_a_row_of_skips() {
    let mut bench = bench(Policy::Skip);
    let phase = of(DISCRIMINATOR, &bench);
    let odd = leaf(bench.model.gradient(phase), 0, f32::NAN);
    for _ in 0..2 {
        skip(&bench.model, &mut bench.state, phase, &odd, 0).unwrap();
    }
    let mean = leaf(bench.model.gradient(phase), 0, 1.0);
    commit(&bench.model, &mut bench.state, phase, &mean, 0).unwrap();
    assert_eq!((bench.state.counters.skipped, bench.state.counters.position.0), (0, 3));
}

#[test]
fn the_count_of_skips_is_part_of_the_digest() {
    let bench = bench(Policy::Skip);
    let flat = to_bytes(&bench.state.flat).into();
    let mut snapshot = Snapshot::whole((0, 0), flat, bench.state.counters);
    let digest = state_digest(&bench.model.layout, &snapshot);
    snapshot.counters.skipped = 1;
    assert_ne!(state_digest(&bench.model.layout, &snapshot), digest);
}
