//! Committing a phase: the only writer of state while a run trains.
//!
//! 1. `commit` is a function of (objective, state, phase, reduced gradient, sample checksum); it draws
//!    nothing and reads no clock.
//! 2. The optimizer's calls cover one whole network, or its tensors that decay and those that do not, whatever
//!    the number of workers. So does the norm by which a gradient is clipped: that of the reduced gradient, which
//!    all ranks hold.
//! 3. `pass` is a commit that changes no network, in a step in which a phase does not run. Only the update
//!    index and, at the end of a step, moving averages go on.
//! 4. `skip` is a commit: a function of (objective, state, phase, sample checksum). It leaves parameters,
//!    moments and running statistics as they are; update index, sample checksum and moving averages go on,
//!    and so do the count by which Adam corrects its bias, and schedules.

use c10d::aten::{Step, fused_adam, fused_sgd, norm};
use tch::{Tensor, no_grad};

use crate::nn::Follow;
use crate::objective::{GradLayout, Model, NetworkId, Phase, Rule};
use crate::state::{State, narrow};

/// Applies the reduced gradient of `phase` to the state. `ledger` is the sample checksum of the real
/// samples in it. A gradient that is too long is scaled down in place, and its norm written to its place.
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
    let optimizer = model.objective.optimizer(phase, steps);
    let norm = measure(layout, mean)?;
    let excess = norm.zip(optimizer.clip_norm).map(|(norm, clip)| norm / clip).filter(|excess| *excess > 1.0);
    #[allow(clippy::cast_possible_truncation)] // rounded, as the gradient is
    let divisor = excess.map(|excess| excess as f32);
    for (network, gradient) in layout.networks() {
        let of_network = narrow(mean, gradient.clone());
        let applied = Applied { rule: optimizer.rule, count: updates(*network), divisor };
        update(state, *network, &of_network, applied)?;
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

/// Computes the norm of a reduced gradient that may be clipped, over all its networks, and writes it to its place.
fn measure(layout: &GradLayout, mean: &Tensor) -> Result<Option<f64>, c10d::Error> {
    let Some(place) = layout.norm() else { return Ok(None) };
    let norm = norm(&narrow(mean, layout.gradient()))?;
    let _ = no_grad(|| narrow(mean, place..place + 1).fill_(norm));
    Ok(Some(norm))
}

/// Application of an update rule.
#[derive(Clone, Copy)]
struct Applied {
    rule: Rule,
    /// Number of the network's update, from 1.
    count: u64,
    /// Number that the gradient is divided by.
    divisor: Option<f32>,
}

/// Updates the parameters of a network by its gradient.
fn update(
    state: &State,
    network: NetworkId,
    grads: &Tensor,
    Applied { rule, count, divisor }: Applied,
) -> Result<(), c10d::Error> {
    let sections = state.layout.network(network);
    let moment = |index| state.section(sections.moment_range(index));
    // A shallow clone shares the storage and its version counter, so autograd sees that the parameters change.
    let mut params = state.parameters(network).shallow_clone();
    let mut apply = |rule: Rule, ranges: Option<&[_]>| {
        let step = Step { ranges, divisor, ..Step::whole(&mut params, grads) };
        match rule {
            Rule::Adam(adam) => fused_adam(step, [&mut moment(0), &mut moment(1)], count, adam),
            Rule::Sgd(sgd) if sgd.momentum == 0.0 => fused_sgd(step, None, sgd),
            Rule::Sgd(sgd) => fused_sgd(step, Some(&mut moment(0)), sgd),
        }
    };
    if rule.weight_decay() == 0.0 {
        return apply(rule, None);
    }
    // A call for each rate of decay, which covers the same ranges for any number of workers.
    for (rule, decays) in [(rule, true), (rule.without_decay(), false)] {
        let ranges = sections.parameters.by_decay(decays);
        if !ranges.is_empty() {
            apply(rule, Some(&ranges))?;
        }
    }
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

/// Commits `phase` without its reduced gradient, which was not finite. Its norm is written to its place, as by a
/// commit.
pub fn skip(
    model: &Model,
    state: &mut State,
    phase: Phase,
    mean: &Tensor,
    ledger: u64,
) -> Result<(), c10d::Error> {
    measure(model.gradient(phase), mean)?;
    state.counters.skipped += 1;
    go_on(model, state, phase, ledger);
    Ok(())
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
