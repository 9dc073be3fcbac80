//! Verdict on two builds: whether different bits have different version numbers.

/// Result of comparing two builds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Version numbers of their arithmetic (`NUMERICS`): the base's, then this tree's.
    pub numerics: [u32; 2],
    /// Differences of this tree's bits from the base's.
    pub differences: Vec<String>,
    /// Failures that another number cannot mend.
    pub failures: Vec<String>,
}

/// Returns the text for two builds that are consistent; otherwise the reason why they are not.
pub(crate) fn verdict(found: &Found) -> Result<String, String> {
    let [base, here] = found.numerics;
    if !found.failures.is_empty() {
        return Err("that is no matter of another NUMERICS".to_string());
    }
    if here < base {
        return Err(format!("NUMERICS fell from {base} to {here}; a number is never used again"));
    }
    let raised = here > base;
    match (found.differences.is_empty(), raised) {
        (true, false) => Ok("every bit is the same".to_string()),
        (false, true) => Ok(format!("different bits, and NUMERICS went from {base} to {here}, as it should")),
        (true, true) => Ok(format!(
            "every bit is the same here, and NUMERICS went from {base} to {here}: runs of the base cannot go on with \
             this build"
        )),
        (false, false) => Err(format!(
            "different bits, and NUMERICS is {here} in both builds: their workers would train together. If the bits are \
             to change, raise it in worker/src/engine/passport.rs"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(numerics: [u32; 2], differences: usize, failures: usize) -> Result<String, String> {
        let some = |count| vec!["it differs".to_string(); count];
        verdict(&Found { numerics, differences: some(differences), failures: some(failures) })
    }

    #[test]
    fn different_bits_must_have_different_numbers() {
        assert!(of([1, 1], 0, 0).is_ok());
        assert!(of([1, 1], 1, 0).unwrap_err().contains("raise it"));
        assert!(of([1, 2], 1, 0).is_ok());
    }

    #[test]
    fn a_number_that_is_raised_for_nothing_is_said() {
        assert!(of([1, 2], 0, 0).unwrap().contains("cannot go on"));
    }

    #[test]
    fn a_number_never_falls_and_excuses_no_failure() {
        assert!(of([2, 1], 1, 0).is_err());
        assert!(of([2, 1], 0, 0).is_err());
        assert!(of([1, 2], 0, 1).is_err());
    }
}
