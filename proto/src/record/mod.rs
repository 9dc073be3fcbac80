//! Records of a run: the types behind the lines of its files.

mod named;
mod row;

pub use named::{Named, Profiles, Scalars};
pub use row::{MetricsRow, Profile};

use crate::bounds::list;
use crate::error::Malformed;
use crate::wire;

/// Most scalars of a row or of an evaluation.
pub const SCALARS: usize = 64;
/// Longest name of a scalar, in bytes.
pub const NAME_BYTES: usize = 64;

/// Columns of `metrics.jsonl` that every objective has. No scalar may have one of these names.
const COLUMNS: [&str; 12] = [
    "step",
    "images_seen",
    "ledger",
    "skipped",
    "epoch",
    "time",
    "generation",
    "world_size",
    "images_per_second",
    "gpu_memory_bytes",
    "gpu_utilisation",
    "profile",
];
/// Keys of the dashboard's curves that are no columns. No scalar may have one of these names.
const CURVES: [&str; 2] = ["rows", "scalars"];

/// Checks the name of a scalar of a metrics row.
///
/// # Errors
/// The name cannot be a column of `metrics.jsonl`; the text says why.
pub fn check_scalar(name: &str) -> Result<(), Malformed> {
    if COLUMNS.contains(&name) || CURVES.contains(&name) {
        return Err(Malformed(format!(
            "a scalar is named {name}, as a fixed column is: give it another name"
        )));
    }
    check_name(name)
}

fn check_name(name: &str) -> Result<(), Malformed> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
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
    scalars.iter().try_for_each(|scalar| check_scalar(&scalar.name))?;
    from_wire(scalars)
}

/// Checks named values whose names are in an object of their own.
pub(crate) fn from_wire(scalars: Vec<wire::Scalar>) -> Result<Scalars, Malformed> {
    let scalars = list(scalars, SCALARS, "the list of scalars")?;
    for (at, scalar) in scalars.iter().enumerate() {
        check_name(&scalar.name)?;
        if scalars[..at].iter().any(|earlier| earlier.name == scalar.name) {
            return Err(Malformed(format!("the scalar {} comes twice", scalar.name)));
        }
    }
    Ok(scalars.into_iter().map(|scalar| (scalar.name, scalar.value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(names: &[&str]) -> Result<Scalars, Malformed> {
        of_row(names.iter().map(|name| wire::Scalar { name: (*name).to_string(), value: 1.5 }).collect())
    }

    #[test]
    fn scalars_keep_their_order_and_their_bits() {
        let scalars: Scalars = [("recon", 0.1 + 0.2), ("kl", f64::NEG_INFINITY)].into_iter().collect();
        let read = of_row(to_wire(&scalars)).unwrap();
        assert_eq!(read, scalars);
        assert_eq!(read.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["recon", "kl"]);
    }

    #[test]
    fn scalars_that_cannot_be_columns_are_refused() {
        for (names, text) in [
            (&["time"][..], "named time, as a fixed column is"),
            (&["rows"], "give it another name"),
            (&["kl", "recon", "kl"], "the scalar kl comes twice"),
            (&[""], "\"\" is not the name of a scalar"),
            (&["Kl"], "lower-case letters"),
            (&["a\"b"], "is not the name of a scalar"),
            (&[&"x".repeat(NAME_BYTES + 1)], "1 to 64"),
        ] {
            let refused = read(names).unwrap_err().to_string();
            assert!(refused.contains(text), "{refused}");
        }
        let many: Vec<String> = (0..=SCALARS).map(|at| format!("s{at}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(
            read(&many).unwrap_err().to_string(),
            "malformed message: the list of scalars has 65 items, and at most 64 are allowed"
        );
        assert!(read(&many[1..]).is_ok() && read(&[]).is_ok());
    }
}
