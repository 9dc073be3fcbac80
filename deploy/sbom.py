"""Writes the bill of materials of the shipped programs (CycloneDX 1.5, JSON): the crates in both programs, and libtorch.

    python3 deploy/sbom.py --features ganglion-worker/cloud --out dist/ganglion.cdx.json

1. The crates are those that cargo-cyclonedx finds for these features, without what only builds.
2. libtorch is what pip brought to build with: its packages, as their metadata name them. A wheel does not hold them but
   requires the same version of PyTorch; `--without-libtorch` marks that.
3. The same sources give the same bytes: no time, no random number, no path of the machine that built them.
"""

import argparse
import json
import os
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("coordinator", "worker")
# A unique name: the tool writes a file beside each Cargo.toml.
DRAFT = "ganglion-bill-of-materials"


def bills(tool, features):
    """Returns the output of cargo-cyclonedx, by program."""
    command = [tool, "cyclonedx", "--format", "json", "--spec-version", "1.5", "--all", "--no-build-deps", "--quiet"]
    command += ["--override-filename", DRAFT, "--manifest-path", ROOT / "Cargo.toml"]
    command += ["--features", features] if features else []
    drafts = lambda: ROOT.glob(f"*/{DRAFT}.json")
    try:
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "0"})
        texts = {draft.parent.name: draft.read_text(encoding="utf-8") for draft in drafts()}
    finally:
        for draft in drafts():
            draft.unlink()
    return {name: json.loads(texts[name].replace(f"file://{ROOT}", "file:///ganglion")) for name in PROGRAMS}


def libtorch(folder, shipped):
    """Returns the Python packages that libtorch comes from."""
    found = []
    for info in sorted(folder.glob("*.dist-info/METADATA")):
        head = HeaderParser().parsestr(info.read_text(encoding="utf-8"))
        name, version = head["Name"], head["Version"]
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        component = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
            "description": head["Summary"] or "",
            "scope": "required",
            "properties": [{"name": "ganglion:shipped", "value": str(shipped).lower()}],
        }
        licence = head["License-Expression"] or head["License"]
        if licence:
            component["licenses"] = [{"license": {"name": licence.strip().splitlines()[0][:200]}}]
        found.append(component)
    if not any(component["name"] == "torch" for component in found):
        sys.exit(f"error: {folder}: no torch there; `make setup` brings it")
    return found


def merged(parts, torch):
    components = {component["bom-ref"]: component for component in torch}
    needs = {component["bom-ref"]: set() for component in torch}
    programs = []
    for part in parts.values():
        own = part["metadata"]["component"]
        # The crate's name implies its target.
        own.pop("components", None)
        programs.append(own["bom-ref"])
        for component in [own, *part["components"]]:
            components[component["bom-ref"]] = component
        for entry in part["dependencies"]:
            needs.setdefault(entry["ref"], set()).update(entry.get("dependsOn", []))
    version = components[programs[0]]["version"]
    needs[programs[PROGRAMS.index("worker")]].add(next(one["bom-ref"] for one in torch if one["name"] == "torch"))
    needs["ganglion"] = set(programs)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "ganglion",
                "name": "ganglion",
                "version": version,
                "licenses": [{"expression": "Apache-2.0"}],
            },
        },
        "components": [components[ref] for ref in sorted(components)],
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(wanted & components.keys())} for ref, wanted in sorted(needs.items())
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", default="cargo-cyclonedx", help="the program cargo-cyclonedx")
    parser.add_argument("--features", default="", help="the features that the programs are built with")
    parser.add_argument("--libtorch", type=Path, default=ROOT / ".libtorch", help="the folder that pip put libtorch in")
    parser.add_argument("--without-libtorch", action="store_true", help="libtorch is required, and not shipped")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch = libtorch(arguments.libtorch.resolve(), not arguments.without_libtorch)
    bill = merged(bills(arguments.tool, arguments.features), torch)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place first: a full disk must not leave half a bill, which a release would carry.
    draft = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}.new")
    try:
        draft.write_text(json.dumps(bill, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(arguments.out)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{arguments.out}: {len(bill['components'])} parts")


if __name__ == "__main__":
    main()
