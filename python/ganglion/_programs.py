"""The two programs, on the libtorch inside the installed PyTorch.

1. As commands they replace this process, so its number, its signals and its exit code are the program's own.
2. PyTorch is found and not imported: that would take seconds, and nothing of its Python is needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import NoReturn

from ganglion._errors import Error

try:
    from ganglion.built import TORCH  # type: ignore[import-not-found]  # written by the wheel's build
except ImportError:
    TORCH = ""
TORCH_VERSION = TORCH.partition("+")[0] or "2.11.0"
"""Version of PyTorch that the programs are built with."""

_HERE = os.path.dirname(os.path.abspath(__file__))


def coordinator() -> NoReturn:
    """The `coordinator` program."""
    _become("coordinator")


def worker() -> NoReturn:
    """The `worker` program."""
    _become("worker")


def program(name: str) -> str:
    """Path of a program: of the wheel, or of the source tree that this package lies in.

    Raises:
        Error: it is not there.
    """
    wheel = os.path.join(_HERE, "bin", name)
    root = os.path.dirname(os.path.dirname(_HERE))
    tree = os.path.join(os.environ.get("GANGLION_BIN") or os.path.join(root, "target", "release"), name)
    for path in (wheel, tree):
        if os.path.exists(path):
            return path
    raise Error(f"there is no program {wheel}, nor {tree}: install the wheel, or run `make build` in the source tree")


def environment() -> dict[str, str]:
    """Environment of the programs: this one, with the folder of libtorch's libraries.

    Raises:
        Error: the installed PyTorch is not the version of this build.
    """
    # The coordinator needs no libtorch, but the workers that it starts have its environment.
    known = os.environ.get("LD_LIBRARY_PATH")
    libraries = _libtorch() + (os.pathsep + known if known else "")
    return {**os.environ, "LD_LIBRARY_PATH": libraries}


def _become(name: str) -> NoReturn:
    path = os.path.join(_HERE, "bin", name)
    try:
        os.execve(path, [name, *sys.argv[1:]], environment())
    except OSError as error:
        sys.exit(f"error: cannot start {path}: {error.strerror}")
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _libtorch() -> str:
    mend = f"install it with: pip install torch=={TORCH_VERSION}"
    found = importlib.util.find_spec("torch")
    for package in (found.submodule_search_locations or ()) if found else ():
        version = _version(package)
        if not TORCH or version == TORCH or version.partition("+")[0] == TORCH:
            return os.path.join(package, "lib")
        raise Error(f"PyTorch {TORCH} is needed, and {package} is {version or 'none'}; {mend}")
    raise Error(f"PyTorch {TORCH_VERSION} is needed, and {sys.executable} has none; {mend}")


def _version(package: str) -> str:
    """Version of the PyTorch in a folder with its build, such as 2.11.0+cu130; empty if there is none."""
    try:
        with open(os.path.join(package, "version.py"), encoding="utf-8") as file:
            said = re.search(r"^__version__ = '([^']*)'", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return said.group(1) if said else ""
