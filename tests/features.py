#!/usr/bin/env python3
"""Checks that a crate has the same features for the programs and for each set of tests.

    python3 tests/features.py

Cargo compiles a crate once for each set of features that it has, with all that depends on it. A feature that only
tests want would so have `make test` compile again what `make demo` had compiled. Name it in the root's Cargo.toml.
"""

import os
import re
import subprocess
import sys

# Dependencies for hosts alone, those of build scripts, are a set of their own anyway.
PROGRAMS = ["-p", "ganglion-coordinator", "-p", "ganglion-worker"]
# What else the Makefile builds, always with the programs.
SETS = {
    "cargo test --workspace": ["--workspace", "--exclude", "ganglion-bench", "--edges", "normal,dev"],
    "the programs of tests": [*PROGRAMS, "-p", "ganglion-tests", "-p", "ganglion-failing", "--edges", "normal"],
    "the programs of bench": [*PROGRAMS, "-p", "ganglion-bench", "--edges", "normal"],
    "cargo test -p ganglion-worker": ["-p", "ganglion-worker", "--edges", "normal,dev"],
}


def features(arguments):
    """The features of each crate that a build needs, by name and version."""
    command = [os.environ.get("CARGO", "cargo"), "tree", "--locked", "--prefix", "none", "--format", "{p}|{f}"]
    done = subprocess.run(command + arguments, check=True, capture_output=True, text=True)
    found = {}
    for line in filter(None, done.stdout.splitlines()):
        package, its = re.sub(r" \(\*\)$", "", line).split("|")
        found.setdefault(" ".join(package.split()[:2]), set()).add(its)
    return found


def main():
    programs = features([*PROGRAMS, "--edges", "normal"])
    wrong = False
    for name, arguments in SETS.items():
        for package, its in sorted(features(arguments).items()):
            if not programs.get(package, set()) <= its:
                wrong = True
                print(f"{package} has {programs[package]} for the programs, and {its} for `{name}`", file=sys.stderr)
    if wrong:
        sys.exit("name the features of these crates in the [workspace.dependencies] of Cargo.toml")


if __name__ == "__main__":
    main()
