//! Sections of the model and its training: `[model]`, `[loss]`, `[optimizer]` and `[augmentation]`.

use std::path::PathBuf;

use ganglion_proto::job::{
    Activation, Augmentation, EmaSchedule, Family, Job, Likelihood, Loss, LossKind, Model, ModelKind,
    Positions, TransformerSettings, VaeSettings,
};

use super::sections::{MAX_STEPS, address};
use super::settings::Settings;

pub(super) fn model(settings: &mut Settings, check_paths: bool) -> Model {
    let kind = settings.choice_or("model.kind", ModelKind::Mlp28);
    let [generator, discriminator] =
        ["model.generator", "model.discriminator"].map(|key| script(settings, kind, key, check_paths));
    let (latent_dim, width) = match kind {
        ModelKind::Mlp28 => (100, 256),
        ModelKind::Dcgan28 | ModelKind::Dcgan64 | ModelKind::Script | ModelKind::Package => (100, 64),
        // Miyato et al. (2018), table 4, with half of its features.
        ModelKind::Sngan32 => (128, 64),
        ModelKind::R3gan28 | ModelKind::R3gan32 => (64, 8),
        ModelKind::Vae28 | ModelKind::Vae32 => (32, 32),
        ModelKind::Transformer => (0, 128),
    };
    let path = super::package::path(settings, kind);
    let package_hash = settings.text("model.package_hash", "0a1b2c");
    let init_from = settings.text("model.init_from", "../runs/other/checkpoints/step-00020000");
    Model {
        kind,
        latent_dim: settings.whole_or("model.latent_dim", 1..=65_536, latent_dim),
        width: settings.whole_or("model.width", 1..=8192, width),
        ema_half_life_images: settings.whole_or("model.ema_half_life_images", 1..=MAX_STEPS, 10_000),
        ema_schedule: settings.choice_or("model.ema_schedule", EmaSchedule::RampUp),
        conditional: settings.flag_or("model.conditional", false),
        init_from: init_from.and_then(|place| address(settings, "model.init_from", place)),
        freeze_discriminator: settings.whole_or("model.freeze_discriminator", 0..=1000, 0),
        generator,
        discriminator,
        path,
        package_hash,
        vae: vae(settings).filter(|_| kind.family() == Family::Vae),
        transformer: transformer(settings).filter(|_| kind.family() == Family::Transformer),
    }
}

/// Settings of a VAE. They are taken in any job, so that their names are known.
fn vae(settings: &mut Settings) -> Option<VaeSettings> {
    Some(VaeSettings {
        likelihood: settings.choice_or("loss.likelihood", Likelihood::Bernoulli),
        beta: settings.number_or("loss.beta", 0.0..=1e6, 1.0),
        binarise: settings.flag_or("loss.binarise", false),
        importance_samples: settings.whole_or("evaluation.importance_samples", 1..=1_000_000, 100),
    })
}

/// Settings of a transformer.
fn transformer(settings: &mut Settings) -> Option<TransformerSettings> {
    Some(TransformerSettings {
        layers: settings.whole_or("model.layers", 1..=1000, 4),
        heads: settings.whole_or("model.heads", 1..=1000, 4),
        positions: settings.choice_or("model.positions", Positions::Learned),
        activation: settings.choice_or("model.activation", Activation::Gelu),
        // Below 1, where nothing would be left.
        dropout: settings.number_or("model.dropout", 0.0..=0.9, 0.0),
        levels: settings.whole("data.levels", 2..=256, 16),
    })
}

/// Refuses settings that mean nothing to the model's family.
pub(super) fn refuse_others(settings: &mut Settings, kind: ModelKind) {
    if !settings.sound(&["model.kind"]) {
        return;
    }
    let family = kind.family();
    let others = family.keys_of_others().filter(|(key, _)| settings.is_given(key)).collect::<Vec<_>>();
    for (key, families) in others {
        // The last word wins: whoever sets another kind does not mean the settings of the file's own.
        if settings.yields(&key, "model.kind") {
            continue;
        }
        let problem = if family == Family::Package {
            "given, but a package has its own; remove it, or change it in Python and export again".to_owned()
        } else {
            let families: Vec<String> = families.iter().map(Family::to_string).collect();
            let of = families.join(" and ");
            format!("is a setting of {of}, and model.kind = \"{kind}\" is one of the {family}; remove it")
        };
        settings.refuse(&key, problem);
    }
}

/// File of one of the user's own networks.
fn script(settings: &mut Settings, kind: ModelKind, key: &'static str, check_paths: bool) -> Option<PathBuf> {
    let path = settings.text(key, "networks/G.pt").and_then(|path| settings.absolute(key, &path));
    match (&path, kind) {
        (Some(_), kind) if kind != ModelKind::Script && settings.sound(&["model.kind"]) => {
            settings.fault(
                key,
                format!("given, but model.kind = \"{kind}\" has networks of its own; set kind = \"script\""),
            );
        }
        (None, ModelKind::Script) if settings.sound(&[key]) => {
            settings
                .fault(key, "missing; \"script\" trains two TorchScript files, generator and discriminator");
        }
        (Some(file), ModelKind::Script) if check_paths && !file.is_file() => {
            settings.fault(key, format!("{} is no file", file.display()));
        }
        _ => {}
    }
    path
}

pub(super) fn loss(settings: &mut Settings, model: ModelKind) -> Loss {
    let by_model = match model {
        ModelKind::R3gan28 | ModelKind::R3gan32 => LossKind::RelativisticPairing,
        ModelKind::Sngan32 => LossKind::Hinge,
        _ => LossKind::NonSaturating,
    };
    let kind = settings.choice_or("loss.kind", by_model);
    // Gulrajani et al. (2017), algorithm 1, and Miyato et al. (2018), section 4: five updates for one of the
    // generator.
    let several = kind == LossKind::WassersteinGp || model == ModelKind::Sngan32;
    let discriminator_steps = if several { 5 } else { 1 };
    // Huang et al. (2024), section 2.2: without both penalties training by pairs diverges.
    let penalty = if kind == LossKind::RelativisticPairing { 1.0 } else { 0.0 };
    let r1 = settings.number_or("loss.r1", 0.0..=1e6, penalty);
    let r2 = settings.number_or("loss.r2", 0.0..=1e6, penalty);
    Loss {
        kind,
        discriminator_steps: settings.whole_or("loss.discriminator_steps", 1..=100, discriminator_steps),
        gradient_penalty: settings.number_or("loss.gradient_penalty", 0.0..=1e6, 10.0),
        r1,
        final_r1: settings.number_or("loss.final_r1", 0.0..=1e6, r1),
        r2,
        final_r2: settings.number_or("loss.final_r2", 0.0..=1e6, r2),
        penalty_every: settings.whole_or("loss.penalty_every", 1..=1000, 1),
    }
}

pub(super) fn augmentation(settings: &mut Settings) -> Augmentation {
    let probability = settings.number_or("augmentation.probability", 0.0..=1.0, 1.0);
    Augmentation {
        flip: settings.flag_or("augmentation.flip", false),
        kinds: settings.choices("augmentation.kinds"),
        probability,
        final_probability: settings.number_or("augmentation.final_probability", 0.0..=1.0, probability),
        adaptive: settings.flag_or("augmentation.adaptive", false),
        // Karras et al. (2020), section 3 and appendix B: r_t = 0.6, and from 0 to 1 in half a million
        // images.
        target: settings.number_or("augmentation.target", -1.0..=1.0, 0.6),
        adjust_images: settings.whole_or("augmentation.adjust_images", 1..=MAX_STEPS, 500_000),
    }
}

/// Checks the settings of these sections against each other.
pub(super) fn check(settings: &mut Settings, job: &Job) {
    match job.model.kind.family() {
        // It has none of them.
        Family::Package => {}
        Family::Gan => {
            check_finals(settings, job);
            check_gan(settings, job);
        }
        Family::Vae => check_finals(settings, job),
        Family::Transformer => {
            check_finals(settings, job);
            check_transformer(settings, job);
        }
    }
}

fn check_transformer(settings: &mut Settings, job: &Job) {
    let Some(TransformerSettings { heads, positions, levels, .. }) = job.model.transformer else { return };
    let width = job.model.width;
    let sound = settings.sound(&["model.width", "model.heads"]);
    if sound && !width.is_multiple_of(heads) {
        settings.fault(
            "model.heads",
            format!("is {heads}, which does not divide model.width = {width}; choose {heads} heads of a width such as {}",
                width.next_multiple_of(heads)),
        );
    } else if sound && positions == Positions::Rotary && !(width / heads).is_multiple_of(2) {
        settings.fault(
            "model.positions",
            format!("\"rotary\" turns pairs, and a head has {} numbers (model.width / model.heads); make that even", width / heads),
        );
    }
    if levels.is_some() && !job.data.kind.is_images() && settings.sound(&["data.kind"]) {
        let kind = job.data.kind;
        settings
            .fault("data.levels", format!("is for images, and data.kind = \"{kind}\" gives none; remove it"));
    }
}

fn check_gan(settings: &mut Settings, job: &Job) {
    check_adaptive(settings, job);
    let frozen = job.model.freeze_discriminator;
    if frozen > 0 && job.model.init_from.is_none() && settings.sound(&["model.init_from"]) {
        settings.fault(
            "model.freeze_discriminator",
            format!(
                "keeps {frozen} layers as they begin, and without model.init_from they are random; set \
                 model.init_from to a checkpoint, or remove it"
            ),
        );
    }
    if job.model.conditional && job.model.kind == ModelKind::Script && settings.sound(&["model.kind"]) {
        let problem = "networks of your own are not told classes; remove it, or choose another model.kind";
        settings.fault("model.conditional", problem.to_string());
    }
    let grouped = matches!(job.model.kind, ModelKind::R3gan28 | ModelKind::R3gan32);
    if grouped && !job.model.width.is_multiple_of(8) && settings.sound(&["model.width"]) {
        let width = job.model.width;
        settings.fault(
            "model.width",
            format!(
                "is {width}, but R3GAN's groups of 16 features need a multiple of 8; choose 8, for example"
            ),
        );
    }
}

/// Checks settings that change over time: they need a duration to change in.
fn check_finals(settings: &mut Settings, job: &Job) {
    let keys = [
        "loss.final_r1",
        "loss.final_r2",
        "optimizer.final_learning_rate",
        "optimizer.final_discriminator_learning_rate",
        "optimizer.final_beta2",
        "augmentation.final_probability",
    ];
    let (loss, optimizer, augmentation) = (&job.loss, &job.optimizer, &job.augmentation);
    let changes = [
        loss.final_r1 != loss.r1,
        loss.final_r2 != loss.r2,
        optimizer.final_learning_rate != optimizer.learning_rate,
        optimizer.final_discriminator_learning_rate != optimizer.discriminator_learning_rate,
        optimizer.final_beta2 != optimizer.beta2,
        augmentation.final_probability != augmentation.probability,
    ];
    // With a length, all of them may change.
    if optimizer.decay_images > 0 || !settings.sound(&["optimizer.decay_images", "optimizer.decay_steps"]) {
        return;
    }
    for (key, changes) in keys.into_iter().zip(changes) {
        if changes && settings.is_given(key) && settings.sound(&[key]) {
            settings.fault(
                key,
                "is another value to end with, but optimizer.decay_images is 0; set that to the images after which it \
                 is reached",
            );
        }
    }
    if job.model.ema_schedule == EmaSchedule::Cosine {
        let problem =
            "\"cosine\" needs a length; set optimizer.decay_images to the images over which it runs";
        settings.fault("model.ema_schedule", problem);
    }
}

/// Checks adaptive augmentation: its controller reads the sign of the D output, so the loss must
/// give it a meaning.
fn check_adaptive(settings: &mut Settings, job: &Job) {
    if !job.augmentation.adaptive || !settings.sound(&["augmentation.kinds", "loss.kind"]) {
        return;
    }
    if job.augmentation.kinds.is_empty() {
        let problem =
            "has nothing to adapt; name augmentation.kinds, such as [\"flip\", \"translation\", \"color\"]";
        settings.fault("augmentation.adaptive", problem);
    }
    if matches!(job.loss.kind, LossKind::RelativisticPairing | LossKind::WassersteinGp) {
        let loss = job.loss.kind;
        settings.fault(
            "augmentation.adaptive",
            format!(
                "goes by the sign of the discriminator's output, and with loss.kind = \"{loss}\" that has no meaning; \
                 choose another loss, or set augmentation.probability instead"
            ),
        );
    }
}
