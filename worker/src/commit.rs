//! Committing a phase: the only writer of state while a run trains.
//!
//! 1. `commit` is a function of (job, state, phase, reduced leaf, ledger); it draws nothing and reads no clock.
//! 2. Every optimizer call covers one whole module, whatever the number of workers.
//! 3. `skip` is a commit: a function of (job, state, phase, ledger). It leaves parameters, moments and running statistics
//!    as they are; position, ledger and moving average go on, and so does the count by which Adam corrects its bias.

use c10d::aten::{Adam, fused_adam};
use ganglion_proto::job::Job;
use tch::{Tensor, no_grad};

use crate::nn::Follow;
use crate::phase::{LeafLayout, Phase};
use crate::state::{Module, State, narrow};

/// The half-life of the moving average grows with the run up to the job's: Karras et al., StyleGAN2-ADA (2020) and its
/// released training loop, where it is at most this share of the images seen.
const EMA_RAMP_UP: f64 = 0.05;

/// Applies the mean leaf of `phase` to the state. `ledger` is the hash sum of the real samples in it.
pub fn commit(
    job: &Job,
    state: &mut State,
    phase: Phase,
    layout: &LeafLayout,
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
    state.counters.skipped = 0;
    go_on(job, state, phase, ledger);
    Ok(())
}

/// Lets a module's buffers follow what one pass of all leaves handed out, on the mean.
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

/// Commits `phase` without what it reduced to, which was not finite.
pub fn skip(job: &Job, state: &mut State, phase: Phase, ledger: u64) {
    state.counters.skipped += 1;
    go_on(job, state, phase, ledger);
}

/// What every commit ends with.
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
    let (lr, updates_before) = match module {
        Module::Generator => (optimizer.learning_rate, steps_before),
        Module::Discriminator => {
            let this_step = state.counters.position.0 % job.phases_per_step();
            let updates = steps_before * u64::from(job.loss.discriminator_steps) + this_step;
            (optimizer.discriminator_learning_rate, updates)
        }
    };
    let adam = Adam { lr, beta1: optimizer.beta1, beta2: optimizer.beta2, eps: optimizer.epsilon };
    fused_adam(
        // Autograd sees that these change.
        &mut state.parameters(module).shallow_clone(),
        gradient,
        &mut state.section(sections.exp_avg_range()),
        &mut state.section(sections.exp_avg_sq_range()),
        updates_before + 1,
        adam,
    )
}

fn update_average(job: &Job, state: &State) {
    let steps = state.counters.position.0 / job.phases_per_step() + 1;
    let mut average = state.section(state.layout.ema_range());
    let generator = state.section(state.layout.generator.weight_range());
    let _ = average.lerp_(&generator, 1.0 - average_decay(job, steps));
}

/// Share of the old average that stays after `steps` steps.
fn average_decay(job: &Job, steps: u64) -> f64 {
    // Counts of images are far below 2^53, so these conversions are exact.
    #[allow(clippy::cast_precision_loss)]
    let (batch, seen, half_life) = (
        job.global_batch() as f64,
        (steps * job.global_batch()) as f64,
        job.model.ema_half_life_images as f64,
    );
    let half_life = half_life.min(seen * EMA_RAMP_UP);
    if half_life <= 0.0 { 0.0 } else { libm::exp2(-batch / half_life) }
}
