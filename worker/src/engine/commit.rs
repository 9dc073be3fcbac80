//! Committing a phase: the only writer of state while a run trains.
//!
//! 1. `commit` is a function of (objective, state, phase, reduced gradient, sample checksum); it draws
//!    nothing and reads no clock.
//! 2. Every optimizer call covers one whole network, whatever the number of workers.
//! 3. `pass` is a commit that changes no network, in a step in which a phase does not run. Only the update
//!    index and, at the end of a step, moving averages go on.
//! 4. `skip` is a commit: a function of (objective, state, phase, sample checksum). It leaves parameters,
//!    moments and running statistics as they are; update index, sample checksum and moving averages go on,
//!    and so does the count by which Adam corrects its bias.

use c10d::aten::fused_adam;
use tch::{Tensor, no_grad};

use crate::nn::Follow;
use crate::objective::{GradLayout, Model, NetworkId, Phase};
use crate::state::{State, narrow};

/// Applies the reduced gradient of `phase` to the state. `ledger` is the sample checksum of the real
/// samples in it.
pub fn commit(
    model: &Model,
    state: &mut State,
    phase: Phase,
    mean: &Tensor,
    ledger: u64,
) -> Result<(), c10d::Error> {
    let layout = model.gradient(phase);
    let steps = model.steps(state.counters.position);
    let updates = |network| model.updates_before(steps, phase, network) + 1;
    for (network, gradient) in layout.networks() {
        let sections = state.layout.network(*network);
        fused_adam(
            // A shallow clone shares the storage and its version counter, so autograd sees that the
            // parameters change.
            &mut state.parameters(*network).shallow_clone(),
            &narrow(mean, gradient.clone()),
            [&mut state.section(sections.exp_avg_range()), &mut state.section(sections.exp_avg_sq_range())],
            updates(*network),
            model.objective.optimizer(phase, steps),
        )?;
        state.cast_network(*network);
    }
    no_grad(|| {
        for statistics in layout.statistics() {
            follow(state, layout, &narrow(mean, statistics));
        }
        let scalars = narrow(mean, layout.scalar_range());
        model.objective.after_update(phase, phase.updates.first().map_or(0, updates), &scalars, state);
        model.keep_scalars(phase, &scalars, state);
    });
    state.counters.skipped = 0;
    go_on(model, state, phase, ledger);
    Ok(())
}

/// Applies the buffer updates of one pass, means over all shards.
fn follow(state: &State, layout: &GradLayout, statistics: &Tensor) {
    for run in layout.buffer_runs() {
        let buffers = state.section(state.layout.network(run.network).buffer_range());
        let (mut held, new) =
            (narrow(&buffers, run.buffers.clone()), narrow(statistics, run.updates.clone()));
        let _ = match run.follow {
            Follow::Towards(momentum) => held.lerp_(&new, momentum),
            Follow::By => held.g_add_(&new),
        };
    }
}

/// Commits `phase` without its reduced gradient, which was not finite.
pub fn skip(model: &Model, state: &mut State, phase: Phase, ledger: u64) {
    state.counters.skipped += 1;
    go_on(model, state, phase, ledger);
}

/// Commits `phase` in a step in which it does not run.
pub fn pass(model: &Model, state: &mut State, phase: Phase) {
    // The row of skipped phases neither ends nor grows: nothing was judged.
    go_on(model, state, phase, 0);
}

/// Common end of every commit: moving averages at the end of a step, update index, sample checksum.
fn go_on(model: &Model, state: &mut State, phase: Phase, ledger: u64) {
    if model.is_last(phase) {
        no_grad(|| update_averages(model, state));
    }
    state.counters.position.0 += 1;
    state.counters.ledger = state.counters.ledger.wrapping_add(ledger);
}

fn update_averages(model: &Model, state: &State) {
    let steps = model.steps(state.counters.position) + 1;
    for (network, sections) in (0..).map(NetworkId).zip(state.layout.networks()) {
        let Some(average) = sections.average_range() else { continue };
        let decay = model.objective.average_decay(network, steps);
        let _ = state.section(average).lerp_(&state.section(sections.weight_range()), 1.0 - decay);
    }
}
