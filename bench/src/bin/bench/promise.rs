//! Cost of the promise: jobs with and without the measures that keep the bits the same.

use crate::contenders;
use crate::figures::{Figures, Report, Rounds};
use crate::job::{DCGAN_28, Job, MLP};
use crate::options::Options;
use crate::table::Table;

/// Job in two variants.
pub(crate) struct Comparison {
    /// Measure that keeps the promise, and its substitute.
    what: &'static str,
    with: Job,
    without: Job,
    /// Largest acceptable ratio of step times, with the measure to without it.
    target: Option<f64>,
    rounds: usize,
}

fn comparisons() -> Vec<Comparison> {
    let mlp = Job { steps: 250, ..MLP.on(2) };
    [of(&mlp, 5), of(&DCGAN_28.on(2), 3)].into_iter().flatten().collect()
}

fn of(job: &Job, rounds: usize) -> [Comparison; 3] {
    let with = |settings| Job { settings, ..job.clone() };
    let global_batch = job.global_batch();
    let shards = Job { data_shards: 8, shard_batch: global_batch / 8, ..job.clone() };
    [
        Comparison {
            what: "tree against ring",
            with: with(&["job.reduction=\"tree\""]),
            without: with(&["job.reduction=\"ring\""]),
            target: Some(1.2),
            rounds,
        },
        Comparison {
            what: "8 data shards against one a worker",
            with: shards,
            without: job.clone(),
            target: None,
            rounds,
        },
        Comparison {
            what: "deterministic kernels against any",
            with: with(&["job.deterministic=true"]),
            without: with(&["job.deterministic=false"]),
            target: None,
            rounds,
        },
    ]
}

impl Comparison {
    fn name(&self) -> String {
        format!("{}, {}", self.with.name(), self.what)
    }

    fn measure(&self, place: &str, options: &Options) -> Result<Rounds, String> {
        let jobs = [&self.with, &self.without].map(|job| job.clone().asked(options));
        let what = format!("{place} {}", self.name());
        let names = ["with".to_string(), "without".to_string()];
        let run = |variant: usize| contenders::ours(&jobs[variant]);
        Rounds::run(&what, options.rounds(self.rounds), &names, run)
    }
}

/// Returns the comparisons that the options ask for.
pub(crate) fn wanted(options: &Options) -> Result<Vec<Comparison>, String> {
    options.wanted(comparisons(), Comparison::name)
}

/// Runs all comparisons that the options ask for.
pub(crate) fn measure(options: &Options) -> Result<Report, String> {
    let all = wanted(options)?;
    let mut report = Report::default();
    let mut table =
        Table::new(&["milliseconds a step", "rounds x steps", "with", "without", "costs", "target"]);
    for (place, comparison) in all.iter().enumerate() {
        let place = format!("promise {}/{}:", place + 1, all.len());
        let mut cells = vec![comparison.name()];
        match comparison.measure(&place, options) {
            Ok(rounds) => {
                let costs = rounds.ratio(0, 1, Figures::step);
                cells.push(rounds.extent());
                cells
                    .extend([0, 1].map(|variant| format!("{:.1}", rounds.of(variant, Figures::step).median)));
                cells.push(costs.to_string());
                cells.extend(comparison.target.map(|target| costs.at_most(target)));
            }
            Err(problem) => {
                report.problems.push(format!("{}: {problem}", comparison.name()));
                cells.push("**failed**".to_string());
            }
        }
        table.row(cells);
    }
    report.text = table.text();
    Ok(report)
}
