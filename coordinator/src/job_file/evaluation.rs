//! The sections `[evaluation]` and `[alarms]`.

use std::path::PathBuf;

use ganglion_proto::evaluation::{Alarms, BestBy, Evaluation, Features};
use ganglion_proto::job::DataKind;
use ganglion_proto::record::check_metric;

use super::sections::{CADENCE, MAX_STEPS, address, is_remote};
use super::settings::Settings;

pub(super) fn evaluation(settings: &mut Settings, data: DataKind, check_paths: bool) -> Evaluation {
    let default = Evaluation::default();
    Evaluation {
        every_steps: settings.whole_or("evaluation.every_steps", CADENCE, default.every_steps),
        with_checkpoints: settings.flag_or("evaluation.with_checkpoints", default.with_checkpoints),
        samples: settings.whole_or("evaluation.samples", 10..=1_000_000, default.samples),
        reference: settings.whole_or("evaluation.reference", 0..=100_000_000, default.reference),
        features: features(settings, check_paths).unwrap_or(default.features),
        held_out: held_out(settings, data, check_paths),
        best_by: best_by(settings).unwrap_or(default.best_by),
        best_goal: settings.choice("evaluation.best_goal"),
    }
}

/// Name of the metric that chooses the best checkpoint. Whether there is one of this name is known to the
/// workers, which have the objective.
fn best_by(settings: &mut Settings) -> Option<BestBy> {
    const KEY: &str = "evaluation.best_by";
    let text = settings.text(KEY, "auto")?;
    match check_metric(&text) {
        Ok(()) => Some(BestBy::from(text)),
        Err(error) => {
            settings.fault(KEY, error.0);
            None
        }
    }
}

fn features(settings: &mut Settings, check_paths: bool) -> Option<Features> {
    const KEY: &str = "evaluation.features";
    let text = settings.text(KEY, "digits")?;
    match Features::from(text.clone()) {
        Features::File(_) => {
            let file = settings.absolute(KEY, &text)?;
            if check_paths && !file.is_file() {
                let known = "write \"auto\", \"digits\", \"pixels\" or the path of a TorchScript file";
                settings.fault(KEY, format!("{} is no file; {known}", file.display()));
            }
            Some(Features::File(file))
        }
        known => Some(known),
    }
}

/// Path of the held-out samples; they are of the same kind as the training data.
fn held_out(settings: &mut Settings, data: DataKind, check_paths: bool) -> Option<PathBuf> {
    const KEY: &str = "evaluation.held_out";
    let text = settings.text(KEY, "../data/t10k-images-idx3-ubyte.gz")?;
    let path = PathBuf::from(address(settings, KEY, text)?);
    if data == DataKind::Mnist10k {
        let advice = "remove it, or set data.kind = \"idx\" and data.path to files of your own";
        settings.fault(KEY, format!("given, but all of the bundled digits are trained on; {advice}"));
    } else if check_paths && !is_remote(&path) && !path.exists() {
        settings.fault(
            KEY,
            format!("{} does not exist; name a file or folder of the kind of data.kind", path.display()),
        );
    }
    Some(path)
}

pub(super) fn alarms(settings: &mut Settings) -> Alarms {
    let default = Alarms::default();
    Alarms {
        policy: settings.choice_or("alarms.policy", default.policy),
        after_images: settings.whole_or("alarms.after_images", 0..=MAX_STEPS, default.after_images),
        collapse: settings.number_or("alarms.collapse", 0.0..=1.0, default.collapse),
        overfitting: settings.number_or("alarms.overfitting", 0.0..=10.0, default.overfitting),
        saturated_rows: settings.whole_or("alarms.saturated_rows", 1..=MAX_STEPS, default.saturated_rows),
    }
}
