"""Packs the built programs and the Python package into a wheel (PEP 427), for pip. Their libtorch is the one inside the PyTorch that pip installs.

1. The programs are those that were built, without symbols and without a search path of the machine that built them.
2. The platform tag is the oldest that the symbols they need allow.
3. The same programs give the same bytes.
"""

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
from notices import metadata, notices  # noqa: E402

PROGRAMS = ("coordinator", "worker")
# glibc of the first distributions with this libstdc++ (GLIBCXX_3.4.x), as manylinux counts them.
LIBSTDCXX = {24: 28, 28: 31, 29: 34, 30: 35, 33: 39}


def tool(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def finish(program, patchelf, folder):
    """Returns a program's bytes as shipped."""
    copy = folder / program.name
    tool("strip", "-o", copy, program)
    tool(patchelf, "--remove-rpath", copy)
    return copy


def platform_tag(programs):
    """Returns the oldest manylinux on which the programs start, by the versions of the symbols they need."""
    needed = "".join(tool("objdump", "-T", program) for program in programs)
    glibc = max(int(minor) for minor in re.findall(r"\bGLIBC_2\.(\d+)", needed))
    libstdcxx = max((int(minor) for minor in re.findall(r"\bGLIBCXX_3\.4\.(\d+)", needed)), default=0)
    glibc = max(glibc, next(with_it for last, with_it in LIBSTDCXX.items() if libstdcxx <= last))
    machine = tool("uname", "-m").strip()
    return f"manylinux_2_{glibc}_{machine}"


def description(version, torch):
    head = f"""\
Metadata-Version: 2.4
Name: ganglion
Version: {version}
Summary: Trains generative adversarial networks data-parallel; the cluster never changes the result
License-Expression: Apache-2.0
License-File: LICENSE
License-File: THIRD-PARTY.txt
Requires-Python: >=3.10
Requires-Dist: torch=={torch}
Requires-Dist: numpy
Classifier: Operating System :: POSIX :: Linux
Classifier: Programming Language :: Rust
Classifier: Topic :: Scientific/Engineering :: Artificial Intelligence
Description-Content-Type: text/markdown

"""
    return head + (ROOT / "README.md").read_text(encoding="utf-8")


def contents(arguments, version, programs, tag, third_party):
    """Returns the wheel's files except RECORD: (name, bytes, executable)."""
    package = ROOT / "python/ganglion"
    sources = sorted(path for path in package.iterdir() if path.suffix == ".py" or path.name == "py.typed")
    info = f"ganglion-{version}.dist-info"
    torch = f"{arguments.torch}+{arguments.cuda}" if arguments.cuda else arguments.torch
    built = f'"""What the programs were built for."""\n\nTORCH = "{torch}"\n'
    entry_points = "[console_scripts]\n" + "".join(f"{name} = ganglion:{name}\n" for name in PROGRAMS)
    wheel = f"Wheel-Version: 1.0\nGenerator: ganglion\nRoot-Is-Purelib: false\nTag: py3-none-{tag}\n"
    texts = {
        **{f"ganglion/{source.name}": source.read_text(encoding="utf-8") for source in sources},
        "ganglion/built.py": built,
        f"{info}/METADATA": description(version, arguments.torch),
        f"{info}/WHEEL": wheel,
        f"{info}/entry_points.txt": entry_points,
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        f"{info}/licenses/THIRD-PARTY.txt": third_party,
        f"{info}/sboms/ganglion.cdx.json": arguments.sbom.read_text(encoding="utf-8"),
    }
    files = [(f"ganglion/bin/{program.name}", program.read_bytes(), True) for program in programs]
    return files + [(name, text.encode(), False) for name, text in texts.items()]


def record(files, info):
    """Returns RECORD: each file's hash and size, and its own name."""

    def line(name, data):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(data)}\n"

    return "".join(line(name, data) for name, data, _ in files) + f"{info}/RECORD,,\n"


def write(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data, executable in files:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            archive.writestr(entry, data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", required=True, help="the version of PyTorch that the programs were built for")
    parser.add_argument("--cuda", default="", metavar="cuNNN", help="the programs use this CUDA; part of the version")
    parser.add_argument("--programs", type=Path, default=ROOT / "target/release", help="the folder they were built in")
    parser.add_argument(
        "--sbom", type=Path, required=True, help="the list of the programs' parts, of sbom.py (PEP 770)"
    )
    parser.add_argument("--patchelf", default="patchelf", help="the patchelf program")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to write to")
    arguments = parser.parse_args()

    known = metadata()
    version = next(package["version"] for package in known["packages"] if package["name"] == "ganglion-worker")
    if arguments.cuda:
        version += f"+{arguments.cuda}"
    with tempfile.TemporaryDirectory() as folder:
        programs = [finish(arguments.programs / name, arguments.patchelf, Path(folder)) for name in PROGRAMS]
        tag = platform_tag(programs)
        files = contents(arguments, version, programs, tag, notices(known))
    info = f"ganglion-{version}.dist-info"
    files.append((f"{info}/RECORD", record(files, info).encode(), False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"ganglion-{version}-py3-none-{tag}.whl"
    write(path, files)
    print(path)


if __name__ == "__main__":
    main()
