//! Links between machines are cut, silently, and restored; the result stays the same.
//!
//! The machines are network namespaces on one bridge. Between two of them a link is cut by sending
//! what one says to the other to an address that no machine has; a machine is cut from all by
//! taking its end of the cable down. Both drop packets silently. Without the right to make
//! namespaces the tests print that and pass.
#![allow(clippy::unwrap_used)] // a test may panic

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ganglion_tests::{OVER_GLOO, Process, Run, SMALL_DCGAN, SMALL_MLP, program};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Job without an end of its own: a test stops it.
const LONG: &[&str] =
    &["job.steps=1000000", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=1000"];
/// Port of every coordinator, each on a network of its own.
const PORT: u16 = 7000;

/// One test at a time: a machine that computes for several groups misses their deadlines.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ip(arguments: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(arguments.split(' ')).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Machines 0 (the coordinator's), 1, 2 and so on, on one bridge.
struct Network {
    name: String,
    machines: usize,
}

impl Network {
    /// Makes this number of machines; `None` without the right to do so.
    fn of(machines: usize) -> Option<Network> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let network = Network { name: format!("g{}-{number}", std::process::id() % 100_000), machines };
        let bridge = network.name.clone();
        let made = ip(&format!("link add {bridge} type bridge")) && ip(&format!("link set {bridge} up"));
        if made && (0..machines).all(|machine| network.plug(machine)) {
            return Some(network);
        }
        println!("skipped: no right to make network namespaces here (needs root and iproute2)");
        None
    }

    fn namespace(&self, machine: usize) -> String {
        format!("{}-{machine}", self.name)
    }

    /// The bridge's end of a machine's cable.
    fn cable(&self, machine: usize) -> String {
        format!("{}v{machine}", self.name)
    }

    fn address(machine: usize) -> String {
        format!("10.77.0.{}", machine + 1)
    }

    fn plug(&self, machine: usize) -> bool {
        let (namespace, cable, bridge) = (self.namespace(machine), self.cable(machine), &self.name);
        let address = Network::address(machine);
        [
            format!("netns add {namespace}"),
            format!("link add {cable} type veth peer name eth0 netns {namespace}"),
            format!("link set {cable} master {bridge}"),
            format!("link set {cable} up"),
            format!("-n {namespace} link set lo up"),
            format!("-n {namespace} addr add {address}/24 dev eth0"),
            format!("-n {namespace} link set eth0 up"),
        ]
        .iter()
        .all(|command| ip(command))
    }

    fn command(&self, machine: usize, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(machine)]).arg(program);
        // Machines share no memory; these do.
        command.env(OVER_GLOO.0, OVER_GLOO.1);
        command
    }

    fn coordinator(&self, run: &Run, settings: &[&[&str]]) -> Process {
        let mut command = self.command(0, &program("coordinator"));
        command.arg("--run-dir").arg(run.path("")).args(["--workers", "0", "--insecure"]);
        command.args(["--listen", &format!("{}:{PORT}", Network::address(0))]);
        for setting in settings.concat() {
            command.args(["--set", setting]);
        }
        Process::start(command)
    }

    fn worker(&self, machine: usize) -> Process {
        let mut command = self.command(machine, &program("worker"));
        command.args(["--coordinator", &format!("http://{}:{PORT}", Network::address(0))]);
        Process::start(command)
    }

    /// Cuts the link between two machines, or restores it.
    fn cut(&self, one: usize, other: usize, cut: bool) {
        for (from, to) in [(one, other), (other, one)] {
            let (namespace, address) = (self.namespace(from), Network::address(to));
            let done = if cut {
                let nobody = "lladdr 02:00:00:00:00:99 dev eth0 nud permanent";
                ip(&format!("-n {namespace} neigh replace {address} {nobody}"))
            } else {
                ip(&format!("-n {namespace} neigh del {address} dev eth0"))
            };
            assert!(done, "the link from {from} to {to}");
        }
    }

    /// Cuts a machine from all others, or restores its link.
    fn unplug(&self, machine: usize, cut: bool) {
        let state = if cut { "down" } else { "up" };
        assert!(ip(&format!("link set {} {state}", self.cable(machine))));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in 0..self.machines {
            ip(&format!("link del {}", self.cable(machine)));
            ip(&format!("netns del {}", self.namespace(machine)));
        }
        ip(&format!("link del {}", self.name));
    }
}

/// Group whose members each have a machine of their own.
struct Cluster {
    settings: [&'static [&'static str]; 2],
    run: Run,
    coordinator: Process,
    workers: Vec<Process>,
    network: Network,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts a run on this number of workers; `None` without the right to make machines.
    fn of(workers: usize) -> Option<Cluster> {
        Cluster::with(workers, [SMALL_MLP, LONG])
    }

    /// The same for a job of these settings.
    fn with(workers: usize, settings: [&'static [&'static str]; 2]) -> Option<Cluster> {
        let alone = alone();
        let network = Network::of(workers + 1)?;
        let run = Run::new(&settings);
        let coordinator = network.coordinator(&run, &settings);
        run.wait_for("coordinator_started", |_| true);
        let mut joined = Vec::new();
        for machine in 1..=workers {
            joined.push(network.worker(machine));
            // One after the other, so that workers and machines have the same numbers.
            run.wait_for("worker_joined", |event| event["worker"] == machine as u64);
        }
        run.wait_for("generation_formed", |event| event["world_size"] == workers as u64);
        let step = run.wait_for_step(1);
        run.wait_for_step(step + 20);
        Some(Cluster { settings, run, coordinator, workers: joined, network, _alone: alone })
    }

    /// Waits for a generation above `above` with exactly these workers; returns its number.
    fn formed(&self, above: u64, workers: &[u64]) -> u64 {
        let members = |event: &Value| -> Vec<u64> {
            event["members"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|member| member["worker"].as_u64())
                .collect()
        };
        let is = |event: &Value| event["generation"].as_u64() > Some(above) && members(event) == workers;
        self.run.wait_for("generation_formed", is)["generation"].as_u64().unwrap()
    }

    /// Waits for a generation above `above` of this size; returns its number.
    fn sized(&self, above: u64, size: u64) -> u64 {
        let is = |event: &Value| event["generation"].as_u64() > Some(above) && event["world_size"] == size;
        self.run.wait_for("generation_formed", is)["generation"].as_u64().unwrap()
    }

    fn generation(&self) -> u64 {
        let events = self.run.events();
        let formed = events.iter().filter(|event| event["kind"] == "generation_formed");
        formed.filter_map(|event| event["generation"].as_u64()).max().unwrap()
    }

    /// Stops the run once it trains again, and asserts that its result is undisturbed.
    #[track_caller]
    fn assert_same_result(self) {
        let step = self.run.wait_for_step(1);
        self.run.wait_for_step(step + 50);
        self.coordinator.signal(Signal::SIGTERM);
        let ended = self.coordinator.wait();
        assert_eq!(ended.code, Some(143), "{}", ended.output);
        for worker in self.workers {
            let ended = worker.wait();
            assert_eq!(ended.code, Some(0), "{}", ended.output);
        }
        self.run.assert_audited();
        let last = self.run.rows().iter().filter_map(|row| row["step"].as_u64()).max().unwrap();
        let mut steps: Vec<u64> = self.run.rows().iter().filter_map(|row| row["step"].as_u64()).collect();
        steps.sort_unstable();
        assert_eq!(steps, (1..=last).collect::<Vec<u64>>(), "a row for each step");
        let [networks, job] = self.settings;
        let whole = Run::new(&[networks, job, &[&format!("job.steps={last}")]]);
        assert_eq!(self.run.digest(), whole.complete(1), "another result than undisturbed");
    }
}

#[test]
fn a_worker_that_is_cut_from_the_coordinator_alone_is_left_out_until_it_is_back() {
    let Some(cluster) = Cluster::of(3) else { return };
    let before = cluster.generation();
    cluster.network.cut(0, 3, true);
    let without = cluster.formed(before, &[1, 2]);
    cluster.network.cut(0, 3, false);
    cluster.sized(without, 3);
    cluster.assert_same_result();
}

#[test]
fn of_two_workers_that_do_not_reach_each_other_the_newer_is_left_out_until_they_do() {
    let Some(cluster) = Cluster::of(3) else { return };
    let before = cluster.generation();
    cluster.network.cut(2, 3, true);
    let without = cluster.formed(before, &[1, 2]);
    let links = cluster.run.wait_for("fault", |event| event["fault"] == "links");
    assert!(links["worker"] == 2 || links["worker"] == 3, "{links}");
    cluster.network.cut(2, 3, false);
    cluster.formed(without, &[1, 2, 3]);
    cluster.assert_same_result();
}

#[test]
fn a_worker_that_is_cut_from_all_is_left_out_until_it_is_back() {
    let Some(cluster) = Cluster::with(3, [SMALL_DCGAN, LONG]) else { return };
    let before = cluster.generation();
    cluster.network.unplug(2, true);
    let without = cluster.formed(before, &[1, 3]);
    cluster.network.unplug(2, false);
    cluster.sized(without, 3);
    cluster.assert_same_result();
}

#[test]
fn a_coordinator_that_is_cut_from_all_for_less_than_the_lease_is_not_missed() {
    let Some(cluster) = Cluster::of(3) else { return };
    let (before, step) = (cluster.generation(), cluster.run.wait_for_step(1));
    cluster.network.unplug(0, true);
    // Two deadlines, of the twelve that the lease has.
    std::thread::sleep(Duration::from_secs(4));
    cluster.network.unplug(0, false);
    cluster.run.wait_for_step(step + 500);
    assert_eq!(cluster.generation(), before, "the group trained on");
    cluster.assert_same_result();
}
