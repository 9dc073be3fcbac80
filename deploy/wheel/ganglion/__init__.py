"""Starts Ganglion's programs on the libtorch inside the installed PyTorch.

1. The program replaces this process, so its number, its signals and its exit code are the program's own.
2. PyTorch is found and not imported: that would take seconds, and nothing of its Python is needed.
"""

import importlib.util
import os
import re
import sys

from ganglion.built import TORCH


def coordinator():
    """The `coordinator` program."""
    _become("coordinator")


def worker():
    """The `worker` program."""
    _become("worker")


def _become(program):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin", program)
    # The coordinator needs no libtorch, but the workers that it starts have its environment.
    known = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = _libtorch() + (os.pathsep + known if known else "")
    try:
        os.execv(path, [program, *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"error: cannot start {path}: {error.strerror}")


def _libtorch():
    """Returns the folder of libtorch's libraries; exits with code 2 if it is not the version of this build."""
    mend = f"install it with: pip install torch=={TORCH.partition('+')[0]}"
    found = importlib.util.find_spec("torch")
    for package in found.submodule_search_locations if found else ():
        version = _version(package)
        if version == TORCH or version.partition("+")[0] == TORCH:
            return os.path.join(package, "lib")
        _refuse(f"PyTorch {TORCH} is needed, and {package} is {version or 'none'}; {mend}")
    _refuse(f"PyTorch {TORCH} is needed, and {sys.executable} has none; {mend}")


def _version(package):
    """Returns the version of the PyTorch in a folder with its build, such as 2.11.0+cu130; empty if there is none."""
    try:
        with open(os.path.join(package, "version.py"), encoding="utf-8") as file:
            said = re.search(r"^__version__ = '([^']*)'", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return said.group(1) if said else ""


def _refuse(reason):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
