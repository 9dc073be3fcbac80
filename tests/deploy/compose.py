"""Runs the container image and deploy/compose.yaml with Podman, as root.

1. The image is `ganglion:cpu`, or the one that GANGLION_IMAGE names. If there is none it is built, on stand-ins for the
   images that it builds from (bases.sh).
2. Containers, volumes and networks carry this process's number in their names, and go when the test ends.
"""

import json
import os
import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from common import (
    LIMIT,
    ROOT,
    audit,
    check,
    digest,
    events,
    last_step,
    main,
    run,
    say,
    scratch,
    undisturbed,
    wait_for,
)

IMAGE = os.environ.get("GANGLION_IMAGE", "ganglion:cpu")
PROJECT = f"ganglion-test-{os.getpid()}"
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
# A machine without systemd, and without the right to raise limits, needs these.
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""


def podman(*arguments, **options):
    return run("podman", *arguments, **options).strip()


def build_if_missing():
    if os.system(f"podman image exists {shlex.quote(IMAGE)}") == 0:
        return
    check(IMAGE == "ganglion:cpu", f"there is no image {IMAGE}")
    say("building ganglion:cpu, which takes a while")
    arguments = run(ROOT / "tests/deploy/bases.sh", timeout=3600).splitlines()[-1]
    run("make", "image", "DOCKER=podman", f"IMAGE_ARGS={arguments}", cwd=ROOT, timeout=7200)


def inspect(container, what):
    return podman("inspect", "--format", "{{" + what + "}}", container)


def world_sizes(run_dir):
    return [event["world_size"] for event in events(run_dir, "generation_formed")]


class Volume:
    """A volume that is deleted with the test, and its path on the host."""

    def __init__(self, stack):
        self.name = f"{PROJECT}-volume"
        podman("volume", "create", self.name)
        stack.callback(podman, "volume", "rm", "--force", self.name)
        self.folder = Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", self.name))


def the_image_holds_what_runs_and_nothing_else():
    facts = json.loads(podman("image", "inspect", IMAGE))[0]
    check(facts["Config"]["User"] == "10001:10001", facts["Config"])
    say(f"{IMAGE}: {facts['Size'] / 1e6:.0f} MB")
    look = "id -u; for tool in cc ld make cargo rustc pip python3; do command -v $tool; done; ldd /usr/local/bin/worker"
    said = podman("run", "--rm", "--network", "none", IMAGE, "sh", "-c", look)
    check(said.startswith("10001\n\tlinux-vdso"), said)
    check("not found" not in said, said)
    run("podman", "run", "--rm", IMAGE, "coordinator", "--set", "job.stepz=1", code=2)
    parts = json.loads(podman("run", "--rm", IMAGE, "cat", "/usr/share/doc/ganglion/ganglion.cdx.json"))["components"]
    check({"ganglion-worker", "torch", "tonic"} <= {part["name"] for part in parts}, "parts are not listed")


class Alone:
    """A coordinator with its own workers in one container."""

    def __init__(self, stack):
        self.volume = Volume(stack)
        self.name = f"{PROJECT}-alone"
        self.run_dir = self.volume.folder / "alone"
        podman(
            "run",
            "--detach",
            "--name",
            self.name,
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--cap-drop",
            "all",
            "--network",
            "none",
            "--volume",
            f"{self.volume.name}:/runs",
            IMAGE,
            "coordinator",
            "--workers",
            "2",
            "--run-dir",
            "/runs/alone",
            *SETTINGS,
        )
        stack.callback(podman, "rm", "--force", self.name)

    def ended(self, code):
        wait_for("the container's end", lambda: inspect(self.name, ".State.Status") == "exited")
        said = podman("logs", self.name)
        check(inspect(self.name, ".State.ExitCode") == str(code), said)

    def processes(self):
        return podman("top", self.name, "hpid", "state", "comm").splitlines()[1:]


def process_1_reaps_stops_and_resumes():
    with ExitStack() as stack:
        expected = undisturbed(scratch(stack), SETTINGS, STEPS)
        here = Alone(stack)
        wait_for("step 200", lambda: last_step(here.run_dir) >= 200)
        worker = next(line.split()[0] for line in here.processes() if line.endswith("worker"))
        os.kill(int(worker), signal.SIGKILL)
        wait_for("another group", lambda: len(world_sizes(here.run_dir)) >= 2)
        check(not any(line.split()[1].startswith("Z") for line in here.processes()), here.processes())
        podman("stop", "--time", str(LIMIT), here.name)
        here.ended(143)
        check(last_step(here.run_dir) < STEPS, "it was not stopped but done")
        podman("start", here.name)
        here.ended(0)
        check(digest(here.run_dir, STEPS) == expected, "it has other bits than an undisturbed run")
        audit(here.run_dir)


class Compose:
    """deploy/compose.yaml, up."""

    def __init__(self, stack):
        os.environ |= {"GANGLION_ARGS": " ".join(SETTINGS), "GANGLION_IMAGE": IMAGE}
        tools = os.pathsep.join([str(ROOT / ".tools/compose"), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": tools}
        stack.callback(self.do, "down", "--volumes", "--timeout", "5")
        self.do("up", "--detach")
        volume = podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{PROJECT}_runs")
        self.run_dir = Path(volume) / "compose"

    def do(self, *arguments):
        command = [
            sys.executable,
            "-m",
            "podman_compose",
            "-f",
            ROOT / "deploy/compose.yaml",
            "-p",
            PROJECT,
            *arguments,
        ]
        return run(*command, env=self.environment)

    def container(self, service):
        return f"{PROJECT}_{service}_1"

    def wait_for_a_group_of(self, workers):
        """Waits until a new group of this size is formed and trains."""
        wait_for(f"a group of {workers}", lambda: world_sizes(self.run_dir)[-1:] == [workers])
        step = last_step(self.run_dir)
        wait_for("progress", lambda: last_step(self.run_dir) > step)
        check(
            last_step(self.run_dir) < STEPS, f"too late to disturb it\n{podman('logs', self.container('coordinator'))}"
        )


def a_killed_and_a_cut_off_worker_change_no_bit():
    with ExitStack() as stack:
        expected = undisturbed(scratch(stack), SETTINGS, STEPS)
        here = Compose(stack)
        here.wait_for_a_group_of(2)
        podman("healthcheck", "run", here.container("coordinator"))
        victim = here.container("worker-1")
        os.kill(int(inspect(victim, ".State.Pid")), signal.SIGKILL)
        here.wait_for_a_group_of(1)
        here.wait_for_a_group_of(2)
        check(int(inspect(victim, ".RestartCount")) >= 1, "it was not started again")
        network, cut_off = f"{PROJECT}_training", here.container("worker-2")
        podman("network", "disconnect", network, cut_off)
        here.wait_for_a_group_of(1)
        podman("network", "connect", network, cut_off)
        here.wait_for_a_group_of(2)
        coordinator = here.container("coordinator")
        wait_for("the end", lambda: inspect(coordinator, ".State.Status") == "exited")
        check(inspect(coordinator, ".State.ExitCode") == "0", podman("logs", coordinator))
        check(digest(here.run_dir, STEPS) == expected, "it has other bits than an undisturbed run")
        audit(here.run_dir)


if __name__ == "__main__":
    with ExitStack() as stack:
        if "CONTAINERS_CONF" not in os.environ:
            configuration = scratch(stack) / "containers.conf"
            configuration.write_text(CONFIGURATION)
            os.environ["CONTAINERS_CONF"] = str(configuration)
        build_if_missing()
        main(
            [
                the_image_holds_what_runs_and_nothing_else,
                process_1_reaps_stops_and_resumes,
                a_killed_and_a_cut_off_worker_change_no_bit,
            ]
        )
