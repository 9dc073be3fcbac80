"""`check`: a package against eager PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor

from ganglion._capture import Method, Tensors, check_phases, evaluation_mode, settings
from ganglion._compile import missing_features
from ganglion._errors import Error
from ganglion._export import exported, methods_of
from ganglion._package import read_manifest
from ganglion._random import Source
from ganglion.objective import Draw, DrawSpec, Objective, data_of

# Steps done before, for methods that ask.
_STEP = 1000.0
# A gradient smaller than this part of the whole is zero but for rounding.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance of one output of a graph from the same in eager PyTorch in float64, relative to its norm.

    A gradient that is zero but for rounding, as of a bias before batch normalisation, has no such distance: its own is
    relative to the norm of the graph's whole gradient.

    Attributes:
        graph: name of the graph.
        output: name of the gradient, buffer or scalar; "images" of samples.
        package: distance of the package, in float32.
        eager: distance of eager PyTorch in float32.
    """

    graph: str
    output: str
    package: float
    eager: float


def check(
    objective: Objective, package: str | os.PathLike[str] | None = None, *, seed: int = 0, quiet: bool = False
) -> list[Distance]:
    """Compares each graph of a package with the objective's method in eager PyTorch, on random samples.

    Both compute in float32 and are held against eager PyTorch in float64. Distances of the package that are like those
    of eager float32 are rounding; much larger ones are a fault.

    Args:
        objective: the objective that was exported, with any weights.
        package: the package; by default the newest that `export` made of this objective.
        seed: seed of samples and draws.
        quiet: print nothing.

    Returns:
        A distance for each output of each graph.
    """
    if package is None:
        if objective not in exported:
            raise Error("check: this objective was not exported yet; name its package: check(objective, 'vae.pt2')")
        package = exported[objective].path
    manifest = read_manifest(package)
    if manifest["torch"] != torch.__version__.partition("+")[0]:
        raise Error(f"{package}: is for PyTorch {manifest['torch']}, and this is {torch.__version__}: export it again")
    missing = missing_features(manifest["cpu"]["features"])
    if missing:
        raise Error(f"{package}: was compiled for processors with {', '.join(missing)}, which this one has not")
    data, device = data_of(manifest["data"]), manifest["device"]
    phases = check_phases(objective)
    tensors = Tensors(objective, phases)
    samples = manifest.get("sample", {}).get("count", 1)
    methods = methods_of(objective, phases, tensors, data, device, manifest["shard_batch"], samples)
    distances = []
    phases_once = [about for about in manifest["phases"] if about["name"] == about["graph"]]
    for about in [*phases_once, *(manifest[name] for name in ("sample", "evaluate") if name in manifest)]:
        method = methods[about["graph"]]
        given = _values(method, about, seed)
        with settings(), evaluation_mode(objective) if method.kind != "phase" else contextlib.nullcontext():
            exact = _eager(method, given, about, torch.float64)
            eager = _eager(method, given, about, torch.float32)
        compiled = _compiled(package, about, method, given)
        names = [next(iter(output.values())) for output in method.outputs] or ["images"]
        whole = [true for output, true in zip(method.outputs, exact) if "gradient" in output]
        for name, true, ours, theirs in zip(names, exact, compiled, eager):
            norm = _norm(true, whole if any(true is one for one in whole) else [])
            distances.append(Distance(about["graph"], name, _distance(ours, true, norm), _distance(theirs, true, norm)))
    if not quiet:
        _print(distances)
    return distances


@dataclasses.dataclass
class _Given:
    state: list[Tensor]
    batch: list[Tensor]
    draws: list[Tensor]


def _values(method: Method, about: dict, seed: int) -> _Given:
    random = Draw(seed=seed, device=method.device)
    parts, step = method.data.random(random, method.count), method.batch()[-1]
    draws = [random._take(_spec(draw)) for draw in about["draws"]]
    return _Given(method.values(), [*parts, step + _STEP], draws)


def _spec(draw: dict) -> DrawSpec:
    return DrawSpec(
        draw["kind"], tuple(draw["shape"]), *(draw.get(k, d) for k, d in (("low", 0.0), ("high", 1.0), ("p", 0.5)))
    )


def _eager(method: Method, given: _Given, about: dict, precision: torch.dtype) -> list[Tensor]:
    def kind(tensor: Tensor) -> Tensor:
        return tensor.to(precision) if tensor.is_floating_point() else tensor

    method.precision = precision
    default = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        draws = [kind(draw).clone() for draw in given.draws]
        inputs = [kind(tensor) for tensor in [*given.state, *given.batch]]
        return method.run(inputs, Source(method.device, draws))
    finally:
        torch.set_default_dtype(default)
        method.precision = torch.float32


def _compiled(package: str | os.PathLike[str], about: dict, method: Method, given: _Given) -> list[Tensor]:
    *parts, step = given.batch
    named = {entry.state_name: value for entry, value in zip(method.tensors.entries, given.state)}
    names = [part.name for part in method.data.parts(method.count)]

    def value(given_: dict) -> Tensor:
        ((what, which),) = given_.items()
        if what in ("parameter", "buffer"):
            return named[which]
        if what == "draw":
            return given.draws[which]
        if what == "step":
            return step
        return parts[names.index("classes" if what == "classes" else which)]

    _show_libtorch()
    loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(Path(package)), about["graph"], True, 1, -1)
    return loader.run([value(given_).clone() for given_ in about["inputs"]])


def _show_libtorch() -> None:
    """Shows libtorch's symbols to libraries that are not linked to it, as those of packages."""
    folder = Path(torch.__file__).parent / "lib"
    names = ["libc10.so", "libtorch_cpu.so", "libtorch.so"]
    if torch.cuda.is_available():
        names += ["libc10_cuda.so", "libtorch_cuda.so"]
    for name in names:
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def _norm(true: Tensor, whole: list[Tensor]) -> float:
    """Norm that distances are relative to."""
    own = float(true.double().norm())
    all_of_them = sum(float(one.double().norm()) ** 2 for one in whole) ** 0.5
    return (own if own > _ROUNDING * all_of_them else all_of_them) or 1.0


def _distance(value: Tensor, true: Tensor, norm: float) -> float:
    return float((value.double() - true.double()).norm()) / norm


def _print(distances: list[Distance]) -> None:
    wide = max(len(distance.output) for distance in distances)
    graph = ""
    for distance in distances:
        if distance.graph != graph:
            graph = distance.graph
            print(f"{graph}: relative distance to float64")
            print(f"  {'output':{wide}}   package     eager")
        print(f"  {distance.output:{wide}}   {distance.package:.1e}   {distance.eager:.1e}")
