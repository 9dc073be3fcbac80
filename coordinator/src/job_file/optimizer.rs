//! Sections `[optimizer]` and `[optimizer.PHASE]`: update rules, clipping and schedules.
//!
//! 1. A setting that means nothing to the update rule is refused, not passed over.
//! 2. Lengths may be given in steps. A job has them in images, which are exact in both: a step has the same number
//!    of them all through a run.

use std::collections::BTreeMap;

use ganglion_proto::job::{
    CLIP_NORM, Family, Job, Length, LossKind, MOMENTUM, ModelKind, Optimizer, OptimizerKind,
    OptimizerOptions, WEIGHT_DECAY,
};

use super::sections::MAX_STEPS;
use super::settings::Settings;

/// Section of the settings of all phases.
const OF_ALL: &str = "optimizer";

pub(super) fn optimizer(settings: &mut Settings, loss: LossKind, model: ModelKind) -> Optimizer {
    // Gulrajani et al. (2017), algorithm 1; Huang et al. (2024), appendix; Miyato et al. (2018), setting C;
    // Radford et al. (2015), section 4.
    let (beta1, beta2) = match (loss, model) {
        // Kingma and Ba (2015), algorithm 1.
        (_, model) if model.family() != Family::Gan => (0.9, 0.999),
        (LossKind::WassersteinGp | LossKind::RelativisticPairing, _) => (0.0, 0.9),
        (_, ModelKind::Sngan32) => (0.0, 0.9),
        _ => (0.5, 0.999),
    };
    let rate = if matches!(model.family(), Family::Vae | Family::Transformer) { 1e-3 } else { 2e-4 };
    let is_package = model == ModelKind::Package;
    let kind = settings.choice_or("optimizer.kind", OptimizerKind::Adam);
    let learning_rate = settings.number_or("optimizer.learning_rate", 0.0..=10.0, rate);
    let of_discriminator =
        settings.number_or("optimizer.discriminator_learning_rate", 0.0..=10.0, learning_rate);
    let beta2 = settings.number_or("optimizer.beta2", 0.0..1.0, beta2);
    let last = if falls(settings, OF_ALL) { 0.0 } else { learning_rate };
    let last = settings.number_or("optimizer.final_learning_rate", 0.0..=10.0, last);
    // The discriminator's rate keeps its ratio to the generator's.
    let shared = if last == learning_rate || learning_rate == 0.0 { 1.0 } else { last / learning_rate };
    let optimizer = Optimizer {
        kind,
        learning_rate,
        discriminator_learning_rate: of_discriminator,
        beta1: settings.number_or("optimizer.beta1", 0.0..1.0, beta1),
        beta2,
        epsilon: settings.number_or("optimizer.epsilon", 1e-16..=1.0, 1e-8),
        decay_images: 0,
        final_learning_rate: last,
        final_discriminator_learning_rate: settings.number_or(
            "optimizer.final_discriminator_learning_rate",
            0.0..=10.0,
            of_discriminator * shared,
        ),
        final_beta2: settings.number_or("optimizer.final_beta2", 0.0..1.0, beta2),
        // All that is given: a package's phases may have other rules.
        options: options(settings, OF_ALL, if is_package { OptimizerKind::Sgd } else { kind }, None),
        phases: BTreeMap::new(),
    };
    if !is_package {
        refuse_others(settings, OF_ALL, &[kind]);
    }
    optimizer
}

/// Whether the settings of a table ask for a decay: then the learning rate falls to 0 unless they say otherwise.
pub(super) fn falls(settings: &Settings, table: &str) -> bool {
    settings.is_given(&format!("{table}.decay"))
}

/// Reads the settings of a table beside step sizes and Adam's, for a rule; `default` has those that a package brings.
pub(super) fn options(
    settings: &mut Settings,
    table: &str,
    kind: OptimizerKind,
    default: Option<OptimizerOptions>,
) -> OptimizerOptions {
    let default = default.unwrap_or_default();
    let key = |name: &str| format!("{table}.{name}");
    let weight_decay = settings.number(&key("weight_decay"), WEIGHT_DECAY, 0.01);
    let momentum = settings.number(&key("momentum"), MOMENTUM, 0.9);
    let nesterov = settings.flag(&key("nesterov"), true);
    let above_zero = (std::ops::Bound::Excluded(0.0), std::ops::Bound::Included(CLIP_NORM));
    let clip_norm = settings.number(&key("clip_norm"), above_zero, 1.0);
    let (weight_decay, momentum) = (weight_decay.or(default.weight_decay), momentum.or(default.momentum));
    let of_sgd = |is: bool| (kind == OptimizerKind::Sgd).then_some(is);
    OptimizerOptions {
        // Loshchilov and Hutter's code has no default; PyTorch's is 0.01 for AdamW, and 0 for SGD.
        weight_decay: match kind {
            OptimizerKind::Adam => None,
            OptimizerKind::Adamw => Some(weight_decay.unwrap_or(0.01)),
            OptimizerKind::Sgd => Some(weight_decay.unwrap_or(0.0)),
        },
        momentum: of_sgd(true).map(|_| momentum.unwrap_or(0.0)),
        nesterov: of_sgd(nesterov.or(default.nesterov).unwrap_or(false)),
        clip_norm: clip_norm.or(default.clip_norm),
        warmup_images: None,
        decay: settings.choice(&key("decay")),
    }
}

/// Refuses the settings of a table that mean nothing to any of these rules, and momenta that do not fit together.
pub(super) fn refuse_others(settings: &mut Settings, table: &str, kinds: &[OptimizerKind]) {
    use OptimizerKind::{Adam, Adamw, Sgd};
    let adams =
        "is a setting of \"adam\" and \"adamw\", and kind is \"sgd\"; remove it, or set momentum instead";
    let sgds = "is a setting of \"sgd\"; remove it: the momentum of \"adam\" and \"adamw\" is beta1";
    let all: [(&str, &[OptimizerKind], &str); 7] = [
        (
            "weight_decay",
            &[Adamw, Sgd],
            "is not for \"adam\", which would scale the decay like a gradient; set kind = \"adamw\", or remove it",
        ),
        ("momentum", &[Sgd], sgds),
        ("nesterov", &[Sgd], sgds),
        ("beta1", &[Adam, Adamw], adams),
        ("beta2", &[Adam, Adamw], adams),
        ("epsilon", &[Adam, Adamw], adams),
        ("final_beta2", &[Adam, Adamw], adams),
    ];
    if !settings.sound(&[&format!("{table}.kind")]) {
        return;
    }
    for (name, of, problem) in all {
        let key = format!("{table}.{name}");
        if settings.is_given(&key) && !kinds.iter().any(|kind| of.contains(kind)) {
            settings.refuse(&key, problem);
        }
    }
}

/// Reads the lengths of schedules, of `[optimizer]`, where the number of samples of a step is known.
pub(super) fn lengths(settings: &mut Settings, job: &mut Job) {
    let per_step = job.samples_per_step();
    job.optimizer.decay_images = length(settings, OF_ALL, "decay", per_step).unwrap_or(0);
    job.optimizer.options.warmup_images = length(settings, OF_ALL, "warmup", per_step);
}

/// Reads a length, in steps or in images.
pub(super) fn length(settings: &mut Settings, table: &str, of: &str, per_step: u64) -> Option<u64> {
    let [steps, images] = ["steps", "images"].map(|unit| format!("{table}.{of}_{unit}"));
    settings.override_either(&steps, &images);
    let in_steps = settings.whole(&steps, 0..=MAX_STEPS, 1000);
    let in_images = settings.whole(&images, 0..=MAX_STEPS, 64_000);
    if settings.is_given(&steps) && settings.is_given(&images) && settings.sound(&[&steps, &images]) {
        settings.fault(&steps, format!("given together with {images}; keep one of them"));
    }
    let samples = in_steps.map(|count| count.saturating_mul(per_step));
    if let Some(samples) = samples.filter(|samples| *samples > MAX_STEPS) {
        settings.fault(&steps, format!("is {samples} images, more than {MAX_STEPS}; choose fewer steps"));
    }
    samples.or(in_images)
}

/// Settings of a phase, and the tables that they may come from, the phase's own first.
struct Given<'a> {
    tables: Vec<String>,
    options: &'a OptimizerOptions,
    /// Images of the decay, and of the warm-up.
    over: u64,
    warmup: u64,
}

impl Given<'_> {
    /// The first of these settings that the user gave, in any of the tables.
    fn key(&self, settings: &Settings, names: &[&str]) -> Option<String> {
        let keys =
            names.iter().flat_map(|name| self.tables.iter().map(move |table| format!("{table}.{name}")));
        keys.into_iter().find(|key| settings.is_given(key))
    }

    fn check(&self, settings: &mut Settings) {
        let Given { options, over, warmup, .. } = *self;
        let mut fault = |names: &[&str], problem: &str| {
            let key = self.key(settings, names).filter(|key| settings.sound(&[key]));
            // Of several phases with one mistake in common the first shows it.
            if let Some(key) = key {
                settings.fault(&key, problem);
            }
        };
        if options.nesterov == Some(true) && options.momentum == Some(0.0) {
            let problem = "looks ahead along a momentum, and there is none; set momentum, for example 0.9";
            fault(&["nesterov", "momentum"], problem);
        }
        if over == 0 {
            fault(&["decay"], "needs a length; set decay_steps or decay_images beside it");
        } else if warmup >= over {
            let problem = format!(
                "the learning rate rises over {warmup} images, and is to have fallen after {over}; make the warm-up shorter \
                 than the decay, which includes it"
            );
            fault(&["warmup_steps", "warmup_images", "decay_steps", "decay_images"], &problem);
        }
    }
}

/// Checks the schedule and the options of all phases, or of each phase of a package.
pub(super) fn check(settings: &mut Settings, job: &Job) {
    let optimizer = &job.optimizer;
    let of_all = Given {
        tables: vec![OF_ALL.to_owned()],
        options: &optimizer.options,
        over: optimizer.decay_images,
        warmup: optimizer.options.warmup_images.unwrap_or(0),
    };
    let lengths = ["decay_steps", "decay_images", "warmup_steps", "warmup_images"];
    if !settings.sound(&lengths.map(|name| format!("{OF_ALL}.{name}")).each_ref().map(String::as_str)) {
        return;
    }
    if job.model.kind != ModelKind::Package {
        of_all.check(settings);
    }
    for (phase, own) in &optimizer.phases {
        let given = Given {
            tables: vec![format!("{OF_ALL}.{phase}"), OF_ALL.to_owned()],
            options: &own.options,
            over: own.decay_images.unwrap_or(of_all.over),
            warmup: own.options.warmup_images.unwrap_or(of_all.warmup),
        };
        given.check(settings);
    }
}

/// Warning for a run that ends before its learning rate has risen.
pub fn warmup_is_cut(job: &Job) -> Option<String> {
    // The length of epochs in steps is known once the data are.
    let Length::Steps(steps) = job.job.length else { return None };
    let own = job.optimizer.phases.values().map(|own| &own.options);
    let warmups = own.chain([&job.optimizer.options]).filter_map(|options| options.warmup_images);
    let (warmup, images) = (warmups.max()?, steps.saturating_mul(job.samples_per_step()));
    (warmup > images).then(|| {
        format!(
            "the learning rate rises over {warmup} images (warmup_steps or warmup_images in [optimizer]), and the run ends \
             after {images}"
        )
    })
}
