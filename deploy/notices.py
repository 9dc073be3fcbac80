"""Writes the licences of all code linked into the programs, as these licences require of a distributor.

python3 deploy/notices.py > THIRD-PARTY.txt
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("ganglion-coordinator", "ganglion-worker")
TEXTS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "UNLICENSE*")


def metadata():
    """Returns cargo's metadata of this workspace and its dependencies."""
    command = [os.environ.get("CARGO", "cargo"), "metadata", "--locked", "--format-version", "1", "--all-features"]
    host = subprocess.run(["rustc", "--print", "host-tuple"], check=True, capture_output=True, text=True).stdout.strip()
    root = Path(__file__).resolve().parent.parent
    known = subprocess.run([*command, "--filter-platform", host], check=True, capture_output=True, cwd=root)
    return json.loads(known.stdout)


def linked(known):
    """Returns the third-party packages in the programs, by name and version."""
    packages = {package["id"]: package for package in known["packages"]}
    needs = {
        node["id"]: [dep["pkg"] for dep in node["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]
        for node in known["resolve"]["nodes"]
    }
    waiting = [package["id"] for package in known["packages"] if package["name"] in PROGRAMS]
    seen = set()
    while waiting:
        package = waiting.pop()
        if package not in seen:
            seen.add(package)
            waiting += needs[package]
    others = [packages[package] for package in seen if packages[package]["source"]]
    return sorted(others, key=lambda package: (package["name"], package["version"]))


def notices(known):
    """Returns the text: each licence once, after the packages under it."""
    users = {}
    lines = ["Parts of these programs, and their licences", ""]
    for package in linked(known):
        name = f"{package['name']} {package['version']}"
        lines.append(f"{name}: {package['license'] or 'see its text below'}")
        folder = Path(package["manifest_path"]).parent
        for file in sorted({file for pattern in TEXTS for file in folder.glob(pattern) if file.is_file()}):
            users.setdefault(file.read_text(encoding="utf-8", errors="replace").strip(), []).append(name)
    for text, names in sorted(users.items(), key=lambda item: item[1]):
        lines += ["", "-" * 80, ", ".join(dict.fromkeys(names)), "", text]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(notices(metadata()))
