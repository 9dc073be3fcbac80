"""Shared support of the tests of packages, containers and Slurm.

1. Nothing sleeps and hopes: a test waits for what it needs to see, at most LIMIT.
2. Nothing is left behind: what a test starts or makes, it hands to an ExitStack.
3. The digest to compare with is that of an undisturbed run of the built programs on this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(os.environ.get("GANGLION_BIN", ROOT / "target/release"))
# Limit of every wait in seconds; machines may be busy.
LIMIT = 600


# A signal that ends a test also runs its cleanup.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def say(text):
    print(text, flush=True)


def check(holds, what):
    if not holds:
        raise AssertionError(what)


def wait_for(what, look, limit=LIMIT):
    """Waits until the result of `look` is true; returns it."""
    end = time.monotonic() + limit
    while not (seen := look()):
        check(time.monotonic() < end, f"waited {limit} s for {what}")
        time.sleep(0.1)
    return seen


def run(*command, code=0, **options):
    """Runs a program to its end; returns its output. Another exit code than `code` fails the test."""
    options = {"capture_output": True, "text": True, "timeout": LIMIT, **options}
    done = subprocess.run([str(part) for part in command], **options)
    said = (done.stdout or "") + (done.stderr or "")
    check(done.returncode == code, f"{' '.join(map(str, command))}: exit code {done.returncode}\n{said}")
    return said


def end(process):
    """Ends a process that may still run."""
    if process.poll() is None:
        process.kill()
    process.wait()


def scratch(stack):
    """A folder that is deleted when the test ends, unless KEEP is set."""
    folder = Path(tempfile.mkdtemp(prefix="ganglion-test-"))
    if os.environ.get("KEEP"):
        say(f"keeping {folder}")
    else:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def lines(run_dir, name):
    """Returns the objects of a file that may be written to at the same time."""
    try:
        text = (run_dir / name).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def events(run_dir, kind):
    return [event for event in lines(run_dir, "events.jsonl") if event["kind"] == kind]


def last_step(run_dir):
    """Returns the newest reported step; 0 if there is none."""
    return max((row["step"] for row in lines(run_dir, "metrics.jsonl")), default=0)


def digest(run_dir, step):
    manifest = run_dir / f"checkpoints/step-{step:08}/manifest.json"
    return json.loads(manifest.read_text())["state_digest"]


def undisturbed(folder, settings, step):
    """The digest of the built programs' own run with these settings."""
    run(PROGRAMS / "coordinator", "--workers", "1", "--run-dir", folder / "undisturbed", *settings)
    return digest(folder / "undisturbed", step)


def audit(run_dir):
    """Proves a run from its files."""
    run(PROGRAMS / "coordinator", "audit", run_dir)


def main(tests):
    """Runs tests in order, or the ones named on the command line, and prints the results."""
    named = [name for name in sys.argv[1:] if not name.startswith("-")]
    tests = [test for test in tests if test.__name__ in named] if named else tests
    for test in tests:
        began = time.monotonic()
        test()
        say(f"ok: {test.__name__.replace('_', ' ')} ({time.monotonic() - began:.0f} s)")
    say(f"{len(tests)} passed, 0 failed")
    sys.exit(0)
