//! `coordinator data check`: whether every sample of a data set can be trained on, before any training.
//!
//! The `worker` program reads the samples, as training does; this side reads the job, shows
//! progress and reports the result.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use ganglion_proto::data_report::{Line, Report};
use ganglion_proto::job::{Data, Job, exclude_argument};
use ganglion_proto::progress::Progress;
use ganglion_proto::{log, out};
use ganglion_storage::whole;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::commands::inspect;
use crate::error::Failure;
use crate::job_file::{self, Source};
use crate::workers::worker_program;

/// Maximum number of samples named on the screen, and in an argument.
const SHOWN: usize = 20;

/// Arguments of `coordinator data check`.
#[derive(Debug, clap::Args)]
pub struct Check {
    /// Job file whose data to check. Default, without --data too: the bundled digits.
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    config: Option<PathBuf>,
    /// Data to check instead of a job's, such as folder:pictures. Pictures may then have any size.
    #[arg(long, value_name = "KIND:PATH")]
    data: Option<String>,
    /// Set one key of the job, such as --set data.resize=64. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "data")]
    overrides: Vec<String>,
    /// Write the names of samples that cannot be used to this file, for --set data.exclude=@FILE.
    #[arg(long, value_name = "FILE")]
    bad: Option<PathBuf>,
    /// Number of threads that read. Default: one for each processor.
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Runs the check and prints its report.
    ///
    /// # Errors
    /// A sample cannot be used, or the data set as a whole; a signal; the `worker` program failed.
    pub async fn run(&self) -> Result<(), Failure> {
        let (data, job) = self.data()?;
        if let Some(file) = &self.bad {
            // Fail early on an unwritable file: the check may take long.
            whole::try_out(file)
                .map_err(|error| Failure::unwritable(format_args!("--bad {}", file.display()), &error))?;
        }
        let mut worker = Command::new(worker_program().map_err(Failure::other)?);
        let about = serde_json::to_string(&data).map_err(Failure::other)?;
        worker.args(["check-data", "--data", &about]);
        worker.args(self.threads.iter().flat_map(|threads| ["--threads".to_owned(), threads.to_string()]));
        // Without a job there is no model that asks for a size.
        if job.is_none() {
            worker.arg("--any-size");
        }
        // This process handles signals: the worker is killed with it, at once. The worker's log
        // goes to the user, since data of an object store are fetched first, which may take long.
        worker.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        worker.env(log::VARIABLE, log::format());
        let mut child = worker.process_group(0).kill_on_drop(true).spawn().map_err(Failure::other)?;
        // Without a limit: a large data set takes as long as it takes, and a signal ends it.
        let report = follow(&mut child).await?;
        self.conclude(&report, job.as_ref())
    }

    /// Data to check, and the job that they are for; `None` with --data.
    fn data(&self) -> Result<(Data, Option<Job>), Failure> {
        let Some(data) = &self.data else {
            let source = self.config.clone().map_or(Source::Embedded, Source::File);
            let job = job_file::read(&source, &self.overrides).map_err(Failure::input)?;
            return Ok((job.data.clone(), Some(job)));
        };
        let (kind, path) =
            data.split_once(':').map_or((data.as_str(), None), |(kind, path)| (kind, Some(path)));
        let data = job_file::read_data(kind, path).map_err(Failure::input)?;
        Ok((data, None))
    }

    fn conclude(&self, report: &Report, job: Option<&Job>) -> Result<(), Failure> {
        let text = if self.json { inspect::as_json(report) } else { shown(report) };
        if let Some(file) = &self.bad {
            let names: String = report.bad_samples.iter().map(|bad| format!("{}\n", bad.name)).collect();
            whole::write(file, names.as_bytes())
                .map_err(|error| Failure::unwritable(format_args!("--bad {}", file.display()), &error))?;
        }
        out::print(&text)?;
        // Single samples first: without them the rest may be enough or not.
        let verdict = self.verdict(report).or_else(|| job.and_then(|job| too_few(report, job)));
        verdict.map_or(Ok(()), |verdict| Err(Failure::Input(verdict)))
    }

    /// Verdict on single samples, with the argument that leaves them out; `None` if all can be used.
    fn verdict(&self, report: &Report) -> Option<String> {
        let (bad, all) = (report.bad, report.found.samples);
        if bad == 0 {
            return None;
        }
        let names: Vec<&str> = report.bad_samples.iter().map(|bad| bad.name.as_str()).collect();
        let advice = match &self.bad {
            Some(file) => exclude_argument(&[&format!("@{}", file.display())]),
            None if names.len() <= SHOWN => exclude_argument(&names),
            None => "--bad FILE writes their names, for --set data.exclude=@FILE".to_owned(),
        };
        Some(format!("{bad} of {all} samples cannot be used; get them again, or leave them out:\n{advice}"))
    }
}

/// Verdict on a data set with fewer usable samples than a phase takes; `None` if there are enough.
fn too_few(report: &Report, job: &Job) -> Option<String> {
    let (good, batch) = (report.found.samples - report.bad, job.global_batch());
    (batch > good).then(|| {
        format!(
            "job.data_shards x job.shard_batch is {batch} samples, more than the {good} of the data; lower one of them"
        )
    })
}

/// Shows the worker's progress until it has reported its result.
async fn follow(child: &mut Child) -> Result<Report, Failure> {
    let stdout = child.stdout.take().ok_or_else(|| Failure::Other("the worker has no output".to_owned()))?;
    let mut lines = BufReader::new(stdout).lines();
    let progress = Progress::start("looking for the samples");
    let mut has_begun = false;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::other)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::other)?;
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line.map_err(Failure::other)?,
            _ = interrupt.recv() => return Err(Failure::Interrupted(130)),
            _ = terminate.recv() => return Err(Failure::Interrupted(143)),
        };
        // The worker closed its output without a report.
        let Some(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(Line::Progress { done, of }) => {
                if !std::mem::replace(&mut has_begun, true) {
                    progress.part("samples checked", of);
                }
                progress.set(done, of);
            }
            Ok(Line::Report(report)) => return Ok(*report),
            Ok(Line::Wrong(detail)) => return Err(Failure::Input(detail)),
            Err(error) => return Err(Failure::Other(format!("`worker check-data` said {line:?}: {error}"))),
        }
    }
    // The output has ended without a report, so the process has ended or is about to.
    let status = child.wait().await.map_err(Failure::other)?;
    Err(Failure::Other(format!("`worker check-data` ended with {status}")))
}

/// Renders a report as text.
fn shown(report: &Report) -> String {
    let place = report.path.as_ref().map_or_else(String::new, |path| format!(" {path}"));
    let mut text = format!("{}{place}: {}", report.kind, report.found.samples_line());
    let mut line = |what: &str, parts: Vec<String>| {
        if !parts.is_empty() {
            let _ = write!(text, "\n  {what:<9} {}", parts.join(", "));
        }
    };
    line("formats", report.formats.iter().map(|(format, count)| format!("{format} {count}")).collect());
    let mut sizes: Vec<String> = report
        .sizes
        .iter()
        .map(|size| format!("{} x {} (width x height): {}", size.width, size.height, size.samples))
        .collect();
    if report.other_sizes > 0 {
        sizes.push(format!("others: {}", report.other_sizes));
    }
    line("sizes", sizes);
    line("classes", classes(report));
    line("left out", report.found.left_out_line().into_iter().collect());
    report.found.warnings().into_iter().for_each(|warning| line("warning", vec![warning]));
    line("read", vec![format!("in {:.1} s", report.seconds)]);
    for bad in report.bad_samples.iter().take(SHOWN) {
        line("bad", vec![bad.problem.clone()]);
    }
    let more = report.bad.saturating_sub(SHOWN as u64);
    if more > 0 {
        line("bad", vec![format!("and {more} more")]);
    }
    text
}

fn classes(report: &Report) -> Vec<String> {
    if let Some(why) = &report.no_classes {
        return vec![format!("none: {why}")];
    }
    report.found.classes_line().into_iter().collect()
}
