"""`train` and `Run`: a training by the coordinator, seen from Python."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ganglion import _display
from ganglion._errors import Error
from ganglion._package import read_manifest, read_tensors
from ganglion._programs import environment, program

if TYPE_CHECKING:
    from torch import Tensor

_POLL_SECONDS = 0.1
_START_SECONDS = 30.0
_STOPPED = (129, 130, 143)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: steps done, as far as rows of metrics tell.
        steps: steps of the whole training; 0 if it is not known yet.
        images_per_second: samples per second.
        workers: workers of the present group.
        losses: newest scalars whose names have "loss" in them, else all.
    """

    step: int
    steps: int
    images_per_second: float
    workers: int
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file of samples; a notebook shows it.

    Attributes:
        path: the file.
        step: step of the state that drew it; None for other pictures.
    """

    path: Path
    step: int | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves of scalars over the steps; a notebook shows them.

    Attributes:
        html: the curves as SVG, with their names and newest values.
    """

    html: str = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run.

    Attributes:
        step: steps done.
        path: its folder.
        digest: `state_digest`, the hash of the whole state: equal for any number of workers.
    """

    step: int
    path: Path
    digest: str


class Run:
    """A training in a run directory, going on or ended. `train` and `load` return it.

    As a context manager it stops the training at the end of the block, if this process started it.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir).absolute()
        self.name = self.path.name
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._text = b""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._said = 0
        self._rows: list[dict[str, Any]] = []
        self._read = 0

    def __repr__(self) -> str:
        progress = self.progress()
        state = (
            "training" if self.running else "complete" if 0 < progress.steps == progress.step else "not training here"
        )
        return f"Run({str(self.path)!r}: step {progress.step} of {progress.steps}, {state})"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()

    @property
    def running(self) -> bool:
        """Whether a training that this process started goes on."""
        return self._process is not None and self._process.poll() is None

    # ---- The training ------------------------------------------------------------------------------------------------

    def _start(self, arguments: Sequence[str], job: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ganglion-")
        config = Path(self._folder.name) / "job.toml"
        config.write_text(job, encoding="utf-8")
        # A file and not a pipe: nobody need read it for the coordinator to go on.
        self._output = open(Path(self._folder.name) / "output", "w+b")
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_guard.py")), str(os.getpid())]
        coordinator = [program("coordinator"), "--config", str(config), "--run-dir", str(self.path), *arguments]
        command = [*guard, self._folder.name, *coordinator]
        # A session of its own: Ctrl-C comes here alone, and is passed on once.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        # Wrong input is told at once, also to a caller that does not wait.
        limit = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < limit:
            if any(line.startswith("run ") for line in self._lines()):
                return
            time.sleep(_POLL_SECONDS / 4)
        if self._process.returncode is not None:
            self._check(self._process.returncode)

    def wait(self, timeout: float | None = None, progress: bool = True) -> Run:
        """Waits until the training that this process started has ended.

        Ctrl-C, or another exception, stops it after a checkpoint; `train` with the same arguments goes on with it.

        Args:
            timeout: seconds to wait at most; then the training goes on, and this returns.
            progress: show the progress.

        Raises:
            Error: the training failed; the text is the coordinator's.
        """
        if self._process is None:
            return self
        display = _display.choose() if progress else _display.Nothing()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while self._process.poll() is None:
                self._show_warnings(display)
                display.update(self)
                if deadline is not None and time.monotonic() >= deadline:
                    return self
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self._end()
            display.say(f"stopped at step {self.progress().step}; the same call goes on from there")
            raise
        self._show_warnings(display)
        self._check(self._process.returncode)
        display.close(self)
        return self

    def stop(self) -> Run:
        """Stops the training after a checkpoint, and waits for that. `train` with the same arguments goes on with it."""
        if self._process is not None:
            self._end()
        else:
            self._command("coordinator", "stop", str(self.path))
        return self

    def scale(self, workers: int) -> None:
        """Sets the number of workers on this machine. The result stays the same."""
        self._command("coordinator", "scale", str(workers), str(self.path))

    def _end(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait()
            except BaseException:
                # Told twice to end: at once then, with all that the coordinator started.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                raise
        self._check(self._process.returncode)

    def _lines(self) -> list[str]:
        """Lines that the coordinator has written."""
        if self._output is not None:
            self._output.seek(0)
            self._text = self._output.read()
        return self._text.decode("utf-8", "replace").splitlines()

    def _show_warnings(self, display: _display.Display) -> None:
        lines = self._lines()
        for line in lines[self._said :]:
            if line.startswith("warning"):
                display.say(line)
        self._said = len(lines)

    def _check(self, code: int) -> None:
        """Looks at how the coordinator has ended."""
        lines = self._lines()
        if self._output is not None and self._folder is not None:
            self._output.close()
            self._folder.cleanup()
            self._output = None
        if code in (0, *_STOPPED):
            return
        at = [number for number, line in enumerate(lines) if line.startswith("error")]
        text = "\n".join(lines[at[0] :] if at else lines[-10:]) or f"the coordinator ended with exit code {code}"
        text = re.sub(r"[^ \n]*/job\.toml(:\d+)?: ", "", text.removeprefix("error: "))
        raise Error(text)

    def _command(self, name: str, *arguments: str) -> str:
        command = [program(name), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
        if done.returncode != 0:
            raise Error(done.stderr.strip().removeprefix("error: ") or f"{name} ended with exit code {done.returncode}")
        return done.stdout

    # ---- Records -----------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`: a dict for each reported step, with its scalars by name.

        `pandas.DataFrame(run.metrics())` makes a table of them.
        """
        try:
            with open(self.path / "metrics.jsonl", "rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            return list(self._rows)
        whole = text[: text.rfind(b"\n") + 1]
        self._rows += [json.loads(line) for line in whole.splitlines() if line.strip()]
        self._read += len(whole)
        return list(self._rows)

    def plot(self, *names: str) -> Plot:
        """Curves of scalars over the steps, such as `run.plot("kl")`; by default of the losses.

        Raises:
            Error: the run has no such scalar.
        """
        rows = self.metrics()
        unknown = [name for name in names if rows and name not in rows[-1]]
        if unknown:
            there = ", ".join(_display.scalar_names(rows))
            raise Error(f"{self.path}: has no scalar {', '.join(unknown)}; there are {there}")
        return Plot(_display.plot(rows, names))

    def events(self) -> list[dict[str, Any]]:
        """Events of `events.jsonl`: workers that join and leave, checkpoints, evaluations, faults."""
        try:
            text = (self.path / "events.jsonl").read_bytes()
        except OSError:
            return []
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines() if line.strip()]

    def progress(self) -> Progress:
        """How far the training is."""
        rows = self.metrics()
        steps = int(self._job().get("job.steps", 0))
        if not rows:
            return Progress(0, steps, 0.0, 0, {})
        row = rows[-1]
        names = _display.scalar_names(rows)
        names = [name for name in names if "loss" in name] or names
        losses = {name: float(row[name]) for name in names if isinstance(row[name], (int, float))}
        return Progress(row["step"], steps, row.get("images_per_second") or 0.0, row.get("world_size", 0), losses)

    def samples(self) -> list[Picture]:
        """Grids of samples drawn during the training, oldest first."""
        found = [
            (re.fullmatch(r"step-(\d+)\.png", path.name), path)
            for path in sorted((self.path / "samples").glob("*.png"))
        ]
        return [Picture(path, int(match[1])) for match, path in found if match]

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that are there, oldest first."""
        folders = sorted((self.path / "checkpoints").glob("step-*/manifest.json"))
        found = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in folders]
        return [Checkpoint(manifest["step"], folder, manifest["state_digest"]) for manifest, folder in found]

    def state_dict(self, step: int | None = None, average: bool = False) -> dict[str, Tensor]:
        """Weights and buffers of a checkpoint, under the objective's own names: `objective.load_state_dict(...)` takes them.

        Args:
            step: step of the checkpoint; by default the newest.
            average: take the moving average of networks that have one.
        """
        found = self.checkpoints()
        if step is not None:
            found = [checkpoint for checkpoint in found if checkpoint.step == step] or self._no_checkpoint(found, step)
        if not found:
            raise Error(f"{self.path}: has no checkpoint yet")
        tensors: dict[str, Tensor] = {}
        for file in sorted(found[-1].path.glob("state-*.safetensors")):
            tensors |= read_tensors(file)
        job = self._job()
        if job.get("model.kind") != "package":
            return {
                name: tensor for name, tensor in tensors.items() if not name.startswith(("optimizer.", "counters."))
            }
        return _by_objective(tensors, read_manifest(job["model.path"]), average)

    def _no_checkpoint(self, found: list[Checkpoint], step: int) -> list[Checkpoint]:
        there = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
        raise Error(f"{self.path}: has no checkpoint of step {step}; there are: {there}")

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Evaluates the newest checkpoint with `worker eval`; returns its figures by name.

        Args:
            options: options of that command, such as samples=5000 or held_out="t10k-images-idx3-ubyte.gz".
        """
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        found = json.loads(self._command("worker", "eval", str(self.path), "--json", *arguments))
        return found["judged"][0]["metrics"]

    def _job(self) -> dict[str, Any]:
        """Keys of `job.toml`, as `section.key`."""
        keys, section = {}, ""
        try:
            text = (self.path / "job.toml").read_text(encoding="utf-8")
        except OSError:
            return {}
        for line in text.splitlines():
            if line.startswith("["):
                section = line.strip("[] ") + "."
            elif "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                try:
                    keys[section + key.strip()] = json.loads(value)
                except ValueError:
                    keys[section + key.strip()] = value.strip()
        return keys


def _by_objective(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], average: bool) -> dict[str, Tensor]:
    found = {}
    for network in manifest["networks"]:
        name, prefix = network["name"], "" if network["name"] == "objective" else network["name"] + "."
        section = network["average"]["name"] if average and network["average"] else name
        for tensor in [*network["parameters"], *network["buffers"]]:
            found[prefix + tensor["name"]] = tensors[f"{section}.{tensor['name']}"]
    for alias, first in manifest.get("aliases", {}).items():
        found[alias] = found[first]
    return found


# ---- Functions -------------------------------------------------------------------------------------------------------


def train(
    package: str | os.PathLike[str],
    *,
    workers: int | str = 1,
    data: str = "mnist-10k",
    run_dir: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    wait: bool = True,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Run:
    """Trains a package with workers on this machine, or goes on with a training that was stopped.

    Calling it again with the same arguments resumes the run in `run_dir`; the result is the same as without the stop,
    and the same for any number of workers. Ctrl-C stops after a checkpoint. Nothing is left running when this process
    ends, however it ends.

    Args:
        package: file of `ganglion.export`.
        workers: number of workers, "auto" for one a GPU, 0 to wait for workers of other machines.
        data: kind and path, such as "mnist-10k", "idx:train-images-idx3-ubyte.gz" or "folder:/path/to/pictures",
            "text:corpus" or "arrays:/path/to/arrays".
        run_dir: folder of the run; by default runs/NAME by the package's name.
        steps: length of the training.
        wait: return only when the training has ended; otherwise `run.wait()` does that.
        progress: show the progress: a bar on a terminal, curves and samples in a notebook.
        settings: further keys of the job: {"optimizer.learning_rate": 1e-3} or {"optimizer": {"learning_rate": 1e-3}}.
        more: the same as keyword arguments: optimizer__learning_rate=1e-3; without a section a key of [job]: seed=1.

    Returns:
        The run.

    Raises:
        Error: wrong input, or the training failed; the text is the coordinator's.
    """
    path = Path(package).expanduser().resolve()
    name = path.stem
    kind, _, place = data.partition(":")
    keys: dict[str, Any] = {"job.name": name, "data.kind": kind, "model.kind": "package", "model.path": str(path)}
    if place:
        keys["data.path"] = str(Path(place).expanduser().resolve())
    if steps is not None:
        keys["job.steps"] = steps
    keys |= _flat(settings or {})
    keys |= {key.replace("__", ".") if "__" in key else f"job.{key}": value for key, value in more.items()}
    run = Run(Path(run_dir) if run_dir is not None else Path("runs") / keys["job.name"])
    run._start(["--workers", str(workers)], job_text(keys))
    return run.wait(progress=progress) if wait else run


def _flat(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in settings.items():
        keys |= _flat(value, f"{section}{key}.") if isinstance(value, Mapping) else {section + key: value}
    return keys


def job_text(keys: Mapping[str, Any]) -> str:
    """Job file with these keys, each `section.key`."""
    sections: dict[str, list[str]] = {}
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml(key, value)}")
    return "\n".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


def _toml(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        if value is None:
            raise Error(f"{key} is None: leave it out")
        return str(value).lower()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (int, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(key, part) for part in value) + "]"
    raise Error(f"{key} is a {type(value).__name__}; a key is a number, a text, true or false, or a list of such")


def load(run_dir: str | os.PathLike[str]) -> Run:
    """Finds an earlier run, or one that another process trains: its metrics, samples and weights.

    Args:
        run_dir: folder of the run, or its name in runs/.

    Raises:
        Error: there is no run.
    """
    for path in (Path(run_dir), Path("runs") / run_dir):
        if (path / "job.toml").is_file() or (path / "events.jsonl").is_file():
            return Run(path)
    raise Error(f"{run_dir}: there is no run there")


def sample(
    run: Run | str | os.PathLike[str],
    count: int = 50,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Picture:
    """Draws samples from the newest checkpoint of a run, or from `runs/vae@5000` or `runs/vae@best`.

    Args:
        run: the run, or a checkpoint of it by name.
        count: number of samples.
        seed: seed of the draws; the same seed gives the same samples.
        out: PNG file to write; by default samples.png in the run's folder of samples.
        options: further options of `worker sample`, such as class_=3.
    """
    place = run.path if isinstance(run, Run) else Path(run)
    path = Path(out) if out is not None else Path(str(place).partition("@")[0]) / "samples" / "samples.png"
    arguments = ["sample", str(place), "--count", str(count), "--seed", str(seed), "--out", str(path)]
    for name, value in options.items():
        arguments += [f"--{name.strip('_').replace('_', '-')}", str(value)]
    Run(place)._command("worker", *arguments)
    return Picture(path)
