//! Taking over a run from earlier coordinators, by its directory, its journal and its storage.

use std::sync::Arc;

use ganglion_membership::{Checkpoint, Generation, Recovered};
use ganglion_proto::job::{Job, Length};
use ganglion_storage::run::place_of;
use tokio::sync::mpsc;

use crate::checkpoints::best::Judged;
use crate::checkpoints::catalog::Checkpoints;
use crate::checkpoints::retry::Patience;
use crate::commands::inspect::newest_row;
use crate::control::Change;
use crate::control::records::Records;
use crate::error::Failure;
use crate::job_file;
use crate::journal::{Fact, Journal};
use crate::records::alarms::at_the_end;
use crate::records::disk::Disk;
use crate::records::progress::Screen;
use crate::run_dir::{RunDir, Settled};
use crate::startup::exclusion;
use crate::startup::mend::open_records;
use crate::startup::resume::{self, Asked, known_samples, known_shape, storage_failed};
use crate::system::node::Node;
use crate::workers::{Adoption, Exited, Processes, Supervisor, new_token};

/// State of the run as taken over from earlier coordinators.
pub(crate) struct TakenOver {
    /// The job, including the samples that the run leaves out.
    pub job: Job,
    /// Final line of a run that is already finished; `None` if there is work left.
    pub done: Option<String>,
    /// Samples to leave out from now on.
    pub change: Change,
    /// Unique name of the run.
    pub run: String,
    /// The open journal.
    pub journal: Journal,
    /// Metrics, events and progress.
    pub records: Records,
    /// Supervisor of the local workers that are still running.
    pub supervisor: Supervisor,
    /// Receives the exits of local workers.
    pub exited: mpsc::UnboundedReceiver<Exited>,
    /// The newest group, and the checkpoint to go on from.
    pub recovered: Recovered,
    /// The checkpoint storage.
    pub checkpoints: Checkpoints,
    /// Message for a run whose checkpoints are lost while no living member holds a state either.
    pub lost: Option<String>,
    /// Retries of a storage that is away.
    pub patience: Patience,
}

/// The machine, the directory and the wishes with which a run is taken over.
pub(crate) struct Wanted<'a> {
    /// The run directory, held.
    pub run_dir: &'a RunDir,
    /// Terminal.
    pub screen: &'a Screen,
    /// Writer of the records' files.
    pub disk: Arc<dyn Disk>,
    /// Local processes.
    pub processes: Box<dyn Processes>,
    /// Whether a run whose checkpoints are lost may begin anew.
    pub from_start: bool,
}

/// Takes over a run, or begins one if there is none.
///
/// # Errors
/// The run is not this job's, or its journal, records or storage cannot be used.
pub(crate) async fn take_over(wanted: Wanted<'_>, job: Job) -> Result<TakenOver, Failure> {
    let Wanted { run_dir, screen, disk, processes, from_start } = wanted;
    let mut journal = open_journal(run_dir, screen)?;
    // Nothing was trained before the first group formed, so a mistake in the job may still be mended.
    let begun = journal.last_generation()? > Generation(0);
    let Settled { mut job, recorded, asked } = run_dir.check_job(job, begun, journal.unused_exclusion()?)?;
    let moves = recorded.as_ref().map(|recorded| job_file::moves(recorded, &job)).unwrap_or_default();
    // Before any record is opened: update indices become steps by it, and a refusal writes nothing.
    job.shape = if begun { known_shape(&journal)? } else { None };
    check_length(&job, begun, &journal, run_dir)?;
    let run = run_name(&mut journal)?;
    let patience = Patience::new(screen.clone());
    let mut records = open_records(&job, run_dir.folder(), screen, &disk, &mut journal)?;
    // Before the storage is asked: whether members may live decides what a missing checkpoint means.
    let mut recovered = Recovered { shape: job.shape.clone(), ..left_behind(&journal)? };
    let (exits, exited) = mpsc::unbounded_channel();
    let mut supervisor = Supervisor::new(processes, exits);
    adopt(&mut journal, &mut supervisor, &mut recovered)?;
    // Members that live read at the old place; the content of the new one is compared once they rest.
    let change = if !moves.is_empty() && may_live(&recovered) { Change::Waits } else { Change::None };
    if let Some(recorded) = recorded.as_ref().filter(|_| change == Change::Waits) {
        stay_in_place(&mut job, recorded);
    }
    // Members of the newest generation train by the recorded job. Another one reaches them only with a new
    // generation.
    recovered.job_changed = recorded != Some(Job { shape: None, ..job.clone() });
    let place = storage_of(&job, run_dir);
    let wanted = Asked { place: &place, run: &run, may_live: may_live(&recovered), from_start };
    let found = resume::find(&wanted, &mut journal, &mut records, &patience).await?;
    recovered.checkpoint = found.checkpoint;
    let done = finished(&journal, &job, recovered.checkpoint.as_ref(), run_dir)?
        .map(|line| line + &at_the_end(&records.chronicle.look().alarms));
    // Nothing is read for a finished run.
    for moved in moves.iter().filter(|_| done.is_none()) {
        records.message(&format!("{moved}: the run goes on if the content is the same"));
    }
    match recorded {
        // Nothing was trained: whatever is asked for is the run.
        None => run_dir.write_job(&job)?,
        Some(recorded) if done.is_some() => run_dir.write_job(&as_finished(recorded, &job))?,
        // Written with the next group: what no worker has accepted may yet be refused.
        Some(_) => {}
    }
    if done.is_some() {
        // Workers may be left of a coordinator that died before it could release them.
        supervisor.ask_all_to_end();
    }
    let mut taken = TakenOver {
        job,
        done,
        change,
        run,
        journal,
        records,
        supervisor,
        exited,
        recovered,
        checkpoints: found.checkpoints,
        lost: found.lost,
        patience,
    };
    // A finished run has no step left from which samples could be left out.
    if taken.done.is_none() && !asked.is_empty() {
        taken.leave_out(asked)?;
    }
    Ok(taken)
}

impl TakenOver {
    /// Leaves samples out from here on; while members of earlier terms may train, only once they rest.
    fn leave_out(&mut self, asked: Vec<String>) -> Result<(), Failure> {
        // A member that trains on would read the samples for some steps more, and the change would not
        // be at one update index for all.
        if may_live(&self.recovered) {
            self.change = Change::Waits;
            return Ok(());
        }
        let exclusion = exclusion::decide(asked, &self.job, &self.journal, &self.records)?;
        exclusion::write(&exclusion, &mut self.job, &mut self.journal)?;
        // Read again, since the change made the journal forget the items about samples.
        let is_known = self.recovered.group.is_some();
        self.recovered.passport = if is_known { self.journal.passport()? } else { None };
        self.change = Change::Made(exclusion);
        Ok(())
    }
}

/// Refuses a job that ends before what its run has done: no committed step is lost.
fn check_length(job: &Job, begun: bool, journal: &Journal, run_dir: &RunDir) -> Result<(), Failure> {
    // Without a data set there is neither a step nor a number of steps in an epoch.
    let Some(samples) = known_samples(journal)?.filter(|_| begun) else { return Ok(()) };
    let journaled = journal.newest_position()?.0 / job.phases_per_step();
    let (last, done) = (job.last_step(samples), journaled.max(newest_row(run_dir.folder()).step));
    if done <= last {
        return Ok(());
    }
    let asked = match job.job.length {
        Length::Steps(_) => format!("job.steps is {last}"),
        Length::Epochs(epochs) => format!("job.epochs is {epochs}, which is {last} steps"),
    };
    Err(Failure::Input(format!(
        "{}: the run has done {done} steps, and {asked}; ask for {done} steps or more, or train the shorter job as a run \
         of its own: --set job.name={}-2 (without --run-dir), or another --run-dir",
        run_dir.folder().display(),
        job.job.name
    )))
}

/// Takes over the recorded places of content.
fn stay_in_place(job: &mut Job, recorded: &Job) {
    job.data.path.clone_from(&recorded.data.path);
    job.model.generator.clone_from(&recorded.model.generator);
    job.model.discriminator.clone_from(&recorded.model.discriminator);
    job.model.path.clone_from(&recorded.model.path);
    job.model.init_from.clone_from(&recorded.model.init_from);
}

/// The job to record of a finished run, of which another one was asked for: as it ran, to the length that it
/// has, with the checkpoints where they are now.
fn as_finished(mut recorded: Job, asked: &Job) -> Job {
    recorded.job.length = asked.job.length;
    recorded.checkpoint.url.clone_from(&asked.checkpoint.url);
    recorded
}

/// Address of the storage that holds the run's checkpoints.
pub(crate) fn storage_of(job: &Job, run_dir: &RunDir) -> String {
    place_of(run_dir.folder(), job.checkpoint.url.as_deref())
}

/// Opens the journal. If it is missing while the run's records exist, the run is refused: it is not new.
pub(crate) fn open_journal(run_dir: &RunDir, screen: &Screen) -> Result<Journal, Failure> {
    let journal = run_dir.path("journal.sqlite");
    let holds = |name: &&str| std::fs::metadata(run_dir.path(name)).is_ok_and(|file| file.len() > 0);
    // Each shows that a coordinator has worked here. SQLite would begin an empty journal without a word,
    // and numbers of terms and generations would be assigned twice (M1).
    let records = ["metrics.jsonl", "events.jsonl", "checkpoints/.run"];
    if !holds(&"journal.sqlite")
        && let Some(record) = records.iter().find(|name| holds(name))
    {
        let folder = run_dir.folder().display();
        return Err(Failure::Input(format!(
            "{}: missing or empty, though {folder} holds the {record} of a run; restore it, or make a new one from the \
             checkpoints with: coordinator recover {folder}; to begin anew, choose another --run-dir",
            journal.display()
        )));
    }
    // The journal holds the tokens by which local workers authenticate.
    if let Err(error) = run_dir.keep_private("journal.sqlite") {
        tracing::debug!("{}: its mode stays as it is: {error}", journal.display());
    }
    let mut journal = Journal::open(&journal)?;
    // From here on each commit looks for a newer claim first.
    journal.guard(run_dir.ownership())?;
    if let Some(lacking) = journal.lacking() {
        screen.print(lacking);
    }
    Ok(journal)
}

fn run_name(journal: &mut Journal) -> Result<String, Failure> {
    if let Some(run) = journal.fact(Fact::Run)? {
        return Ok(run);
    }
    // A random name, as two runs of one job may share an object store.
    let run = new_token().map_err(Failure::other)?;
    journal.set_fact(Fact::Run, &run)?;
    Ok(run)
}

/// Loads the recorded evaluations, and writes the events that an earlier coordinator's death prevented.
pub(crate) async fn judged(taken: &mut TakenOver) -> Result<Judged, Failure> {
    let TakenOver { journal, checkpoints, job, records, patience, .. } = taken;
    let rows = journal.evaluations()?;
    let untold = rows.iter().filter(|row| !records.chronicle.look().evaluations.contains_key(&row.step));
    let untold: Vec<_> = untold.cloned().collect();
    // The journal has an evaluation before the events do, so a death in between leaves one untold.
    untold.iter().for_each(|row| records.evaluation(row));
    let storage = checkpoints.storage();
    let folders = match rows.is_empty() {
        // Nothing was evaluated, so a start need not wait for a listing.
        true => Ok(Vec::new()),
        false => patience.wait_for(storage, async || storage.checkpoints().await).await,
    };
    let folders = folders.map_err(|error| storage_failed(checkpoints, patience, &error))?;
    Ok(Judged::new(job.clone(), rows, &folders))
}

/// Group of the earlier terms, from the journal.
fn left_behind(journal: &Journal) -> Result<Recovered, Failure> {
    let group = journal.last_group()?;
    // Before the first group nothing depends on a fingerprint: the first worker that loads sets it.
    let passport = if group.is_some() { journal.passport()? } else { None };
    let condemned = known_generation(journal, Fact::Condemned)?;
    let closed = known_generation(journal, Fact::Closed)?;
    let resting = group.iter().filter(|group| closed == Some(group.generation));
    // Members of a closed generation have exited or are about to, and commit nothing: nobody waits for
    // them.
    let dead = resting.flat_map(|group| &group.members).map(|member| member.worker).collect();
    let skips = journal.skips()?;
    Ok(Recovered { group, dead, condemned, skips, passport, ..Recovered::default() })
}

/// Whether a member that holds a state may be alive.
fn may_live(recovered: &Recovered) -> bool {
    let mut members = recovered.group.iter().flat_map(|group| &group.members);
    members.any(|member| !recovered.dead.contains(&member.worker))
}

fn known_generation(journal: &Journal, fact: Fact) -> Result<Option<Generation>, Failure> {
    Ok(journal.fact(fact)?.and_then(|text| text.parse().ok()).map(Generation))
}

/// Adopts local workers of earlier terms that are still running, and notes the members of the
/// newest group that are not.
fn adopt(
    journal: &mut Journal,
    supervisor: &mut Supervisor,
    recovered: &mut Recovered,
) -> Result<(), Failure> {
    let members: Vec<_> =
        recovered.group.iter().flat_map(|group| &group.members).map(|member| member.worker).collect();
    let here = Node::here();
    let children = journal.children()?;
    let mut ended = Vec::new();
    for child in &children {
        match supervisor.adopt(child, &here) {
            // Counts against `--workers`, so that no process too many is started (M12).
            Adoption::Runs => {
                recovered.running += 1;
                recovered.locals.extend(child.worker);
            }
            Adoption::Ended => {
                // A process without a known number may yet say hello; nothing waits for it.
                if child.process.is_some() && !child.ended {
                    ended.push(child.token.as_str());
                }
                recovered.dead.extend(child.worker.filter(|worker| members.contains(worker)));
            }
            // A member has until the end of its lease to come back.
            Adoption::Elsewhere => {}
        }
    }
    Ok(journal.all_ended(&ended)?)
}

/// Final line of a run that has no work left; `None` if there is any.
fn finished(
    journal: &Journal,
    job: &Job,
    checkpoint: Option<&Checkpoint>,
    run_dir: &RunDir,
) -> Result<Option<String>, Failure> {
    let samples = known_samples(journal)?;
    // Without either of them the length of the run, or how far it is, is unknown.
    let (Some(samples), Some(checkpoint)) = (samples, checkpoint) else { return Ok(None) };
    let last_step = job.last_step(samples);
    if checkpoint.step < last_step {
        return Ok(None);
    }
    Ok(Some(format!(
        "run {} in {} is finished: step {} of {last_step}, state_digest {}; raise job.steps to train on",
        job.job.name,
        run_dir.folder().display(),
        checkpoint.step,
        checkpoint.state_digest
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_membership::Term;

    use crate::journal::Spawned;
    use crate::workers::{Process, StartOrder};

    /// A machine on which no process runs any more.
    struct Deserted;

    impl Processes for Deserted {
        fn check_program(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn count_gpus(&self) -> std::io::Result<u32> {
            Ok(0)
        }
        fn start(&mut self, _: StartOrder) -> std::io::Result<(Box<dyn Process>, Spawned)> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn find(
            &mut self,
            _: &str,
            _: Spawned,
            _: mpsc::UnboundedSender<Exited>,
        ) -> Option<Box<dyn Process>> {
            None
        }
    }

    /// Otherwise each start would wait for the disk once for each process that the run ever had.
    #[test]
    fn ends_are_journaled_once_and_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&folder.path().join("journal.sqlite")).unwrap();
        let written = || std::fs::metadata(folder.path().join("journal.sqlite-wal")).unwrap().len();
        for pid in 1..=100 {
            let token = format!("token {pid}");
            journal.spawning(Term(1), &token, 0).unwrap();
            journal.spawned(&token, Spawned { pid, started: 1 }).unwrap();
        }
        let (exits, _exited) = mpsc::unbounded_channel();
        let mut start = || {
            let before = written();
            let mut supervisor = Supervisor::new(Box::new(Deserted), exits.clone());
            adopt(&mut journal, &mut supervisor, &mut Recovered::default()).unwrap();
            written() - before
        };
        // One page per child, if each were a transaction.
        let page = 4096;
        assert!((1..50 * page).contains(&start()), "all that ended are noted in one transaction");
        assert_eq!(start(), 0, "and those that were noted are not noted again");
        assert!(journal.children().unwrap().iter().all(|child| child.ended));
    }
}
