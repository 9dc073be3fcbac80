use proptest::prelude::*;

use super::*;
use crate::job::{
    OptimizerKind, sample_of_all, sample_of_options, sample_of_package, sample_of_transformer, sample_of_vae,
};

/// Text of [`sample_of_all`]. A run directory holds such a text, and workers of the same version of
/// the contract read it: a change here needs a new version.
const TEXT: &str = r#"[job]
name = "n"
seed = 9223372036854775807
epochs = 3
data_shards = 6
shard_batch = 4
threads = 1
failure_deadline = 5.0
non_finite = "roll-back"
precision = "bf16"
tf32 = "all"
reduction = "ring"
deterministic = true

[data]
kind = "cifar-10"
path = "/data/a b"
resize = 64
channels = 3
image_extension = "jpg"
orientation = "ignore"
fit = "pad"
background = "black"
class_order = "bytes"

[[data.exclusion]]
after_step = 7
after_phase = 1
names = "9f"
files = ["a b.png", "c"]

[model]
kind = "dcgan-64"
latent_dim = 100
width = 64
ema_half_life_images = 10
ema_schedule = "cosine"
conditional = true
init_from = "runs/a b"
freeze_discriminator = 3
generator = "/networks/G.pt"
discriminator = "/networks/D.pt"

[loss]
kind = "wasserstein-gp"
discriminator_steps = 5
gradient_penalty = 10.0
r1 = 1.0
final_r1 = 0.1
r2 = 2.0
final_r2 = 0.2
penalty_every = 4

[optimizer]
kind = "adam"
learning_rate = 0.30000000000000004
discriminator_learning_rate = 0.0001
beta1 = 0.5
beta2 = 0.999
epsilon = 0.00000001
decay_images = 1000
final_learning_rate = 0.1
final_discriminator_learning_rate = 0.00001
final_beta2 = 0.99

[augmentation]
flip = true
kinds = ["rotate90", "cutout"]
probability = 0.5
final_probability = 0.25
adaptive = true
target = 0.6
adjust_images = 500

[checkpoint]
every_steps = 1
every_epochs = 2
keep_last = 3

[sample]
every_steps = 7
count = 50

[metrics]
every_steps = 10

[evaluation]
every_steps = 5
with_checkpoints = false
samples = 2000
reference = 10000
features = "/inception.pt"
held_out = "/h"
best_by = "auto"

[alarms]
policy = "warn"
after_images = 25000
collapse = 0.3
overfitting = 0.8
saturated_rows = 9
"#;

#[test]
fn the_text_is_fixed_and_gives_the_same_job() {
    assert_eq!(sample_of_all().to_toml(), TEXT);
    assert_eq!(Job::from_toml(TEXT), Ok(sample_of_all()));
}

/// Text of [`sample_of_package`] from its model to its optimizers.
const OF_PACKAGE: &str = r#"[model]
kind = "package"
conditional = true
path = "/vae.pt2"
package_hash = "0a1b"

[optimizer]
decay_images = 1000

[optimizer.critic]
kind = "adam"
learning_rate = 1.0
beta1 = 0.5
beta2 = 0.999
epsilon = 0.00000001
final_learning_rate = 0.00001
final_beta2 = 0.99

[optimizer.encoder]
kind = "adam"
learning_rate = 0.30000000000000004
beta1 = 0.5
beta2 = 0.999
epsilon = 0.00000001
final_learning_rate = 0.00001
final_beta2 = 0.99
"#;

#[test]
fn the_text_of_a_package_has_what_it_uses_and_gives_the_same_job() {
    let (text, job) = (sample_of_package().to_toml(), sample_of_package());
    assert_eq!(text.parse::<Table>(), toml::from_str(&format!("{OF_PACKAGE}{}", of_others())), "{text}");
    assert_eq!(Job::from_toml(&text), Ok(job.clone()));
    assert!(text.starts_with("[job]\n") && text.contains("\n\n[optimizer.critic]\n"), "{text}");
    assert_eq!(job.clone().without_unused(), job);
    for (from, to, says) in [
        ("path = \"/vae.pt2\"", "path = \"/vae.pt2\"\nwidth = 3", "does not know: model.width;"),
        ("[optimizer.critic]", "[loss]\nr1 = 1.0\n[optimizer.critic]", "does not know: loss;"),
        ("epsilon = 0.00000001", "epsilon = 0.00000001\nrho = 0.9", "does not know: optimizer.critic.rho;"),
        ("epsilon = 0.00000001\n", "", "missing field `epsilon`"),
        ("conditional = true\n", "", "missing field `conditional`"),
    ] {
        let text = text.replacen(from, to, 1);
        assert!(refused(&text).contains(says), "{}", refused(&text));
    }
    let of_gan = TEXT.replace("[augmentation]", "[optimizer.generator]\nbeta1 = 0.0\n[augmentation]");
    assert!(refused(&of_gan).contains("does not know: optimizer.generator;"), "{}", refused(&of_gan));
}

/// Sections of [`sample_of_vae`] that say what is trained.
const OF_VAE: &str = r#"[model]
kind = "vae-32"
latent_dim = 16
width = 8
ema_half_life_images = 10
ema_schedule = "ramp-up"
conditional = true

[loss]
likelihood = "gaussian"
beta = 0.30000000000000004
binarise = true
"#;

/// Those of [`sample_of_transformer`].
const OF_TRANSFORMER: &str = r#"[model]
kind = "transformer"
width = 64
conditional = false
layers = 3
heads = 2
positions = "rotary"
activation = "swiglu"
dropout = 0.25
"#;

/// Section of the optimizer of both.
const OF_ONE_OPTIMIZER: &str = r#"
[optimizer]
kind = "adam"
learning_rate = 0.30000000000000004
beta1 = 0.5
beta2 = 0.999
epsilon = 0.00000001
decay_images = 1000
final_learning_rate = 0.1
final_beta2 = 0.99
"#;

#[test]
fn the_text_of_a_family_has_what_it_uses_and_gives_the_same_job() {
    for (job, own, section, keys) in [
        (sample_of_vae(), OF_VAE, "[evaluation]", "\nimportance_samples = 7"),
        (sample_of_transformer(), OF_TRANSFORMER, "[data]", "\nlevels = 16"),
    ] {
        let text = job.to_toml();
        let expected = format!("{own}{OF_ONE_OPTIMIZER}{}", of_others());
        let expected = expected.replace(section, &format!("{section}{keys}"));
        assert_eq!(text.parse::<Table>(), toml::from_str(&expected), "{text}");
        assert_eq!(Job::from_toml(&text), Ok(job.clone()));
        assert_eq!(job.clone().without_unused(), job);
        assert_eq!((job.phases_per_step(), job.samples_per_step()), (1, job.global_batch()));
    }
    let (vae, transformer) = (sample_of_vae().to_toml(), sample_of_transformer().to_toml());
    for (text, from, to, says) in [
        (&vae, "latent_dim = 16", "latent_dim = 16\nlayers = 3", "does not know: model.layers;"),
        (&vae, "binarise = true", "binarise = true\nr1 = 1.0", "does not know: loss.r1;"),
        (&vae, "binarise = true\n", "", "missing field `binarise`"),
        (&vae, "\"gaussian\"", "\"cauchy\"", "unknown variant `cauchy`"),
        (&transformer, "layers = 3", "layers = 3\nlatent_dim = 3", "does not know: model.latent_dim;"),
        (&transformer, "layers = 3", "layers = -3", "-3"),
    ] {
        let text = text.replacen(from, to, 1);
        assert!(refused(&text).contains(says), "{}", refused(&text));
    }
    let of_gan = TEXT.replace("r1 = 1.0", "r1 = 1.0\nbeta = 4.0");
    assert!(refused(&of_gan).contains("does not know: loss.beta;"), "{}", refused(&of_gan));
}

/// Section of the optimizer of a GAN with every setting of `sgd`.
const OF_SGD: &str = r#"[optimizer]
kind = "sgd"
learning_rate = 0.30000000000000004
discriminator_learning_rate = 0.0001
decay_images = 1000
final_learning_rate = 0.1
final_discriminator_learning_rate = 0.00001
weight_decay = 0.1
momentum = 0.9
nesterov = true
clip_norm = 1.5
warmup_images = 90
decay = "linear"
"#;

/// Settings of Adam's are in no text of another rule, for all phases or for one.
#[test]
fn the_text_of_an_optimizer_has_what_it_uses_and_gives_the_same_job() {
    let mut job = sample_of_all();
    job.optimizer.options = sample_of_options();
    assert!(Job::from_toml(&job.to_toml()) == Ok(job.clone()) && job.to_toml().contains("beta1"));
    job.optimizer.kind = OptimizerKind::Sgd;
    for number in ["beta1", "beta2", "epsilon", "final_beta2"] {
        assert!(!job.to_toml().contains(number), "{}", job.to_toml());
    }
    let job = job.without_unused();
    assert_eq!((job.optimizer.beta1, job.optimizer.epsilon), (0.0, 0.0));
    let section = job.to_table().remove("optimizer").unwrap();
    assert_eq!(Table::from_iter([("optimizer".to_owned(), section)]), OF_SGD.parse().unwrap());
    let text = job.to_toml();
    assert_eq!(Job::from_toml(&text), Ok(job.clone()));
    let other = text.replace("momentum = 0.9", "momentum = 0.9\nbeta1 = 0.5");
    assert!(refused(&other).contains("does not know: optimizer.beta1;"), "{}", refused(&other));
    let mut job = sample_of_package();
    let critic = job.optimizer.phases.get_mut("critic").unwrap();
    (critic.kind, critic.options, critic.decay_images) = (OptimizerKind::Sgd, sample_of_options(), Some(70));
    let (job, text) = (job.clone().without_unused(), job.to_toml());
    assert_eq!(Job::from_toml(&text), Ok(job.clone()));
    assert!(text.matches("beta1").count() == 1 && text.contains("decay_images = 70"), "{text}");
    assert_eq!(job.optimizer.phases["critic"].beta1, 0.0);
}

/// The sections of [`TEXT`] that jobs of other families have as well.
fn of_others() -> String {
    let mut table: Table = TEXT.parse().unwrap();
    let _ = ["model", "loss", "optimizer", "augmentation"].map(|section| table.remove(section));
    table.to_string()
}

fn refused(text: &str) -> String {
    Job::from_toml(text).unwrap_err().to_string()
}

/// A worker must not train by half a job, which a newer coordinator would send.
#[test]
fn settings_that_this_build_does_not_know_are_named() {
    let with = |from: &str, to: &str| {
        assert!(TEXT.contains(from));
        refused(&TEXT.replace(from, to))
    };
    let told = with("beta1 = 0.5", "beta1 = 0.5\nrho = 0.9\nsigma = true");
    assert!(told.contains("does not know: optimizer.rho, optimizer.sigma; use one build"), "{told}");
    let told = with("[metrics]", "[sweep]\ntrials = 3\n[metrics]");
    assert!(told.contains("does not know: sweep;"), "{told}");
    let told = with("after_step = 7", "after_step = 7\nweight = 0.5");
    assert!(told.contains("does not know: data.exclusion;"), "{told}");
    let told = with("epochs = 3", "epochs = 3\nsteps = 4");
    assert!(told.contains("job.epochs") || told.contains("job.steps"), "{told}");
    let told = with("kind = \"wasserstein-gp\"", "kind = \"logistic\"");
    assert!(told.contains("at \"kind = \"logistic\"\": unknown variant"), "{told}");
    let told = with("beta2 = 0.999\n", "");
    assert!(told.contains("[optimizer]") && told.contains("missing field `beta2`"), "{told}");
    let told = with("count = 50", "count = -1");
    assert!(told.contains("at \"count = -1\""), "{told}");
}

#[test]
fn a_job_that_cannot_be_computed_with_is_refused() {
    for (from, to, says) in [
        ("r1 = 1.0", "r1 = nan", "loss.r1 = NaN"),
        ("r1 = 1.0", "r1 = -inf", "loss.r1 = -inf"),
        ("data_shards = 6", "data_shards = 0", "without data shards"),
        ("failure_deadline = 5.0", "failure_deadline = -1.0", "no time"),
        ("discriminator_steps = 5", "discriminator_steps = 0", "without a discriminator phase"),
        ("discriminator_steps = 5", "discriminator_steps = 1024", "more than 1024 phases"),
        ("name = \"n\"", "name = \"\\u001b[2J\"", "control characters"),
    ] {
        let told = refused(&TEXT.replacen(from, to, 1));
        assert!(told.contains(says) && !told.contains('\n'), "{told}");
    }
    let most = ["data_shards = 4294967295", "shard_batch = 4294967295", "discriminator_steps = 4294967295"];
    let many = TEXT.replace("data_shards = 6", most[0]).replace("shard_batch = 4", most[1]);
    assert!(refused(&many.replace("discriminator_steps = 5", most[2])).contains("more samples than"));
    let long = format!("# {}\n{TEXT}", "x".repeat(TEXT_LIMIT));
    assert!(refused(&long).contains("at most 8388608 are allowed"));
}

/// All finite numbers of double precision.
fn finite() -> impl Strategy<Value = f64> {
    use proptest::num::f64::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    let edges = [0.0, -0.0, f64::MIN_POSITIVE, 5e-324, -5e-324, f64::MAX, f64::MIN, f64::EPSILON, 0.1 + 0.2];
    prop_oneof![
        POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO,
        proptest::num::f32::ANY.prop_filter("finite", |value| value.is_finite()).prop_map(f64::from),
        proptest::sample::select(edges.to_vec()),
    ]
}

proptest! {
    /// Invariant 1.
    #[test]
    fn numbers_keep_their_bits(values in proptest::collection::vec(finite(), 5), shards in 1..u32::MAX, seed in 0..=i64::MAX) {
        let mut job = sample_of_all();
        job.job.seed = seed.unsigned_abs();
        job.job.data_shards = shards;
        fn numbers(job: &mut Job) -> [&mut f64; 5] {
            let Job { loss, optimizer, augmentation, alarms, .. } = job;
            [&mut loss.r1, &mut optimizer.learning_rate, &mut optimizer.final_beta2, &mut augmentation.target,
                &mut alarms.collapse]
        }
        for (place, value) in numbers(&mut job).into_iter().zip(&values) {
            *place = *value;
        }
        let mut read = Job::from_toml(&job.to_toml()).unwrap();
        prop_assert_eq!(&read, &job);
        let bits: Vec<u64> = values.iter().map(|value| value.to_bits()).collect();
        prop_assert_eq!(numbers(&mut read).map(|value| value.to_bits()).to_vec(), bits);
    }

    #[test]
    fn texts_and_paths_stay_as_they_are(path in "/\\PC{0,40}", file in any::<String>(), url in any::<String>()) {
        let mut job = sample_of_all();
        job.data.path = Some(path.into());
        job.data.exclusions[0].files = vec![file];
        job.checkpoint.url = Some(url);
        prop_assert_eq!(Job::from_toml(&job.to_toml()), Ok(job));
    }

    /// No text makes the reader panic, and an accepted text is a job as it was sent.
    #[test]
    fn a_changed_text_is_refused_or_is_a_job(at in 0..TEXT.len(), cut in 0..20_usize, put in "\\PC{0,6}") {
        let (at, end) = (TEXT.floor_char_boundary(at), TEXT.floor_char_boundary((at + cut).min(TEXT.len())));
        let text = format!("{}{put}{}", &TEXT[..at], &TEXT[end..]);
        if let Ok(job) = Job::from_toml(&text) {
            prop_assert_eq!(Job::from_toml(&job.to_toml()), Ok(job));
        }
    }
}
