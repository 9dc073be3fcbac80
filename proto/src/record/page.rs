//! The reference page of the records, made from their types.

use std::fmt::Write;

use super::row::{MetricsRow, Profile};
use super::{EvaluationRow, EventKind, FaultKind, Field, PlannedChange, RunOutcome};
use crate::names::names_of;
use crate::record::found::Found;

const HEAD: &str = "\
# The records of a run

<!-- Written by `make records-page` from the types in proto/src/record. Do not edit. -->

Both files are JSON, an object a line, in UTF-8. They are only ever appended to; a last line without an end is being written.
A reader passes over keys and kinds that it does not know: later versions may have more of them.

## metrics.jsonl

One line for each reported step (`metrics.every_steps`), once each. The columns up to the scalars are a function of the job: a
step that is computed again has the same bytes there. A number that is not finite is null.

";

const SCALARS: &str = "
Each scalar of the objective is a column of its own, in place of `scalars`. A GAN has `loss_discriminator` and `loss_generator`,
and `score_real` and `score_fake`, the discriminator's mean output for samples of both kinds: a probability where the loss takes
the output for its logarithm. A VAE has `loss`, `recon` and `kl`, in nats an image. All are means over the global batch of the
step's last phase of that kind; a phase that does not run in every step shows those of the last step in which it ran. Everything that shows columns shows any scalar: TensorBoard as
`scalar/NAME`, Prometheus as `ganglion_scalar{name}`, the dashboard as a curve. Only losses and a GAN's scores are grouped:
`loss_OF` and `OF_loss` as `loss/OF` and `ganglion_loss{module}`, `score_OF` as `score/OF` and `ganglion_score{of}`.

A setting that a schedule or a controller moves over the run is a scalar too, `setting_NAME`, as it is after the step: learning
rates, beta2, the weights of R1 and R2, the probability of augmentation, the half-life of the moving average. TensorBoard has it
as `setting/NAME`, Prometheus as `ganglion_setting{name}`. A setting that stays the same is in `job.toml` and in no row.

A job with `optimizer.clip_norm` has `gradient_norm_PHASE`, or `gradient_norm` if there is one phase: the norm of the phase's
gradient before it is clipped.

A name has at most 64 lower-case letters, digits and underscores, and is none of the columns above; a row has at most 64 scalars.

In `profile` the phases of each name (of a GAN, each network) have an object of milliseconds per step:

";

const EVENTS: &str = "
## events.jsonl

One line for each event: `time`, the seconds since the Unix epoch, `kind`, and the keys of that kind. Of an event that would be
longer than 1 MiB only its length is left, in `bytes_left_out`.

| kind | what happened | keys |
|---|---|---|
";

const DATA: &str = "
## The data set

The object `found` of a `data` event: the data set as the first worker found it.

";

const EVALUATIONS: &str = "
## Evaluations

The line of an `evaluation` is also what `/api/evaluations` lists. [Its metrics](metrics.md#the-metrics) are there by name.

";

/// Writes the page.
pub fn page() -> String {
    let mut page = HEAD.to_string();
    table(&mut page, "column", MetricsRow::FIELDS);
    page.push_str(SCALARS);
    table(&mut page, "key", Profile::FIELDS);
    page.push_str(EVENTS);
    for kind in EventKind::ALL {
        let keys: Vec<String> = kind
            .fields()
            .iter()
            .map(|field| format!("`{}`, {}: {}", field.name, value(field.kind), sentence(field.doc)))
            .collect();
        line(&mut page, &[&format!("`{}`", kind.name()), kind.doc(), &keys.join("<br>")]);
    }
    page.push_str(DATA);
    // The last is not in records.
    let (_, recorded) = Found::FIELDS.split_last().expect("a data set has keys");
    table(&mut page, "key", recorded);
    page.push_str(EVALUATIONS);
    table(&mut page, "key", EvaluationRow::FIELDS);
    page
}

fn table(page: &mut String, first: &str, fields: &[Field]) {
    line(page, &[first, "value", "what it is"]);
    line(page, &["---"; 3]);
    for field in fields {
        line(page, &[&format!("`{}`", field.name), &value(field.kind), field.doc.trim()]);
    }
}

fn line(page: &mut String, cells: &[&str]) {
    writeln!(page, "| {} |", cells.join(" | ")).expect("a text takes what is written");
}

/// Documentation as a part of a sentence.
fn sentence(doc: &str) -> String {
    let doc = doc.trim().trim_end_matches('.');
    let mut letters = doc.chars();
    // A word in capital letters stays.
    match (letters.next(), letters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => doc.to_string(),
    }
}

/// JSON value of a Rust type.
fn value(kind: &str) -> String {
    let one_of = |names: &[&str]| {
        let names = names.iter().filter(|name| **name != "unknown");
        names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ")
    };
    if let Some(inner) = kind.strip_prefix("Option<").and_then(|inner| inner.strip_suffix('>')) {
        return value(inner);
    }
    match kind {
        "u64" | "u32" => "integer".to_string(),
        "f64" => "number".to_string(),
        "bool" => "true or false".to_string(),
        "String" | "Hexadecimal" => "text".to_string(),
        "Scalars" => "numbers".to_string(),
        "FaultKind" => one_of(names_of::<FaultKind>()),
        "RunOutcome" => one_of(names_of::<RunOutcome>()),
        "PlannedChange" => one_of(names_of::<PlannedChange>()),
        _ if kind.starts_with("Vec<") || kind.starts_with('[') => "list".to_string(),
        _ => "object".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_up_to_date() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/records.md");
        let written = std::fs::read_to_string(file).unwrap_or_default();
        assert!(written == page(), "docs/records.md is not what the types say: run `make records-page`");
    }
}
