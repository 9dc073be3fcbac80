"""Trains anything written in PyTorch, on any number of workers, with the same bits for any number of them.

An `Objective` is a training step in plain PyTorch. `export` captures it with its backward passes and compiles it into
one `.pt2` package; `train` trains that with workers that need no Python.

    vae = VAE()                                       # a ganglion.Objective
    ganglion.export(vae, "vae.pt2", data=ganglion.images(channels=1, size=28))
    run = ganglion.train("vae.pt2", workers=4, steps=5000)
    vae.load_state_dict(run.state_dict())

`check` compares a package with plain PyTorch; `load` finds an earlier run; `sample` draws from one. Importing this
module does not import torch: that happens when the first name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ganglion._errors import Error, ExportError
from ganglion._programs import coordinator, worker

if TYPE_CHECKING:
    from ganglion._check import Distance, check
    from ganglion._export import Package, export
    from ganglion._run import Picture, Plot, Run, load, sample, train
    from ganglion.objective import (
        SGD,
        Adam,
        AdamW,
        Arrays,
        Batch,
        Draw,
        Images,
        Objective,
        Phase,
        Text,
        arrays,
        images,
        text,
    )

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Arrays",
    "Batch",
    "Distance",
    "Draw",
    "Error",
    "ExportError",
    "Images",
    "Objective",
    "Package",
    "Phase",
    "Picture",
    "Plot",
    "Run",
    "Text",
    "arrays",
    "check",
    "coordinator",
    "export",
    "images",
    "load",
    "sample",
    "text",
    "train",
    "worker",
]

# Modules of the names above that are imported on first use.
_MODULES = {
    "_check": ("Distance", "check"),
    "_export": ("Package", "export"),
    "_run": ("Picture", "Plot", "Run", "load", "sample", "train"),
    "objective": (
        "SGD",
        "Adam",
        "AdamW",
        "Arrays",
        "Batch",
        "Draw",
        "Images",
        "Objective",
        "Phase",
        "Text",
        "arrays",
        "images",
        "text",
    ),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ganglion' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ganglion.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
