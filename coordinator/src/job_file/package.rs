//! Jobs that train a package: `model.path`, and what the package's manifest settles.
//!
//! 1. The package has losses, networks and defaults of its own: settings of built-in objectives are refused.
//! 2. The record of a run has all that followed from the manifest, and is read without the package, which may
//!    have moved.

use std::path::PathBuf;

use ganglion_membership::StepShape;
use ganglion_proto::evaluation::{BestBy, names};
use ganglion_proto::job::{self, DataKind, Job, ModelKind, OptimizerKind, OptimizerOptions, PhaseOptimizer};
use ganglion_proto::package::{Batch, ImageSpec, Manifest, Optimizer, Output, Package, SampleSpec};

use super::optimizer::{falls, length, options, refuse_others};
use super::sections::side;
use super::settings::Settings;

const PATH: &str = "model.path";
/// Key of the package's hash in a resolved job.
pub(super) const HASH: &str = "model.package_hash";

/// Path of the package.
pub(super) fn path(settings: &mut Settings, kind: ModelKind) -> Option<PathBuf> {
    let path = settings.text(PATH, "vae.pt2").and_then(|path| settings.absolute(PATH, &path));
    match (&path, kind) {
        (None, ModelKind::Package) if settings.sound(&[PATH]) => {
            settings.fault(PATH, "missing; \"package\" trains the .pt2 file that ganglion.export(...) wrote");
        }
        (Some(_), kind) if kind != ModelKind::Package && settings.sound(&["model.kind"]) => {
            let problem = format!("given, but model.kind is \"{kind}\"; set kind = \"package\"");
            settings.fault(PATH, problem);
        }
        _ => {}
    }
    path
}

/// Reads the package of a job that trains one, where files shall be looked at.
pub(super) fn read(settings: &mut Settings, job: &Job, check_paths: bool) -> Option<Package> {
    let path = job.model.path.as_deref().filter(|_| check_paths && job.model.kind == ModelKind::Package)?;
    match Package::read(path) {
        Ok(package) => Some(package),
        Err(error) => {
            settings.fault(PATH, format!("{}: {error}", path.display()));
            None
        }
    }
}

/// Completes a job that trains a package, and checks it against the manifest.
pub(super) fn apply(settings: &mut Settings, job: &mut Job, package: Option<&Package>) {
    if job.model.kind != ModelKind::Package {
        if settings.is_given(HASH) && settings.sound(&["model.kind"]) {
            settings.fault(HASH, "given, but the model is no package; remove it");
        }
        return;
    }
    if let Some(package) = package {
        settle(settings, job, package);
    }
}

/// Takes over what the manifest settles, and checks what the job says of it.
fn settle(settings: &mut Settings, job: &mut Job, package: &Package) {
    let manifest = &package.manifest;
    let batch = manifest.shard_batch;
    if settings.is_given("job.shard_batch")
        && job.job.shard_batch != batch
        && settings.sound(&["job.shard_batch"])
    {
        settings.fault(
            "job.shard_batch",
            format!(
                "is {}, and the package was exported for {batch}; remove it, or export the package with shard_batch={}",
                job.job.shard_batch, job.job.shard_batch
            ),
        );
    }
    job.job.shard_batch = batch;
    let reads_classes = manifest.data.classes > 0;
    if settings.is_given("model.conditional") && job.model.conditional != reads_classes {
        let what = if reads_classes { "reads the classes of samples" } else { "reads no classes" };
        settings.fault("model.conditional", format!("the package {what}; remove it"));
    }
    job.model.conditional = reads_classes;
    if job.model.package_hash.as_ref().is_some_and(|hash| *hash != package.hash) {
        settings
            .fault(HASH, "the package has another hash: it was changed; remove the key to train it as it is");
    }
    job.model.package_hash = Some(package.hash.clone());
    settle_data(settings, job, &manifest.data.samples);
    // A package without a graph for it draws none.
    if manifest.sample.is_none() && !settings.is_given("sample.every_steps") {
        job.sample.every_steps = 0;
    }
    check_best_by(settings, job, manifest);
    let readers = (0..).zip(&manifest.phases).filter(|(_, phase)| phase.batch == Batch::Next);
    let count = u32::try_from(manifest.phases.len()).ok();
    // Checked with the manifest, so there is one.
    job.shape = count.and_then(|count| StepShape::new(count, readers.map(|(index, _)| index).collect()));
}

/// Checks that evaluations have the metric that chooses the best checkpoint.
fn check_best_by(settings: &mut Settings, job: &Job, manifest: &Manifest) {
    let BestBy::Named(name) = &job.evaluation.best_by else { return };
    let metrics = if manifest.sample.is_some() { &names::ALL[..] } else { &[] };
    let own = manifest.evaluate.iter().flat_map(|evaluate| &evaluate.outputs);
    let own = own.filter_map(|output| match output {
        Output::Scalar(name) => Some(name.as_str()),
        _ => None,
    });
    let known: Vec<&str> = own.chain(metrics.iter().copied()).collect();
    if !known.contains(&name.as_str()) {
        let known = known.iter().map(|name| format!(", \"{name}\"")).collect::<String>();
        settings.fault(
            "evaluation.best_by",
            format!("the package evaluates no \"{name}\"; choose one of \"auto\"{known}"),
        );
    }
}

/// Takes over what the package settles of the data, and checks what the job says of them.
fn settle_data(settings: &mut Settings, job: &mut Job, samples: &SampleSpec) {
    let kind = job.data.kind;
    let (fits, wanted) = match samples {
        SampleSpec::Images(_) => (kind.is_images(), "images"),
        SampleSpec::Tokens(_) => (kind == DataKind::Text, "tokens, which data.kind = \"text\" gives"),
        SampleSpec::Arrays(_) => (kind == DataKind::Arrays, "arrays, which data.kind = \"arrays\" gives"),
    };
    if !fits {
        if settings.sound(&["data.kind"]) {
            settings.fault(
                PATH,
                format!("the package takes {wanted}, but data.kind is \"{kind}\"; change one of the two"),
            );
        }
        return;
    }
    match samples {
        SampleSpec::Images(images) => check_images(settings, job, *images),
        SampleSpec::Tokens(tokens) => {
            const KEY: &str = "data.context";
            let (own, given) = (tokens.context, job.data.context);
            if settings.is_given(KEY) && given != Some(own) && settings.sound(&[KEY]) {
                let given = given.unwrap_or_default();
                settings.fault(
                    KEY,
                    format!(
                        "is {given}, and the package was exported for {own}; remove it, or export the package with \
                         context={given}"
                    ),
                );
            }
            job.data.context = Some(own);
        }
        SampleSpec::Arrays(arrays) => {
            const KEY: &str = "data.names";
            let given = job.data.names.as_ref();
            let missing = arrays.iter().find(|array| given.is_some_and(|given| !given.contains(&array.name)));
            if let Some(array) = missing.filter(|_| settings.sound(&[KEY])) {
                settings.fault(
                    KEY,
                    format!("the package also takes the array {}; add it, or remove the key", array.name),
                );
            }
            // No array is read in vain.
            let mut own: Vec<String> = arrays.iter().map(|array| array.name.clone()).collect();
            own.sort();
            job.data.names = Some(own);
        }
    }
}

/// Checks the images that leave the data pipeline, as far as the job determines them.
fn check_images(settings: &mut Settings, job: &Job, images: ImageSpec) {
    let keys = ["data.kind", "data.resize", "data.crop", "data.channels"];
    if job.data.channels != images.channels && settings.sound(&keys) {
        settings.fault(
            PATH,
            format!(
                "the package takes images of {} channel(s), and data.kind = \"{}\" gives {}; export it for \
                 ganglion.images(channels={}, ...), or for a folder set data.channels",
                images.channels, job.data.kind, job.data.channels, job.data.channels
            ),
        );
    }
    if let Some(side) = side(&job.data)
        && (side, side) != (images.height, images.width)
        && settings.sound(&keys)
    {
        let (height, width) = (images.height, images.width);
        settings.fault(
            PATH,
            format!(
                "the package takes images of {height} x {width}, and the data gives {side} x {side}; set data.resize = \
                 {height}, or export it with size={side}"
            ),
        );
    }
}

/// Reads the optimizers of a package's phases: the package's settings, under those of `[optimizer]`, under those
/// of `[optimizer.PHASE]`. `is_record` says that the text is a run's own.
pub(super) fn optimizers(settings: &mut Settings, job: &mut Job, package: Option<&Package>, is_record: bool) {
    let manifest = package.map(|package| &package.manifest);
    if job.model.kind != ModelKind::Package || manifest.is_none() && !is_record {
        return;
    }
    let nested: Vec<(String, String)> = settings
        .given_in("optimizer")
        .into_iter()
        .filter_map(|key| Some((key.split('.').nth(1)?.to_owned(), key)))
        .filter(|(phase, key)| key.len() > "optimizer.".len() + phase.len())
        .collect();
    let phases: Vec<(String, Option<&Optimizer>)> = match manifest {
        Some(manifest) => {
            manifest.phases.iter().map(|phase| (phase.name.clone(), Some(&phase.optimizer))).collect()
        }
        // A record names all.
        None => nested.iter().map(|(phase, _)| (phase.clone(), None)).collect(),
    };
    for (phase, own) in &phases {
        if !job.optimizer.phases.contains_key(phase) {
            let optimizer = optimizer(settings, job, phase, *own);
            job.optimizer.phases.insert(phase.clone(), optimizer);
        }
    }
    for (phase, key) in nested.iter().filter(|(phase, _)| !job.optimizer.phases.contains_key(phase)) {
        let names: Vec<&str> = phases.iter().map(|(name, _)| name.as_str()).collect();
        settings.refuse(key, format!("the package has no phase {phase}; it has {}", names.join(", ")));
    }
    let kinds: Vec<OptimizerKind> = job.optimizer.phases.values().map(|own| own.kind).collect();
    refuse_others(settings, "optimizer", &kinds);
    // What is not a phase's own is the schedule alone.
    let OptimizerOptions { warmup_images, decay, .. } = job.optimizer.options;
    job.optimizer.options = OptimizerOptions { warmup_images, decay, ..OptimizerOptions::default() };
    check_finals(settings, job);
}

/// Reads the optimizer of a phase.
fn optimizer(settings: &mut Settings, job: &Job, phase: &str, own: Option<&Optimizer>) -> PhaseOptimizer {
    let (shared, table) = (&job.optimizer, format!("optimizer.{phase}"));
    let key = |name: &str| format!("{table}.{name}");
    // A record has each key, so nothing stands in for it.
    let is_given = |settings: &Settings, name: &str| settings.is_given(&format!("optimizer.{name}"));
    let pick = |settings: &Settings, name: &str, of_all: f64, of_package: Option<f64>| {
        of_package.filter(|_| !is_given(settings, name)).unwrap_or(of_all)
    };
    let kind = own.map(|own| own.kind).filter(|_| !is_given(settings, "kind")).unwrap_or(shared.kind);
    let kind = settings.choice_or(&key("kind"), kind);
    // Of another rule only the step size and the clipping have a meaning for this one.
    let is_sgd = |kind: OptimizerKind| kind == OptimizerKind::Sgd;
    let alike = own.filter(|own| is_sgd(own.kind) == is_sgd(kind));
    let rate = pick(settings, "learning_rate", shared.learning_rate, own.map(|own| own.learning_rate));
    let beta1 = pick(settings, "beta1", shared.beta1, alike.map(|own| own.beta1));
    let beta2 = pick(settings, "beta2", shared.beta2, alike.map(|own| own.beta2));
    let epsilon = pick(settings, "epsilon", shared.epsilon, alike.map(|own| own.epsilon));
    let default = brought(settings, shared, own, kind);
    let learning_rate = settings.number_or(&key("learning_rate"), 0.0..=10.0, rate);
    let beta2 = settings.number_or(&key("beta2"), 0.0..1.0, beta2);
    let falls = [&*table, "optimizer"].into_iter().any(|table| falls(settings, table));
    let last = if falls { 0.0 } else { learning_rate };
    let last = pick(settings, "final_learning_rate", shared.final_learning_rate, Some(last));
    let last_beta2 = pick(settings, "final_beta2", shared.final_beta2, Some(beta2));
    let per_step = job.samples_per_step();
    let optimizer = PhaseOptimizer {
        kind,
        learning_rate,
        beta1: settings.number_or(&key("beta1"), 0.0..1.0, beta1),
        beta2,
        epsilon: settings.number_or(&key("epsilon"), 1e-16..=1.0, epsilon),
        final_learning_rate: settings.number_or(&key("final_learning_rate"), 0.0..=10.0, last),
        final_beta2: settings.number_or(&key("final_beta2"), 0.0..1.0, last_beta2),
        decay_images: length(settings, &table, "decay", per_step),
        options: OptimizerOptions {
            warmup_images: length(settings, &table, "warmup", per_step),
            ..options(settings, &table, kind, Some(default))
        },
    };
    refuse_others(settings, &table, &[kind]);
    optimizer
}

/// Settings beside step sizes and Adam's that a phase has without any of its own: those of `[optimizer]`, else the
/// package's.
fn brought(
    settings: &Settings,
    shared: &job::Optimizer,
    own: Option<&Optimizer>,
    kind: OptimizerKind,
) -> OptimizerOptions {
    let is_given = |name: &str| settings.is_given(&format!("optimizer.{name}"));
    let same = own.filter(|own| own.kind == kind);
    let of_all = &shared.options;
    OptimizerOptions {
        weight_decay: of_all
            .weight_decay
            .filter(|_| is_given("weight_decay"))
            .or(same.and_then(|own| own.weight_decay)),
        momentum: of_all.momentum.filter(|_| is_given("momentum")).or(same.and_then(|own| own.momentum)),
        nesterov: of_all.nesterov.filter(|_| is_given("nesterov")).or(same.and_then(|own| own.nesterov)),
        clip_norm: of_all.clip_norm.or(own.and_then(|own| own.clip_norm)),
        ..OptimizerOptions::default()
    }
}

/// Checks settings that change over time: they need a duration to change in.
fn check_finals(settings: &mut Settings, job: &Job) {
    if !settings.sound(&["optimizer.decay_images", "optimizer.decay_steps"]) {
        return;
    }
    let is_still = |own: &PhaseOptimizer| own.decay_images.unwrap_or(job.optimizer.decay_images) == 0;
    for (phase, optimizer) in job.optimizer.phases.iter().filter(|(_, own)| is_still(own)) {
        for (name, changes) in [
            ("final_learning_rate", optimizer.final_learning_rate != optimizer.learning_rate),
            ("final_beta2", optimizer.final_beta2 != optimizer.beta2),
        ] {
            let keys = [format!("optimizer.{phase}.{name}"), format!("optimizer.{name}")];
            if let Some(key) = keys.iter().find(|key| changes && settings.is_given(key))
                && settings.sound(&[key])
            {
                settings.fault(
                    key,
                    "is another value to end with, but optimizer.decay_images is 0; set that to the images after which \
                     it is reached",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use ganglion_proto::archive::PACKAGE_MANIFEST;
    use ganglion_proto::job::Decay;
    use ganglion_proto::package::WEIGHTS;
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use zip::ZipWriter;
    use zip::write::FileOptions;

    use super::*;
    use crate::job_file::{Difference, Text, differences, parse_resolved, render};

    fn manifest() -> Value {
        let phase = |name: &str, network: &str, batch: &str, rate: f64| {
            json!({
                "name": name, "graph": name, "updates": [network], "every": 1, "batch": batch,
                "optimizer": {"kind": "adam", "learning_rate": rate, "beta1": 0.5, "beta2": 0.99, "epsilon": 1e-8},
                "inputs": [], "draws": [], "loss": format!("{name}_loss"),
                "outputs": [{"gradient": format!("{network}.w")}, {"scalar": format!("{name}_loss")}],
            })
        };
        let network =
            |name: &str| json!({"name": name, "parameters": [{"name": "w", "shape": [1]}], "buffers": []});
        json!({
            "format": 1, "torch": "2.11.0", "device": "cpu", "cpu": {"arch": "x86_64", "features": []},
            "shard_batch": 3, "data": {"images": {"channels": 1, "height": 28, "width": 28}, "classes": 10},
            "networks": [network("d"), network("g")],
            "phases": [phase("critic", "d", "next", 1e-3), phase("generator", "g", "none", 1e-4)],
        })
    }

    fn write(path: &Path, manifest: &Value) {
        let mut archive = ZipWriter::new(std::fs::File::create(path).unwrap());
        let mut add = |name: &str, content: &[u8]| {
            archive.start_file(name, FileOptions::default()).unwrap();
            archive.write_all(content).unwrap();
        };
        add(&format!("x/{PACKAGE_MANIFEST}"), manifest.to_string().as_bytes());
        add(&format!("x/{WEIGHTS}"), b"");
        let _ = ["critic", "generator"].map(|graph| add(&format!("x/data/aotinductor/{graph}/a.so"), b""));
        archive.finish().unwrap();
    }

    /// A folder with a package.
    fn folder() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("x.pt2"), &manifest());
        folder
    }

    fn resolve(folder: &TempDir, sections: &str, overrides: &[&str]) -> Result<Job, String> {
        let text = format!(
            "[job]\nsteps = 9\n[data]\nkind = \"mnist-10k\"\n[model]\nkind = \"package\"\npath = \"x.pt2\"\n{sections}"
        );
        let text = Text { file: "x.toml", folder: folder.path(), default_name: Some("x"), text: &text };
        let overrides: Vec<String> = overrides.iter().map(|pair| (*pair).to_owned()).collect();
        text.resolve(&overrides, true).map_err(|errors| errors.to_string())
    }

    fn rates(job: &Job) -> Vec<(&str, f64, f64)> {
        let phases = &job.optimizer.phases;
        phases.iter().map(|(name, phase)| (name.as_str(), phase.learning_rate, phase.beta1)).collect()
    }

    #[test]
    fn the_package_settles_what_it_takes_of_text_and_of_arrays() {
        let folder = folder();
        let mut other = manifest();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.txt"), "text").unwrap();
        let array = |name: &str| json!({"name": name, "kind": "float32", "shape": [2]});
        for (data, text) in [
            (json!({"tokens": {"context": 16, "vocabulary": 256}}), true),
            (json!({"arrays": [array("y"), array("x")]}), false),
        ] {
            other["data"] = data;
            write(&at("x.pt2"), &other);
            let kind = if text { "text" } else { "arrays" };
            let of = [format!("data.kind={kind}"), format!("data.path={}", at("a.txt").display())];
            let resolve = |more: &[&str]| {
                let all: Vec<&str> = of.iter().map(String::as_str).chain(more.iter().copied()).collect();
                resolve(&folder, "", &all)
            };
            let job = resolve(&[]).unwrap();
            let names = ["x", "y"].map(str::to_owned).to_vec();
            let expected = if text { (Some(16), None) } else { (None, Some(names)) };
            assert_eq!((job.data.context, job.data.names.clone()), expected);
            assert_eq!(parse_resolved(&render(&job)).unwrap(), Job { shape: None, ..job });
            let given = if text { "data.context=8" } else { "data.names=[\"x\"]" };
            let expected =
                if text { "is 8, and the package was exported for 16" } else { "also takes the array y" };
            let refused = resolve(&[given]).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn the_manifest_settles_what_is_not_given_and_the_resolved_job_reads_back_the_same() {
        let folder = folder();
        let job = resolve(&folder, "", &[]).unwrap();
        assert_eq!((job.job.shard_batch, job.model.conditional), (3, true));
        assert_eq!(rates(&job), [("critic", 1e-3, 0.5), ("generator", 1e-4, 0.5)]);
        assert_eq!((job.phases_per_step(), job.samples_per_step()), (2, 24));
        assert_eq!(job.sample.every_steps, 0, "it draws none");
        assert_eq!(resolve(&folder, "", &["sample.every_steps=5"]).unwrap().sample.every_steps, 5);
        let hash = Package::read(&folder.path().join("x.pt2")).unwrap().hash;
        assert_eq!(job.model.package_hash.as_ref(), Some(&hash));
        let sections = "[optimizer]\nlearning_rate = 1e-5\ndecay_images = 100\nfinal_beta2 = 0.9\n\
                        [optimizer.critic]\nbeta1 = 0\nlearning_rate = 2e-5\n";
        let job = resolve(&folder, sections, &["optimizer.generator.final_learning_rate=1e-6"]).unwrap();
        assert_eq!(rates(&job), [("critic", 2e-5, 0.0), ("generator", 1e-5, 0.5)]);
        let phase = &job.optimizer.phases["generator"];
        assert_eq!((phase.final_learning_rate, phase.final_beta2, phase.beta2), (1e-6, 0.9, 0.99));
        // The record of the run, for which the package need not be there any more.
        drop(folder);
        let text = render(&job);
        assert!(!text.contains("loss") && !text.contains("width"), "{text}");
        let back = parse_resolved(&text).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        assert_eq!(differences(&job, &back), []);
        assert_eq!(back, Job { shape: None, ..job });
    }

    /// A phase's own settings go before those of all phases, and these before the package's.
    #[test]
    fn phases_have_rules_and_schedules_of_their_own() {
        let folder = folder();
        let mut manifest = manifest();
        let sgd = json!({"kind": "sgd", "learning_rate": 0.1, "momentum": 0.5, "clip_norm": 2.0});
        manifest["phases"][0]["optimizer"] = sgd;
        write(&folder.path().join("x.pt2"), &manifest);
        let sections = "[optimizer]\nwarmup_steps = 2\ndecay_steps = 5\nweight_decay = 0.25\n\
                        [optimizer.generator]\nkind = \"adamw\"\nwarmup_images = 0\ndecay = \"linear\"\n";
        let job = resolve(&folder, sections, &["optimizer.critic.nesterov=true"]).unwrap();
        let [critic, generator] = ["critic", "generator"].map(|phase| &job.optimizer.phases[phase]);
        assert_eq!((critic.learning_rate, critic.final_learning_rate, critic.beta1), (0.1, 0.1, 0.0));
        let options = OptimizerOptions {
            weight_decay: Some(0.25),
            momentum: Some(0.5),
            nesterov: Some(true),
            clip_norm: Some(2.0),
            warmup_images: None,
            decay: None,
        };
        assert_eq!(critic.options, options);
        assert_eq!((generator.beta1, generator.final_learning_rate), (0.5, 0.0));
        let (weight_decay, warmup_images, decay) = (Some(0.25), Some(0), Some(Decay::Linear));
        let options = OptimizerOptions { weight_decay, warmup_images, decay, ..OptimizerOptions::default() };
        assert_eq!(generator.options, options);
        // Of all phases there is the schedule alone.
        let options = OptimizerOptions { warmup_images: Some(48), ..OptimizerOptions::default() };
        assert_eq!((job.optimizer.decay_images, job.optimizer.options), (120, options));
        let back = parse_resolved(&render(&job)).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(back, Job { shape: None, ..job });
        // Its settings for another rule have no meaning for this one.
        let job = resolve(&folder, "", &["optimizer.kind=adam"]).unwrap();
        assert_eq!(rates(&job), [("critic", 0.1, 0.9), ("generator", 1e-4, 0.5)]);
        assert_eq!(job.optimizer.phases["critic"].options.clip_norm, Some(2.0));
        for (settings, says) in [
            (&["optimizer.critic.beta1=0.5"][..], "critic.beta1=0.5: is a setting of \"adam\""),
            (&["optimizer.generator.weight_decay=1"], "generator.weight_decay=1: is not for \"adam\""),
            (&["optimizer.kind=adam", "optimizer.momentum=0.5"], "optimizer.momentum=0.5: is a setting of"),
            (&["optimizer.critic.decay=linear"], "critic.decay=linear: needs a length"),
            (&["optimizer.critic.momentum=0", "optimizer.nesterov=true"], "nesterov=true: looks ahead"),
            (&["optimizer.critic.warmup_steps=3", "optimizer.decay_steps=2"], "rises over 72 images"),
            (&["optimizer.critic.clip_norm=0"], "must be above 0.0"),
        ] {
            let refused = resolve(&folder, "", settings).map(|_| settings).unwrap_err();
            assert!(refused.contains(says) && !refused.contains('\n'), "{settings:?}: {refused}");
        }
        assert!(resolve(&folder, "", &["optimizer.momentum=0.25"]).is_ok(), "one phase has a use for it");
    }

    #[test]
    fn settings_of_built_in_objectives_are_refused() {
        let folder = folder();
        let sections = "width = 3\n[loss]\nkind = \"hinge\"\n[augmentation]\nflip = 7\n";
        let refused = resolve(&folder, sections, &["optimizer.discriminator_learning_rate=1"]).unwrap_err();
        for key in ["model.width", "loss.kind", "augmentation.flip", "discriminator_learning_rate"] {
            assert!(refused.contains(key), "{key}: {refused}");
        }
        assert!(
            refused.contains("given, but a package has its own") && refused.contains("4 errors"),
            "{refused}"
        );
        for (settings, says) in [
            (&["job.shard_batch=4"][..], "is 4, and the package was exported for 3"),
            (&["model.conditional=false"], "the package reads the classes of samples; remove it"),
            (&["job.precision=bf16"], "must be \"fp32\" for model.kind = \"package\""),
            (&["optimizer.g.beta1=0.5"], "the package has no phase g; it has critic, generator"),
            (&["optimizer.critic.rho=0.5"], "optimizer.critic.rho=0.5: unknown key"),
            (&["optimizer.critic.momentum=0.5"], "is a setting of \"sgd\""),
            (&["optimizer.critic.beta1=1"], "must be at least 0.0 and below 1.0"),
            (&["optimizer.final_beta2=0.5"], "optimizer.decay_images is 0"),
            (&["model.package_hash=00"], "it was changed"),
            (&["evaluation.best_by=kid"], "the package evaluates no \"kid\"; choose one of \"auto\""),
            (&["data.kind=cifar-10", "data.path=/"], "takes images of 1 channel(s)"),
            (&["data.resize=32"], "takes images of 28 x 28, and the data gives 32 x 32"),
            (&["model.path=absent.pt2"], "absent.pt2: cannot be read"),
            (&["model.path=Cargo.toml"], "Cargo.toml: is a text file, not a package"),
            (&["model.kind=mlp-28"], "given, but model.kind is \"mlp-28\"; set kind = \"package\""),
        ] {
            let refused = resolve(&folder, "", settings).map(|_| settings).unwrap_err();
            assert!(refused.contains(says), "{settings:?}: {refused}");
            assert!(
                !refused.contains('\n') || settings.len() > 1 || settings[0].contains("kind"),
                "{refused}"
            );
        }
        assert!(resolve(&folder, "", &["model.conditional=true", "job.shard_batch=3"]).is_ok());
        let missing = Text { file: "x.toml", folder: folder.path(), default_name: Some("x"), text: "" };
        let given = ["job.steps=1", "data.kind=mnist-10k", "model.kind=package"].map(str::to_owned);
        assert!(missing.resolve(&given, true).unwrap_err().to_string().contains("model.path: missing"));
    }

    #[test]
    fn a_package_that_was_changed_is_another_job() {
        let folder = folder();
        let recorded = resolve(&folder, "", &[]).unwrap();
        let mut changed = manifest();
        changed["phases"][0]["optimizer"]["beta1"] = json!(0.25);
        write(&folder.path().join("x.pt2"), &changed);
        let given = resolve(&folder, "", &[]).unwrap();
        let shown: Vec<String> = differences(&recorded, &given).iter().map(Difference::to_string).collect();
        assert!(shown[0].starts_with("model.path: the package was changed since the run began"), "{shown:?}");
        assert!(shown[1].starts_with("optimizer.critic.beta1: the run was started with 0.5"), "{shown:?}");
        assert_eq!(shown.len(), 2);
        // Elsewhere, it is the same job.
        write(&folder.path().join("y.pt2"), &manifest());
        let moved = resolve(&folder, "", &["model.path=y.pt2"]);
        let there = folder.path().join("y.pt2").display().to_string();
        let moved = moved.or_else(|_| resolve(&folder, "", &[&format!("model.path={there}")])).unwrap();
        assert_eq!(differences(&recorded, &moved), []);
    }
}
