//! The tables.

use std::fmt::Write as _;

use crate::contenders::{Figures, median};
use crate::rows::Row;

/// All tables, as Markdown.
pub fn render(results: &[(&Row, Vec<[Figures; 3]>)]) -> String {
    let mut text = String::from(
        "| milliseconds a step | ours | usual DDP | tuned DDP | against usual | target | against tuned | target |\n\
         |---|---:|---:|---:|---:|---|---:|---|\n",
    );
    for (row, rounds) in results {
        let step = |contender: usize| of(rounds, contender, Figures::step);
        let _ = write!(text, "| {} | {:.1} | {:.1} | {:.1} |", row.name(), step(0), step(1), step(2));
        for (place, contender) in [(0, 1), (1, 2)] {
            let ratio = Ratio::of(rounds, contender, Figures::step);
            let _ = write!(text, " {ratio} | {} |", ratio.verdict(row.targets.map(|targets| targets[place])));
        }
        text.push('\n');
    }
    text.push_str(
        "\n| | first step, s: ours | usual | tuned | against usual | resident, MiB: ours | usual | tuned | of usual |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for (row, rounds) in results {
        let first = |contender| of(rounds, contender, |figures| figures.first_step);
        let resident = |contender| of(rounds, contender, |figures| figures.resident);
        let faster = Ratio::of(rounds, 1, |figures| figures.first_step);
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:.2} | {:.2} | {faster} | {:.0} | {:.0} | {:.0} | {:.2} |",
            row.name(),
            first(0),
            first(1),
            first(2),
            resident(0),
            resident(1),
            resident(2),
            resident(0) / resident(1),
        );
    }
    text
}

fn of(rounds: &[[Figures; 3]], contender: usize, figure: impl Fn(&Figures) -> f64) -> f64 {
    median(&rounds.iter().map(|round| figure(&round[contender])).collect::<Vec<_>>())
}

/// How many times another's figure is ours, round by round.
struct Ratio {
    median: f64,
    least: f64,
    most: f64,
}

impl Ratio {
    fn of(rounds: &[[Figures; 3]], other: usize, figure: impl Fn(&Figures) -> f64) -> Ratio {
        let ratios: Vec<f64> = rounds.iter().map(|round| figure(&round[other]) / figure(&round[0])).collect();
        let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let most = ratios.iter().copied().fold(0.0, f64::max);
        Ratio { median: median(&ratios), least, most }
    }

    fn verdict(&self, target: Option<f64>) -> String {
        match target {
            None => String::new(),
            Some(target) if self.median >= target => format!("{target}x: met"),
            Some(target) => format!("{target}x: **missed**"),
        }
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2}x ({:.2}-{:.2})", self.median, self.least, self.most)
    }
}
