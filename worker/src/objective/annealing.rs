//! Hyperparameters that change with the samples seen: the formulas, for any objective.

use ganglion_proto::job::{EmaSchedule, Job};

/// Interpolates from the first to the last value along half a cosine over `over` samples, of which `seen` are
/// seen: Huang et al. (2024) and the released training loop.
pub(super) fn between(first: f64, last: f64, seen: u64, over: u64) -> f64 {
    // Exactly the value, without the rounding of the formula.
    if over == 0 || first == last {
        return first;
    }
    // Exactly the last value from there on.
    if seen >= over {
        return last;
    }
    // Counts of samples are far below 2^53, so these conversions are exact.
    #[allow(clippy::cast_precision_loss)]
    let passed = seen as f64 / over as f64;
    // Not the C library's, whose last bits differ between machines.
    last + (first - last) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * passed))
}

/// The half-life of a moving average grows with the run up to its full value: Karras et al., StyleGAN2-ADA
/// (2020) and its released training loop, where it is at most this share of the samples seen.
const RAMP_UP: f64 = 0.05;

/// Half-life of a moving average after `seen` samples, which grows up to `full`.
pub(super) fn ramped_up(full: f64, seen: f64) -> f64 {
    full.min(seen * RAMP_UP)
}

/// Share of an average that stays in an update which shows `batch` samples, for a half-life in samples.
pub(super) fn decay(batch: f64, half_life: f64) -> f64 {
    // At the start nothing stays: the average follows at once.
    if half_life <= 0.0 { 0.0 } else { libm::exp2(-batch / half_life) }
}

/// Half-life of a job's moving averages, in images, after `seen` real images, of which the weights were trained
/// for `trained`.
pub(super) fn half_life(job: &Job, seen: u64, trained: u64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // exact, as above
    let (trained, full) = (trained as f64, job.model.ema_half_life_images as f64);
    match job.model.ema_schedule {
        EmaSchedule::RampUp => ramped_up(full, trained),
        EmaSchedule::Cosine => between(0.0, full, seen, job.optimizer.decay_images),
    }
}

/// Share of a job's moving averages that stays in an update, which is of one step.
pub(super) fn average_decay(job: &Job, seen: u64, trained: u64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // exact, as above
    let batch = job.global_batch() as f64;
    decay(batch, half_life(job, seen, trained))
}
