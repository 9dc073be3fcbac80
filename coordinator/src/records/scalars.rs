//! Presentation of a step's scalars: the one rule by which TensorBoard, Prometheus, the dashboard,
//! the trace and the progress line group and label them.
//!
//! `loss_NETWORK` is the loss of a network, `score_OF` a mean output of a discriminator for samples
//! of a kind. Every other scalar stands for itself.

use ganglion_proto::record::Scalars;

/// Groups with the label that tells their scalars apart, and what they are. The last one is of the
/// scalars that stand for themselves.
pub const GROUPS: [(&str, &str, &str); 3] = [
    ("loss", "module", "Mean loss of the newest step"),
    ("score", "of", "What the discriminator says of samples, a mean of the newest step"),
    ("scalar", "name", "What the objective reports of the newest step"),
];
const OTHERS: (&str, &str, &str) = GROUPS[2];

/// Presentation of one scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown<'a> {
    /// Group: `loss`, `score` or `scalar`.
    pub group: &'static str,
    /// Name of the label that tells the scalars of the group apart.
    pub key: &'static str,
    /// Value of that label.
    pub of: &'a str,
}

impl<'a> Shown<'a> {
    /// Derives the presentation from a scalar's name.
    pub fn new(name: &'a str) -> Shown<'a> {
        let grouped = |(group, key, _): (&'static str, &'static str, &'static str)| {
            let of = name.strip_prefix(group)?.strip_prefix('_').filter(|of| !of.is_empty())?;
            Some(Shown { group, key, of })
        };
        let (group, key, _) = OTHERS;
        GROUPS[..2].iter().copied().find_map(grouped).unwrap_or(Shown { group, key, of: name })
    }

    /// Tag in TensorBoard.
    pub fn tag(&self) -> String {
        format!("{}/{}", self.group, self.of)
    }

    /// Label where there is little room: a network by its initial.
    pub fn short(&self) -> String {
        match self.of.chars().next() {
            Some(initial) if self.group == "loss" => initial.to_ascii_uppercase().to_string(),
            _ => self.of.replace('_', " "),
        }
    }
}

/// One line with the losses, then the scalars that stand for themselves.
pub fn in_words(scalars: &Scalars) -> String {
    let of_group = |wanted: &'static str| {
        let shown = scalars.iter().map(|(name, value)| (Shown::new(name), value));
        shown
            .filter(move |(shown, _)| shown.group == wanted)
            .map(|(shown, value)| format!(" {} {value:.3}", shown.short()))
            .collect::<String>()
    };
    let (losses, others) = (of_group("loss"), of_group(OTHERS.0));
    let losses = if losses.is_empty() { losses } else { format!("  loss{losses}") };
    let others = if others.is_empty() { others } else { format!(" {others}") };
    format!("{losses}{others}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_scores_are_groups_and_others_stand_for_themselves() {
        for (name, group, key, of, short) in [
            ("loss_discriminator", "loss", "module", "discriminator", "D"),
            ("score_real", "score", "of", "real", "real"),
            ("grad_norm", "scalar", "name", "grad_norm", "grad norm"),
            ("loss", "scalar", "name", "loss", "loss"),
            ("loss_", "scalar", "name", "loss_", "loss "),
        ] {
            let shown = Shown::new(name);
            assert_eq!((shown, shown.short().as_str()), (Shown { group, key, of }, short));
        }
    }

    #[test]
    fn a_line_of_words_leaves_scores_out() {
        let words = |scalars: &[(&str, f64)]| in_words(&scalars.iter().copied().collect());
        let gan = [("loss_discriminator", 1.25), ("loss_generator", f64::NAN), ("score_real", 0.75)];
        assert_eq!(words(&gan), "  loss D 1.250 G NaN");
        assert_eq!(words(&[("recon", 0.1), ("kl", 12.0)]), "  recon 0.100 kl 12.000");
        assert_eq!(words(&[("loss_model", 0.1), ("kl", 12.0)]), "  loss M 0.100  kl 12.000");
        assert_eq!(words(&[]), "");
    }
}
