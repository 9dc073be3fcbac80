//! `coordinator recover`: makes a new journal for a run whose own is damaged or missing, from its
//! other files.
//!
//! 1. Nothing is overwritten: the old journal stays beside the new one, as `journal.sqlite.damaged-1`.
//! 2. Nothing is guessed. Whatever cannot be read is named, and the audit counts the claims that
//!    cannot be proven without it.
//! 3. Without a checkpoint there is no state to go on from, and no journal is made.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_membership::Checkpoint;
use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::job::Job;
use ganglion_proto::record::{EventLine, RunEvent};
use ganglion_proto::words::counted;
use ganglion_storage::run::manifests;
use ganglion_storage::whole;
use serde::Serialize;
use serde_json::Value;

use crate::commands::audit::evidence::{open_storage, silent};
use crate::commands::inspect::as_json;
use crate::error::Failure;
use crate::job_file;
use crate::journal::{Fact, Journal, Recovery, Salvaged};
use crate::records::damage::{SetAside, free_name};
use crate::records::disk::{Disk, SystemDisk};
use crate::records::progress::Screen;
use crate::run_dir::RunDir;
use crate::startup::mend::open_records;
use crate::startup::resume::known_shape;

const JOURNAL: &str = "journal.sqlite";
/// Name of the new journal until it is complete.
const DRAFT: &str = ".journal.sqlite.new";
/// Upper limit of credible numbers; a greater one comes from damage.
// SQLite's integers end at 2^63, and `LEAP` is added to this.
const CREDIBLE: u64 = 1 << 60;
/// Suffixes of a journal and of the files that SQLite writes beside it. A remaining rollback
/// journal would be rolled back into the new one.
const BESIDE: [&str; 4] = ["", "-wal", "-shm", "-journal"];

/// Report of a recovery.
#[derive(Debug, Serialize)]
struct Recovered {
    run_dir: PathBuf,
    /// Name of the job.
    name: String,
    /// Number of checkpoints found.
    checkpoints: usize,
    step: u64,
    state_digest: String,
    /// Number of rows copied from the old journal.
    rows: usize,
    #[serde(flatten)]
    recovery: Recovery,
    /// Files that were set aside.
    set_aside: Vec<SetAside>,
}

/// Facts about the run from records other than the journal.
#[derive(Default)]
struct Told {
    /// The greatest number of a term, a generation or a worker, and the losses of earlier recoveries.
    before: Recovery,
    passport: Option<String>,
    evaluations: Vec<EvaluationRow>,
}

/// Makes a new journal for a run; returns the report to print.
pub(crate) fn recover(run: &Path, json: bool) -> Result<String, Failure> {
    // Before the folder is held: a mistyped path must not become a run directory.
    let job = read_job(run)?;
    let run_dir = RunDir::hold(run)?;
    // Before the journal is touched: without a checkpoint no new one is made (3).
    let (owner, checkpoints) = find_checkpoints(run_dir.folder(), &job)?;
    let Some(newest) = checkpoints.iter().max_by_key(|checkpoint| checkpoint.position) else {
        return Err(Failure::Input(format!(
            "{}: no checkpoint is there, so there is nothing to go on from; mount or restore the checkpoints, or begin anew \
             with another --run-dir",
            run.display()
        )));
    };
    let failed = |error: io::Error| Failure::Other(format!("{}: {error}", run.display()));
    let old = newest_journal(&run_dir).map_err(failed)?;
    let salvaged = old.as_deref().map(Salvaged::read).unwrap_or_default();
    let name = run_name(&salvaged, owner, run)?;
    let told = Told::read(run_dir.folder());
    let draft = run_dir.path(DRAFT);
    // A draft that is there was never exchanged, so its recovery was not completed.
    remove_draft(&draft).map_err(failed)?;
    let mut journal = Journal::open(&draft)?;
    // Losses of earlier recoveries stay losses, whichever file still tells of them.
    let before = salvaged.fact(Fact::Recovered).and_then(|text| serde_json::from_str::<Recovery>(&text).ok());
    let lost = [told.before.lost.clone(), before.map(|before| before.lost).unwrap_or_default()].concat();
    let recovery = journal.take_over(&salvaged, Recovery { floor: told.before.floor, lost })?;
    journal.set_fact(Fact::Run, &name)?;
    fill(&mut journal, &told, &checkpoints)?;
    // The new journal tells of the loss of the old one from its first moment on.
    let aside = SetAside {
        file: JOURNAL.to_string(),
        aside: free_name(&run_dir.path(JOURNAL)),
        kept: salvaged.rows() as u64,
        lost: recovery.lost.len() as u64,
        steps: Vec::new(),
    };
    let is_there = run_dir.path(JOURNAL).exists();
    // No file to keep, only a loss to tell.
    let aside = if is_there { aside } else { SetAside { aside: String::new(), ..aside } };
    journal.set_aside(&aside)?;
    // Closes it, so that SQLite moves the log into the file: the draft is exchanged as one file.
    drop(journal);
    exchange(&run_dir, &draft, &aside.aside).map_err(failed)?;
    let recovered = Recovered {
        run_dir: run.to_path_buf(),
        name: job.job.name.clone(),
        checkpoints: checkpoints.len(),
        step: newest.step,
        state_digest: newest.state_digest.clone(),
        rows: salvaged.rows(),
        set_aside: tell(&run_dir, &job, &recovery)?,
        recovery,
    };
    Ok(if json { as_json(&recovered) } else { recovered.describe() })
}

fn read_job(run: &Path) -> Result<Job, Failure> {
    let file = run.join("job.toml");
    let text = fs::read_to_string(&file).map_err(|error| {
        Failure::Input(format!(
            "{}: {error}; give the folder of a run, with the job.toml that its coordinator wrote",
            file.display()
        ))
    })?;
    job_file::parse_resolved(&text)
        .map_err(|errors| Failure::Input(format!("{}: not a job of this version:\n{errors}", file.display())))
}

/// Run that the storage belongs to, and the checkpoints on it. Their files are verified by the next start.
fn find_checkpoints(run: &Path, job: &Job) -> Result<(Option<String>, Vec<Checkpoint>), Failure> {
    let storage = open_storage(run, job).map_err(|error| Failure::Input(error.to_string()))?;
    let found = storage.wait(async {
        let owner = storage.storage().owner().await?;
        Ok((owner, manifests(storage.storage()).await?))
    });
    let found = found.map_err(|error| Failure::Other(silent(storage.storage(), &error).to_string()));
    let (owner, manifests) = found?;
    let whole = manifests.into_iter().filter_map(|(folder, manifest)| {
        let manifest = manifest.ok()?;
        // A manifest in another folder's place would give a step that is not there.
        (manifest.folder() == folder).then_some(manifest)
    });
    Ok((owner, whole.collect()))
}

/// Path of the journal; or of the newest one that was set aside, if a recovery was interrupted. The
/// files beside that one are then set aside too.
fn newest_journal(run_dir: &RunDir) -> io::Result<Option<PathBuf>> {
    let journal = run_dir.path(JOURNAL);
    let aside = |number: u32| run_dir.path(&format!("{JOURNAL}.damaged-{number}"));
    if journal.exists() {
        return Ok(Some(journal));
    }
    let newest = (1..).map(aside).take_while(|path| path.exists()).last();
    for (aside, beside) in newest.iter().flat_map(|aside| BESIDE.map(|beside| (aside, beside))) {
        if with(&journal, beside).exists() && !with(aside, beside).exists() {
            whole::rename(&with(&journal, beside), &with(aside, beside))?;
        }
    }
    Ok(newest)
}

fn run_name(salvaged: &Salvaged, owner: Option<String>, run: &Path) -> Result<String, Failure> {
    match (owner, salvaged.fact(Fact::Run)) {
        // Going on would train one run from another one's state.
        (Some(owner), Some(known)) if owner != known => Err(Failure::Input(format!(
            "{}: the checkpoints are another run's ({owner}, not {known}); name their place in job.toml as checkpoint.url",
            run.display()
        ))),
        (Some(name), _) | (None, Some(name)) => Ok(name),
        // Neither mark nor journal can be read. The checkpoints lie where job.toml says, so they are
        // this run's.
        (None, None) => crate::workers::new_token().map_err(|error| Failure::Other(error.to_string())),
    }
}

fn remove_draft(draft: &Path) -> io::Result<()> {
    for beside in BESIDE {
        match fs::remove_file(with(draft, beside)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(end);
    name.into()
}

/// Adds facts that the old journal has lost.
fn fill(journal: &mut Journal, told: &Told, checkpoints: &[Checkpoint]) -> Result<(), Failure> {
    // What the old journal has is nearer to the truth than what events tell of it.
    if let Some(passport) = told.passport.as_ref().filter(|_| journal.passport().ok().flatten().is_none()) {
        journal.set_fact(Fact::Passport, passport)?;
    }
    for row in &told.evaluations {
        journal.evaluated(row)?;
    }
    for checkpoint in checkpoints {
        journal.found(checkpoint)?;
    }
    Ok(())
}

/// Puts the new journal in the place of the old one, which stays under another name.
fn exchange(run_dir: &RunDir, draft: &Path, aside: &str) -> io::Result<()> {
    // The old one is not synced: it may no longer be writable.
    File::open(draft)?.sync_all()?;
    let journal = run_dir.path(JOURNAL);
    // The journal first: SQLite must never find one next to files written for another.
    for beside in BESIDE.iter().filter(|beside| with(&journal, beside).exists()) {
        let name = if aside.is_empty() { free_name(&journal) } else { aside.to_string() };
        whole::rename(&with(&journal, beside), &with(&run_dir.path(&name), beside))?;
    }
    // The last step: until here a repeated command finds the old journal, or what was set aside, and
    // begins again.
    whole::rename(draft, &journal)
}

/// Sets damaged records aside as well, and records the recovery as an event.
fn tell(run_dir: &RunDir, job: &Job, recovery: &Recovery) -> Result<Vec<SetAside>, Failure> {
    let mut journal = Journal::open(&run_dir.path(JOURNAL))?;
    let job = &Job { shape: known_shape(&journal)?, ..job.clone() };
    let disk: Arc<dyn Disk> = Arc::new(SystemDisk);
    let mut records = open_records(job, run_dir.folder(), &Screen::silent(), &disk, &mut journal)?;
    let all = journal.set_asides()?;
    let Recovery { floor, lost } = recovery.clone();
    records.event(&RunEvent::JournalRecovered { floor, lost });
    records.finish_writing();
    Ok(all)
}

impl Told {
    fn read(run: &Path) -> Told {
        let mut told = Told::default();
        for name in ["metrics.jsonl", "events.jsonl"] {
            let content = fs::read(run.join(name)).unwrap_or_default();
            for line in content.split(|byte| *byte == b'\n') {
                serde_json::from_slice(line).iter().for_each(|line| told.count(line));
                EventLine::parse(line)
                    .ok()
                    .and_then(|line| line.event.ok())
                    .into_iter()
                    .for_each(|event| told.hear(event));
            }
        }
        told
    }

    fn count(&mut self, line: &Value) {
        let numbers = ["term", "generation", "worker", "floor"].map(|name| line[name].as_u64().unwrap_or(0));
        // One damaged digit must not use up the numbers of all later terms.
        let numbers = numbers.into_iter().filter(|number| *number < CREDIBLE);
        self.before.floor = numbers.fold(self.before.floor, u64::max);
    }

    fn hear(&mut self, event: RunEvent) {
        match event {
            RunEvent::Passport { items } => self.passport = serde_json::to_string(&items).ok(),
            RunEvent::Evaluation(row) => self.evaluations.push(row),
            RunEvent::JournalRecovered { lost, .. } => self.before.lost.extend(lost),
            _ => {}
        }
    }
}

impl Recovered {
    fn describe(&self) -> String {
        let Recovered { name, checkpoints, step, state_digest, rows, recovery, .. } = self;
        let run = self.run_dir.display();
        let mut lines = vec![
            format!("made a new journal for run {name} in {run}"),
            format!(
                "  {}, the newest of step {step}, state_digest {state_digest}",
                counted(*checkpoints, "checkpoint")
            ),
            format!(
                "  {} of the old journal; new terms, generations and workers count from {}",
                counted(*rows, "row"),
                recovery.floor + 1
            ),
        ];
        if !recovery.lost.is_empty() {
            lines.push(format!(
                "  tables that could not be read, or only in part: {}",
                recovery.lost.join(", ")
            ));
        }
        lines.extend(self.set_aside.iter().map(|found| format!("  {}", found.describe())));
        lines.push(format!(
            "the same command as before goes on; `coordinator audit {run}` tells what cannot be proven any more"
        ));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Suffixes of a journal and of all files that SQLite may write beside it.
    const ALL: [&str; 4] = ["", "-wal", "-shm", "-journal"];

    fn old(run_dir: &RunDir, name: &str) {
        for beside in ALL {
            fs::write(with(&run_dir.path(name), beside), format!("old{beside}")).unwrap();
        }
    }

    fn assert_is_old(journal: &Path) {
        for beside in ALL {
            assert_eq!(fs::read_to_string(with(journal, beside)).unwrap(), format!("old{beside}"));
        }
    }

    /// Invariant 1: SQLite would take files beside a journal for that journal's.
    #[test]
    fn a_new_journal_has_nothing_of_the_old_one_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::hold(folder.path()).unwrap();
        let (journal, draft) = (run_dir.path(JOURNAL), run_dir.path(DRAFT));
        old(&run_dir, JOURNAL);
        fs::write(&draft, "new").unwrap();
        exchange(&run_dir, &draft, "journal.sqlite.damaged-1").unwrap();
        assert_eq!(fs::read_to_string(&journal).unwrap(), "new");
        assert!(ALL[1..].iter().all(|beside| !with(&journal, beside).exists()));
        assert_is_old(&run_dir.path("journal.sqlite.damaged-1"));
    }

    /// A later repetition of an evaluation is compared by its bits, and called a breach if one differs.
    #[test]
    fn an_evaluation_is_read_back_from_its_event_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let mut number = 1_u64;
        let mut metric = |name: usize| {
            // Knuth's MMIX generator. Between 2^-32 and 2^32, with all bits of the fraction.
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let exponent = 991 + (number >> 58);
            (format!("m{name}"), f64::from_bits((exponent << 52) | (number >> 12)))
        };
        let metrics: Vec<(String, f64)> = (0..1000).map(&mut metric).collect();
        let metrics = metrics.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let row = EvaluationRow {
            step: 20,
            metrics,
            features: "digits ab".to_string(),
            held_out: 48,
            seconds: 0.1,
        };
        let line = RunEvent::Evaluation(row.clone()).line(1.5, usize::MAX);
        fs::write(folder.path().join("events.jsonl"), [line, vec![b'\n']].concat()).unwrap();
        let told = Told::read(folder.path());
        let [read] = told.evaluations.as_slice() else { panic!("one evaluation") };
        for (name, value) in row.metrics.iter() {
            assert_eq!(read.get(name).map(f64::to_bits), Some(value.to_bits()), "{value:?}");
        }
        assert!(row.agrees(read));
    }

    #[test]
    fn a_recovery_that_ended_half_way_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::hold(folder.path()).unwrap();
        old(&run_dir, JOURNAL);
        let aside = run_dir.path("journal.sqlite.damaged-1");
        fs::rename(run_dir.path(JOURNAL), &aside).unwrap();
        assert_eq!(newest_journal(&run_dir).unwrap(), Some(aside.clone()));
        assert_is_old(&aside);
    }
}
