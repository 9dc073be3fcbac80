"""Pins the inputs of builds by their content: images by digest, Python packages by hash.

python3 deploy/pins.py check                      nothing is named by a tag or a version alone
python3 deploy/pins.py update --docker podman     the digests that the tags have now, into deploy/Dockerfile
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy/Dockerfile"
REQUIREMENTS = ROOT / "deploy/requirements"
IMAGE = re.compile(r"^ARG (?P<name>\w+_IMAGE)=(?P<tag>[^@\s]+)(?:@(?P<digest>sha256:[0-9a-f]{64}))?$", re.MULTILINE)


def unpinned_images(text):
    """Returns the images that a Dockerfile does not name by digest."""
    names = {image["name"] for image in IMAGE.finditer(text) if image["digest"]}
    stages = set()
    for source, stage in re.findall(r"^FROM (\S+)(?: AS (\S+))?", text, re.MULTILINE):
        variable = re.fullmatch(r"\$\{(\w+)\}", source)
        known = variable[1] in names if variable else source in stages or "@sha256:" in source
        if not known:
            yield source
        stages.add(stage)


def unpinned_packages(text):
    """Returns the packages that a requirements file names without a hash."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        package = line.split("#")[0].strip()
        if package and not re.search(r"--hash=sha256:[0-9a-f]{64}\b", package):
            yield package.split()[0]


def problems():
    for source in unpinned_images(DOCKERFILE.read_text()):
        yield f"deploy/Dockerfile: {source} is named by a tag; `make update-pins` adds its digest"
    for wanted in sorted(REQUIREMENTS.glob("*.in")):
        written = wanted.with_suffix(".txt")
        if not written.exists():
            yield f"{written.relative_to(ROOT)} is not there; `make requirements` writes it"
            continue
        for package in unpinned_packages(written.read_text()):
            yield f"{written.relative_to(ROOT)}: {package} has no hash; `make requirements` adds it"
    for line in (ROOT / "Makefile").read_text().splitlines():
        if "pip install" in line and "--require-hashes" not in line:
            yield f"Makefile: `{line.strip()}` takes packages without a hash; use $(PIP) and a file of {REQUIREMENTS.name}/"


def newest_digest(docker, tag):
    subprocess.run([docker, "pull", "--quiet", tag], check=True, stdout=subprocess.DEVNULL)
    shown = subprocess.run(
        [docker, "image", "inspect", "--format", "{{range .RepoDigests}}{{println .}}{{end}}", tag],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return re.search(r"@(sha256:[0-9a-f]{64})", shown)[1]


def update(docker):
    def pinned(image):
        digest = newest_digest(docker, image["tag"])
        print(f"{image['tag']}: {image['digest'] or 'no digest'} -> {digest}")
        return f"ARG {image['name']}={image['tag']}@{digest}"

    DOCKERFILE.write_text(IMAGE.sub(pinned, DOCKERFILE.read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "update"))
    parser.add_argument("--docker", default="docker", help="the program that pulls images")
    arguments = parser.parse_args()
    if arguments.what == "update":
        return update(arguments.docker)
    found = list(problems())
    print("\n".join(found) or "images are named by digest, Python packages by hash")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
