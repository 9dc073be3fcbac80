//! Sections of a job file: their keys, limits and defaults.
//!
//! A reader takes every key even where an earlier one was wrong, so that all errors show at once
//! and no known key is mistaken for an unknown one.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use ganglion_proto::PHASES;
use ganglion_proto::job::{
    ArchiveKind, Background, Checkpoint, ClassOrder, Data, DataKind, Fit, General, Job, Length, Metrics,
    ModelKind, NonFinite, Orientation, Precision, Reduction, Sample, Tf32,
};

use ganglion_storage::{Address, AddressError};

use super::models::{augmentation, loss, model};
use super::settings::Settings;
use super::{models, optimizer};

/// Maximum number of steps; more is taken for a typing error.
pub(super) const MAX_STEPS: u64 = 1_000_000_000_000;
/// Maximum number of passes over the data; more is taken for a typing error.
const MAX_EPOCHS: u64 = 1_000_000;
/// Upper bound for numbers of samples, so that sums of them cannot overflow.
const MAX_SAMPLES: u64 = 1 << 62;
/// Largest seed: the limit of TOML's integers.
const MAX_SEED: u64 = i64::MAX.unsigned_abs();
/// Maximum length of a run's name, in bytes; it names a folder.
const MAX_NAME_BYTES: usize = 64;

/// Range of a cadence in steps or samples; 0 means never.
pub(super) const CADENCE: RangeInclusive<u64> = 0..=MAX_STEPS;

/// Reads all sections. The result is valid only if `settings` ends without an error.
pub(super) fn read(settings: &mut Settings, default_name: Option<&str>, check_paths: bool) -> Job {
    let general = general(settings, default_name);
    // A run's own record has no default for its name.
    let data = data(settings, check_paths, default_name.is_none());
    // Before loss and optimizer, whose defaults follow from the model's paper.
    let model = model(settings, check_paths);
    let loss = loss(settings, model.kind);
    let mut job = Job {
        optimizer: optimizer::optimizer(settings, loss.kind, model.kind),
        augmentation: augmentation(settings),
        checkpoint: checkpoint(settings),
        sample: sample(settings),
        metrics: metrics(settings),
        evaluation: super::evaluation::evaluation(settings, data.kind, check_paths),
        alarms: super::evaluation::alarms(settings),
        shape: None,
        job: general,
        data,
        model,
        loss,
    };
    // After all keys were taken: these checks compare settings, and are skipped where one of them is
    // wrong.
    models::refuse_others(settings, job.model.kind);
    let package = super::package::read(settings, &job, check_paths);
    super::package::apply(settings, &mut job, package.as_ref());
    // Once a step has its number of samples, and before what needs the lengths of schedules.
    optimizer::lengths(settings, &mut job);
    super::package::optimizers(settings, &mut job, package.as_ref(), default_name.is_none());
    check_image(settings, &job);
    models::check(settings, &job);
    optimizer::check(settings, &job);
    check_samples(settings, &job);
    check_precision(settings, &job);
    // A run's own record, which needs no default for its name, may be of an objective whose steps have more
    // phases than its GAN's.
    let phases = if default_name.is_some() { job.phases_per_step() } else { PHASES.into() };
    super::exclusions::check(settings, &job, phases);
    job.without_unused()
}

fn general(settings: &mut Settings, default_name: Option<&str>) -> General {
    General {
        name: name(settings, default_name),
        seed: settings.whole_or("job.seed", 0..=MAX_SEED, 0),
        length: length(settings),
        data_shards: settings.whole_or("job.data_shards", 1..=65_536, 8),
        shard_batch: settings.whole_or("job.shard_batch", 1..=65_536, 8),
        // A part of the fingerprint of the environment (D11): another number of threads may give other
        // bits. One is what every machine can have.
        threads: settings.whole_or("job.threads", 1..=1024, 1),
        // Five heartbeats are due in it, and each may come late on a busy machine.
        failure_deadline: settings.number_or("job.failure_deadline", 0.5..=3600.0, 5.0),
        non_finite: settings.choice_or("job.non_finite", NonFinite::Skip),
        precision: settings.choice_or("job.precision", Precision::Fp32),
        tf32: settings.choice_or("job.tf32", Tf32::default()),
        reduction: settings.choice_or("job.reduction", Reduction::Tree),
        deterministic: settings.flag_or("job.deterministic", true),
    }
}

/// Name of the run, by default that of the file.
fn name(settings: &mut Settings, default_name: Option<&str>) -> String {
    let given = settings.text("job.name", "my-first-gan");
    // The text was refused already; a second error for the same key would mislead.
    if !settings.sound(&["job.name"]) {
        return String::new();
    }
    let rule = format!(
        "1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 . _ - and no dot in front, for it names the run's \
             folder"
    );
    match (&given, default_name) {
        (Some(name), _) if !is_name(name) => {
            settings
                .fault("job.name", format!("\"{name}\" is no name; write {rule}, such as \"my-first-gan\""));
        }
        (None, Some(stem)) if !is_name(stem) => {
            settings.fault(
                "job.name",
                format!(
                    "missing, and the file's own name \"{stem}\" cannot serve; add name = \
                     \"...\" of {rule}"
                ),
            );
        }
        (None, None) => settings.fault("job.name", "missing; add name = \"my-first-gan\""),
        _ => {}
    }
    given.unwrap_or_else(|| default_name.unwrap_or_default().to_owned())
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

fn length(settings: &mut Settings) -> Length {
    settings.override_either("job.steps", "job.epochs");
    let steps = settings.whole("job.steps", 1..=MAX_STEPS, 20_000);
    let epochs = settings.whole("job.epochs", 1..=MAX_EPOCHS, 10);
    match (settings.is_given("job.steps"), settings.is_given("job.epochs")) {
        (true, true) if settings.sound(&["job.steps", "job.epochs"]) => {
            settings.fault("job.epochs", "given together with job.steps; keep one of them")
        }
        (false, false) => settings.fault(
            "job.steps",
            "missing, and so is job.epochs; say how long to train, for example steps = 20000 in \
                 [job]",
        ),
        _ => {}
    }
    match epochs {
        Some(epochs) => Length::Epochs(epochs),
        None => Length::Steps(steps.unwrap_or(1)),
    }
}

/// Reads section `[data]`, of the record of a run or of a new job.
pub(super) fn data(settings: &mut Settings, check_paths: bool, is_record: bool) -> Data {
    let kind = settings.choice("data.kind");
    if kind.is_none() && settings.sound(&["data.kind"]) {
        settings.fault(
            "data.kind",
            "missing; add for example kind = \"mnist-10k\" in [data], the digits that need no \
                 download",
        );
    }
    let path = settings.text("data.path", "../data/images");
    let path = path.and_then(|path| address(settings, "data.path", path)).map(PathBuf::from);
    if let Some(kind) = kind {
        check_path(settings, kind, path.as_deref(), check_paths);
    }
    let resize = settings.whole("data.resize", 1..=4096, 64);
    let crop = settings.whole("data.crop", 1..=4096, 64);
    let channels = settings.whole("data.channels", 1..=3, 3);
    let image_extension = image_extension(settings);
    let orientation = settings.choice::<Orientation>("data.orientation");
    let background = background(settings);
    let class_order = settings.choice::<ClassOrder>("data.class_order");
    let of_pictures = [
        ("data.image_extension", image_extension.is_some()),
        ("data.orientation", orientation.is_some()),
        ("data.class_order", class_order.is_some()),
    ];
    for (key, given) in of_pictures {
        if given && kind.is_some_and(|kind| kind != DataKind::Folder) {
            settings.fault(key, "is of use with data.kind = \"folder\" alone; remove it");
        }
    }
    let fit = settings.choice_or("data.fit", Fit::Crop);
    check_fit(settings, fit, resize, crop);
    if background.is_some() && fit == Fit::Crop && kind.is_some_and(|kind| kind != DataKind::Folder) {
        settings.fault(
            "data.background",
            "is of use with data.kind = \"folder\" or data.fit = \"pad\" alone; remove it",
        );
    }
    let rows = super::rows::read(settings, kind, check_paths);
    let exclusions = super::exclusions::read(settings, path.as_deref());
    let channels = check_channels(settings, kind, channels);
    let mut data = Data::plain(kind.unwrap_or(DataKind::Mnist10k), path, channels);
    // A run that began before there was a setting goes on without it.
    if is_record {
        (data.background, data.class_order) = (None, None);
    }
    Data {
        exclusions,
        resize,
        // A resized picture is square only if it was before, and models take squares.
        crop: crop.or(resize),
        image_extension,
        orientation: orientation.unwrap_or_default(),
        fit,
        background: background.or(data.background),
        class_order: class_order.or(data.class_order),
        context: rows.context,
        tokenizer: rows.tokenizer,
        tokenizer_hash: rows.tokenizer_hash,
        names: rows.names,
        ..data
    }
}

/// Colour behind transparent parts, and around padded pictures.
fn background(settings: &mut Settings) -> Option<Background> {
    let text = settings.text("data.background", "white")?;
    let background = text.parse::<Background>();
    background.map_err(|problem| settings.fault("data.background", problem.to_string())).ok()
}

/// Checks that a picture that is padded is scaled, and not cut.
fn check_fit(settings: &mut Settings, fit: Fit, resize: Option<u32>, crop: Option<u32>) {
    if fit == Fit::Crop || !settings.sound(&["data.fit", "data.resize", "data.crop"]) {
        return;
    }
    match (resize, crop) {
        (None, _) => settings.fault("data.fit", "\"pad\" needs the size of the square; set data.resize"),
        (Some(_), Some(crop)) if resize != Some(crop) => {
            settings.fault("data.crop", "cuts, and data.fit = \"pad\" does not; remove one of the two");
        }
        _ => {}
    }
}

/// Extension of the image files to train on.
fn image_extension(settings: &mut Settings) -> Option<String> {
    let text = settings.text("data.image_extension", "jpg")?;
    let extension = text.trim_start_matches('.').to_ascii_lowercase();
    let is_one = !extension.is_empty() && extension.len() <= 64;
    if !is_one || extension.contains(['/', '\\', '*']) || extension.chars().any(char::is_control) {
        settings
            .fault("data.image_extension", "must be an ending of files, such as \"jpg\" or \"input.png\"");
    }
    Some(extension)
}

/// Checks a path against the requirements of its kind of data.
fn check_path(settings: &mut Settings, kind: DataKind, path: Option<&Path>, check_paths: bool) {
    let needed = match kind {
        DataKind::Mnist10k => None,
        DataKind::Idx => Some("an IDX file of images, or the folder that holds it"),
        DataKind::Cifar10 => Some("the folder that holds data_batch_1.bin to data_batch_5.bin"),
        DataKind::Folder => Some("a folder of pictures, or a zip or tar file of them"),
        DataKind::Text => Some("a file of text, or a folder of them"),
        DataKind::Arrays => Some("a folder of files NAME.npy, or one such file"),
    };
    let problem = match (needed, path) {
        (None, Some(_)) => {
            format!(
                "given, but \"{kind}\" comes with the program; remove it, or set data.kind = \
                     \"idx\" to read it"
            )
        }
        (Some(needed), None) if settings.sound(&["data.path"]) => {
            format!("missing; \"{kind}\" needs path = \"...\" in [data], {needed}")
        }
        (Some(needed), Some(path)) if check_paths && !is_remote(path) && !is_readable(kind, path) => {
            let state = if path.exists() { "is no folder" } else { "does not exist" };
            let shown = path.display();
            format!("{shown} {state}; \"{kind}\" needs {needed}")
        }
        _ => return,
    };
    settings.fault("data.path", problem);
}

/// Whether a place is a URL; its contents are then checked by the workers.
pub(super) fn is_remote(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains("://"))
}

/// Whether a path has the file type that its kind reads.
fn is_readable(kind: DataKind, path: &Path) -> bool {
    match kind {
        DataKind::Mnist10k | DataKind::Idx | DataKind::Text | DataKind::Arrays => path.exists(),
        DataKind::Cifar10 => path.is_dir(),
        DataKind::Folder => path.is_dir() || path.is_file() && ArchiveKind::of(path).is_some(),
    }
}

/// Number of channels for a kind of data; the user may choose it for folders only.
fn check_channels(settings: &mut Settings, kind: Option<DataKind>, given: Option<u32>) -> u32 {
    if given == Some(2) {
        settings.fault("data.channels", "must be 1 for grey or 3 for colour, but is 2");
    }
    let own = match kind {
        Some(DataKind::Mnist10k | DataKind::Idx) => 1,
        Some(DataKind::Cifar10) => 3,
        // Refused where it is given.
        Some(DataKind::Text | DataKind::Arrays) => return 0,
        Some(DataKind::Folder) | None => return given.unwrap_or(3),
    };
    if let (Some(kind), Some(given)) = (kind, given)
        && given != own
        && settings.sound(&["data.channels"])
    {
        settings.fault("data.channels", format!("is {given}, but \"{kind}\" has {own}; remove it"));
    }
    own
}

fn checkpoint(settings: &mut Settings) -> Checkpoint {
    let every_epochs = settings.whole("checkpoint.every_epochs", 0..=MAX_EPOCHS, 1);
    // A user who asks for epochs alone does not want the default's steps as well.
    let every_steps = if every_epochs > Some(0) { 0 } else { 1000 };
    let url = settings.text("checkpoint.url", "file:///mnt/checkpoints");
    Checkpoint {
        every_steps: settings.whole_or("checkpoint.every_steps", CADENCE, every_steps),
        every_epochs: every_epochs.unwrap_or(0),
        // Three, so that a damaged newest one still has two before it.
        keep_last: settings.whole_or("checkpoint.keep_last", 0..=1_000_000, 3),
        url: url.and_then(|url| address(settings, "checkpoint.url", url)),
    }
}

/// Address of files: a URL unchanged, a path made absolute.
pub(super) fn address(settings: &mut Settings, key: &'static str, url: String) -> Option<String> {
    match Address::parse(&url) {
        Ok(Address::Folder(_)) if !url.contains("://") => {
            let folder: PathBuf = settings.absolute(key, &url)?;
            folder.to_str().map(str::to_owned)
        }
        Ok(_) => Some(url),
        // The error names the setting: a secret must not reach a terminal or a log with it.
        Err(problem @ AddressError::Credentials) => {
            settings.conceal(key);
            settings.fault(key, problem.to_string());
            None
        }
        Err(problem) => {
            settings.fault(key, format!("\"{url}\" {problem}"));
            None
        }
    }
}

fn sample(settings: &mut Settings) -> Sample {
    Sample {
        every_steps: settings.whole_or("sample.every_steps", CADENCE, 1000),
        count: settings.whole_or("sample.count", 1..=1024, 50),
    }
}

fn metrics(settings: &mut Settings) -> Metrics {
    Metrics { every_steps: settings.whole_or("metrics.every_steps", 1..=MAX_STEPS, 10) }
}

/// Checks `job.precision`: the precision of a user's own network is that network's.
fn check_precision(settings: &mut Settings, job: &Job) {
    let kind = job.model.kind;
    let is_own = matches!(kind, ModelKind::Script | ModelKind::Package);
    if is_own && job.job.precision != Precision::Fp32 {
        settings.fault("job.precision", format!("must be \"fp32\" for model.kind = \"{kind}\"; remove it"));
    }
}

/// Checks the image that leaves the data pipeline against the one that the model takes, as far as
/// the job determines them: the size of other people's files is known only when they are read.
fn check_image(settings: &mut Settings, job: &Job) {
    let keys = ["data.kind", "data.resize", "data.crop", "data.channels", "model.kind"];
    if !settings.sound(&keys) {
        return;
    }
    if !job.data.kind.is_images() {
        super::rows::check(settings, job);
        return;
    }
    check_side(settings, job);
    if job.model.kind == ModelKind::Mlp28 && job.data.channels != 1 {
        let model = job.model.kind;
        let data = job.data.kind;
        settings.fault(
            "model.kind",
            format!(
                "\"{model}\" takes images of 1 channel, but data.kind = \"{data}\" gives {}; \
                 choose \"dcgan-28\", or for a folder data.channels = 1",
                job.data.channels
            ),
        );
    }
}

fn check_side(settings: &mut Settings, job: &Job) {
    let model = job.model.kind;
    let data = job.data.kind;
    let Some(side) = job.model.kind.side() else {
        // The user's networks report their sizes themselves, when they are loaded.
        return;
    };
    let whole = job.data.resize.or(own_side(data));
    let cut = job.data.crop.or(whole);
    // The key that the user can change, and not one that was derived from it.
    let key = if settings.is_given("data.crop") { "data.crop" } else { "data.resize" };
    match (whole, cut) {
        (Some(whole), Some(cut)) if cut > whole => settings.fault(
            "data.crop",
            format!(
                "cuts {cut} pixels out of an image with a shorter side of {whole}; make \
                 data.resize at least {cut}"
            ),
        ),
        (_, Some(cut)) if cut != side && settings.is_given(key) => settings.fault(
            key,
            format!(
                "gives images of {cut} x {cut}, but model.kind = \"{model}\" takes {side} x \
                 {side}; set it to {side}"
            ),
        ),
        (_, Some(cut)) if cut != side => settings.fault(
            "model.kind",
            format!(
                "\"{model}\" takes images of {side} x {side}, but \"{data}\" has {cut} x \
                 {cut}; set data.resize = {side}"
            ),
        ),
        _ => {}
    }
}

/// Pixels a side of the samples as they lie there, where the kind of data determines them.
fn own_side(data: DataKind) -> Option<u32> {
    match data {
        DataKind::Mnist10k => Some(28),
        DataKind::Cifar10 => Some(32),
        DataKind::Idx | DataKind::Folder | DataKind::Text | DataKind::Arrays => None,
    }
}

/// Pixels a side of the samples that leave the data pipeline, where the job determines them.
pub(super) fn side(data: &Data) -> Option<u32> {
    data.crop.or(data.resize).or(own_side(data.kind))
}

/// Checks that the sample numbers of the whole run stay in range.
fn check_samples(settings: &mut Settings, job: &Job) {
    let keys = ["job.steps", "job.data_shards", "job.shard_batch", "loss.discriminator_steps"];
    let Length::Steps(steps) = job.job.length else {
        return;
    };
    let samples = steps.checked_mul(job.samples_per_step());
    if settings.sound(&keys) && samples.is_none_or(|samples| samples > MAX_SAMPLES) {
        let per_step = job.samples_per_step();
        settings.fault(
            "job.steps",
            format!(
                "{steps} steps of {per_step} samples are more than {MAX_SAMPLES} samples; \
                 train for fewer steps"
            ),
        );
    }
}
