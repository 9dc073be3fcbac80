//! Hyperparameters that change with the images seen.
//!
//! A value is a function of the job and of the steps done, so all ranks have the same at an update index,
//! at any time and in any group. It stays the same within a step.

use ganglion_proto::job::Job;

use crate::objective::annealing;

/// Name of the probability of augmentation, whether a schedule or the adaptive controller moves it.
pub(crate) const AUGMENTATION: &str = "augmentation_probability";

/// Schedule of a job's hyperparameters at a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule<'a> {
    job: &'a Job,
    /// Number of real images seen before the step.
    images: u64,
}

/// Hyperparameter with a schedule.
type Scheduled = fn(&Schedule<'_>) -> f64;

/// All hyperparameters with a schedule, by the names that rows of metrics have for them.
const ALL: [(&str, Scheduled); 7] = [
    ("learning_rate_generator", |schedule| schedule.generator_rate()),
    ("learning_rate_discriminator", |schedule| schedule.discriminator_rate()),
    ("beta2", |schedule| schedule.beta2()),
    ("r1", |schedule| schedule.penalties()[0]),
    ("r2", |schedule| schedule.penalties()[1]),
    (AUGMENTATION, |schedule| schedule.augmentation()),
    ("ema_half_life_images", |schedule| schedule.half_life()),
];

impl<'a> Schedule<'a> {
    /// Returns the hyperparameters whose values change over a run of the job, by name.
    pub(crate) fn moving(job: &Job) -> impl Iterator<Item = (&'static str, Scheduled)> {
        let turns = Schedule { job, images: 0 }.annealing().turns().map(|images| Schedule { job, images });
        ALL.into_iter().filter(move |(_, value)| turns.iter().any(|turn| value(turn) != value(&turns[0])))
    }

    /// Returns the schedule after `steps` steps.
    pub(crate) fn after(job: &'a Job, steps: u64) -> Schedule<'a> {
        Schedule { job, images: steps.saturating_mul(job.samples_per_step()) }
    }

    fn annealing(&self) -> annealing::Schedule {
        annealing::Schedule::of_all(&self.job.optimizer, self.job.samples_per_step())
    }

    /// Interpolates from the first to the last value over `optimizer.decay_images`.
    pub(crate) fn between(&self, first: f64, last: f64) -> f64 {
        self.annealing().between(first, last, self.images)
    }

    /// Learning rate of the generator.
    fn generator_rate(&self) -> f64 {
        let optimizer = &self.job.optimizer;
        self.annealing().rate(optimizer.learning_rate, optimizer.final_learning_rate, self.images)
    }

    /// Learning rate of the discriminator.
    fn discriminator_rate(&self) -> f64 {
        let optimizer = &self.job.optimizer;
        let (first, last) =
            (optimizer.discriminator_learning_rate, optimizer.final_discriminator_learning_rate);
        self.annealing().rate(first, last, self.images)
    }

    /// Decay of Adam's second moment.
    fn beta2(&self) -> f64 {
        self.between(self.job.optimizer.beta2, self.job.optimizer.final_beta2)
    }

    /// Weights of R1 and R2, the penalties at real and at generated samples.
    pub(crate) fn penalties(&self) -> [f64; 2] {
        let loss = &self.job.loss;
        [self.between(loss.r1, loss.final_r1), self.between(loss.r2, loss.final_r2)]
    }

    /// Probability of each kind of augmentation.
    pub(crate) fn augmentation(&self) -> f64 {
        let augmentation = &self.job.augmentation;
        self.between(augmentation.probability, augmentation.final_probability)
    }

    /// Half-life of the moving average, in images that the generator is trained for.
    fn half_life(&self) -> f64 {
        annealing::half_life(self.job, self.images, self.trained())
    }

    /// Decay of the moving average: the share of the old value that stays in an update.
    pub(crate) fn average_decay(&self) -> f64 {
        annealing::average_decay(self.job, self.images, self.trained())
    }

    /// Images that the generator has been trained for: one global batch a step.
    fn trained(&self) -> u64 {
        self.images / u64::from(self.job.loss.discriminator_steps)
    }
}
