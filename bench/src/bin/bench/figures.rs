//! Measurements of runs, and statistics over them.

use std::fmt;

use crate::chart::Panel;

/// Measurements of one run of a contender.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    /// Seconds from the command to the end of the first step.
    pub first_step: f64,
    /// Milliseconds of each counted step.
    pub steps: Vec<f64>,
    /// Largest resident memory of a process that trains, in MiB.
    pub resident: f64,
    /// Two losses in each step: of a GAN the discriminator's and the generator's.
    pub losses: Vec<[f64; 2]>,
}

impl Figures {
    /// Median step time, in milliseconds.
    pub(crate) fn step(&self) -> f64 {
        median(&self.steps)
    }
}

/// Median of some numbers; NaN of none.
pub(crate) fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// Measurements of several contenders that ran in turns, round by round.
#[derive(Debug)]
pub(crate) struct Rounds(Vec<Vec<Figures>>);

impl Rounds {
    /// Runs all contenders one after the other, round after round. Every other round is in reverse
    /// order, so that a machine that grows slower or faster favours none.
    pub(crate) fn run(
        what: &str,
        rounds: usize,
        contenders: &[String],
        mut run: impl FnMut(usize) -> Result<Figures, String>,
    ) -> Result<Rounds, String> {
        let mut all = Vec::new();
        for round in 0..rounds {
            let is_forwards = round % 2 == 0;
            let mut turn = |turn: usize| {
                let contender = if is_forwards { turn } else { contenders.len() - 1 - turn };
                let figures = run(contender)?;
                let (name, step) = (&contenders[contender], figures.step());
                eprintln!("{what}, round {} of {rounds}, {name}: {step:.1} ms a step", round + 1);
                Ok(figures)
            };
            let mut figures = (0..contenders.len()).map(&mut turn).collect::<Result<Vec<_>, String>>()?;
            if !is_forwards {
                figures.reverse();
            }
            all.push(figures);
        }
        Ok(Rounds(all))
    }

    /// Spread of a contender's figure over the rounds.
    pub(crate) fn of(&self, contender: usize, figure: impl Fn(&Figures) -> f64) -> Spread {
        Spread::of(self.0.iter().map(|round| figure(&round[contender])))
    }

    /// Ratio of one contender's figure to another's. Only figures of the same round are divided.
    pub(crate) fn ratio(&self, of: usize, to: usize, figure: impl Fn(&Figures) -> f64) -> Spread {
        Spread::of(self.0.iter().map(|round| figure(&round[of]) / figure(&round[to])))
    }

    /// Describes the extent of the measurement: rounds and counted steps in each.
    pub(crate) fn extent(&self) -> String {
        let steps = self.0.first().and_then(|round| round.first()).map_or(0, |figures| figures.steps.len());
        let few = if self.0.len() < 3 { " (few)" } else { "" };
        format!("{} x {steps}{few}", self.0.len())
    }
}

/// Median, minimum and maximum of some numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub(crate) fn of(numbers: impl Iterator<Item = f64>) -> Spread {
        let numbers: Vec<f64> = numbers.collect();
        let least = numbers.iter().copied().fold(f64::NAN, f64::min);
        let most = numbers.iter().copied().fold(f64::NAN, f64::max);
        Spread { median: median(&numbers), least, most }
    }

    /// Marks whether a ratio reaches its target.
    pub(crate) fn at_least(&self, target: f64) -> String {
        format!("{target}x: {}", verdict(self.median >= target))
    }

    /// Marks whether a ratio stays within its target.
    pub(crate) fn at_most(&self, target: f64) -> String {
        format!("at most {target}x: {}", verdict(self.median <= target))
    }
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "**missed**" }
}

/// Formats the spread of a ratio.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2}x ({:.2}-{:.2})", self.median, self.least, self.most)
    }
}

/// Report of one part.
#[derive(Default)]
pub(crate) struct Report {
    /// Report as Markdown.
    pub text: String,
    /// Panels of the part's picture; empty without one.
    pub panels: Vec<Panel>,
    /// Failures of runs.
    pub problems: Vec<String>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Creates rounds from the step times of the contenders, in milliseconds.
    pub(crate) fn rounds_of(steps: &[&[f64]]) -> Rounds {
        let figures = |step: &f64| Figures { steps: vec![*step], ..Figures::default() };
        Rounds(steps.iter().map(|round| round.iter().map(figures).collect()).collect())
    }

    #[test]
    fn each_other_round_goes_backwards_and_figures_stay_with_their_contender() {
        let mut order = Vec::new();
        let names = ["a".to_string(), "b".to_string(), "c".to_string()];
        let steps = [1.0, 2.0, 4.0];
        let run = |contender: usize| {
            order.push(contender);
            Ok(Figures { steps: vec![steps[contender]], ..Figures::default() })
        };
        let rounds = Rounds::run("a test", 2, &names, run).unwrap();
        assert_eq!(order, [0, 1, 2, 2, 1, 0]);
        for (contender, step) in steps.iter().enumerate() {
            let spread = rounds.of(contender, Figures::step);
            assert!(spread.least == *step && spread.most == *step, "{spread:?}");
        }
    }

    #[test]
    fn a_ratio_is_the_median_of_the_ratios_of_neighbours() {
        let rounds = rounds_of(&[&[10.0, 20.0], &[20.0, 30.0], &[10.0, 40.0]]);
        let ratio = rounds.ratio(1, 0, Figures::step);
        assert_eq!(ratio.to_string(), "2.00x (1.50-4.00)");
        assert_eq!(ratio.at_least(2.0), "2x: met");
        assert_eq!(ratio.at_least(2.1), "2.1x: **missed**");
        assert_eq!(ratio.at_most(2.0), "at most 2x: met");
        assert_eq!(ratio.at_most(1.9), "at most 1.9x: **missed**");
    }

    #[test]
    fn what_was_not_measured_meets_no_target() {
        let ratio = rounds_of(&[]).ratio(1, 0, Figures::step);
        assert_eq!(ratio.at_least(1.0), "1x: **missed**");
        assert_eq!(ratio.at_most(1.0), "at most 1x: **missed**");
    }
}
