"""`export`: an objective as one `.pt2` package."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ganglion._capture import (
    SCALARS,
    Graph,
    Method,
    Tensors,
    capture,
    check_phases,
    evaluation_mode,
    settings,
)
from ganglion._compile import choose, compile_graph, features, without_sources
from ganglion._errors import Error, ExportError
from ganglion._package import add_members
from ganglion._place import SKIPPED, short
from ganglion._programs import TORCH_VERSION
from ganglion._random import Source
from ganglion.objective import SGD, Adam, Data, Draw, Objective, Phase

exported: weakref.WeakKeyDictionary[Objective, Package] = weakref.WeakKeyDictionary()
"""Newest package of each objective."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that was exported.

    Attributes:
        path: the file.
        manifest: what it contains, as in the file.
        seconds: time that capturing and compiling took.
    """

    path: Path
    manifest: Mapping[str, Any] = dataclasses.field(repr=False)
    seconds: float

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return "\n".join([str(self.path), *_summary(self.manifest)])


def export(
    objective: Objective,
    path: str | os.PathLike[str],
    *,
    data: Data,
    shard_batch: int = 16,
    device: str = "cpu",
    samples: int = 64,
    cpu: str = "auto",
    quiet: bool = False,
) -> Package:
    """Captures an objective with its backward passes, compiles it and writes it to a `.pt2` package.

    Args:
        objective: networks and methods; their present weights are the first ones of a training.
        path: file to write.
        data: shape of the samples, of `ganglion.images`, `ganglion.text` or `ganglion.arrays`.
        shard_batch: samples of one data shard. Shapes are fixed, so a job with the package has this `job.shard_batch`.
        device: "cpu", or "cuda" on a machine with a GPU of the kind that shall train.
        samples: images of one call of `sample`.
        cpu: instructions that the code may use: "x86-64-v3" (AVX2), "x86-64-v4" (AVX-512), "native" for all of this
            machine, "auto" for the higher level that this machine has. Workers on machines without them refuse the package.
        quiet: write nothing about the progress to standard error.

    Returns:
        The package; printing it shows networks, phases, draws, scalars and buffers.

    Raises:
        ExportError: the objective cannot be captured; the message has the place and the fix.
    """
    begun = time.monotonic()
    path = Path(path)
    if shard_batch < 1 or samples < 1:
        raise Error("shard_batch and samples must be at least 1")
    if device not in ("cpu", "cuda"):
        raise Error(f"device={device!r}; it is 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise Error("device='cuda' needs a GPU here, of the kind that shall train")
    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise Error(f"{path}: a package is a file NAME.pt2 in a folder that exists")
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    if torch.__version__.partition("+")[0] != TORCH_VERSION:
        raise Error(f"PyTorch {TORCH_VERSION} is needed, as the workers have, and this is {torch.__version__}")
    cpu = choose(cpu)
    used = features(cpu)
    phases = check_phases(objective)
    tensors = Tensors(objective, phases)
    methods = methods_of(objective, phases, tensors, data, device, shard_batch, samples)
    graphs = {}
    for name, method in methods.items():
        with evaluation_mode(objective) if method.kind != "phase" else settings():
            graphs[name] = capture(method, name)
            _try(method, graphs[name])
    _check_use(objective, tensors, methods, graphs)
    files = {}
    for name, graph in graphs.items():
        since = time.monotonic()
        files[name] = _compiled(graph, cpu)
        say(f"{name}: {len(graph.module.graph.nodes)} operations, compiled in {time.monotonic() - since:.1f} s")
    manifest = _manifest(objective, phases, tensors, methods, graphs, data, device, used, shard_batch)
    _write(path, files, manifest, tensors)
    package = Package(path.resolve(), manifest, time.monotonic() - begun)
    exported[objective] = package
    for line in _summary(manifest):
        say(line)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB, in {package.seconds:.1f} s")
    return package


def methods_of(
    objective: Objective,
    phases: list[Phase],
    tensors: Tensors,
    data: Data,
    device: str,
    shard_batch: int,
    samples: int,
) -> dict[str, Method]:
    """Methods that become graphs, by the graphs' names."""

    def method(kind: str, name: str, count: int) -> Method:
        made = Method(objective, tensors, data, device, kind=kind, method=name)
        made.count = count
        return made

    methods = {}
    for phase in phases:
        made = method("phase", phase.name, shard_batch)
        made.phase = phase
        made.loss_name = "loss" if len(phases) == 1 else f"{phase.name}_loss"
        methods[phase.name] = made
    if callable(getattr(type(objective), "sample", None)):
        methods["sample"] = method("sample", "sample", samples)
        methods["sample"].takes_classes = methods["sample"].argument_count() == 3
        if methods["sample"].takes_classes and not data.classes:
            raise ExportError(
                f"{type(objective).__name__}.sample takes classes, and the data have none: images(..., classes=10)"
            )
    if callable(getattr(type(objective), "evaluate", None)):
        methods["evaluate"] = method("evaluate", "evaluate", shard_batch)
    return methods


def _try(method: Method, graph: Graph) -> None:
    """Runs a method on values once: what is not deterministic fails here."""
    random = Draw(seed=0, device=method.device)
    inputs = [*method.values(), *method.data.random(random, method.count), method.batch()[-1]]
    draws = [random._take(spec) for spec in method.specs]
    try:
        method.run(inputs, Source(method.device, draws))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = str(error).partition(" does not have")[0].partition(". ")[0]
        raise ExportError(
            f"{_place(error)}{what} is not deterministic on {method.device}: the same step would give other bits; use"
            " another operation"
        ) from None


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(SKIPPED)]
    return f"{short(frames[-1].filename)}:{frames[-1].lineno}: `{frames[-1].line}`: " if frames else ""


def _check_use(objective: Objective, tensors: Tensors, methods: dict[str, Method], graphs: dict[str, Graph]) -> None:
    """Refuses parameters that no phase trains though one should."""
    trained = {
        output["gradient"] for graph in graphs.values() for output in graph.outputs if "gradient" in output
    } - set.intersection(
        *(
            set(graph.unused) | _not_updated(tensors, methods[name])
            for name, graph in graphs.items()
            if methods[name].kind == "phase"
        )
    )
    where = type(objective).__name__
    spare = [entry.key for entry in tensors.entries if entry.kind == "parameter" and entry.state_name not in trained]
    kinds = {entry.key: entry.kind for entry in tensors.entries}
    idle = [key for key, value in objective.named_parameters() if value.requires_grad and kinds[key] == "buffer"]
    for keys, what in ((spare, "no loss depends on"), (idle, "no phase updates")):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ExportError(f"{where}: {what} {shown}: call requires_grad_(False) on it, or remove it")


def _not_updated(tensors: Tensors, method: Method) -> set[str]:
    assert method.phase is not None
    return {entry.state_name for entry in tensors.entries if entry.network not in method.phase.updates}


def _compiled(graph: Graph, cpu: str) -> list[str]:
    try:
        with settings():
            return compile_graph(graph.module, graph.examples, cpu)
    except Error:
        raise
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip(": ")), type(error).__name__)
        numbers = [node.meta.get("val") for node in graph.module.graph.nodes]
        if any(isinstance(value, torch.Tensor) and value.is_complex() for value in numbers):
            said += "; it computes with complex numbers, of which the compiler knows little: use real ones"
        raise ExportError(f"the graph {graph.name} does not compile: PyTorch's compiler says: {said}") from error


# ---- Manifest --------------------------------------------------------------------------------------------------------


def _manifest(
    objective: Objective,
    phases: list[Phase],
    tensors: Tensors,
    methods: dict[str, Method],
    graphs: dict[str, Graph],
    data: Data,
    device: str,
    used: list[str],
    shard_batch: int,
) -> dict[str, Any]:
    read = [graph.reads("classes") for graph in graphs.values()]
    manifest: dict[str, Any] = {"format": 1, "torch": torch.__version__.partition("+")[0], "device": device}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        manifest |= {"capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    manifest |= {
        "cpu": {"arch": os.uname().machine, "features": used},
        "shard_batch": shard_batch,
        "data": data.to_json(any(read)),
        "networks": [_network(objective, tensors, network) for network in tensors.networks],
        "aliases": tensors.aliases,
        "phases": _phases(objective, phases, graphs),
    }
    if "sample" in graphs:
        graph, method = graphs["sample"], methods["sample"]
        manifest["sample"] = {
            "graph": "sample",
            "count": method.count,
            "classes": data.classes if graph.reads("classes") else 0,
            "inputs": graph.inputs,
            "draws": [spec.to_json() for spec in graph.draws],
            "output": list(method.pictures),
        }
    if "evaluate" in graphs:
        graph = graphs["evaluate"]
        draws = [spec.to_json() for spec in graph.draws]
        manifest["evaluate"] = {"graph": "evaluate", "inputs": graph.inputs, "draws": draws, "outputs": graph.outputs}
    return manifest


def _network(objective: Objective, tensors: Tensors, network: str) -> dict[str, Any]:
    never = _never_decay(objective)

    def listed(kind: str) -> list[dict[str, Any]]:
        return [
            # What has fewer dimensions does not decay anyway.
            {"name": entry.name, "shape": list(entry.tensor.shape)}
            | ({"decays": False} if entry.tensor.dim() > 1 and id(entry.tensor) in never else {})
            for entry in tensors.of(network, kind)
        ]

    average = None
    if network in objective.average:
        average = {"name": f"{network}_ema", "half_life_samples": objective.average_half_life}
    return {"name": network, "parameters": listed("parameter"), "buffers": listed("buffer"), "average": average}


def _phases(objective: Objective, phases: list[Phase], graphs: dict[str, Graph]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    where = type(objective).__name__
    _check_scalars(where, phases, graphs)
    for phase in phases:
        graph = graphs[phase.name]
        has_read = any(one["batch"] == "next" for one in found)
        optimizer = phase.optimizer or objective.optimizer
        _check_optimizer(f"{where}: the phase {phase.name}", optimizer)
        about = {
            "graph": phase.name,
            "updates": list(phase.updates),
            "every": phase.every,
            "batch": _batch(where, phase, graph, has_read),
            "optimizer": optimizer.to_json(),
            "inputs": graph.inputs,
            "draws": [spec.to_json() for spec in graph.draws],
            "outputs": graph.outputs,
            "loss": graph.loss,
        }
        names = [phase.name, *(f"{phase.name}_{number}" for number in range(2, phase.repeat + 1))]
        found += [{"name": name, **about} for name in names]
    if len({about["name"] for about in found}) < len(found):
        raise ExportError(f"{where}: two phases have one name, as a repeated one is called NAME_2: rename one")
    if not any(about["batch"] == "next" for about in found):
        raise ExportError(f"{where}: no phase reads samples; let one take them: batch='next'")
    return found


def _never_decay(objective: Objective) -> set[int]:
    """Parameters of embeddings and normalisations, of any number of dimensions."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    kinds = (nn.Embedding, nn.EmbeddingBag, *norms)
    modules = [module for module in objective.modules() if isinstance(module, kinds)]
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def _check_optimizer(where: str, optimizer: Any) -> None:
    if not isinstance(optimizer, (Adam, SGD)):
        raise ExportError(
            f"{where} has the optimizer {optimizer!r}; there are ganglion.Adam, ganglion.AdamW and ganglion.SGD"
        )
    if optimizer.clip_norm is not None and not optimizer.clip_norm > 0:
        raise ExportError(f"{where} has clip_norm={optimizer.clip_norm}; it must be above 0, or None for no limit")
    if isinstance(optimizer, SGD) and optimizer.nesterov and not optimizer.momentum:
        raise ExportError(f"{where} has nesterov=True without a momentum; set one, such as momentum=0.9")


def _batch(where: str, phase: Phase, graph: Graph, has_read: bool) -> str:
    reads = graph.reads_batch()
    batch = phase.batch or (("same" if has_read else "next") if reads else "none")
    where = f"{where}: the phase {phase.name}"
    if batch == "none" and reads:
        raise ExportError(f"{where} has batch='none' and reads the batch")
    if batch == "same" and not has_read:
        raise ExportError(f"{where} has batch='same', and no phase before it reads samples")
    if batch == "next" and phase.every != 1:
        raise ExportError(
            f"{where} is the first to read samples, and runs every {phase.every} steps: list a phase with every=1 that"
            " reads samples before it"
        )
    return batch


def _check_scalars(where: str, phases: list[Phase], graphs: dict[str, Graph]) -> None:
    known: dict[str, str] = {}
    for phase in phases:
        for name in (output["scalar"] for output in graphs[phase.name].outputs if "scalar" in output):
            if name in known:
                raise ExportError(
                    f"{where}: the phases {known[name]} and {phase.name} both return a scalar {name}: name them apart"
                )
            known[name] = phase.name
    if len(known) > SCALARS:
        raise ExportError(f"{where}: its phases return {len(known)} scalars; at most {SCALARS}")


def _write(path: Path, files: dict[str, list[str]], manifest: dict[str, Any], tensors: Tensors) -> None:
    """Writes a package, which is there whole or not at all."""
    from torch._inductor.package import package_aoti

    weights = {entry.state_name: entry.tensor.detach().float() for entry in tensors.entries if entry.kind != "constant"}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        package_aoti(str(new), {name: without_sources(made, Path(folder)) for name, made in files.items()})
        add_members(new, manifest, weights)
        os.replace(new, path)


def _summary(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for network in manifest["networks"]:
        count = sum(_size(tensor["shape"]) for tensor in network["parameters"])
        frozen = sum(_size(tensor["shape"]) for tensor in network["buffers"])
        average = ", averaged" if network["average"] else ""
        lines.append(f"network {network['name']}: {count:,} parameters, {frozen:,} numbers in buffers{average}")
    for phase in manifest["phases"]:
        if phase["name"] != phase["graph"]:
            lines.append(f"phase {phase['name']}: {phase['graph']} again")
            continue
        every = f" every {phase['every']} steps" if phase["every"] > 1 else ""
        lines.append(f"phase {phase['name']}{every}: updates {', '.join(phase['updates'])}; {_contents(phase)}")
    for name in ("sample", "evaluate"):
        if name in manifest:
            lines.append(f"{name}: {_contents(manifest[name])}")
    return lines


def _contents(graph: Mapping[str, Any]) -> str:
    outputs = graph["outputs"] if isinstance(graph.get("outputs"), list) else []
    scalars = [output["scalar"] for output in outputs if "scalar" in output]
    buffers = sum("buffer" in output for output in outputs)
    draws = [f"{draw['kind']} {tuple(draw['shape'])}" for draw in graph["draws"]]
    shown = ", ".join(draws[:4]) + (f" and {len(draws) - 4} more" if len(draws) > 4 else "")
    parts = [f"draws {shown or 'nothing'}"]
    if scalars:
        parts.append(f"scalars {', '.join(scalars)}")
    if buffers:
        parts.append(f"{buffers} buffers change")
    return "; ".join(parts)


def _size(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
