//! Comparison with PyTorch: jobs, contenders and targets.

use ganglion_tests::measured::computes_bf16;

use crate::contenders;
use crate::figures::{Figures, Report, Rounds};
use crate::job::{DCGAN_28, DCGAN_64, Job, MLP, Precision, TRANSFORMER, VAE};
use crate::options::Options;
use crate::table;

/// Target of the first step: speed-up over the usual program.
pub(crate) const FIRST_STEP: f64 = 7.0;
/// Target of the resident memory: share of the usual program's.
pub(crate) const RESIDENT: f64 = 0.3;

/// Job that all contenders train.
pub(crate) struct Row {
    pub job: Job,
    /// Number of runs of each contender.
    rounds: usize,
    /// Targets of the speed-up over the usual program in fp32, and over the tuned one.
    targets: Option<[f64; 2]>,
}

/// Program that takes part.
pub(crate) struct Contender {
    pub name: &'static str,
    /// Name of the way to train with PyTorch; `None` for Ganglion.
    way: Option<&'static str>,
    /// Precision, if it is not the row's.
    precision: Option<Precision>,
    /// Index among the targets of a row.
    pub target: Option<usize>,
}

const OURS: Contender = Contender { name: "ours", way: None, precision: None, target: None };
const USUAL: Contender =
    Contender { name: "usual DDP", way: Some("usual"), precision: None, target: Some(0) };
const TUNED: Contender =
    Contender { name: "tuned DDP", way: Some("tuned"), precision: None, target: Some(1) };
const FP32: &[Contender] = &[OURS, USUAL, TUNED];
/// Both programs for PyTorch with autocast, and the usual one in fp32: it has no bf16, and the
/// target refers to it in that form.
const BF16: &[Contender] = &[
    OURS,
    Contender { name: "usual + autocast", target: None, ..USUAL },
    Contender { name: "tuned + autocast", ..TUNED },
    Contender { name: "usual in fp32", precision: Some(Precision::Fp32), ..USUAL },
];

/// Contenders of a precision: Ganglion first, then the usual program and the tuned one.
pub(crate) fn contenders_in(precision: Precision) -> &'static [Contender] {
    match precision {
        Precision::Fp32 => FP32,
        Precision::Bf16 => BF16,
    }
}

impl Contender {
    fn run(&self, row: &Row, options: &Options) -> Result<Figures, String> {
        let job = Job { precision: self.precision.unwrap_or(row.job.precision), ..row.job.clone() };
        let job = job.asked(options);
        match self.way {
            None => contenders::ours(&job),
            Some(way) => contenders::peer(&job, way, &[], &options.python_path),
        }
    }
}

/// Outcome of a row.
pub(crate) enum Outcome {
    Measured(Rounds),
    NotRun(&'static str),
}

impl Row {
    pub(crate) const fn new(job: Job, rounds: usize) -> Row {
        Row { job, rounds, targets: None }
    }

    pub(crate) const fn with_targets(self, usual: f64, tuned: f64) -> Row {
        Row { targets: Some([usual, tuned]), ..self }
    }

    pub(crate) const fn in_bf16(self) -> Row {
        Row { job: Job { precision: Precision::Bf16, ..self.job }, ..self }
    }

    pub(crate) fn name(&self) -> String {
        match self.job.precision {
            Precision::Fp32 => self.job.name(),
            Precision::Bf16 => format!("{}, bf16", self.job.name()),
        }
    }

    /// Returns the target of the speed-up over a contender.
    pub(crate) fn target(&self, contender: &Contender) -> Option<f64> {
        Some(self.targets?[contender.target?])
    }

    fn measure(&self, place: &str, options: &Options) -> Result<Outcome, String> {
        if self.job.precision == Precision::Bf16 && !computes_bf16() && !options.is_bf16_forced {
            return Ok(Outcome::NotRun("not run: this CPU computes bf16 in software"));
        }
        let contenders = contenders_in(self.job.precision);
        let names: Vec<String> = contenders.iter().map(|contender| contender.name.to_string()).collect();
        let what = format!("{place} {}", self.name());
        let run = |contender: usize| contenders[contender].run(self, options);
        Rounds::run(&what, options.rounds(self.rounds), &names, run).map(Outcome::Measured)
    }
}

/// Returns all rows. A round of the larger models takes minutes, so those without a target have few
/// rounds.
fn rows() -> Vec<Row> {
    let mlp_4 = Job { steps: 200, ..MLP.on(4) };
    let dcgan_28_4 = Job { steps: 8, ..DCGAN_28.on(4) };
    let dcgan_64_4 = Job { steps: 4, ..DCGAN_64.on(4) };
    vec![
        Row::new(MLP, 3).with_targets(1.6, 1.2),
        Row::new(MLP.on(2), 3).with_targets(2.2, 2.2),
        Row::new(mlp_4.clone(), 3).with_targets(2.0, 2.0),
        Row::new(DCGAN_28, 2),
        Row::new(DCGAN_28.on(2), 3).with_targets(1.35, 1.2),
        Row::new(dcgan_28_4.clone(), 1),
        Row::new(DCGAN_64, 1),
        Row::new(DCGAN_64.on(2), 2),
        Row::new(dcgan_64_4.clone(), 1),
        Row::new(VAE, 3).with_targets(1.3, 1.1),
        Row::new(VAE.on(2), 3).with_targets(1.6, 1.3),
        Row::new(TRANSFORMER, 3).with_targets(1.2, 1.2),
        Row::new(TRANSFORMER.on(2), 3).with_targets(1.2, 1.2),
        Row::new(MLP, 1).in_bf16(),
        Row::new(MLP.on(2), 1).in_bf16(),
        Row::new(mlp_4, 1).in_bf16(),
        Row::new(DCGAN_28, 1).in_bf16(),
        Row::new(DCGAN_28.on(2), 3).in_bf16().with_targets(3.0, 1.2),
        Row::new(dcgan_28_4, 1).in_bf16(),
        Row::new(DCGAN_64, 1).in_bf16(),
        Row::new(DCGAN_64.on(2), 3).in_bf16().with_targets(3.0, 1.2),
        Row::new(dcgan_64_4, 1).in_bf16(),
    ]
}

/// Returns the rows that the options ask for.
pub(crate) fn wanted(options: &Options) -> Result<Vec<Row>, String> {
    options.wanted(rows(), Row::name)
}

/// Measures all rows that the options ask for.
pub(crate) fn measure(options: &Options) -> Result<Report, String> {
    let rows = wanted(options)?;
    let mut report = Report::default();
    let mut results = Vec::new();
    for (place, row) in rows.iter().enumerate() {
        let outcome = row.measure(&format!("rows {}/{}:", place + 1, rows.len()), options);
        let outcome = outcome.unwrap_or_else(|problem| {
            report.problems.push(format!("{}: {problem}", row.name()));
            Outcome::NotRun("**failed**")
        });
        results.push((row, outcome));
    }
    report.text = table::render(&results);
    Ok(report)
}
