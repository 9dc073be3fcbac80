"""All checks that need a GPU, in one call: `make bench-gpu`, or `python3 bench/gpu.py --out FOLDER`.

It runs the built programs, and PyTorch beside them, and writes a Markdown table with a verdict for each check, anew after
each part, so that a call that is cut off leaves what it has seen:

- arithmetic: the losses of the first steps on a GPU against those on the CPU;
- repeats: two runs on a GPU come to the same bits;
- sharing: so do one worker and two that share a GPU over Gloo, also through a kill -9 of one of them;
- several: so do one worker and a worker for each of several GPUs over NCCL, also through a kill -9;
- nccl: groups of one, and of several, really reduced over NCCL, and rows of metrics tell how the GPU was used;
- speed: milliseconds a step against PyTorch on the same GPU, plain and with torch.compile.

A part that fails says so and the others still run; each has its time limit, and all together end within `--limit` seconds.
Exit code 0: all passed; 1: some did not; 2: there is no GPU, or the options are wrong.

`--device cpu` runs the same parts in small on the CPU: it shows that they work, but for the GPU. Only the standard library
is used here; what needs PyTorch runs as `bench/peer.py`.
"""

import argparse
import collections
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
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = ROOT / "data/mnist-10k/t10k-images-idx3-ubyte.gz"
COMPILE_MODE = "reduce-overhead"
# Minimum speed relative to PyTorch: plain, and compiled.
TARGETS = {"mlp-28": (3.0, 1.2), "dcgan-64": (1.3, 1.0)}
PARTS = {"arithmetic": 90, "repeats": 70, "sharing": 90, "several": 90, "nccl": 5, "speed": 300}

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


# ---- Our runs --------------------------------------------------------------------------------------------------------


def lines_of(path):
    """The whole lines of a file of JSON objects."""
    with contextlib.suppress(OSError):
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []


class Run:
    """One run of our programs, with its files."""

    def __init__(self, bench, name, settings, workers, visible=None, extra=None):
        self.folder = bench.scratch / name
        self.bench = bench
        command = [bench.bin / "coordinator", "--workers", str(workers), "--run-dir", self.folder]
        for key, value in dict(QUIET, **settings).items():
            command += ["--set", f"{key}={value}"]
        variables = dict(
            environment(None, bench.libtorch, bench.hidden if visible is None else visible), **(extra or {})
        )
        self.log = bench.scratch / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)

    def rows(self):
        return lines_of(self.folder / "metrics.jsonl")

    def events(self, kind):
        return [event for event in lines_of(self.folder / "events.jsonl") if event["kind"] == kind]

    def wait_for(self, what, found):
        """Polls until `found` returns a value."""
        while not (seen := found()):
            if self.process.poll() is not None:
                raise Failed(f"it ended before {what}: {self.last_words()}")
            self.bench.check_time(f"waiting for {what}")
            time.sleep(0.005)
        return seen

    def kill_one(self, step):
        """Kills the last member of the newest group once a step was reported."""
        self.wait_for(f"step {step}", lambda: any(row["step"] >= step for row in self.rows()))
        victim = self.events("generation_formed")[-1]["members"][-1]["pid"]
        os.kill(victim, signal.SIGKILL)
        return victim

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
        self.bench.runs.append(self)
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
        self.checks, self.runs, self.figures = [], [], {}
        self.end = time.monotonic() + options.limit
        self.part, self.part_end = "", self.end

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

    def train(self, *arguments, kill_at=None, **more):
        run = Run(self, *arguments, **more)
        try:
            if kill_at is not None:
                run.kill_one(kill_at)
            return run, run.finish()
        finally:
            run.end()

    def measure(self):
        parts = [self.arithmetic, self.repeats, self.sharing, self.several, self.nccl, self.speed]
        for part in parts:
            self.part = part.__name__
            if self.options.only and self.part not in self.options.only:
                continue
            self.part_end = time.monotonic() + PARTS[self.part]
            with self.attempt("the part"):
                part()
            write(self)

    # Losses on a GPU against the CPU. Without TF32 only the order of sums differs.
    def arithmetic(self):
        steps = self.small(20, 3)
        for model, limits in {"mlp-28": (1e-3, None), "dcgan-28": (1e-2, 5e-2)}.items():
            settings = dict(self.model(model), **{"job.steps": steps})
            with self.attempt(f"{model}, first {steps} steps, as on the CPU"):
                expected, _ = self.train(f"cpu-{model}", settings, 1, visible="")
                for name, extra, limit in [
                    ("without TF32", {"NVIDIA_TF32_OVERRIDE": "0"}, limits[0]),
                    ("as it runs", {}, limits[1] or limits[0]),
                ]:
                    label = f"{model}, first {steps} steps, {name}: relative error of losses"
                    with self.attempt(label, f"at most {limit:g}"):
                        run, _ = self.train(f"gpu-{model}-{len(self.runs)}", settings, 1, extra=extra)
                        first, worst = errors(run.rows(), expected.rows())
                        self.note(label, f"{worst:.2g} ({first:.2g} in step 1)", f"at most {limit:g}", worst <= limit)

    # The same run twice.
    def repeats(self):
        for model in ("mlp-28", "dcgan-28"):
            name = f"{model}, two runs on one GPU"
            with self.attempt(name, "equal bits"):
                settings = self.long(model)
                _, once = self.train(f"once-{model}", settings, 1)
                _, twice = self.train(f"twice-{model}", settings, 1)
                self.note(name, short(once, twice), "equal bits", once == twice)

    def sharing(self):
        self.compare_workers("mlp-28", 2, self.hidden, "Gloo")
        self.compare_workers("dcgan-28", 2, self.hidden, "Gloo")

    def several(self):
        if len(self.gpus) < 2:
            return self.note("a worker for each GPU", f"{len(self.gpus)} here", "", "skipped")
        count = min(len(self.gpus), 4)
        for model in ("mlp-28", "dcgan-28"):
            self.compare_workers(model, count, ",".join(self.gpus[:count]), "NCCL")

    def compare_workers(self, model, count, visible, backend):
        """One worker against several, undisturbed and with one killed."""
        settings, place = self.long(model), f"{count} workers over {backend}"
        name = f"{model}, 1 worker and {place}"
        alone = None
        with self.attempt(name, "equal bits"):
            _, alone = self.train(f"alone-{model}-{backend}", settings, 1)
            run, together = self.train(f"together-{model}-{backend}", settings, count, visible=visible)
            self.note(name, short(alone, together), "equal bits", alone == together)
            self.note(f"{model}, {place}: the backend", over(run, count), backend, over(run, count) == backend)
        name = f"{model}, {place}, one killed (-9)"
        with self.attempt(name, "equal bits"):
            kill_at = settings["job.steps"] // 4
            run, killed = self.train(f"killed-{model}-{backend}", settings, count, visible=visible, kill_at=kill_at)
            groups = len(run.events("generation_formed"))
            if groups < 2:
                raise Failed("the run was over before the kill: no new group was formed")
            self.note(name, f"{short(alone or '', killed)}, {groups} groups", "equal bits", alone == killed)

    # Descriptions of the runs so far, from their own output.
    def nccl(self):
        if not self.on_gpu:
            return self.note("groups over NCCL", "no GPU", "", "skipped")
        sizes = collections.Counter()
        for run in self.runs:
            for event in run.events("generation_formed"):
                sizes[event["world_size"]] += event["backend"] == "NCCL"
        self.note("groups of one over NCCL", str(sizes[1]), "at least 1", sizes[1] > 0)
        several = sum(count for size, count in sizes.items() if size > 1)
        verdict = several > 0 if len(self.gpus) > 1 else "skipped"
        self.note("groups of several over NCCL", str(several), "at least 1 with several GPUs", verdict)
        rows = [row for run in self.runs for row in run.rows()]
        used = [row["gpu_memory_bytes"] for row in rows if row.get("gpu_memory_bytes")]
        busy = [row["gpu_utilisation"] for row in rows if "gpu_utilisation" in row]
        most = f"{max(used, default=0) / 2**20:.0f} MiB and {max(busy, default=0)} % at most"
        self.note(
            "rows that tell how the GPU was used", f"{len(used)} of {len(rows)}: {most}", "some", bool(used and busy)
        )

    # In turns, so that a busy moment hits all.
    def speed(self):
        for model, targets in TARGETS.items():
            name = f"{model}: milliseconds a step"
            with self.attempt(name):
                rounds = [self.race(model, turn) for turn in range(self.small(2, 1))]
                ours, plain, compiled = (statistics.median(times) for times in zip(*rounds))
                self.figures[model] = {"ours": ours, "plain": plain, "compiled": compiled, "rounds": rounds}
                self.note(name, f"ours {ours:.3f}, PyTorch {plain:.3f}, compiled {compiled:.3f}", "", "measured")
                for against, figure, target in [("plain", plain, targets[0]), ("compiled", compiled, targets[1])]:
                    reached = figure / ours >= target if self.on_gpu else "not judged on a CPU"
                    self.note(f"{model}: as fast as PyTorch, {against}", f"{figure / ours:.2f}x", f"{target}x", reached)

    def race(self, model, turn):
        if model == "mlp-28":
            steps, warm_up, width, batch = self.small((600, 100, 256, 64), (12, 3, 32, 16))
        else:
            steps, warm_up, width, batch = self.small((200, 40, 64, 64), (6, 2, 8, 4))
        settings = {"model.kind": model, "model.width": width, "job.data_shards": 1, "job.shard_batch": batch}
        settings.update({"job.steps": steps, "optimizer.learning_rate": 0.0002})
        if model == "dcgan-64":
            settings["data.resize"] = 64
        run, _ = self.train(f"race-{model}-{turn}", settings, 1)
        rows = run.rows()
        times = [row["time"] for row in rows]
        ours = statistics.median(1e3 * (b - a) for a, b in zip(times[warm_up:], times[warm_up + 1 :]))
        self.figures.setdefault("profiles", {})[model] = rows[-1].get("profile")
        figures = [ours]
        for way in (["--way", "usual"], ["--way", "tuned", "--compile", COMPILE_MODE]):
            peer = [sys.executable, str(ROOT / "bench/peer.py"), *way, "--model", model, "--width", str(width)]
            peer += ["--batch", str(batch), "--steps", str(steps), "--data", str(DIGITS), "--started", str(time.time())]
            peer += ["--device", self.options.device]
            variables = environment(self.python_path, None, self.hidden)
            variables.update(TORCHINDUCTOR_CACHE_DIR=str(self.scratch / "inductor"))
            figures.append(statistics.median(self.peer_steps(peer, variables)[warm_up:]))
        return figures

    def peer_steps(self, command, variables):
        """The milliseconds of each step of PyTorch's run."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        peer = subprocess.Popen(command, env=variables, **streams)
        left = self.time_left()
        try:
            said, errors = peer.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            raise Failed(f"PyTorch's run ({' '.join(command[2:5])}) did not end within the {left:.0f} s left") from None
        finally:
            # Compiling has processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(peer.pid, signal.SIGKILL)
            peer.wait()
        line = next((line for line in said.splitlines() if line.startswith("{")), None)
        if line is None:
            raise Failed(f"PyTorch's run ended with {peer.returncode}: {errors.strip()[-400:]}")
        return json.loads(line)["steps"]

    def model(self, model):
        """A small job, which still has every kind of layer."""
        if model == "mlp-28":
            return {"model.kind": model, "job.data_shards": 8, "job.shard_batch": 8}
        return {"model.kind": model, "model.width": self.small(32, 4), "job.data_shards": 4, "job.shard_batch": 8}

    def long(self, model):
        """The same, long enough for a kill in its middle."""
        steps = self.small(400, 300) if model == "mlp-28" else self.small(200, 120)
        return dict(self.model(model), **{"job.steps": steps})


def errors(rows, expected):
    """The largest relative error of the losses: in the first step, and in all."""
    if [row["step"] for row in rows] != [row["step"] for row in expected] or not rows:
        raise Failed("the runs have other steps")
    names = ("loss_discriminator", "loss_generator")
    steps = [
        max(abs(row[name] - known[name]) / max(abs(known[name]), 1e-6) for name in names)
        for row, known in zip(rows, expected)
    ]
    return steps[0], max(steps)


def over(run, count):
    """Backend of the run's last group of this size."""
    formed = [event for event in run.events("generation_formed") if event["world_size"] == count]
    return formed[-1]["backend"] if formed else f"no group of {count}"


def short(one, other):
    return one[:12] if one == other else f"{one[:12] or 'nothing'} and {other[:12]}"


# ---- The report ------------------------------------------------------------------------------------------------------


def write(bench):
    """The table so far, into the folder."""
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
    rows = "".join(f"| {' | '.join(check)} |\n" for check in bench.checks)
    return f"Checked {date} on {device}.\n\n| part | check | result | limit | verdict |\n|---|---|---|---|---|\n{rows}"


def options():
    parser = argparse.ArgumentParser(description="All checks that need a GPU.", epilog="See the top of this file.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT", "bench-gpu"), help="default: $OUT")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release", help="the folder of our programs")
    parser.add_argument("--python-path", type=pathlib.Path, help="where PyTorch is, if not with this Python")
    parser.add_argument(
        "--libtorch", type=pathlib.Path, help="the libtorch of our programs: default .libtorch/torch, else PyTorch's"
    )
    parser.add_argument("--limit", type=float, default=530, help="seconds that all may take")
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
        for log in scratch.glob("*.log"):
            shutil.copy(log, chosen.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if any("**" in check.verdict for check in bench.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
