//! Committing a phase: the only writer of state while a run trains.
//!
//! 1. `commit` is a function of (job, state, phase, reduced gradient, sample checksum); it draws nothing
//!    and reads no clock.
//! 2. Every optimizer call covers one whole module, whatever the number of workers.
//! 3. `skip` is a commit: a function of (job, state, phase, sample checksum). It leaves parameters, moments
//!    and running statistics as they are; update index, sample checksum and moving average go on, and so
//!    does the count by which Adam corrects its bias.

use c10d::aten::{Adam, fused_adam};
use ganglion_proto::job::Job;
use tch::{Tensor, no_grad};

use crate::nn::Follow;
use crate::objective::gan::augment;
use crate::objective::gan::schedule::Schedule;
use crate::objective::{GradLayout, Phase};
use crate::state::{Module, State, narrow};

/// Applies the reduced gradient of `phase` to the state. `ledger` is the sample checksum of the real
/// samples in it.
pub fn commit(
    job: &Job,
    state: &mut State,
    phase: Phase,
    layout: &GradLayout,
    mean: &Tensor,
    ledger: u64,
) -> Result<(), c10d::Error> {
    update_parameters(job, state, phase.module, &narrow(mean, layout.gradient()))?;
    state.cast_module(phase.module);
    no_grad(|| {
        for statistics in layout.statistics() {
            follow(state, phase.module, &narrow(mean, statistics));
        }
    });
    if phase.module == Module::Discriminator {
        augment::adjust(job, state, &narrow(mean, layout.signs()), discriminator_updates(job, state) + 1);
    }
    state.counters.skipped = 0;
    go_on(job, state, phase, ledger);
    Ok(())
}

/// Applies the buffer updates of one pass, means over all shards, to a module's buffers.
fn follow(state: &State, module: Module, statistics: &Tensor) {
    let sections = state.layout.module(module);
    let buffers = state.section(sections.buffer_range());
    for (range, follow) in sections.buffers.follows() {
        let (mut held, new) = (narrow(&buffers, range.clone()), narrow(statistics, range));
        let _ = match follow {
            Follow::Towards(momentum) => held.lerp_(&new, momentum),
            Follow::By => held.g_add_(&new),
        };
    }
}

/// Commits `phase` without its reduced gradient, which was not finite.
pub fn skip(job: &Job, state: &mut State, phase: Phase, ledger: u64) {
    state.counters.skipped += 1;
    go_on(job, state, phase, ledger);
}

/// Common end of every commit: moving average, update index, sample checksum.
fn go_on(job: &Job, state: &mut State, phase: Phase, ledger: u64) {
    if phase.module == Module::Generator {
        no_grad(|| update_average(job, state));
    }
    state.counters.position.0 += 1;
    state.counters.ledger = state.counters.ledger.wrapping_add(ledger);
}

fn update_parameters(job: &Job, state: &State, module: Module, gradient: &Tensor) -> Result<(), c10d::Error> {
    let sections = state.layout.module(module);
    let optimizer = &job.optimizer;
    let steps_before = state.counters.position.0 / job.phases_per_step();
    let schedule = Schedule::after(job, steps_before);
    let (lr, updates_before) = match module {
        Module::Generator => (schedule.generator_rate(), steps_before),
        Module::Discriminator => (schedule.discriminator_rate(), discriminator_updates(job, state)),
    };
    let adam = Adam { lr, beta1: optimizer.beta1, beta2: schedule.beta2(), eps: optimizer.epsilon };
    fused_adam(
        // A shallow clone shares the storage and its version counter, so autograd sees that the parameters
        // change.
        &mut state.parameters(module).shallow_clone(),
        gradient,
        &mut state.section(sections.exp_avg_range()),
        &mut state.section(sections.exp_avg_sq_range()),
        updates_before + 1,
        adam,
    )
}

/// Number of discriminator updates before a phase of its own.
fn discriminator_updates(job: &Job, state: &State) -> u64 {
    let position = state.counters.position.0;
    let steps_before = position / job.phases_per_step();
    steps_before * u64::from(job.loss.discriminator_steps) + position % job.phases_per_step()
}

fn update_average(job: &Job, state: &State) {
    let steps = state.counters.position.0 / job.phases_per_step() + 1;
    let mut average = state.section(state.layout.ema_range());
    let generator = state.section(state.layout.generator.weight_range());
    let _ = average.lerp_(&generator, 1.0 - Schedule::after(job, steps).average_decay());
}
