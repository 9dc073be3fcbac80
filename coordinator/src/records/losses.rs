//! Magnitudes of the losses: whether one has grown beyond all that it was.

use std::collections::{BTreeMap, VecDeque};

use ganglion_proto::record::MetricsRow;

use super::scalars::{LOSS, Shown};

/// Number of newest rows whose median counts: a few outliers are no explosion.
const RECENT: usize = 5;
/// Growth over the calmest level that counts as an explosion. In healthy runs the losses of GANs stay below
/// a hundredfold.
const GROWTH: f64 = 1000.0;
/// Bounds of the calmest level. A loss near zero may grow a thousandfold and be small; and one that has
/// exploded before the first row was never calm.
const CALM: [f64; 2] = [1.0, 1000.0];

/// Magnitudes of the losses in the rows so far, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Losses(BTreeMap<String, Level>);

#[derive(Clone, Debug)]
struct Level {
    /// Magnitudes in the newest rows, oldest first.
    recent: VecDeque<f64>,
    /// Least median of [`RECENT`] rows so far.
    calmest: f64,
}

impl Losses {
    /// Adds a row. Rows come in the order of their steps.
    pub(crate) fn add(&mut self, row: &MetricsRow) {
        // A loss that is not finite has an alarm of its own.
        let losses = row.scalars.iter().filter(|(name, value)| is_loss(name) && value.is_finite());
        for (name, value) in losses {
            let fresh = || Level { recent: VecDeque::new(), calmest: f64::INFINITY };
            let level = self.0.entry(name.to_owned()).or_insert_with(fresh);
            level.recent.push_back(value.abs());
            if level.recent.len() > RECENT {
                level.recent.pop_front();
            }
            level.calmest = level.calmest.min(level.median());
        }
        // What a worker names is bounded by the row.
        self.0.retain(|name, _| row.scalars.get(name).is_some());
    }

    /// Describes the first loss that has exploded, as of step `step`.
    pub(crate) fn exploded(&self, step: u64) -> Option<String> {
        let exploded = self.0.iter().find(|(_, level)| level.median() > GROWTH * level.calm());
        exploded.map(|(name, level)| {
            format!(
                "{name} has grown to {:.1e} by step {step}, more than {GROWTH} times its calmest level of {:.1}; start \
                 another run with a smaller optimizer.learning_rate",
                level.median(),
                level.calm()
            )
        })
    }
}

impl Level {
    fn calm(&self) -> f64 {
        self.calmest.clamp(CALM[0], CALM[1])
    }

    /// Median of the newest rows; of two middle ones the greater.
    fn median(&self) -> f64 {
        let mut recent: Vec<f64> = self.recent.iter().copied().collect();
        recent.sort_by(f64::total_cmp);
        recent.get(recent.len() / 2).copied().unwrap_or_default()
    }
}

fn is_loss(name: &str) -> bool {
    // The only loss of an objective may have no other name.
    name == LOSS || Shown::new(name).group.name == LOSS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(losses: &[f64]) -> Option<String> {
        let mut seen = Losses::default();
        for (step, loss) in (1..).zip(losses) {
            let scalars = [("loss_generator", *loss), ("score_real", 1e30)].into_iter().collect();
            seen.add(&MetricsRow { step, scalars, ..MetricsRow::default() });
        }
        seen.exploded(losses.len() as u64)
    }

    #[test]
    fn a_loss_that_grows_beyond_all_that_it_was_has_exploded() {
        let told = after(&[12.0, 9.0, -3e7, 2e9, -5e11]).unwrap();
        assert!(told.contains("loss_generator has grown to 3.0e7 by step 5"), "{told}");
        assert!(told.contains("calmest level of 12.0"), "{told}");
        // Before the first row, so that none was calm.
        assert!(after(&[5e11]).is_some() && after(&[5e11; 9]).is_some());
        assert!(after(&[0.7; 100].map(|loss| loss * 4e3)).is_none(), "large from the beginning");
        assert!(["loss", "loss_generator", "r1_loss"].into_iter().all(is_loss) && !is_loss("lossless"));
    }

    #[test]
    fn healthy_losses_do_not_explode() {
        let swinging: Vec<f64> = (0..300).map(|at| f64::from(at % 7) * 90.0 - 200.0).collect();
        for healthy in [
            &[0.69, 0.7, 1.4, 0.01, 9.0, 40.0][..],
            &[0.0, 0.0, 0.0, 1e-3, 900.0, 900.0, 900.0, 900.0],
            &[0.7, 0.7, 0.7, 0.7, 0.7, 1e7, 0.7, 1e7, 0.7],
            &swinging,
            &[f64::NAN, f64::INFINITY],
            &[],
        ] {
            assert_eq!(after(healthy), None, "{healthy:?}");
        }
    }
}
