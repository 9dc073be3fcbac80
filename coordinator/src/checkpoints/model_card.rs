//! The model card of the best checkpoint, `model-card.md` beside it: its description, origin,
//! quality and limits. The form follows Mitchell et al. (2019), "Model cards for model reporting".

use std::fmt::Write;

use ganglion_membership::Passport;
use ganglion_proto::evaluation::{EvaluationRow, names};
use ganglion_proto::job::{Family, Job};
use ganglion_proto::record::found::Found;

use crate::checkpoints::best::{Best, folder};
use crate::job_file;
use crate::journal::Counts;

/// Subject of a model card.
pub(crate) struct Subject<'a> {
    /// The job.
    pub job: &'a Job,
    /// Unique name of the run.
    pub run: &'a str,
    /// Number of starts of a coordinator and of memberships of the group.
    pub counts: Counts,
    /// Fingerprint of the environment that results depend on.
    pub passport: Option<&'a Passport>,
    /// Number of samples in the data set.
    pub samples: Option<u64>,
    /// Data set as a worker found it.
    pub found: Option<&'a Found>,
    /// The best checkpoint.
    pub best: &'a Best,
    /// Evaluation of that checkpoint.
    pub row: &'a EvaluationRow,
}

/// Renders the card as Markdown.
pub(crate) fn render(subject: &Subject) -> String {
    let Subject { job, best, row, .. } = subject;
    let mut card = format!("# Model card: {} at step {}\n\n", job.job.name, best.step);
    model(&mut card, job, &folder(best.step));
    line(&mut card, "images seen in training", &(best.step * job.samples_per_step()).to_string());
    data(&mut card, subject);
    metrics(&mut card, best, row);
    lineage(&mut card, subject);
    let draws = names::ALL.iter().any(|name| row.get(name).is_some());
    card.push_str(if draws { USE_OF_SAMPLES } else { USE });
    card.push_str("- Licence and terms of the training data bind whoever uses what was learned from them.\n");
    let _ = write!(card, "\n## Settings\n\n```toml\n{}```\n", settings(job));
    card
}

/// Intended use and limits of a model that draws samples.
const USE_OF_SAMPLES: &str = "
## Intended use

Drawing images like those of the training data, for study and for comparison with other models. Whoever puts the
model to another use must judge whether it is fit for it.

## Limits

- It can draw nothing that its training data did not show, and repeats what is one-sided in them.
- The figures above are estimates from samples, by features that were made for other images than yours may be; they
  compare models on the same data and say little in themselves.
- A low share of memorised samples does not prove that no training sample can be drawn. Do not give a model of private
  data away on its account.
";

/// Intended use and limits of a model that draws none.
const USE: &str = "
## Intended use

Images like those of the training data, for study and for comparison with other models. Whoever puts the model to
another use must judge whether it is fit for it.

## Limits

- It knows nothing that its training data did not show, and repeats what is one-sided in them.
- The figures above are estimates from the held-out samples, and hold for data like these.
";

fn model(card: &mut String, job: &Job, folder: &str) {
    let family = job.model.kind.family();
    let (what, file, weights) = match family {
        Family::Gan => (
            "A generator of images, trained as half of a generative adversarial network by Ganglion.",
            "generator_ema.safetensors",
            "the moving average over the last steps, which samples should be drawn from",
        ),
        Family::Vae => (
            "A variational autoencoder of images, trained by Ganglion.",
            "weights_ema.safetensors",
            "of encoder and decoder the moving averages over the last steps",
        ),
        Family::Transformer => (
            "An autoregressive transformer, trained by Ganglion.",
            "weights_ema.safetensors",
            "those that samples are drawn with",
        ),
        Family::Package => (
            "A model trained by Ganglion from a package, an objective written in PyTorch.",
            "weights_ema.safetensors",
            "of each network the moving average over the last steps, where it has one",
        ),
    };
    // Writing to a text cannot fail, here and below.
    let _ = write!(card, "{what} The weights are\n`{folder}/{file}`: {weights}.\n\n## Model\n\n");
    line(card, "networks", &job.model.kind.to_string());
    if let Some(hash) = &job.model.package_hash {
        line(card, "hash of the package", hash);
    }
    if job.model.conditional {
        let whose = if family == Family::Package { "the package" } else { "both networks" };
        line(card, "classes", &format!("known to {whose}, from the data's labels"));
    }
    if matches!(family, Family::Gan | Family::Vae) {
        line(card, "noise", &format!("{} numbers of N(0, 1)", job.model.latent_dim));
    }
    if family == Family::Gan {
        line(card, "objective", &job.loss.kind.to_string());
    }
    if let Some(vae) = &job.model.vae {
        let pixels = if vae.binarise { ", of binarised pixels" } else { "" };
        let objective =
            format!("evidence lower bound, {} likelihood{pixels}, beta {}", vae.likelihood, vae.beta);
        line(card, "objective", &objective);
    }
}

fn line(card: &mut String, what: &str, value: &str) {
    let _ = writeln!(card, "- {what}: {value}");
}

fn data(card: &mut String, subject: &Subject) {
    let _ = write!(card, "\n## Data\n\n");
    let data = &subject.job.data;
    let file = data.path.as_deref().and_then(|path| path.file_name());
    let place = file.map(|file| format!(", `{}`", file.to_string_lossy())).unwrap_or_default();
    line(card, "kind", &format!("{}{place}", data.kind));
    match (subject.found, subject.samples) {
        (Some(found), _) => {
            line(card, "samples", &found.samples_line());
            found.classes_line().iter().for_each(|classes| line(card, "classes", classes));
            found.left_out_line().iter().for_each(|left_out| line(card, "files left out", left_out));
            found.warnings().iter().for_each(|warning| line(card, "note", warning));
        }
        (None, Some(samples)) => line(card, "samples", &samples.to_string()),
        (None, None) => {}
    }
    if let Some(hash) = subject.passport.and_then(|passport| passport.0.get("data")) {
        line(card, "hash", hash);
    }
    let held_out = if subject.job.evaluation.held_out.is_some() { "yes" } else { "none" };
    line(card, "held out from training, for evaluation", held_out);
}

fn metrics(card: &mut String, best: &Best, row: &EvaluationRow) {
    let _ = write!(card, "\n## Evaluation\n\n");
    line(
        card,
        "chosen by",
        &format!("{} = {:.4}, the best of this run's checkpoints", best.metric, best.value),
    );
    line(card, "features", &row.features);
    if row.held_out > 0 {
        line(card, "held-out samples of the objective's own scalars", &row.held_out.to_string());
    }
    let _ = write!(card, "\n| metric | value |\n|---|---|\n");
    for (name, value) in row.metrics.iter() {
        let _ = writeln!(card, "| {} | {value:.4} |", name.replace('_', " "));
    }
}

fn lineage(card: &mut String, subject: &Subject) {
    let _ = write!(card, "\n## Lineage\n\n");
    line(card, "run", subject.run);
    line(card, "seed", &subject.job.job.seed.to_string());
    let Counts { terms, generations, is_whole } = subject.counts;
    let bound = if is_whole { "" } else { "at least " };
    line(card, "starts of a coordinator", &format!("{bound}{terms}"));
    line(card, "memberships of the group", &format!("{bound}{generations}"));
    for (item, value) in
        subject.passport.iter().flat_map(|passport| &passport.0).filter(|(item, _)| *item != "data")
    {
        line(card, &item.replace('_', " "), value);
    }
}

/// The resolved job, without the comments of its file and without addresses, which may hold a secret.
fn settings(job: &Job) -> String {
    let mut job = job.clone();
    job.checkpoint.url = None;
    let text = job_file::render(&job);
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect::<String>()
        .trim_start()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_file::{Source, read};
    use ganglion_proto::record::found::Class;

    #[test]
    fn a_card_tells_what_the_model_came_from_and_keeps_secrets() {
        let job = read(&Source::Embedded, &["checkpoint.url=memory://s3cret".to_string()]);
        let mut job = job.unwrap_or_else(|_| read(&Source::Embedded, &[]).unwrap());
        job.checkpoint.url = Some("s3://key:s3cret@bucket".to_string());
        let passport =
            Passport([("data", "0a1b"), ("build", "9")].map(|(k, v)| (k.to_string(), v.to_string())).into());
        let best = Best { step: 1000, metric: "frechet_distance".to_owned(), value: 1.5 };
        let metrics = [("frechet_distance", 1.5), ("kid", f64::NAN)].into_iter().collect();
        let row = EvaluationRow {
            step: 1000,
            metrics,
            features: "digits ab".to_string(),
            held_out: 0,
            seconds: 2.0,
        };
        let mut found = Found { samples: 10_000, width: 28, height: 28, channels: 1, ..Found::default() };
        found.leave_out(".gif", "a.gif");
        let class = |name: &str| Class { name: name.to_string(), samples: 5_000 };
        found.add_classes("folder", [class("cat"), class("dog")].into_iter());
        let card = render(&Subject {
            job: &job,
            found: Some(&found),
            run: "r-u-n",
            counts: Counts { terms: 3, generations: 7, is_whole: false },
            passport: Some(&passport),
            samples: Some(10_000),
            best: &best,
            row: &row,
        });
        for expected in [
            "step-00001000/generator_ema.safetensors",
            "- hash: 0a1b",
            "- samples: 10000 samples of 28 x 28 pixels, grey",
            "- classes: 2 classes by folder: cat (5000), dog (5000)",
            "- files left out: 1 .gif (a.gif)",
            "- note: pictures in formats that are not read",
            "- run: r-u-n",
            "- starts of a coordinator: at least 3",
            "- memberships of the group: at least 7",
            "- build: 9",
            "| frechet distance | 1.5000 |",
            "images seen in training: 64000",
            "learning_rate = 0.001",
        ] {
            assert!(card.contains(expected), "{expected}\n{card}");
        }
        assert!(!card.contains("s3cret"), "{card}");
    }
}
