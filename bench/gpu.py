"""All checks that need a GPU, in one call: `make bench-gpu`, or `python3 bench/gpu.py --out FOLDER`.

It runs the built programs, and PyTorch beside them, and writes two tables, anew after each part, so that a call that is
cut off leaves what it has seen. The first says whether the results are right, the second how fast they came:

- machine: the programs run here, and without a GPU as well;
- arithmetic: gradients of each kind of network and loss against the CPU (`worker probe`), with TF32, without, and in bf16;
- repeats: two runs side by side on a GPU come to the same bits, and their memory does not grow;
- cluster: so do one, two and three workers that share a GPU, through a kill -9, a resume at another size and a skipped
  update; the audit, samples and metrics of such a run;
- several: so do one worker and a worker for each of several GPUs over NCCL, also through a kill -9;
- counts: launches, copies and waits of a step;
- sanitizer: compute-sanitizer finds no wrong access to memory;
- speed: milliseconds a step against PyTorch on the same GPU, plain and with torch.compile.

A part that fails says so and the others still run; each has its time limit, and all together end within `--limit` seconds.
The folder then holds gpu.md, gpu.json and logs.tar.gz. Exit code 0: all is right and as fast as wanted; 1: something is
not right; 3: all is right, and something is slower than wanted; 2: there is no GPU, or the options are wrong.

`--device cpu` runs the same parts in small on the CPU: it shows that they work, but for the GPU. Only the standard library
is used here; what needs PyTorch runs as `bench/peer.py`.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = ROOT / "data/mnist-10k/t10k-images-idx3-ubyte.gz"
COMPILE_MODE = "reduce-overhead"
# Seconds that a part may take.
PARTS = {
    "machine": 20,
    "arithmetic": 90,
    "repeats": 80,
    "cluster": 100,
    "several": 90,
    "counts": 40,
    "sanitizer": 45,
    "speed": 200,
}
# What is raced: settings of the model, images a step, precision, and the speed wanted relative to plain and compiled PyTorch.
RACES = {
    "mlp-28, 64 images": ("mlp-28", 256, 64, "fp32", 3.0, 1.2),
    "dcgan-64, 64 images": ("dcgan-64", 64, 64, "fp32", 1.3, 1.0),
    "dcgan-64, 256 images, bf16": ("dcgan-64", 64, 256, "bf16", 1.3, 1.0),
}
# Every kind of network and loss, and what costs a GPU: penalties, augmentation, classes, resampling, dropout.
JOBS = {
    "mlp-28": {"model.kind": "mlp-28"},
    "wasserstein-gp": {"model.kind": "mlp-28", "loss.kind": "wasserstein-gp"},
    "dcgan-28": {"model.kind": "dcgan-28", "loss.kind": "least-squares", "loss.r1": 0.5, "loss.penalty_every": 2},
    "dcgan-64": {"model.kind": "dcgan-64", "data.resize": 64},
    "r3gan-32": {
        "model.kind": "r3gan-32",
        "data.resize": 32,
        "loss.kind": "relativistic-pairing",
        "loss.r1": 1.0,
        "loss.r2": 1.0,
        "loss.penalty_every": 4,
    },
    "sngan-32": {
        "model.kind": "sngan-32",
        "model.conditional": "true",
        "data.resize": 32,
        "loss.kind": "hinge",
        "augmentation.kinds": "rotate90,color,cutout",
        "augmentation.adaptive": "true",
        "augmentation.adjust_images": 400,
    },
    "vae-28": {"model.kind": "vae-28", "loss.binarise": "true"},
    "transformer": {
        "model.kind": "transformer",
        "data.kind": "text",
        "data.path": ROOT / "data/kjv/train.txt.gz",
        "data.context": 64,
        "model.heads": 4,
        "model.layers": 2,
        "model.dropout": 0.1,
    },
}

Check = collections.namedtuple("Check", "part name result limit verdict")


class Failed(Exception):
    """A check could not be made."""


class NoGpu(Exception):
    """There is nothing to check."""


# ---- The machine -----------------------------------------------------------------------------------------------------


def torch_folder(python_path):
    """PyTorch's package: beside the checkout, or this Python's own. It is only found, not imported."""
    with contextlib.suppress(ValueError, ImportError):
        if python_path:
            found = importlib.machinery.PathFinder.find_spec("torch", [str(python_path)])
        else:
            found = importlib.util.find_spec("torch")
        if found and found.submodule_search_locations:
            return pathlib.Path(found.submodule_search_locations[0])
    return None


def environment(python_path, libtorch, visible):
    """Environment of all programs. `visible` are the GPUs that they may see; None for all of ours."""
    variables = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    for launcher in ("LOCAL_RANK", "SLURM_LOCALID", "RANK", "WORLD_SIZE"):
        variables.pop(launcher, None)
    if libtorch:
        paths = [str(libtorch / "lib"), variables.get("LD_LIBRARY_PATH")]
        variables["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    if python_path:
        variables["PYTHONPATH"] = str(python_path)
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    return variables


def count_gpus(worker, variables):
    """Number of GPUs that our worker can use, and its output."""
    try:
        said = subprocess.run([worker, "gpus"], env=variables, capture_output=True, text=True, timeout=90)
    except FileNotFoundError:
        raise NoGpu(
            f"{worker}: no such program; build it with `make build CUDA=1`, or name its folder with --bin"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoGpu(f"`{worker} gpus` did not end within 90 s: the driver hangs") from None
    if said.returncode != 0 or not said.stdout.strip().isdigit():
        raise NoGpu(f"`{worker} gpus` failed: {(said.stderr or said.stdout).strip()[-500:]}")
    return int(said.stdout)


def why_no_gpu(worker, variables):
    """A worker that was built without CUDA says so when it is told to use it."""
    asked = [worker, "--coordinator", "http://127.0.0.1:1", "--device", "cuda:0"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        said = subprocess.run(asked, env=variables, capture_output=True, text=True, timeout=60)
        if "built without" in said.stderr:
            return f"{worker} is built without CUDA; build it with `make build CUDA=1`"
    return "workers can use no GPU here: is there one, with a driver, and does CUDA_VISIBLE_DEVICES show it?"


def visible_gpus(count):
    """The names by which single GPUs are made visible."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]


def describe_gpus():
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if said.returncode == 0:
            return "; ".join(said.stdout.strip().splitlines())
    return "unknown"


def said_by(command, variables=None, limit=30):
    """Output of a program, or why there is none."""
    try:
        said = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Failed(f"`{command[0]}` did not end within {limit:.0f} s") from None
    if said.returncode != 0:
        raise Failed(
            f"`{pathlib.Path(command[0]).name}` ended with {said.returncode}: {(said.stderr or said.stdout)[-400:]}"
        )
    return said.stdout


# ---- Our runs --------------------------------------------------------------------------------------------------------


def lines_of(path):
    """The whole lines of a file of JSON objects."""
    with contextlib.suppress(OSError):
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []


class Run:
    """One run of our programs, with its files."""

    def __init__(self, bench, name, settings, workers, visible=None, extra=None, resumed=None, before=()):
        self.folder = resumed.folder if resumed else bench.scratch / name
        self.bench = bench
        command = [*before, bench.bin / "coordinator", "--workers", str(workers), "--run-dir", self.folder]
        for key, value in dict(QUIET, **settings).items():
            command += ["--set", f"{key}={value}"]
        variables = dict(bench.variables(bench.hidden if visible is None else visible), **(extra or {}))
        self.log = bench.scratch / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)

    def rows(self):
        return lines_of(self.folder / "metrics.jsonl")

    def events(self, kind):
        return [event for event in lines_of(self.folder / "events.jsonl") if event["kind"] == kind]

    def wait_for_step(self, step):
        while not any(row["step"] >= step for row in self.rows()):
            if self.process.poll() is not None:
                raise Failed(f"it ended before step {step}: {self.last_words()}")
            self.bench.check_time(f"waiting for step {step}")
            time.sleep(0.005)

    def kill_one(self, step):
        """Kills the last member of the newest group once a step was reported."""
        self.wait_for_step(step)
        os.kill(self.events("generation_formed")[-1]["members"][-1]["pid"], signal.SIGKILL)

    def stop(self, step):
        """Stops the run with a checkpoint once a step was reported."""
        self.wait_for_step(step)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(self.bench.time_left())
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not stop in time: {self.last_words()}") from None

    def finish(self):
        """Waits for the end; returns the digest of the last state."""
        try:
            code = self.process.wait(self.bench.time_left())
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end in time: {self.last_words()}") from None
        if code != 0:
            raise Failed(f"exit code {code}: {self.last_words()}")
        latest = (self.folder / "checkpoints/latest").read_text().strip()
        manifest = json.loads((self.folder / "checkpoints" / latest / "manifest.json").read_text())
        return manifest["state_digest"]

    def last_words(self):
        return " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])[-400:]

    def end(self):
        """Ends what still runs. Local workers outlive a coordinator that is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for event in self.events("worker_started"):
            with contextlib.suppress(OSError):
                if pathlib.Path(f"/proc/{event['pid']}/comm").read_text().strip() == "worker":
                    os.kill(event["pid"], signal.SIGKILL)


QUIET = {"metrics.every_steps": 1, "checkpoint.every_steps": 0, "sample.every_steps": 0}


# ---- The checks ------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, options, gpus, scratch):
        self.options, self.scratch = options, scratch
        self.on_gpu = options.device == "cuda"
        self.bin, self.out = options.bin, options.out
        self.libtorch, self.python_path = options.libtorch, options.python_path
        self.gpus = gpus
        # Default GPUs of a run: one, or none.
        self.hidden = gpus[0] if self.on_gpu else ""
        self.checks, self.figures = [], {}
        self.end = time.monotonic() + options.limit
        self.part, self.part_end = "", self.end

    def variables(self, visible):
        return environment(None, self.libtorch, visible)

    def time_left(self):
        return max(0.0, min(self.part_end, self.end) - time.monotonic())

    def check_time(self, what):
        if self.time_left() <= 0:
            raise Failed(f"out of time, {what}")

    def small(self, on_gpu, on_cpu):
        return on_gpu if self.on_gpu else on_cpu

    def note(self, name, result, limit, passed):
        verdict = passed if isinstance(passed, str) else ("pass" if passed else "**missed**")
        self.checks.append(Check(self.part, name, result, limit, verdict))
        print(f"{self.part}: {name}: {result} ({limit}): {verdict}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def attempt(self, name, limit=""):
        """Notes a failure of one check, so that the next is still made."""
        try:
            yield
        except (Failed, OSError, ValueError, KeyError, IndexError, subprocess.SubprocessError) as error:
            text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace("|", "/")
            self.note(name, text[:500], limit, "**failed**")

    def train(self, *arguments, kill_at=None, stop_at=None, **more):
        run = Run(self, *arguments, **more)
        try:
            if kill_at is not None:
                run.kill_one(kill_at)
            if stop_at is not None:
                run.stop(stop_at)
                return run, None
            return run, run.finish()
        finally:
            run.end()

    def together(self, check, names):
        """Makes a check of several jobs at once: most of each is the start of its programs."""
        with concurrent.futures.ThreadPoolExecutor(self.small(8, 1)) as pool:
            list(pool.map(check, names))

    def measure(self):
        # What PyTorch compiles is kept, so that no race waits for it.
        compiling = self.start_compiling() if "speed" in (self.options.only or PARTS) else None
        for name in PARTS:
            if self.options.only and name not in self.options.only:
                continue
            self.part, self.part_end = name, time.monotonic() + self.small(1, 4) * PARTS[name]
            with self.attempt("the part"):
                if name == "speed" and compiling:
                    self.finish_compiling(compiling)
                getattr(self, name)()
            write(self)

    # The programs, with all they load.
    def machine(self):
        for program in ("coordinator", "worker"):
            said = said_by(["ldd", self.bin / program], self.variables(self.hidden))
            missing = [line.split()[0] for line in said.splitlines() if "not found" in line]
            self.note(f"libraries of {program}", ", ".join(missing) or "all found", "all found", not missing)
        with self.attempt("20 steps on the CPU"):
            _, digest = self.train("cpu", self.job("mlp-28", 20), 1, visible="")
            self.note("20 steps on the CPU", digest[:12], "", "pass")
        if self.on_gpu:
            self.note("GPU", f"{describe_gpus()}, {self.clocks()}", "", "measured")

    # Gradients on the device against those of the CPU.
    def arithmetic(self):
        self.together(self.probe_job, JOBS)

    def probe_job(self, name):
        with self.attempt(f"{name}, gradients"):
            run, _ = self.train(f"probed-{name}", self.job(name, 1), 1, visible="")
            half, _ = self.train(f"probed-{name}-bf16", dict(self.job(name, 1), **BF16), 1, visible="")
            # How much rounding matters to this job: statistics of a small batch make more of it than products do.
            rounded = max(phase["gradient"] for phase in self.probe(half, "cpu"))
            self.judge(f"{name}, fp32 without TF32", run, max(1e-5, 3e-4 * rounded), NVIDIA_TF32_OVERRIDE="0")
            # TF32 has three bits more than bf16.
            self.judge(f"{name}, fp32", run, max(2e-3, rounded / 2))
            self.judge(f"{name}, bf16", half, 0.01 + 2 * rounded)

    def judge(self, name, run, limit, **extra):
        phases = self.probe(run, "cuda:0" if self.on_gpu else "cpu", **extra)
        worst, losses = (max(phase[of] for phase in phases) for of in ("gradient", "losses"))
        times = ", ".join(f"{phase['phase']} {phase['milliseconds']:.2f}" for phase in phases)
        repeats = all(phase["repeats"] for phase in phases)
        result = f"{worst:.1e} (losses {losses:.1e}); ms: {times}"
        limits = f"at most {limit:.1e}, same bits"
        self.note(f"{name}: distance of gradients", result, limits, worst <= limit and repeats)

    def probe(self, run, device, **extra):
        command = [self.bin / "worker", "probe", run.folder, "--device", device, "--json"]
        variables = dict(self.variables(self.hidden), **extra)
        return json.loads(said_by(command, variables, self.time_left()))["phases"]

    # The same run twice at once: a GPU that is shared takes other turns.
    def repeats(self):
        self.together(self.repeat, JOBS)

    def repeat(self, name):
        with self.attempt(f"{name}, two runs at once", "equal bits"):
            settings = self.job(name, self.small(60, 6))
            if name == "dcgan-64":
                settings.update(BF16)
            runs = [Run(self, f"{which}-{name}", settings, 1) for which in ("once", "twice")]
            try:
                once, twice = [run.finish() for run in runs]
            finally:
                for run in runs:
                    run.end()
            self.note(f"{name}, two runs at once", short(once, twice), "equal bits", once == twice)
            self.note_memory(name, runs[0].rows())

    def note_memory(self, name, rows):
        used = [row["gpu_memory_bytes"] for row in rows if row.get("gpu_memory_bytes")]
        if used or self.on_gpu:
            half, last = used[len(used) // 2], used[-1]
            most = f"{half / 2**20:.0f} MiB after half of the steps, {last / 2**20:.0f} at the end"
            self.note(f"{name}: memory of the GPU", most, "no growth", last <= half)

    def cluster(self):
        names = ("mlp-28", "dcgan-28", "r3gan-32")
        self.together(lambda name: self.compare_workers(name, [2, 3], self.hidden, "Gloo"), names)
        settings = self.job("dcgan-28", self.small(120, 40))
        with self.attempt("a run that is stopped and resumed with 3 workers", "equal bits"):
            _, whole = self.train("whole", settings, 1)
            stopped, _ = self.train("stopped", settings, 1, stop_at=settings["job.steps"] // 4)
            _, resumed = self.train("resumed", settings, 3, resumed=stopped)
            name = "a run that is stopped and resumed with 3 workers"
            self.note(name, short(whole, resumed), "equal bits", whole == resumed)
            self.look_at(stopped)
        with self.attempt("updates that are not finite", "equal bits"):
            # Without a memory of second moments, a gradient that vanishes throws the weights out of range.
            exploding = {"optimizer.learning_rate": 10, "optimizer.beta2": 0, "optimizer.epsilon": 1e-16}
            settings = dict(self.job("mlp-28", 40), **exploding)
            run, alone = self.train("skips-alone", settings, 1)
            _, together = self.train("skips-together", settings, 2)
            skipped = len(run.events("phase_skipped"))
            result = f"{short(alone, together)}, {skipped} skipped"
            self.note("updates that are not finite", result, "equal bits", alone == together and skipped > 0)

    def look_at(self, run):
        """What people do with a run: audit it, draw from it, evaluate it."""
        picture = self.out / "samples.png"
        for what, command in {
            "audit": [self.bin / "coordinator", "audit", run.folder],
            "samples": [self.bin / "worker", "sample", run.folder, "--out", picture],
            "metrics": [self.bin / "worker", "eval", run.folder, "--samples", "500", "--reference", "500"],
        }.items():
            with self.attempt(f"{what} of that run"):
                said = said_by(command, self.variables(""), self.time_left())
                self.note(f"{what} of that run", said.strip().splitlines()[-1][:80], "", "pass")

    def several(self):
        if len(self.gpus) < 2:
            return self.note("a worker for each GPU", f"{len(self.gpus)} here", "", "skipped")
        count = min(len(self.gpus), 4)
        for name in ("mlp-28", "dcgan-28"):
            self.compare_workers(name, [count], ",".join(self.gpus[:count]), "NCCL")

    def compare_workers(self, job, counts, visible, backend):
        """One worker against several, undisturbed and with one killed."""
        settings = self.job(job, self.small(400, 300) if job == "mlp-28" else self.small(150, 30))
        alone = None
        with self.attempt(f"{job}, 1 worker", "equal bits"):
            run, alone = self.train(f"alone-{job}-{backend}", settings, 1)
            if self.on_gpu:
                # A lone worker on a GPU is a group as well.
                self.note(f"{job}, 1 worker: the backend", over(run, 1), "NCCL", over(run, 1) == "NCCL")
        for count in counts:
            name = f"{job}, {count} workers over {backend}"
            with self.attempt(name, "equal bits"):
                run, together = self.train(f"together-{job}-{count}-{backend}", settings, count, visible=visible)
                self.note(name, short(alone or "", together), "equal bits", alone == together)
                self.note(f"{name}: the backend", over(run, count), backend, over(run, count) == backend)
        with self.attempt(f"{name}, one killed (-9)", "equal bits"):
            kill_at = settings["job.steps"] // 4
            run, killed = self.train(f"killed-{job}-{backend}", settings, count, visible=visible, kill_at=kill_at)
            groups = len(run.events("generation_formed"))
            if groups < 2:
                raise Failed("the run was over before the kill: no new group was formed")
            result = f"{short(alone or '', killed)}, {groups} groups"
            self.note(f"{name}, one killed (-9)", result, "equal bits", alone == killed)

    # Calls of CUDA in a step, as the difference of a longer and a shorter run.
    def counts(self):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            return self.note("calls of a step", "no C compiler", "", "skipped")
        library = self.scratch / "count.so"
        said_by([compiler, "-O2", "-shared", "-fPIC", "-o", library, ROOT / "bench/count.c", "-ldl"])
        cases = [(name, shards) for name in ("mlp-28", "dcgan-28", "r3gan-32") for shards in (1, 8)]
        self.together(lambda case: self.count_calls(library, *case), cases)

    def count_calls(self, library, name, shards):
        with self.attempt(f"{name}, {shards} shards: calls of a step"):
            few, many = self.small((20, 60), (2, 4))
            fewer, more = (self.count(library, name, shards, steps) for steps in (few, many))
            calls = {call: (more[call] - fewer[call]) / (many - few) for call in more}
            text = ", ".join(f"{call} {number:.1f}" for call, number in calls.items() if number) or "none"
            self.note(f"{name}, {shards} shards: calls of a step", text, "", "measured")

    def count(self, library, name, shards, steps):
        file = self.scratch / f"calls-{name}-{shards}-{steps}"
        settings = dict(self.job(name, steps), **{"job.data_shards": shards, "metrics.every_steps": 1000})
        self.train(file.name, settings, 1, extra={"LD_PRELOAD": str(library), "GANGLION_COUNT": str(file)})
        counted = collections.Counter()
        for part in self.scratch.glob(f"{file.name}.[0-9]*"):
            counted.update(json.loads(part.read_text()))
        return counted

    def sanitizer(self):
        tool = shutil.which("compute-sanitizer") or next(
            iter(pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
        )
        if not self.on_gpu or not tool:
            return self.note("compute-sanitizer", "none here" if self.on_gpu else "no GPU", "", "skipped")
        self.together(lambda name: self.check_memory(tool, name), ("mlp-28", "dcgan-28"))

    def check_memory(self, tool, name):
        with self.attempt(f"{name}, 3 steps under memcheck"):
            before = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "7"]
            run, _ = self.train(f"memcheck-{name}", self.job(name, 3), 1, before=before)
            said = re.findall(r"ERROR SUMMARY: (\d+)", run.log.read_text(errors="replace"))
            self.note(f"{name}, 3 steps under memcheck", f"{said or 'no'} errors", "none", not any(map(int, said)))

    def clocks(self):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks_event_reasons.active", "--format=csv,noheader"]
        with contextlib.suppress(Failed, OSError):
            return f"clock and reasons for its limit: {'; '.join(said_by(query).strip().splitlines())}"
        return "clocks unknown"

    # In turns, so that a busy moment hits all.
    def speed(self):
        times = collections.defaultdict(list)
        for turn in range(self.small(3, 1)):
            for race, (model, width, batch, precision, *_) in RACES.items():
                for runner in ("ours", "ours, 8 shards", "usual", "compiled"):
                    # All have run once before time may be short.
                    if turn > 0 and self.time_left() < 30:
                        continue
                    with self.attempt(f"{race}: {runner}"):
                        race_once = self.race_ours if runner.startswith("ours") else self.race_peer
                        times[race, runner].append(race_once(runner, model, width, batch, precision, turn))
        for race, (*_, plain, compiled) in RACES.items():
            figures = {runner: statistics.median(all_) for (of, runner), all_ in times.items() if of == race}
            self.figures[race] = {runner: times[race, runner] for runner in figures}
            text = ", ".join(f"{runner} {figure:.3f}" for runner, figure in figures.items())
            self.note(f"{race}: milliseconds a step", text, "", "measured")
            for against, target in (("usual", plain), ("compiled", compiled)):
                if "ours" in figures and against in figures:
                    ratio = figures[against] / figures["ours"]
                    verdict = ("fast" if ratio >= target else "slow") if self.on_gpu else "not judged on a CPU"
                    self.note(f"{race}: as fast as PyTorch, {against}", f"{ratio:.2f}x", f"{target}x", verdict)
        if self.on_gpu:
            self.note("GPU after the races", self.clocks(), "", "measured")

    def steps(self, model):
        """Steps of a race, and those of them before the clock starts."""
        return self.small((800, 200) if model == "mlp-28" else (300, 100), (12, 4))

    def race_ours(self, runner, model, width, batch, precision, turn):
        (steps, warm_up), shards = self.steps(model), 8 if "8" in runner else 1
        width, batch = self.small((width, batch), (8, 8))
        settings = {"model.kind": model, "model.width": width, "job.data_shards": shards, "job.precision": precision}
        settings.update({"job.steps": steps, "job.shard_batch": batch // shards, "metrics.every_steps": warm_up})
        if model == "dcgan-64":
            settings["data.resize"] = 64
        run, _ = self.train(f"race-{model}-{batch}-{shards}-{turn}", settings, 1)
        rows = run.rows()
        self.figures.setdefault("profiles", {})[f"{model}, {batch} images, {shards} shards"] = rows[-1].get("profile")
        return 1e3 * (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"])

    def race_peer(self, runner, model, width, batch, precision, turn):
        steps, warm_up = self.steps(model)
        command = self.peer(runner, model, width, batch, precision, steps)
        peer = subprocess.Popen(command, env=self.peer_variables(), **PIPES)
        left = self.time_left()
        try:
            said, errors = peer.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            raise Failed(f"PyTorch's run did not end within the {left:.0f} s left") from None
        finally:
            # Compiling has processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(peer.pid, signal.SIGKILL)
            peer.wait()
        line = next((line for line in said.splitlines() if line.startswith("{")), None)
        if line is None:
            raise Failed(f"PyTorch's run ended with {peer.returncode}: {errors.strip()[-400:]}")
        return statistics.mean(json.loads(line)["steps"][warm_up:])

    def peer(self, runner, model, width, batch, precision, steps):
        width, batch = self.small((width, batch), (8, 8))
        way = ["--way", "tuned", "--compile", COMPILE_MODE] if runner == "compiled" else ["--way", "usual"]
        sizes = ["--width", str(width), "--batch", str(batch), "--steps", str(steps), "--precision", precision]
        about = [
            "--model",
            model,
            "--data",
            str(DIGITS),
            "--started",
            str(time.time()),
            "--device",
            self.options.device,
        ]
        return [sys.executable, str(ROOT / "bench/peer.py"), *way, *sizes, *about]

    def peer_variables(self):
        variables = environment(self.python_path, None, self.hidden)
        variables.update(
            TORCHINDUCTOR_CACHE_DIR=str(self.scratch / "inductor"), TRITON_CACHE_DIR=str(self.scratch / "triton")
        )
        return variables

    def start_compiling(self):
        lines = [self.peer("compiled", *RACES[race][:4], 5) for race in RACES]
        script = "; ".join(subprocess.list2cmdline(line) for line in lines)
        log = (self.scratch / "compiling.log").open("w")
        streams = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(["sh", "-c", script], env=self.peer_variables(), **streams)

    def finish_compiling(self, compiling):
        try:
            compiling.wait(self.time_left() / 2)
        except subprocess.TimeoutExpired:
            self.note("PyTorch compiles ahead", "not done in time", "", "so races wait for it")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(compiling.pid, signal.SIGKILL)
            compiling.wait()

    def job(self, name, steps):
        """A small job of a kind, which still has every kind of its layers."""
        sizes = {"job.steps": steps, "job.data_shards": 4, "job.shard_batch": 8, "model.width": self.small(32, 8)}
        return dict(JOBS[name], **sizes)


BF16 = {"job.precision": "bf16"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}


def over(run, count):
    """Backend of the run's last group of this size."""
    formed = [event for event in run.events("generation_formed") if event["world_size"] == count]
    return formed[-1]["backend"] if formed else f"no group of {count}"


def short(one, other):
    return one[:12] if one == other else f"{one[:12] or 'nothing'} and {other[:12]}"


# ---- The report ------------------------------------------------------------------------------------------------------


def write(bench):
    """The tables so far, into the folder."""
    text = report(bench)
    (bench.out / "gpu.md").write_text(text)
    checks = [check._asdict() for check in bench.checks]
    (bench.out / "gpu.json").write_text(json.dumps({"checks": checks, "figures": bench.figures}, indent=1))
    return text


def report(bench):
    device = (
        f"{len(bench.gpus)} GPUs ({describe_gpus()})" if bench.on_gpu else "a CPU, in small: nothing here is a result"
    )
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    head = "| part | check | result | limit | verdict |\n|---|---|---|---|---|\n"

    def table(of):
        return head + "".join(f"| {' | '.join(check)} |\n" for check in bench.checks if of(check))

    right, fast = table(lambda check: check.part not in FIGURES), table(lambda check: check.part in FIGURES)
    return f"Checked {date} on {device}.\n\n## Right\n\n{right}\n## Fast\n\n{fast}"


# Parts that say how fast, not how right.
FIGURES = {"counts", "speed"}


def pack_logs(bench):
    """All logs as one file."""
    with tarfile.open(bench.out / "logs.tar.gz", "w:gz") as archive:
        for log in sorted(bench.scratch.glob("*.log")):
            archive.add(log, log.name)


def exit_code(bench):
    if any("**" in check.verdict for check in bench.checks):
        return 1
    return 3 if any(check.verdict == "slow" for check in bench.checks) else 0


def options():
    parser = argparse.ArgumentParser(description="All checks that need a GPU.", epilog="See the top of this file.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT", "bench-gpu"), help="default: $OUT")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release", help="the folder of our programs")
    parser.add_argument("--python-path", type=pathlib.Path, help="where PyTorch is, if not with this Python")
    parser.add_argument(
        "--libtorch", type=pathlib.Path, help="the libtorch of our programs: default .libtorch/torch, else PyTorch's"
    )
    parser.add_argument("--limit", type=float, default=470, help="seconds that all may take")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be given many times")
    chosen = parser.parse_args()
    beside = ROOT / ".tools/bench"
    if not chosen.python_path and not torch_folder(None) and beside.is_dir():
        chosen.python_path = beside
    own = ROOT / ".libtorch/torch"
    chosen.libtorch = chosen.libtorch or (own if own.is_dir() else torch_folder(chosen.python_path))
    return chosen


def find_gpus(chosen):
    """The GPUs to check, by the names that make them visible."""
    worker = chosen.bin / "worker"
    visible = None if chosen.device == "cuda" else ""
    variables = environment(None, chosen.libtorch, visible)
    count = count_gpus(worker, variables)
    if chosen.device == "cuda" and count == 0:
        raise NoGpu(why_no_gpu(worker, variables))
    return visible_gpus(count)


def main():
    chosen = options()
    try:
        gpus = find_gpus(chosen)
    except NoGpu as reason:
        print(f"gpu.py: {reason}; `--device cpu` shows the checks in small without one", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    try:
        bench = Bench(chosen, gpus, scratch)
        bench.measure()
        print(write(bench))
        pack_logs(bench)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return exit_code(bench)


if __name__ == "__main__":
    sys.exit(main())
