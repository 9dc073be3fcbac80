//! Packages, which `ganglion.export` compiled, beside the built-in model of the same networks and PyTorch.

use std::path::{Path, PathBuf};

use ganglion_tests::Process;

use crate::contenders::{self, file, python};
use crate::figures::{Figures, Report, Rounds};
use crate::job::{GPT, Job, MLP};
use crate::options::Options;
use crate::table::Table;

/// Job that all contenders train.
pub(crate) struct Row {
    job: Job,
    contenders: &'static [Contender],
    rounds: usize,
}

/// Program that a package is compared with.
struct Contender {
    name: &'static str,
    /// Arguments of the program for PyTorch: the way, then more; `None` for Ganglion's built-in model.
    way: Option<&'static [&'static str]>,
    /// Least speed-up of the package over it.
    target: Option<f64>,
}

const USUAL: Contender = Contender { name: "usual DDP", way: Some(&["usual"]), target: None };
const TUNED: Contender = Contender { name: "tuned DDP", way: Some(&["tuned"]), target: None };
const COMPILED: Contender =
    Contender { name: "tuned DDP, compiled", way: Some(&["tuned", "--compile"]), target: None };
const OF_MLP: &[Contender] =
    &[Contender { name: "built in", way: None, target: Some(1.0) }, USUAL, TUNED, COMPILED];
const OF_GPT: &[Contender] = &[USUAL, Contender { target: Some(1.1), ..TUNED }, COMPILED];

fn rows() -> Vec<Row> {
    let of = |job, contenders| Row { job, contenders, rounds: 3 };
    vec![of(MLP, OF_MLP), of(MLP.on(2), OF_MLP), of(GPT, OF_GPT), of(GPT.on(2), OF_GPT)]
}

impl Row {
    fn name(&self) -> String {
        self.job.name()
    }

    fn measure(&self, place: &str, options: &Options, folder: &Path) -> Result<Rounds, String> {
        let job = self.job.clone().asked(options);
        let package = export(&job, &options.python_path, folder)?;
        let names = ["package"].into_iter().chain(self.contenders.iter().map(|contender| contender.name));
        let names: Vec<String> = names.map(str::to_string).collect();
        let run = |place: usize| match place.checked_sub(1).map(|place| self.contenders[place].way) {
            None => contenders::package(&job, &package),
            Some(None) => contenders::ours(&job),
            Some(Some(way)) => contenders::peer(&job, way[0], &way[1..], &options.python_path),
        };
        Rounds::run(&format!("{place} {}", self.name()), options.rounds(self.rounds), &names, run)
    }

    fn cells(&self, rounds: &Rounds) -> Vec<String> {
        let step = |contender| format!("{:.1}", rounds.of(contender, Figures::step).median);
        let mut cells = vec![self.name(), rounds.extent(), step(0)];
        for (name, target) in columns() {
            let Some(place) = self.contenders.iter().position(|contender| contender.name == name) else {
                cells.extend((0..if target { 3 } else { 2 }).map(|_| String::new()));
                continue;
            };
            let ratio = rounds.ratio(place + 1, 0, Figures::step);
            cells.extend([step(place + 1), ratio.to_string()]);
            if target {
                cells.push(
                    self.contenders[place].target.map_or(String::new(), |target| ratio.at_least(target)),
                );
            }
        }
        cells
    }
}

/// Names of the contenders, and whether some row has a target for them.
fn columns() -> [(&'static str, bool); 4] {
    let all = || OF_MLP.iter().chain(OF_GPT);
    let has_target = |name| all().any(|contender| contender.name == name && contender.target.is_some());
    [OF_MLP[0].name, USUAL.name, TUNED.name, COMPILED.name].map(|name| (name, has_target(name)))
}

/// Writes the package of a job's model.
fn export(job: &Job, python_path: &Path, folder: &Path) -> Result<PathBuf, String> {
    let path = folder.join(format!("{}-{}.pt2", job.model, job.shard_batch));
    if !path.is_file() {
        eprintln!("packages: exporting {}", job.model);
        let mut command = python(python_path)?;
        command
            .arg(file("bench/python/packages.py")?)
            .args([job.model, &job.shard_batch.to_string()])
            .arg(&path);
        let ended = Process::start(command).wait();
        if ended.code != Some(0) {
            return Err(format!("the export failed: {}", ended.output));
        }
    }
    Ok(path)
}

/// Returns the rows that the options ask for.
pub(crate) fn wanted(options: &Options) -> Result<Vec<Row>, String> {
    options.wanted(rows(), Row::name)
}

/// Measures all rows that the options ask for.
pub(crate) fn measure(options: &Options) -> Result<Report, String> {
    let rows = wanted(options)?;
    let folder = tempfile::tempdir().map_err(|error| format!("a folder for packages: {error}"))?;
    let mut report = Report::default();
    let mut head = vec!["milliseconds a step".to_string(), "rounds x steps".into(), "package".into()];
    for (name, target) in columns() {
        head.extend([name.to_string(), format!("against {name}")]);
        head.extend(target.then(|| "target".to_string()));
    }
    let mut table = Table::new(&head);
    for (place, row) in rows.iter().enumerate() {
        match row.measure(&format!("packages {}/{}:", place + 1, rows.len()), options, folder.path()) {
            Ok(rounds) => table.row(row.cells(&rounds)),
            Err(problem) => {
                report.problems.push(format!("{}: {problem}", row.name()));
                table.row(vec![row.name(), "**failed**".to_string()]);
            }
        }
    }
    report.text = table.text();
    Ok(report)
}
