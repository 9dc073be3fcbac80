//! Families of models, and the text form of a job by them.
//!
//! A job's text has no setting that means nothing to its family, and a family's own settings stand in the
//! sections in which people look for them.

use std::fmt;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use self::Family::{Gan, Transformer, Vae};
use super::{Job, ModelKind};
use crate::names::{display_as_in_the_file, named};

/// Families of models: those that share an objective and its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Generative adversarial networks.
    Gan,
    /// Variational autoencoders.
    Vae,
    /// Autoregressive transformers.
    Transformer,
    /// Objectives written in PyTorch.
    Package,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Gan => "GANs",
            Vae => "VAEs",
            Transformer => "transformers",
            Family::Package => "packages",
        })
    }
}

/// Settings of a variational autoencoder (Kingma and Welling, 2013).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VaeSettings {
    /// Distribution of a pixel, given the latent vector.
    pub likelihood: Likelihood,
    /// Weight of the KL divergence in the loss (Higgins et al., 2017, equation 4).
    pub beta: f64,
    /// Whether each image is binarised anew each time it is read: a pixel is white with the probability of
    /// its grey value.
    pub binarise: bool,
    /// Latent vectors drawn for each held-out image in an evaluation (Burda et al., 2015, equation 8).
    pub importance_samples: u32,
}

/// Distribution of a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Likelihood {
    /// White with a probability; a grey value counts as its share of white.
    Bernoulli,
    /// Normal, with one learnt variance for all pixels.
    Gaussian,
}

/// Settings of a transformer (Vaswani et al., 2017) beside its width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransformerSettings {
    /// Number of blocks.
    pub layers: u32,
    /// Attention heads of a block.
    pub heads: u32,
    /// Form in which it knows the places of tokens.
    pub positions: Positions,
    /// Nonlinearity of the feed-forward layers.
    pub activation: Activation,
    /// Probability with which an activation is dropped in training.
    pub dropout: f64,
    /// Levels of a pixel's channel, of images: token = floor(byte levels / 256). `None` for all 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub levels: Option<u32>,
}

/// Forms in which a transformer knows the places of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// A learnt vector for each place.
    Learned,
    /// Queries and keys turned by angles that grow with the place (Su et al., 2021).
    Rotary,
}

/// Nonlinearities of feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Hendrycks and Gimpel (2016).
    Gelu,
    /// Shazeer (2020).
    Swiglu,
}

display_as_in_the_file!(Likelihood, Positions, Activation);

/// Settings of some families: key, families, and for a key that every [`Job`] has, the value in jobs of all
/// others.
const OF_SOME: [(&str, &[Family], Option<&str>); 25] = [
    ("model.latent_dim", &[Gan, Vae], Some("0")),
    ("model.width", &[Gan, Vae, Transformer], Some("0")),
    ("model.ema_half_life_images", &[Gan, Vae], Some("0")),
    ("model.ema_schedule", &[Gan, Vae], Some("'ramp-up'")),
    ("model.conditional", &[Gan, Vae, Transformer, Family::Package], Some("false")),
    ("model.freeze_discriminator", &[Gan], Some("0")),
    ("model.generator", &[Gan], None),
    ("model.discriminator", &[Gan], None),
    ("loss.kind", &[Gan], Some("'non-saturating'")),
    ("loss.discriminator_steps", &[Gan], Some("1")),
    ("loss.gradient_penalty", &[Gan], Some("0.0")),
    ("loss.r1", &[Gan], Some("0.0")),
    ("loss.final_r1", &[Gan], Some("0.0")),
    ("loss.r2", &[Gan], Some("0.0")),
    ("loss.final_r2", &[Gan], Some("0.0")),
    ("loss.penalty_every", &[Gan], Some("1")),
    ("optimizer.discriminator_learning_rate", &[Gan], Some("0.0")),
    ("optimizer.final_discriminator_learning_rate", &[Gan], Some("0.0")),
    ("augmentation.flip", &[Gan], Some("false")),
    ("augmentation.kinds", &[Gan], Some("[]")),
    ("augmentation.probability", &[Gan], Some("0.0")),
    ("augmentation.final_probability", &[Gan], Some("0.0")),
    ("augmentation.adaptive", &[Gan], Some("false")),
    ("augmentation.target", &[Gan], Some("0.0")),
    ("augmentation.adjust_images", &[Gan], Some("0")),
];

/// Settings of all optimizers that each phase of a package has for itself; given in a job file they are its
/// defaults.
const BY_PHASE: [(&str, &str); 7] = [
    ("optimizer.kind", "'adam'"),
    ("optimizer.learning_rate", "0.0"),
    ("optimizer.beta1", "0.0"),
    ("optimizer.beta2", "0.0"),
    ("optimizer.epsilon", "0.0"),
    ("optimizer.final_learning_rate", "0.0"),
    ("optimizer.final_beta2", "0.0"),
];

/// Settings that only one family has.
struct Own {
    family: Family,
    /// Their table below `model` in serde's form.
    table: &'static str,
    /// Section and key of each in the text.
    keys: &'static [(&'static str, &'static str)],
}

const OWN: [Own; 2] = [
    Own {
        family: Vae,
        table: "vae",
        keys: &[
            ("loss", "likelihood"),
            ("loss", "beta"),
            ("loss", "binarise"),
            ("evaluation", "importance_samples"),
        ],
    },
    Own {
        family: Transformer,
        table: "transformer",
        keys: &[
            ("model", "layers"),
            ("model", "heads"),
            ("model", "positions"),
            ("model", "activation"),
            ("model", "dropout"),
            ("data", "levels"),
        ],
    },
];

/// Settings of optimizers that mean nothing to `sgd`: their value in a job is 0.
const OF_ADAM: [&str; 4] = ["beta1", "beta2", "epsilon", "final_beta2"];

/// Name of the phases' optimizers in serde's form, where they are a table of their own.
const PHASES: &str = "phases";

impl Family {
    /// Keys of settings that mean nothing to the family, each with the families that have it.
    pub fn keys_of_others(self) -> impl Iterator<Item = (String, Vec<Family>)> {
        let of_some = OF_SOME.into_iter().map(|(key, families, _)| (key.to_owned(), families.to_vec()));
        let own = OWN.into_iter().flat_map(|Own { family, keys, .. }| {
            keys.iter().map(move |(section, key)| (format!("{section}.{key}"), vec![family]))
        });
        of_some.chain(own).filter(move |(_, families)| !families.contains(&self))
    }

    /// Settings that are not in the text of the family's jobs, by section and key, each with its value in a job.
    fn unused(self) -> impl Iterator<Item = (&'static str, &'static str, Value)> {
        let of_some = OF_SOME.into_iter().filter(move |(_, families, _)| !families.contains(&self));
        let of_some = of_some.filter_map(|(key, _, value)| Some((key, value?)));
        let by_phase = BY_PHASE.into_iter().filter(move |_| self == Family::Package);
        of_some.chain(by_phase).map(|(key, value)| {
            let (section, key) = key.split_once('.').expect("a key has a section");
            (section, key, value.parse().expect("the value is TOML"))
        })
    }
}

/// Family of a table of a job's sections; `None` where it has no kind that exists.
pub(super) fn family_of(job: &Table) -> Option<Family> {
    let kind = job.get("model")?.get("kind")?.as_str()?;
    named::<ModelKind>(kind).map(ModelKind::family)
}

/// Whether the text of a job of these sections is serde's form.
pub(super) fn is_plain(job: &Table) -> bool {
    let has_adam = |section: &Table| section.get("optimizer").is_none_or(|optimizer| !is_sgd(optimizer));
    family_of(job).is_none_or(|family| family == Gan) && has_adam(job)
}

fn is_sgd(optimizer: &Value) -> bool {
    optimizer.get("kind").and_then(Value::as_str) == Some("sgd")
}

/// The optimizers of a job that are `sgd`, of all phases or of one, in the form of its text.
fn sgd_of(job: &mut Table) -> Vec<&mut Table> {
    let Some(Value::Table(all)) = job.get_mut("optimizer") else { return Vec::new() };
    if all.get("kind").and_then(Value::as_str) == Some("sgd") {
        return vec![all];
    }
    let tables = all.iter_mut().filter(|(_, phase)| is_sgd(phase));
    tables.filter_map(|(_, phase)| phase.as_table_mut()).collect()
}

fn section_of<'a>(job: &'a mut Table, section: &str) -> Option<&'a mut Table> {
    job.entry(section).or_insert_with(|| Value::Table(Table::new())).as_table_mut()
}

/// Serde's form of a job to that of its text.
pub(super) fn shorten(job: &mut Table) {
    let Some(family) = family_of(job) else { return };
    for (section, key, _) in family.unused() {
        if let Some(Value::Table(own)) = job.get_mut(section) {
            own.remove(key);
        }
    }
    for Own { table, keys, .. } in OWN {
        let own = section_of(job, "model").and_then(|model| model.remove(table));
        let Some(Value::Table(mut own)) = own else { continue };
        for (section, key) in keys {
            if let (Some(value), Some(section)) = (own.remove(*key), section_of(job, section)) {
                section.insert((*key).to_owned(), value);
            }
        }
    }
    if family != Gan {
        job.retain(|_, section| section.as_table().is_none_or(|section| !section.is_empty()));
    }
    if family == Family::Package
        && let Some(Value::Table(optimizer)) = job.get_mut("optimizer")
        && let Some(Value::Table(phases)) = optimizer.remove(PHASES)
    {
        optimizer.extend(phases);
    }
    for optimizer in sgd_of(job) {
        OF_ADAM.iter().for_each(|key| drop(optimizer.remove(*key)));
    }
}

/// The form of a text of a family's job to serde's.
pub(super) fn complete(job: &mut Table, family: Family) {
    for optimizer in sgd_of(job) {
        optimizer.extend(OF_ADAM.map(|key| (key.to_owned(), Value::Float(0.0))));
    }
    if let Some(optimizer) = section_of(job, "optimizer").filter(|_| family == Family::Package) {
        let (phases, mut settings): (Table, Table) =
            std::mem::take(optimizer).into_iter().partition(|(_, value)| value.is_table());
        settings.insert(PHASES.to_owned(), Value::Table(phases));
        *optimizer = settings;
    }
    for (section, key, value) in family.unused() {
        if let Some(own) = section_of(job, section) {
            // What a family has no use for has no other value.
            own.insert(key.to_owned(), value);
        }
    }
    for Own { table, keys, .. } in OWN.iter().filter(|own| own.family == family) {
        let own = keys.iter().filter_map(|(section, key)| {
            let value = section_of(job, section)?.remove(*key)?;
            Some(((*key).to_owned(), value))
        });
        let own = Value::Table(own.collect());
        if let Some(model) = section_of(job, "model") {
            model.insert((*table).to_owned(), own);
        }
    }
}

impl Job {
    /// The same job, without the settings that mean nothing to its family.
    pub fn without_unused(self) -> Job {
        let family = self.model.kind.family();
        let mut table = self.to_table();
        if is_plain(&table) {
            return self;
        }
        complete(&mut table, family);
        let job = Job::deserialize(Value::Table(table)).expect("all keys that a job needs are there");
        Job { shape: self.shape, ..job }
    }
}
