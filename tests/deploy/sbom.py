"""Checks a bill of materials: CycloneDX's schema, and the parts of the programs in it.

python3 tests/deploy/sbom.py dist/ganglion.cdx.json
"""

import json
import sys
from pathlib import Path

import tomllib
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parent.parent.parent
# One required part of each kind: a crate of ours, a crate with native code, a package of libtorch.
WANTED = {"ganglion-coordinator", "ganglion-worker", "c10d", "libsqlite3-sys", "torch-sys", "torch"}


def main(file):
    text = Path(file).read_text(encoding="utf-8")
    wrong = JsonStrictValidator(SchemaVersion.V1_5).validate_str(text)
    if wrong:
        return f"{file}: not CycloneDX 1.5: {wrong}"
    bill = json.loads(text)
    parts = {component["bom-ref"]: component for component in bill["components"]}
    names = {component["name"] for component in parts.values()}
    if WANTED - names:
        return f"{file}: {', '.join(sorted(WANTED - names))} is not in it"
    locked = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))
    locked = {(package["name"], package["version"]) for package in locked["package"]}
    crates = {(part["name"], part["version"]) for part in parts.values() if part["purl"].startswith("pkg:cargo/")}
    if crates - locked:
        return f"{file}: not of Cargo.lock: {sorted(crates - locked)}"
    loose = {need for entry in bill["dependencies"] for need in entry["dependsOn"]} - parts.keys()
    if loose:
        return f"{file}: it depends on what is not in it: {sorted(loose)}"
    print(f"{file}: CycloneDX 1.5, {len(crates)} crates, {len(parts) - len(crates)} Python packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
