//! Hyperparameters that change with the samples seen: the formulas, for any objective.

use ganglion_proto::job::{Decay, EmaSchedule, Job, Optimizer, PhaseOptimizer};

/// Schedule of hyperparameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// Samples over which the learning rate rises.
    warmup: u64,
    /// Samples over which hyperparameters move to their final values; 0 if none does.
    over: u64,
    shape: Decay,
    /// Samples of a step.
    per_step: u64,
}

impl Schedule {
    /// The schedule of a phase: that of its `own` settings, else of those that all `shared` ones have.
    pub(super) fn new(own: &PhaseOptimizer, shared: &Optimizer, per_step: u64) -> Schedule {
        let (own, over, shared) =
            (&own.options, own.decay_images.unwrap_or(shared.decay_images), &shared.options);
        Schedule {
            warmup: own.warmup_images.or(shared.warmup_images).unwrap_or(0),
            over,
            shape: own.decay.or(shared.decay).unwrap_or_default(),
            per_step,
        }
    }

    /// The schedule of hyperparameters beside optimizers.
    pub(super) fn of_all(shared: &Optimizer, per_step: u64) -> Schedule {
        Schedule::new(&shared.of_all(), shared, per_step)
    }

    /// A hyperparameter after `seen` samples.
    pub(super) fn between(&self, first: f64, last: f64, seen: u64) -> f64 {
        between(self.shape, first, last, seen, self.over)
    }

    /// A learning rate after `seen` samples: it rises linearly from one step's share of the warm-up (Goyal et
    /// al., 2017, section 2.2), then moves to its final value.
    pub(super) fn rate(&self, first: f64, last: f64, seen: u64) -> f64 {
        // That of the step to come, so that the first step moves and the last of the warm-up has all of it.
        let risen = seen.saturating_add(self.per_step);
        if risen < self.warmup {
            return first * share(risen, self.warmup);
        }
        let [seen, over] = [seen, self.over].map(|samples| samples.saturating_sub(self.warmup));
        between(self.shape, first, last, seen, over)
    }

    /// Samples seen at which a value that changes over a run differs at least once.
    pub(super) fn turns(&self) -> [u64; 3] {
        [0, self.warmup, u64::MAX]
    }
}

/// Moves from the first to the last value over `over` samples, of which `seen` are seen: along half a cosine
/// (Loshchilov and Hutter, 2017, equation 5, without restarts; Huang et al., 2024), or a line.
fn between(shape: Decay, first: f64, last: f64, seen: u64, over: u64) -> f64 {
    // Exactly the value, without the rounding of the formula.
    if over == 0 || first == last {
        return first;
    }
    // Exactly the last value from there on.
    if seen >= over {
        return last;
    }
    let passed = share(seen, over);
    match shape {
        // Not the C library's, whose last bits differ between machines.
        Decay::Cosine => last + (first - last) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * passed)),
        Decay::Linear => last + (first - last) * (1.0 - passed),
    }
}

fn share(seen: u64, of: u64) -> f64 {
    // Counts of samples are far below 2^53, so these conversions are exact.
    #[allow(clippy::cast_precision_loss)]
    let (seen, of) = (seen as f64, of as f64);
    seen / of
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
        EmaSchedule::Cosine => between(Decay::Cosine, 0.0, full, seen, job.optimizer.decay_images),
    }
}

/// Share of a job's moving averages that stays in an update, which is of one step.
pub(super) fn average_decay(job: &Job, seen: u64, trained: u64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // exact, as above
    let batch = job.global_batch() as f64;
    decay(batch, half_life(job, seen, trained))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PI: f64 = std::f64::consts::PI;

    fn schedule(warmup: u64, over: u64, shape: Decay) -> Schedule {
        Schedule { warmup, over, shape, per_step: 64 }
    }

    /// The closed forms, for ten steps of warm-up and a decay that ends after fifty, from 0.3 to 0.1.
    #[test]
    fn a_rate_rises_and_then_falls_as_its_closed_form() {
        for step in 0..70_u32 {
            let at = f64::from(step);
            let passed = ((at - 10.0) / 40.0).clamp(0.0, 1.0);
            let risen = ((at + 1.0) / 10.0).min(1.0);
            let seen = u64::from(step) * 64;
            for (shape, left) in
                [(Decay::Cosine, 0.5 * (1.0 + (PI * passed).cos())), (Decay::Linear, 1.0 - passed)]
            {
                let rate = schedule(640, 3200, shape).rate(0.3, 0.1, seen);
                let wanted = risen * (0.1 + 0.2 * left);
                assert!((rate - wanted).abs() < 1e-12, "step {step}, {shape}: {rate} and {wanted}");
            }
            let (rate, wanted) = (schedule(640, 0, Decay::Cosine).rate(0.3, 0.3, seen), 0.3 * risen);
            assert!((rate - wanted).abs() < 1e-12, "step {step} without a decay: {rate} and {wanted}");
            // Neither bends what has no warm-up: as before there was one.
            let plain = schedule(0, 3200, Decay::Cosine);
            assert_eq!(plain.rate(0.3, 0.1, seen).to_bits(), plain.between(0.3, 0.1, seen).to_bits());
        }
    }

    #[test]
    fn a_value_ends_exactly_and_a_warm_up_of_part_of_a_step_is_none() {
        for shape in [Decay::Cosine, Decay::Linear] {
            assert_eq!(schedule(100, 6400, shape).rate(0.3, 0.1, 6400), 0.1);
            assert_eq!(schedule(0, 6400, shape).between(0.9, 0.7, u64::MAX), 0.7);
            assert_eq!(schedule(64, 0, shape).rate(0.3, 0.3, 0), 0.3);
        }
        assert_eq!(schedule(0, 6400, Decay::Linear).between(0.9, 0.7, 3200), 0.8);
    }
}
