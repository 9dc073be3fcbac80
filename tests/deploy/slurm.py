"""Runs deploy/slurm/ganglion.sbatch on a Slurm cluster of three nodes, each a network namespace of this machine, as root.

1. A node has its own network, its own name and its own slurmd, and shares the file system with the others.
2. A node is lost as by a power cut: first its cable is drawn, then all its processes are killed.
3. The whole cluster is a network of its own: no address of this machine is used, and all of it goes when the test ends.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
from contextlib import ExitStack

from common import (
    PROGRAMS,
    ROOT,
    audit,
    check,
    digest,
    end,
    events,
    last_step,
    main,
    run,
    scratch,
    undisturbed,
    wait_for,
)

STEPS = 10_000
SETTINGS = [
    argument
    for setting in (
        f"job.steps={STEPS}",
        "model.width=32",
        "job.shard_batch=4",
        "job.data_shards=4",
        "metrics.every_steps=10",
        "checkpoint.every_steps=1000",
        "sample.every_steps=10000",
    )
    for argument in ("--set", setting)
]
NODES = {"n1": "10.0.0.11", "n2": "10.0.0.12", "n3": "10.0.0.13"}
HEAD = "10.0.0.1"

CONFIGURATION = """\
ClusterName=ganglion
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=10
KillWait=30
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """A running cluster."""

    def __init__(self, stack):
        self.folder = scratch(stack)
        self.prefix = f"ganglion-{os.getpid()}"
        self.daemons = {}
        self.stack = stack
        self.network()
        self.configure()
        for name in NODES:
            self.boot(name)
        wait_for("three idle nodes", lambda: self.ask("sinfo", "-h", "-o", "%D %T") == "3 idle")

    def space(self, name):
        return f"{self.prefix}-{name}"

    def network(self):
        """A bridge in the head's namespace, and a cable from it to each node."""
        for name in ("head", *NODES):
            run("ip", "netns", "add", self.space(name))
            self.stack.callback(run, "ip", "netns", "del", self.space(name))
            run("ip", "-n", self.space(name), "link", "set", "lo", "up")
        head = self.space("head")
        run("ip", "-n", head, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", head, "addr", "add", f"{HEAD}/24", "dev", "bridge")
        run("ip", "-n", head, "link", "set", "bridge", "up")
        for name, address in NODES.items():
            node = self.space(name)
            run("ip", "-n", head, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "-n", head, "link", "set", name, "master", "bridge", "up")
            run("ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", node, "link", "set", "eth0", "up")
            run("ip", "-n", node, "route", "add", "default", "via", HEAD)

    def configure(self):
        head = socket.gethostname()
        addresses = {head: HEAD, **NODES}
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.folder / "hosts").write_text(hosts)
        nodes = "\n".join(f"NodeName={name} NodeAddr={address} CPUs=2" for name, address in NODES.items())
        text = CONFIGURATION.format(head=head, address=HEAD, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        socket_ = f"--socket={self.folder}/munge.socket"
        self.daemon("munged", "head", "munged", "--foreground", "--force", f"--key-file={key}", socket_, *files)
        wait_for("munged", (self.folder / "munge.socket").exists)
        self.daemon("slurmctld", "head", "slurmctld", "-D")

    def inside(self, name, *command):
        """A command on a machine of the cluster."""
        script = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {name} && exec "$@"'
        if name == "head":
            script = script.replace("hostname head && ", "")
        space = f"--net=/run/netns/{self.space(name)}"
        return ["nsenter", space, "unshare", "--mount", "--uts", "sh", "-c", script, "sh", *command]

    def environment(self):
        path = f"{PROGRAMS}:{os.environ['PATH']}"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def daemon(self, called, name, *command):
        log = open(self.folder / f"{called}.log", "a")
        options = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "env": self.environment()}
        self.daemons[called] = process = subprocess.Popen(self.inside(name, *command), **options)
        self.stack.callback(end, process)
        self.stack.callback(self.kill_all, name)

    def boot(self, name):
        run("ip", "-n", self.space(name), "link", "set", "eth0", "up")
        run("ip", "-n", self.space(name), "route", "replace", "default", "via", HEAD)
        self.daemon(name, name, "slurmd", "-D", "-N", name)

    def kill_all(self, name):
        for pid in run("ip", "netns", "pids", self.space(name)).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def power_cut(self, name):
        run("ip", "-n", self.space(name), "link", "set", "eth0", "down")
        self.kill_all(name)
        end(self.daemons[name])

    def ask(self, *command, code=0):
        return run(*self.inside("head", *command), code=code, env=self.environment(), cwd=self.folder).strip()


class Job:
    """A submitted job, by default of two nodes."""

    def __init__(self, cluster, *arguments, options=()):
        script = ROOT / "deploy/slurm/ganglion.sbatch"
        self.cluster = cluster
        self.number = cluster.ask("sbatch", "--parsable", *options, script, *arguments)
        self.run_dir = cluster.folder / f"runs/ganglion-{self.number}"

    def facts(self):
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.ask("scontrol", "-o", "show", "job", self.number)))

    def state(self):
        return self.facts()["JobState"]

    def log(self):
        log = self.cluster.folder / f"ganglion-{self.number}.log"
        return log.read_text() if log.exists() else ""

    def wait_for_step(self, least):
        """Waits until the run has reached this step, far from its end."""
        wait_for(f"step {least}", lambda: self.ended() or last_step(self.run_dir) >= least)
        check(last_step(self.run_dir) < STEPS * 0.9, f"too late to disturb it\n{self.log()}")

    def saved(self):
        """Whether a coordinator of this job stopped with a checkpoint."""
        return any(event["outcome"] == "stopped" for event in events(self.run_dir, "run_ended"))

    def ended(self):
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED")

    def wait(self, state, code="0:0"):
        wait_for(f"the end of job {self.number}", self.ended)
        facts = self.facts()
        check((facts["JobState"], facts["ExitCode"]) == (state, code), f"{facts}\n{self.log()}")
        return facts

    def complete(self, expected, restarts):
        facts = self.wait("COMPLETED")
        check(facts["Restarts"] == str(restarts), f"{facts}\n{self.log()}")
        check(digest(self.run_dir, STEPS) == expected, "it has other bits than an undisturbed run")
        audit(self.run_dir)


class Tests:
    """Tests on one cluster, one after the other."""

    def __init__(self, stack):
        self.cluster = Cluster(stack)
        self.expected = undisturbed(self.cluster.folder, SETTINGS, STEPS)

    def two_nodes_train_one_run(self):
        job = Job(self.cluster, *SETTINGS, options=["--ntasks-per-node=2"])
        job.complete(self.expected, restarts=0)
        hosts = sorted(event["host"] for event in events(job.run_dir, "worker_joined"))
        check(hosts == ["n1", "n1", "n2", "n2"], f"workers on {hosts}")
        modes = [path.stat().st_mode & 0o777 for path in (job.run_dir, job.run_dir / "join-token")]
        check(modes == [0o700, 0o600], f"the token lies open: {modes}")

    def wrong_input_fails_the_job_with_exit_code_2(self):
        job = Job(self.cluster, "--set", "job.stepz=1")
        job.wait("FAILED", code="2:0")
        check("stepz" in job.log(), job.log())

    def workers_that_all_fail_fail_the_job(self):
        broken = self.cluster.folder / "broken"
        broken.mkdir()
        (broken / "worker").write_text("#!/bin/sh\necho cannot work >&2\nexit 3\n")
        (broken / "worker").chmod(0o755)
        path = f"{broken}:{self.cluster.environment()['PATH']}"
        job = Job(self.cluster, *SETTINGS, options=[f"--export=ALL,PATH={path}"])
        job.wait("FAILED", code="3:0")
        check("all workers ended" in job.log(), job.log())

    def a_lost_node_is_done_without(self):
        job = Job(self.cluster, *SETTINGS, options=["--nodelist=n1,n2"])
        job.wait_for_step(500)
        self.cluster.power_cut("n2")
        job.complete(self.expected, restarts=0)
        self.cluster.boot("n2")

    def the_first_node_is_lost_and_others_resume(self):
        job = Job(self.cluster, *SETTINGS)
        job.wait_for_step(1500)
        first = job.facts()["BatchHost"]
        self.cluster.power_cut(first)
        job.complete(self.expected, restarts=1)
        check(job.facts()["BatchHost"] != first, "it is where it was")
        self.cluster.boot(first)

    def a_requeued_job_resumes(self):
        job = Job(self.cluster, *SETTINGS)
        job.wait_for_step(1500)
        self.cluster.ask("scontrol", "requeue", job.number)
        job.complete(self.expected, restarts=1)

    def a_preempted_job_saves_and_resumes(self):
        job = Job(self.cluster, *SETTINGS, options=["--partition=low"])
        job.wait_for_step(500)
        urgent = self.cluster.ask("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=true")
        wait_for("the urgent job", lambda: "COMPLETED" in self.cluster.ask("scontrol", "show", "job", urgent))
        check(job.saved(), f"it did not save\n{job.log()}")
        job.complete(self.expected, restarts=1)

    def a_cancelled_job_stays_cancelled(self):
        job = Job(self.cluster, *SETTINGS)
        job.wait_for_step(500)
        self.cluster.ask("scancel", job.number)
        wait_for("the cancelled job to save", job.saved)
        wait_for("its nodes", lambda: self.cluster.ask("squeue", "--noheader") == "")
        facts = job.facts()
        check((facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), f"{facts}\n{job.log()}")


if __name__ == "__main__":
    with ExitStack() as stack:
        tests = Tests(stack)
        main(
            [
                tests.two_nodes_train_one_run,
                tests.wrong_input_fails_the_job_with_exit_code_2,
                tests.workers_that_all_fail_fail_the_job,
                tests.a_lost_node_is_done_without,
                tests.the_first_node_is_lost_and_others_resume,
                tests.a_requeued_job_resumes,
                tests.a_preempted_job_saves_and_resumes,
                tests.a_cancelled_job_stays_cancelled,
            ]
        )
