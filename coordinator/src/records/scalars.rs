//! Presentation of a step's scalars: the one rule by which TensorBoard, Prometheus, the dashboard,
//! the trace and the progress line group and label them.
//!
//! `loss_OF` and `OF_loss` are the loss of a network or of a phase, `score_real` and `score_fake` the mean
//! output of a discriminator for samples of a kind, `setting_NAME` a setting that a schedule or a controller
//! moves. Every other scalar stands for itself.

use std::collections::BTreeSet;

use ganglion_proto::record::Scalars;

/// Name of the group of losses.
pub(crate) const LOSS: &str = "loss";

/// Group of scalars that are shown together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Name, which the names of its scalars have before an underscore, or a loss behind one.
    pub name: &'static str,
    /// Label that tells the scalars of the group apart.
    pub key: &'static str,
    /// Description.
    pub help: &'static str,
}

/// All groups. The last one is of the scalars that stand for themselves.
pub(crate) static GROUPS: [Group; 4] = [
    Group {
        name: LOSS,
        key: "module",
        help: "Loss by network or phase, mean over the batch of the newest recorded step",
    },
    Group {
        name: "score",
        key: "of",
        help: "Output of the discriminator for real and for generated (fake) samples, mean of the newest recorded step",
    },
    Group {
        name: "setting",
        key: "name",
        help: "Settings that a schedule or a controller moves, after the newest recorded step",
    },
    Group {
        name: "scalar",
        key: "name",
        help: "Other scalars of the objective in the newest recorded step, by name",
    },
];
const OTHERS: usize = GROUPS.len() - 1;

/// Most losses in a line of words, and most scalars that stand for themselves.
const WORDS: usize = 4;

/// Presentation of one scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown<'a> {
    /// Group of the scalar.
    pub group: &'static Group,
    /// Value of the group's label.
    pub of: &'a str,
}

impl<'a> Shown<'a> {
    /// Derives the presentation from a scalar's name.
    pub(crate) fn new(name: &'a str) -> Shown<'a> {
        let grouped = |group: &'static Group| {
            let behind = || name.strip_prefix(group.name)?.strip_prefix('_');
            let before = || name.strip_suffix(group.name)?.strip_suffix('_');
            let of = match group.name {
                LOSS => behind().or_else(before),
                // Another objective may score something else.
                "score" => behind().filter(|of| ["real", "fake"].contains(of)),
                _ => behind(),
            };
            Some(Shown { group, of: of.filter(|of| !of.is_empty())? })
        };
        GROUPS[..OTHERS].iter().find_map(grouped).unwrap_or(Shown { group: &GROUPS[OTHERS], of: name })
    }

    /// Tag in TensorBoard.
    pub(crate) fn tag(&self) -> String {
        format!("{}/{}", self.group.name, self.of)
    }

    /// Label where there is little room: what a loss is of by its initial.
    pub(crate) fn short(&self) -> String {
        match self.of.chars().next() {
            Some(initial) if self.group.name == LOSS => initial.to_ascii_uppercase().to_string(),
            _ => self.of.replace('_', " "),
        }
    }
}

/// One line with the losses, then some of the scalars that stand for themselves.
pub(crate) fn in_words(scalars: &Scalars) -> String {
    let of_group = |wanted: &'static Group| {
        let shown = scalars.iter().map(|(name, value)| (Shown::new(name), value));
        shown.filter(move |(shown, _)| shown.group == wanted)
    };
    let initials: BTreeSet<String> = of_group(&GROUPS[0]).map(|(shown, _)| shown.short()).collect();
    // Two losses of one initial could not be told apart.
    let is_short = initials.len() == of_group(&GROUPS[0]).count();
    let word = |(shown, value): (Shown<'_>, f64)| {
        let label = if is_short { shown.short() } else { shown.of.replace('_', " ") };
        format!(" {label} {value:.3}")
    };
    let losses: String = of_group(&GROUPS[0]).take(WORDS).map(word).collect();
    let others: String = of_group(&GROUPS[OTHERS]).take(WORDS).map(word).collect();
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
            ("r1_loss", "loss", "module", "r1", "R"),
            ("score_real", "score", "of", "real", "real"),
            ("score_of_mine", "scalar", "name", "score_of_mine", "score of mine"),
            ("setting_r1", "setting", "name", "r1", "r1"),
            ("grad_norm", "scalar", "name", "grad_norm", "grad norm"),
            ("loss", "scalar", "name", "loss", "loss"),
            ("loss_", "scalar", "name", "loss_", "loss "),
            ("_loss", "scalar", "name", "_loss", " loss"),
        ] {
            let shown = Shown::new(name);
            assert_eq!((shown.group.name, shown.group.key), (group, key));
            assert_eq!((shown.of, shown.short().as_str()), (of, short));
        }
    }

    #[test]
    fn a_line_of_words_leaves_scores_and_settings_out() {
        let words = |scalars: &[(&str, f64)]| in_words(&scalars.iter().copied().collect());
        let gan = [
            ("loss_discriminator", 1.25),
            ("loss_generator", f64::NAN),
            ("score_real", 0.75),
            ("setting_r1", 1.0),
        ];
        assert_eq!(words(&gan), "  loss D 1.250 G NaN");
        assert_eq!(words(&[("recon", 0.1), ("kl", 12.0)]), "  recon 0.100 kl 12.000");
        assert_eq!(words(&[("loss_model", 0.1), ("kl", 12.0)]), "  loss M 0.100  kl 12.000");
        assert_eq!(words(&[]), "");
        assert_eq!(words(&[("gan_loss", 0.1), ("gp_loss", 2.0)]), "  loss gan 0.100 gp 2.000");
        let many: Vec<(String, f64)> = (0..9).map(|at| (format!("s{at}"), 1.0)).collect();
        let many: Vec<(&str, f64)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert_eq!(words(&many), "  s0 1.000 s1 1.000 s2 1.000 s3 1.000");
    }
}
