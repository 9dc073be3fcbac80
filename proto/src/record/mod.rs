//! Records of a run: the types behind the lines of its files.

mod evaluation;
mod event;
pub mod found;
mod named;
mod page;
mod row;
mod schema;
#[cfg(test)]
mod tests;

pub use evaluation::EvaluationRow;
pub use event::{
    BestCheckpoint, EventKind, EventLine, FaultKind, MemberLine, PlannedChange, RunEvent, RunOutcome,
    SavedCheckpoint, Unread,
};
pub use named::{Named, Profiles, Scalars};
pub use page::page;
pub use row::{MetricsRow, Profile};
pub use schema::Field;
pub(crate) use schema::record;

use crate::bounds::list;
use crate::error::Malformed;
use crate::wire;

/// Number of the format of `metrics.jsonl` and `events.jsonl` that this version writes, and the
/// newest that it reads in full. Keys and kinds are added without a new number.
pub const FORMAT: u32 = 1;

/// Most scalars of a row or of an evaluation.
pub const SCALARS: usize = 64;
/// Longest name of a scalar, in bytes.
pub const NAME_BYTES: usize = 64;

/// Further keys beside the dashboard's curves. No scalar may have one of these names.
const BESIDE_CURVES: [&str; 2] = ["rows", "scalars"];

/// Checks the name of a scalar of a metrics row.
///
/// # Errors
/// The name cannot be a column of `metrics.jsonl`; the text says why.
pub fn check_scalar(name: &str) -> Result<(), Malformed> {
    let mut taken = MetricsRow::FIELDS.iter().chain(Profile::FIELDS).map(|field| field.name);
    // Scalars are columns of the row itself, beside the fixed ones.
    if taken.any(|taken| taken == name) || BESIDE_CURVES.contains(&name) {
        return Err(Malformed(format!(
            "a scalar is named {name}, as a fixed column is: give it another name"
        )));
    }
    check_name(name)
}

/// Checks the name of a metric of an evaluation.
///
/// # Errors
/// The name cannot be a key of an evaluation's metrics; the text says why.
pub fn check_metric(name: &str) -> Result<(), Malformed> {
    check_name(name)
}

fn check_name(name: &str) -> Result<(), Malformed> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    // Its start only: a peer's name may be long.
    let start: String = name.chars().take(NAME_BYTES).collect();
    Err(Malformed(format!(
        "{start:?} is not the name of a scalar: 1 to {NAME_BYTES} lower-case letters, digits and underscores"
    )))
}

pub(crate) fn to_wire(scalars: &Scalars) -> Vec<wire::Scalar> {
    scalars.iter().map(|(name, value)| wire::Scalar { name: name.to_string(), value }).collect()
}

/// Checks the scalars of a metrics row.
pub(crate) fn of_row(scalars: Vec<wire::Scalar>) -> Result<Scalars, Malformed> {
    // First the names, as two of them could be one column of the row.
    scalars.iter().try_for_each(|scalar| check_scalar(&scalar.name))?;
    checked(scalars.into_iter().map(|scalar| (scalar.name, scalar.value)).collect())
}

/// Checks named values whose names are in an object of their own.
pub(crate) fn checked(scalars: Vec<(String, f64)>) -> Result<Scalars, Malformed> {
    let scalars = list(scalars, SCALARS, "the list of scalars")?;
    for (at, (name, _)) in scalars.iter().enumerate() {
        check_name(name)?;
        // In an object the second value would replace the first.
        if scalars[..at].iter().any(|(earlier, _)| earlier == name) {
            return Err(Malformed(format!("the scalar {name} comes twice")));
        }
    }
    Ok(scalars.into_iter().collect())
}
