"""Plants each mistake of this folder into a copy of the machine, and demands that the simulation finds it.

python3 membership/tests/planted/check.py [--seeds N] [NAME...]
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
STEP = 10_000


def copy_of(root, to):
    """Copies what the simulation is built from."""
    manifest = (root / "Cargo.toml").read_text()
    (to / "Cargo.toml").write_text(re.sub(r"(?m)^members = .*$", 'members = ["membership"]', manifest))
    shutil.copy(root / "Cargo.lock", to)
    shutil.copytree(root / "membership", to / "membership")


def first_failure(folder, target, seeds):
    """The first seed to fail and what it says, or None."""
    command = ["cargo", "test", "--release", "-p", "ganglion-membership", "--test", "simulation", "every_seed"]
    for first in range(0, seeds, STEP):
        count = min(STEP, seeds - first)
        env = dict(os.environ, FIRST=str(first), SEEDS=str(count), CARGO_TARGET_DIR=str(target))
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if found := re.search(r"seeds fail; the first: (seed \d+: .*)", said):
            failing = re.search(r"; (\d+) fail", said).group(1)
            return f"{failing} of seeds {first} to {first + count - 1} fail; {found.group(1)}"
        if done.returncode:
            sys.exit(f"the simulation did not run:\n{said}")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=300_000)
    parser.add_argument("names", nargs="*", metavar="NAME")
    wanted = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        target = pathlib.Path(scratch) / "target"
        for patch in sorted(HERE.glob("*.patch")):
            if wanted.names and patch.stem not in wanted.names:
                continue
            folder = pathlib.Path(scratch) / patch.stem
            folder.mkdir()
            copy_of(ROOT, folder)
            subprocess.run(["git", "apply", "-p0", patch], cwd=folder, check=True)
            failure = first_failure(folder, target, wanted.seeds)
            missed += failure is None
            print(f"{patch.stem}: {failure or f'not found in {wanted.seeds} seeds'}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
