"""Installs the wheel in an environment without Rust, and trains with it.

python3 tests/deploy/wheel.py          PyTorch is the one that was built with
python3 tests/deploy/wheel.py --full   PyTorch comes through pip as for any user (4.5 GB)
"""

import base64
import csv
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

from common import LIMIT, ROOT, audit, check, digest, end, last_step, main, run, say, scratch, undisturbed, wait_for

TORCH = Path(os.environ.get("LIBTORCH", ROOT / ".libtorch/torch")).resolve()
STEPS = 1000
SETTINGS = ("--set", f"job.steps={STEPS}", "--set", "metrics.every_steps=10")


def the_wheel():
    wheels = sorted((ROOT / "dist").glob("ganglion-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    check(wheels, "no wheel in dist; `make wheel` packs one")
    return wheels[-1]


class Elsewhere:
    """A machine with Python and no Rust: a virtual environment with the wheel, an empty home, an empty folder to work in."""

    def __init__(self, stack, *pip_options):
        self.folder = scratch(stack)
        self.venv = self.folder / "venv"
        run(sys.executable, "-m", "venv", self.venv)
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        path = f"{self.venv}/bin:/usr/bin:/bin"
        self.environment = {**kept, "PATH": path, "HOME": str(self.folder / "home")}
        check(shutil.which("cargo", path=path) is None, "cargo is on the path of a machine without Rust")
        self.empty()
        self.run("python", "-m", "pip", "install", "--quiet", *pip_options, the_wheel(), timeout=3600)

    def empty(self):
        for name in ("work", "home"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        self.work = self.folder / "work"

    def run(self, program, *arguments, **options):
        return run(self.venv / "bin" / program, *arguments, cwd=self.work, env=self.environment, **options)

    def start(self, stack, program, *arguments):
        command = [str(self.venv / "bin" / program), *arguments]
        process = subprocess.Popen(command, cwd=self.work, env=self.environment, stderr=subprocess.DEVNULL)
        stack.callback(end, process)
        return process

    def packages(self):
        return next((self.venv / "lib").glob("python3*/site-packages"))

    def add_torch(self):
        """Adds the PyTorch of the build, as another folder of packages."""
        (self.packages() / "torch.pth").write_text(f"{TORCH.parent}\n")


def every_file_is_as_recorded():
    with zipfile.ZipFile(the_wheel()) as wheel:
        names = wheel.namelist()
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(wheel.read(record).decode().splitlines()))
        check([row[0] for row in rows] == names, "RECORD has other files than the wheel")
        for name, digest_, size in rows[:-1]:
            data = wheel.read(name)
            is_ = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            check((is_, str(len(data))) == (digest_, size), f"{name} is not as recorded")
        for name in ("licenses/LICENSE", "licenses/THIRD-PARTY.txt", "sboms/ganglion.cdx.json", "METADATA"):
            check(any(known.endswith(f".dist-info/{name}") for known in names), f"no {name}")


def the_programs_name_no_folder_of_libraries():
    with ExitStack() as stack:
        folder = scratch(stack)
        with zipfile.ZipFile(the_wheel()) as wheel:
            for name in ("coordinator", "worker"):
                said = run("readelf", "--dynamic", wheel.extract(f"ganglion/bin/{name}", folder))
                check(not re.search("RPATH|RUNPATH", said), said)


class Tests:
    """Tests in one environment, one after the other."""

    def __init__(self, stack):
        self.here = Elsewhere(stack, "--no-deps")
        self.expected = undisturbed(scratch(stack), SETTINGS, STEPS)

    def without_its_pytorch_it_says_what_to_install(self):
        here = self.here
        for program in ("coordinator", "worker"):
            check("pip install torch==2.11.0" in here.run(program, "--version", code=2), "no word of what to install")
        wrong = here.packages() / "torch"
        wrong.mkdir()
        check("is none" in here.run("worker", "gpus", code=2), "a folder without PyTorch in it is taken for one")
        for version in ("2.10.0", "2.11.0a0+git1", "2.11.1+cpu"):
            (wrong / "version.py").write_text(f"__version__ = '{version}'\n")
            check(f"is {version};" in here.run("worker", "gpus", code=2), f"{version} is not refused")
        (wrong / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
        check("libtorch_cpu.so" in here.run("worker", "gpus", code=127), "2.11.0+cpu is refused")
        shutil.rmtree(wrong)
        here.add_torch()
        here.run("worker", "gpus")

    def it_trains_the_same_bits_and_draws(self):
        here = self.here
        here.empty()
        here.run("coordinator", "--workers", "2", *SETTINGS)
        train_dir = here.work / "runs/mnist-mlp"
        check(digest(train_dir, STEPS) == self.expected, "the wheel trains other bits")
        audit(train_dir)
        picture = here.run("worker", "sample", train_dir, "--out", "digits.png").strip()
        check((here.work / picture).read_bytes().startswith(b"\x89PNG"), "no picture")
        check("is finished" in here.run("coordinator", "--workers", "2", *SETTINGS), "a finished run does not say so")
        check(sorted(path.name for path in here.work.iterdir()) == ["digits.png", "runs"], "it wrote elsewhere")

    def it_stops_when_told_to_and_resumes(self):
        here = self.here
        here.empty()
        with ExitStack() as stack:
            process = here.start(stack, "coordinator", "--workers", "2", *SETTINGS)
            train_dir = here.work / "runs/mnist-mlp"
            wait_for("a step", lambda: last_step(train_dir))
            program = os.readlink(f"/proc/{process.pid}/exe")
            check(program.endswith("ganglion/bin/coordinator"), f"process {process.pid} is {program}")
            process.send_signal(signal.SIGTERM)
            check(process.wait(LIMIT) == 143, f"exit code {process.returncode} after SIGTERM")
        check(last_step(train_dir) < STEPS, "it was not stopped but done")
        here.run("coordinator", "--workers", "1", *SETTINGS)
        check(digest(train_dir, STEPS) == self.expected, "a resumed run has other bits")

    def wrong_input_is_told_with_exit_code_2(self):
        check("stepz" in self.here.run("coordinator", "--set", "job.stepz=1", code=2), "no word of the wrong key")
        self.here.run("worker", "--coordinator", "nonsense", code=2)

    def pip_brings_pytorch_along(self):
        with ExitStack() as stack:
            here = Elsewhere(stack)
            here.run("coordinator", "--workers", "2", *SETTINGS)
            check(digest(here.work / "runs/mnist-mlp", STEPS) == self.expected, "the wheel trains other bits")
            say(here.run("python", "-m", "pip", "check").strip())


if __name__ == "__main__":
    say(f"testing {the_wheel().name}")
    with ExitStack() as stack:
        tests = Tests(stack)
        main(
            [
                every_file_is_as_recorded,
                the_programs_name_no_folder_of_libraries,
                tests.without_its_pytorch_it_says_what_to_install,
                tests.it_trains_the_same_bits_and_draws,
                tests.it_stops_when_told_to_and_resumes,
                tests.wrong_input_is_told_with_exit_code_2,
                *([tests.pip_brings_pytorch_along] if "--full" in sys.argv[1:] else []),
            ]
        )
