//! Recovery of other trainers, on the same machine with the same model: PyTorch's elastic launcher,
//! and torchft.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ganglion_tests::measured::{load, now};
use ganglion_tests::{Process, Tail, send};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::figures::{Sample, Section, count, first_time, ms, number};
use crate::options::{Options, Random};
use crate::workers::{MEMBERS, Workers};

/// Time limit of every wait for a trainer: on a busy machine PyTorch alone takes half a minute to
/// load.
const LIMIT: Duration = Duration::from_secs(180);
/// Interval at which a trainer's log is polled.
const LOOK: Duration = Duration::from_millis(50);

/// A trainer under test: its log, its output, its processes.
struct Peer<'a> {
    options: &'a Options,
    python_path: &'a Path,
    folder: TempDir,
    log: Tail,
    random: Random,
}

/// Costs of a trainer's kills, in seconds and steps.
#[derive(Default)]
struct Costs {
    next_step: Vec<f64>,
    full_step: Vec<f64>,
    steps_again: Vec<u64>,
}

/// Kills processes of both trainers.
pub(crate) fn measure(options: &Options, ours: Option<&Workers>) -> Section {
    let mut section = Section::new("Beside others");
    let before = load();
    let rows = [("torchrun, DDP", torchrun as fn(&mut Peer) -> Result<Costs, String>), ("torchft", torchft)]
        .map(|(name, costs)| match Peer::new(options).and_then(|mut peer| costs(&mut peer)) {
            Ok(costs) => costs.row(name, ours),
            Err(reason) => format!("| {name} | not measured: {reason} | | | | |"),
        });
    section.line(format!(
        "{} kills of a random process of {MEMBERS} each, seed {}; load average {before} before, {} after. Both on \
         PyTorch {}; torchft {}.\n",
        options.peer_kills,
        options.seed,
        load(),
        version(options, "torch-"),
        version(options, "torchft_nightly-"),
    ));
    section.line(
        "| trainer | from the kill to the next new step: median | max | to a step of all: median | steps done again or lost, \
         a kill | ours / theirs: next step, step of all |\n|---|---|---|---|---|---|",
    );
    rows.into_iter().for_each(|row| section.line(row));
    section
}

impl Costs {
    fn row(&self, name: &str, ours: Option<&Workers>) -> String {
        let (next, full) = (Sample::new(self.next_step.clone()), Sample::new(self.full_step.clone()));
        let ratio = |ours: Option<Sample>, theirs: &Sample| {
            ours.map_or("-".to_string(), |ours| format!("{:.3}", ours.median() / theirs.median()))
        };
        let again: Vec<String> = self.steps_again.iter().map(u64::to_string).collect();
        format!(
            "| {name} | {} | {} | {} | {} | {}, {} |",
            ms(next.median()),
            ms(next.quantile(1.0)),
            ms(full.median()),
            again.join(", "),
            ratio(ours.map(Workers::next_step), &next),
            ratio(ours.map(Workers::full_step), &full),
        )
    }
}

impl Peer<'_> {
    fn new(options: &Options) -> Result<Peer<'_>, String> {
        let python_path = options.python_path.as_deref().ok_or("no --python-path was given")?;
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let log = Tail::new(folder.path().join("log"));
        Ok(Peer { options, python_path, folder, log, random: Random(options.seed) })
    }

    /// Starts Python with the scripts of this repository on its path.
    fn python(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Process {
        let scripts = scripts();
        let path = format!("{}:{}", absolute(self.python_path), scripts.display());
        let mut command = Command::new("python3");
        command.args(arguments).envs(variables.iter().copied()).current_dir(&scripts);
        command.env("PYTHONPATH", path).env("OMP_NUM_THREADS", "1").env("PYTHONDONTWRITEBYTECODE", "1");
        command.env("BENCH_LOG", self.folder.path().join("log"));
        Process::start(command)
    }

    /// Waits until the log gives a value. A trainer that does not get there is no reason to give up
    /// the others.
    fn wait_for<T>(
        &mut self,
        what: &str,
        of: &Process,
        is: impl Fn(&[Value]) -> Option<T>,
    ) -> Result<T, String> {
        let start = Instant::now();
        loop {
            if let Some(found) = is(self.log.lines()) {
                return Ok(found);
            }
            if start.elapsed() > LIMIT {
                let output = of.output();
                let last = output.trim_end().lines().last().unwrap_or_default().to_string();
                return Err(format!("no {what} in {} s; it printed: {last}", LIMIT.as_secs()));
            }
            sleep(LOOK);
        }
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        let lines = self.log.lines().to_vec();
        for pid in lines.iter().filter_map(pid) {
            // The id may have been reused for another process.
            if fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("_peer.py"))
            {
                send(pid, Signal::SIGKILL);
            }
        }
    }
}

fn scripts() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python")
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_default().display().to_string()
}

/// Returns the version of a Python package, from the name of its metadata folder.
fn version(options: &Options, package: &str) -> String {
    let folder = options.python_path.as_deref().and_then(|path| fs::read_dir(path).ok());
    let names =
        folder.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut versions =
        names.filter_map(|name| Some(name.strip_prefix(package)?.strip_suffix(".dist-info")?.to_string()));
    versions.next().unwrap_or_else(|| "(absent)".to_string())
}

fn pid(line: &Value) -> Option<i32> {
    line["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
}

fn is(line: &Value, kind: &str, after: f64) -> bool {
    line["kind"] == kind && number(line, "time") > after
}

/// Whether all members have made a step since a moment, one line for each rank.
fn all_step(lines: &[Value], after: f64) -> Option<()> {
    let stepped = |rank: u32| {
        let own = |line: &&Value| is(line, "step", after) && count(line, "rank") == u64::from(rank);
        lines.iter().rev().find(own).is_some_and(|line| count(line, "members") == u64::from(MEMBERS))
    };
    (0..MEMBERS).all(stepped).then_some(())
}

/// The launcher restarts all processes, which resume from the newest checkpoint.
fn torchrun(peer: &mut Peer) -> Result<Costs, String> {
    let members = MEMBERS.to_string();
    let launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &members];
    let launcher = [&launcher[..], &["--max-restarts", "1000", "torchrun_peer.py"]].concat();
    // A store that the launcher keeps from one attempt to the next still has the addresses of the
    // dead, where Gloo looks for the living: restarts fail, again and again.
    let launcher = peer.python(&launcher, &[("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")]);
    let (mut costs, mut since) = (Costs::default(), 0.0);
    for _ in 0..peer.options.peer_kills {
        peer.wait_for("steps", &launcher, |lines| all_step(lines, since))?;
        peer.random.sleep(1.0, 4.0);
        let running: Vec<i32> =
            peer.log.lines().iter().filter(|line| is(line, "start", since)).filter_map(pid).collect();
        let pid = *peer.random.choose(&running);
        let kill = now();
        send(pid, Signal::SIGKILL);
        let resumed = |lines: &[Value]| lines.iter().find(|line| is(line, "start", kill)).cloned();
        let resumed = peer.wait_for("restart", &launcher, resumed)?;
        let is_before =
            |line: &&Value| line["kind"] == "step" && number(line, "time") < number(&resumed, "time");
        let last = peer
            .log
            .lines()
            .iter()
            .filter(is_before)
            .map(|line| count(line, "step"))
            .max()
            .unwrap_or_default();
        let is_new = |line: &&Value| is(line, "step", number(&resumed, "time")) && count(line, "step") > last;
        let new = |lines: &[Value]| lines.iter().find(is_new).map(|line| number(line, "time"));
        let new = peer.wait_for("new step", &launcher, new)?;
        costs.next_step.push(new - kill);
        costs.full_step.push(new - kill);
        costs.steps_again.push(last.saturating_sub(count(&resumed, "step")));
        since = kill;
    }
    launcher.signal(Signal::SIGTERM);
    launcher.wait();
    Ok(costs)
}

/// Starts torchft's quorum server, with the options of its README.
fn lighthouse(peer: &Peer, address: &str) -> Process {
    let program = format!("{}/bin/torchft_lighthouse", absolute(peer.python_path));
    let limits = ["--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"];
    peer.python(&[&[&*program, "--bind", address][..], &limits].concat(), &[])
}

fn free_address() -> std::io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// The survivors go on without the dead. The new process is started only then: while it loads,
/// torchft would wait for it too.
fn torchft(peer: &mut Peer) -> Result<Costs, String> {
    let address = free_address().map_err(|error| error.to_string())?;
    let _lighthouse = lighthouse(peer, &address);
    let address = format!("http://{address}");
    let start = |peer: &Peer, rank: usize| {
        peer.python(&["torchft_peer.py", &rank.to_string()], &[("BENCH_LIGHTHOUSE", &address)])
    };
    let ranks: Vec<usize> = (0..MEMBERS as usize).collect();
    let mut processes: Vec<Process> = ranks.iter().map(|rank| start(peer, *rank)).collect();
    let (mut costs, mut since) = (Costs::default(), 0.0);
    for _ in 0..peer.options.peer_kills {
        peer.wait_for("steps", &processes[0], |lines| all_step(lines, since))?;
        peer.random.sleep(1.0, 4.0);
        let rank = *peer.random.choose(&ranks);
        let kill = now();
        processes[rank].signal(Signal::SIGKILL);
        let survivor = (rank + 1) % ranks.len();
        let next = |lines: &[Value], after: f64, members: std::ops::RangeInclusive<u64>| {
            let wanted = |line: &Value| is(line, "step", after) && members.contains(&count(line, "members"));
            let time = first_time(lines, wanted);
            time.is_finite().then_some(time)
        };
        let all = u64::from(MEMBERS);
        let new = peer.wait_for("step", &processes[survivor], |lines| next(lines, kill, 1..=all - 1))?;
        processes[rank] = start(peer, rank);
        let full = peer.wait_for("step of all", &processes[survivor], |lines| next(lines, new, all..=all))?;
        let is_lost = |line: &&Value| {
            is(line, "lost", kill) && number(line, "time") <= new && count(line, "rank") == survivor as u64
        };
        costs.steps_again.push(peer.log.lines().iter().filter(is_lost).count() as u64);
        costs.next_step.push(new - kill);
        costs.full_step.push(full - kill);
        since = full;
    }
    Ok(costs)
}
