use std::os::unix::net::UnixStream;
use std::sync::Arc;

use ganglion_membership::{Generation, LoadedFacts, Passport};
use ganglion_proto::message::{FromWorker, Hello};
use tokio::sync::{oneshot, watch};

use super::*;
use crate::api::grpc::refusal::NotAdmitted;
use crate::job_file::{self, Source};
use crate::journal::History;
use crate::records::disk::SystemDisk;
use crate::records::progress::Screen;
use crate::run_dir::RunDir;
use crate::startup::take_over::{Wanted, judged, take_over};
use crate::workers::{Process, Processes, StartOrder};

/// A machine on which each process ends at once.
struct Bare;

struct Gone;

impl Process for Gone {
    fn kill(&self) {}
    fn ask_to_end(&self) {}
}

impl Processes for Bare {
    fn check_program(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn count_gpus(&self) -> std::io::Result<u32> {
        Ok(0)
    }
    fn start(&mut self, order: StartOrder) -> std::io::Result<(Box<dyn Process>, Spawned)> {
        let status = "exit status: 0".to_string();
        order.exits.send(Exited { token: order.token, pid: 1, status, input_error: false }).unwrap();
        Ok((Box::new(Gone), Spawned { pid: 1, started: 1 }))
    }
    fn find(&mut self, _: &str, _: Spawned, _: mpsc::UnboundedSender<Exited>) -> Option<Box<dyn Process>> {
        None
    }
}

struct Bench {
    run_dir: RunDir,
    shell: Shell,
    _folder: tempfile::TempDir,
}

impl Bench {
    /// A new run with a failure deadline of 5 s.
    async fn new(local_workers: u32, change: Change, launch: Option<Launch>) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::hold(folder.path()).unwrap();
        let job = job_file::read(&Source::Embedded, &["job.failure_deadline=5".to_string()]).unwrap();
        let (screen, processes) = (Screen::silent(), Box::new(Bare));
        let wanted = Wanted {
            run_dir: &run_dir,
            screen: &screen,
            disk: Arc::new(SystemDisk),
            processes,
            from_start: false,
        };
        let mut taken = take_over(wanted, job).await.unwrap();
        let judged = judged(&mut taken).await.unwrap();
        let shell = Shell::new(Parts {
            job: taken.job,
            term: taken.journal.begin_term(1).unwrap(),
            folder: folder.path().to_path_buf(),
            run: taken.run,
            journal: taken.journal,
            checkpoints: taken.checkpoints,
            recovered: taken.recovered,
            lost: taken.lost,
            judged,
            local_workers,
            change,
            url: String::new(),
            invitation: String::new(),
            publisher: watch::Sender::new(None),
            store: Store::new(Term(1)),
            records: taken.records,
            supervisor: taken.supervisor,
            exited: taken.exited,
            launch,
        });
        Bench { run_dir, shell, _folder: folder }
    }

    fn history(&self) -> History {
        History::read(&self.run_dir.path("journal.sqlite")).unwrap()
    }

    /// Sends the hello of a worker, in a session with the number of its process.
    fn hello(&mut self, pid: u32, token: Option<&str>) -> Admission {
        let (outbox, messages) = mpsc::channel(64);
        let (answer, answered) = oneshot::channel();
        let hello = Hello {
            protocol: ganglion_proto::PROTOCOL,
            spawn_token: token.map(str::to_string),
            host: "h".to_string(),
            pid,
            address: "127.0.0.1:1".to_string(),
            resume: None,
            device: "cpu".to_string(),
            attempt: 1,
        };
        let session = SessionId(pid.into());
        self.shell.take(Input::Hello { hello, session, outbox, answer }).unwrap();
        Admission { answered, messages }
    }

    /// Welcomes a worker, which has loaded if it has facts; returns its number and its messages.
    fn join(&mut self, pid: u32, facts: Option<LoadedFacts>) -> (WorkerId, mpsc::Receiver<ToWorker>) {
        let mut admission = self.hello(pid, None);
        let worker = admission.answered.try_recv().unwrap().unwrap();
        if let Some(facts) = facts {
            self.say(pid, worker, FromWorker::Loaded(facts, None));
        }
        (worker, admission.messages)
    }

    fn say(&mut self, pid: u32, worker: WorkerId, message: FromWorker) {
        self.shell.take(Input::Message(SessionId(pid.into()), worker, message)).unwrap();
    }

    fn heartbeat(&mut self, session: SessionId, worker: WorkerId) {
        let heartbeat = FromWorker::Heartbeat(Progress::default(), Usage::default());
        self.shell.take(Input::Message(session, worker, heartbeat)).unwrap();
    }

    /// Lets the shell's time pass.
    fn pass(&mut self, milliseconds: u64) {
        self.shell.started -= Duration::from_millis(milliseconds);
    }
}

struct Admission {
    answered: oneshot::Receiver<Result<WorkerId, NotAdmitted>>,
    messages: mpsc::Receiver<ToWorker>,
}

/// Addresses in the newest answer among a worker's messages.
fn told(messages: &mut mpsc::Receiver<ToWorker>) -> Option<(Generation, Vec<Option<String>>)> {
    let addresses = |message| match message {
        ToWorker::Addresses(generation, addresses) => Some((generation, addresses)),
        _ => None,
    };
    std::iter::from_fn(|| messages.try_recv().ok()).filter_map(addresses).last()
}

#[tokio::test]
async fn only_members_are_told_where_the_members_of_the_newest_generation_are_probed() {
    let mut bench = Bench::new(0, Change::None, None).await;
    bench.shell.handle(Event::Started).unwrap();
    let facts = LoadedFacts {
        passport: Passport::default(),
        samples: 100,
        sees_storage: true,
        shape: bench.shell.job.shape(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    };
    let (first, mut to_first) = bench.join(1, Some(facts));
    let (stranger, mut to_stranger) = bench.join(2, None);
    let newest = bench.shell.machine.group().expect("the first worker is a group").generation;
    let here = Some("127.0.0.1:1".to_string());
    bench.say(1, first, FromWorker::AddressesWanted(newest));
    assert_eq!(told(&mut to_first), Some((newest, vec![here.clone()])));
    bench.say(2, stranger, FromWorker::AddressesWanted(newest));
    assert_eq!(told(&mut to_stranger), None);
    // Nothing is to be journaled for it.
    bench.shell.is_stuck = true;
    bench.say(1, first, FromWorker::AddressesWanted(newest));
    assert_eq!(told(&mut to_first), Some((newest, vec![here])));
    bench.say(1, first, FromWorker::AddressesWanted(Generation(newest.0 + 1)));
    assert_eq!(told(&mut to_first), Some((Generation(newest.0 + 1), Vec::new())));
}

/// D10: a checkpoint that waits for its rows must not be journaled before the decision to give it up.
#[tokio::test]
async fn no_checkpoint_overtakes_the_decision_to_give_it_up() {
    let mut bench = Bench::new(0, Change::None, None).await;
    let state_digest = "d".to_string();
    let checkpoint = Checkpoint { position: Position(2), step: 1, phase: 0, files: Vec::new(), state_digest };
    bench.shell.unjournaled.push(checkpoint);
    bench.shell.journal.refuse_writes(true);
    bench.shell.undone.push_back(Action::Condemn(Generation(1)));
    bench.shell.carry_out().unwrap();
    assert!(bench.shell.is_stuck);
    // The disk has room again, and the decision is not repeated yet.
    bench.shell.journal.refuse_writes(false);
    bench.shell.settle_rows().unwrap();
    assert!(bench.history().checkpoints.is_empty());
    bench.shell.do_chores().unwrap();
    assert!(!bench.shell.is_stuck && bench.shell.unjournaled.is_empty());
    assert!(bench.history().checkpoints.is_empty());
    let condemned = bench.shell.journal.fact(crate::journal::Fact::Condemned).unwrap();
    assert_eq!(condemned.as_deref(), Some("1"));
}

/// M9: the machine is called now and then, so that it cannot take the time for an oversleep.
#[tokio::test]
async fn a_worker_whose_heartbeats_are_answered_is_not_silent() {
    let mut bench = Bench::new(0, Change::None, None).await;
    bench.shell.handle(Event::Started).unwrap();
    let mut first = bench.hello(1, None);
    let worker = first.answered.try_recv().unwrap().unwrap();
    let mut others = Vec::new();
    for other in 2..6 {
        bench.shell.is_stuck = true;
        bench.pass(2300);
        bench.heartbeat(SessionId(1), worker);
        others.push(bench.hello(other, None));
        bench.pass(100);
        bench.shell.unstick().unwrap();
        assert!(others.last_mut().unwrap().answered.try_recv().unwrap().is_ok(), "the machine was called");
        assert!(bench.shell.is_current(SessionId(1), worker), "{other}");
    }
    // One that sends none is.
    bench.shell.is_stuck = true;
    bench.pass(2400);
    bench.shell.unstick().unwrap();
    bench.shell.handle(Event::Tick).unwrap();
    bench.pass(2400);
    bench.shell.handle(Event::Tick).unwrap();
    bench.pass(2400);
    bench.shell.handle(Event::Tick).unwrap();
    assert!(!bench.shell.is_current(SessionId(1), worker));
}

#[tokio::test]
async fn a_worker_with_a_strange_token_uses_up_no_number() {
    let mut bench = Bench::new(0, Change::None, None).await;
    bench.shell.handle(Event::Started).unwrap();
    let mut stranger = bench.hello(1, Some("made up"));
    assert_eq!(stranger.answered.try_recv().unwrap(), Err(NotAdmitted::StrangeToken));
    assert!(bench.history().workers.is_empty());
    let mut known = bench.hello(2, None);
    assert_eq!(known.answered.try_recv().unwrap(), Ok(WorkerId(1)));
}

/// Otherwise the launcher would wait for the whole run.
#[tokio::test]
async fn a_launcher_that_was_told_of_no_start_is_left_for_the_next_term() {
    let (launcher, _other) = UnixStream::pair().unwrap();
    let launch = Launch::to(launcher, &Screen::silent());
    let mut bench = Bench::new(1, Change::Waits, Some(launch)).await;
    let (_inputs, mut inputs) = mpsc::channel(1);
    let (_signals, mut signals) = mpsc::unbounded_channel();
    let ended = bench.shell.run(&mut inputs, &mut signals).await.unwrap();
    assert!(matches!(ended.outcome, Outcome::Stopped(None)), "{ended:?}");
    assert!(bench.shell.waiting_launch().is_some());
}
