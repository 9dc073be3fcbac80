"""Capture: an objective's methods as flat graphs of ATen operations, backward passes included.

1. Tensors of the state are inputs of a graph, never constants in it.
2. A method runs twice on tensors without values: the first pass records what it draws, reads and changes, the second
   becomes the graph. So a capture costs no memory for activations and does not depend on values.
3. Each graph takes and returns what its `inputs` and `outputs` list, in that order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ganglion._errors import ExportError
from ganglion._package import COLUMNS
from ganglion._random import Source, Watch, storage
from ganglion.objective import Data, DrawSpec, Images, Objective, Phase

OWN = "objective"
"""Name of the network of parameters that lie directly on the objective."""
_NAME = re.compile(r"[a-z0-9_]{1,64}")
# Most scalars of all phases, of 64 columns some of which are kept for settings that move.
SCALARS = 48
_TAKEN_SCALARS = COLUMNS | {"rows", "data", "compute", "wait", "commit", "other"}
# Beginnings of other names in the state, and keys of the section [optimizer] of a job.
_TAKEN_NETWORKS = {"optimizer", "counters", "scalars"}
_TAKEN_PHASES = {
    "kind", "learning_rate", "discriminator_learning_rate", "beta1", "beta2", "epsilon", "decay_images",
    "final_learning_rate", "final_discriminator_learning_rate", "final_beta2", "weight_decay", "momentum", "nesterov",
    "clip_norm", "warmup_images", "warmup_steps", "decay", "decay_steps", "phases", "sample", "evaluate",
}  # fmt: skip


@dataclasses.dataclass
class Entry:
    """A tensor of the objective.

    Attributes:
        key: its name in the module.
        network: network that it is of.
        tensor: first value.
        kind: "parameter" if some phase trains it, "buffer" for all else of the state, "constant" for buffers that are
            not persistent; those are part of the graphs.
    """

    key: str
    network: str
    tensor: Tensor
    kind: str

    @property
    def name(self) -> str:
        """Name within the network."""
        return self.key if self.network == OWN else self.key.partition(".")[2]

    @property
    def state_name(self) -> str:
        """Name in the state: `NETWORK.TENSOR`."""
        return f"{self.network}.{self.name}"


class Tensors:
    """All tensors of an objective, and which phase trains which."""

    def __init__(self, objective: Objective, phases: Sequence[Phase]) -> None:
        self.entries: list[Entry] = []
        self.aliases: dict[str, str] = {}
        trained = {network for phase in phases for network in phase.updates}
        persistent = set(objective.state_dict(keep_vars=True))
        first: dict[int, str] = {}
        found = [*objective.named_parameters(remove_duplicate=False), *objective.named_buffers(remove_duplicate=False)]
        for key, tensor in found:
            if id(tensor) in first:
                self.aliases[key] = first[id(tensor)]
                continue
            first[id(tensor)] = key
            network = key.partition(".")[0] if "." in key else OWN
            is_parameter = isinstance(tensor, nn.Parameter)
            learns = is_parameter and tensor.requires_grad and network in trained
            kind = "parameter" if learns else "buffer" if is_parameter or key in persistent else "constant"
            _check_kind(key, tensor, kind)
            self.entries.append(Entry(key, network, tensor, kind))
        if OWN in dict(objective.named_children()) and any("." not in entry.key for entry in self.entries):
            raise ExportError(
                f"a child is called {OWN!r}, as is the network of the objective's own parameters: rename it"
            )
        order = [*dict(objective.named_children()), OWN]
        self.networks = [name for name in order if any(entry.network == name for entry in self.entries)]

    def of(self, network: str, kind: str) -> list[Entry]:
        """Tensors of one kind of a network."""
        return [entry for entry in self.entries if entry.network == network and entry.kind == kind]


def _check_kind(key: str, tensor: Tensor, kind: str) -> None:
    what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    if kind == "constant":
        return
    if tensor.dtype == torch.float64:
        raise ExportError(f"the {what} {key} is float64, and training is in float32: convert it with .float()")
    if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
        raise ExportError(f"the {what} {key} is {tensor.dtype}, {tensor.layout}; it must be real and dense")
    if not tensor.is_floating_point() and not tensor.float().to(tensor.dtype).equal(tensor):
        raise ExportError(f"the {what} {key} has integers that float32 cannot hold; register it with persistent=False")


@dataclasses.dataclass
class Graph:
    """A captured method.

    Attributes:
        module: the graph, from a flat list of tensors to a flat list of tensors.
        examples: inputs of the right shapes.
        inputs, outputs, draws: as in the manifest.
        loss: name of the scalar that is the loss.
        unused: parameters that get no gradient.
    """

    name: str
    module: fx.GraphModule
    examples: list[Tensor]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    draws: list[DrawSpec]
    loss: str = ""
    unused: list[str] = dataclasses.field(default_factory=list)

    def reads(self, what: str) -> bool:
        """Whether the graph reads `classes` or `step`."""
        return any(given.get("batch") == what or given.get(what) is True for given in self.inputs)

    def reads_batch(self) -> bool:
        """Whether the graph reads any part of the samples."""
        return any("batch" in given for given in self.inputs)


class _Call(nn.Module):
    """Lets `functional_call` reach any method, and what is made of its result while the tensors are those of the call."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, method: str, arguments: list[Any], then: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        with _flat_weights(self.objective):
            return then(getattr(self.objective, method)(*arguments))


@contextlib.contextmanager
def _flat_weights(objective: nn.Module) -> Iterator[None]:
    """Recurrent networks keep a list of their weights, which must be that of this call."""
    modules = [module for module in objective.modules() if isinstance(module, nn.RNNBase)]
    kept = [module._flat_weights for module in modules]
    for module in modules:
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    try:
        yield
    finally:
        for module, weights in zip(modules, kept):
            module._flat_weights = weights


class Method:
    """A method of an objective as a function of flat tensors.

    Inputs are the values of all tensors of the state, the parts of a batch, the step, then draws. Calling it runs the method,
    on values as well as without.

    Args:
        kind: "phase", "sample" or "evaluate".
        extra: arguments of `sample` beside the draw.
    """

    def __init__(
        self, objective: Objective, tensors: Tensors, data: Data, device: str, *, kind: str, method: str
    ) -> None:
        self.objective, self.tensors, self.data, self.device = objective, tensors, data, device
        self.kind, self.method = kind, method
        self.phase: Phase | None = None
        self.count, self.takes_classes = 0, False
        self.pictures: tuple[int, ...] = ()
        self.specs: list[DrawSpec] = []
        self.written: set[int] = set()
        self.loss_name = "loss"
        self.precision = torch.float32
        self.outputs: list[dict[str, Any]] = []
        self.unused: list[str] = []

    def values(self) -> list[Tensor]:
        """First values of the tensors of the state, as the graph takes them."""
        return [
            entry.tensor.detach().to(self.device, None if entry.kind == "constant" else torch.float32).contiguous()
            for entry in self.tensors.entries
        ]

    def batch(self) -> list[Tensor]:
        """Parts of the samples and the step, without content."""
        parts = [torch.zeros(p.shape, dtype=p.kind, device=self.device) for p in self.data.parts(self.count)]
        return [*parts, torch.zeros((), device=self.device)]

    def run(self, inputs: Sequence[Tensor], source: Source) -> list[Tensor]:
        """Runs the method; `outputs` then says what it returned."""
        entries = self.tensors.entries
        watch = Watch(source, {})
        values, leaves = self._state(inputs[: len(entries)], watch)
        versions = {key: (value, value._version) for key, value in values.items()}
        *parts, step = inputs[len(entries) :]
        arguments = self._arguments(parts, step, source)
        call, given = _Call(self.objective), {f"objective.{key}": value for key, value in values.items()}
        with torch.enable_grad() if self.kind == "phase" else torch.no_grad(), watch:
            then = lambda returned: self._results(returned, leaves)
            results = torch.func.functional_call(call, given, (self.method, arguments, then))
        self.written = watch.written
        after = {key.partition(".")[2]: value for key, value in given.items()}
        changed = self._changes(inputs, versions, after, watch)
        if self.kind == "phase":
            results = [*results[: len(leaves)], *changed, *results[len(leaves) :]]
        return [result.detach().clone(memory_format=torch.contiguous_format) for result in results]

    def _state(self, given: Sequence[Tensor], watch: Watch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, leaves = {}, {}
        for entry, tensor in zip(self.tensors.entries, given):
            value = tensor.detach()
            if entry.kind == "parameter":
                watch.protected[storage(value)] = entry.key
                if self.phase is not None and entry.network in self.phase.updates:
                    leaves[entry.state_name] = value.requires_grad_()
                values[entry.key] = value.to(self._kind(entry.tensor.dtype))
            else:
                values[entry.key] = value.to(self._kind(entry.tensor.dtype)).clone()
        return values, leaves

    def _kind(self, dtype: torch.dtype) -> torch.dtype:
        return self.precision if dtype == torch.float32 else dtype

    def _arguments(self, parts: Sequence[Tensor], step: Tensor, source: Source) -> list[Any]:
        if self.kind == "sample":
            return [source, self.count, *([parts[1]] if self.takes_classes else [])]
        with_step = [step] if self.argument_count() == 3 else []
        return [self.data.batch([part.clone() for part in parts]), source, *with_step]

    # ---- Results -----------------------------------------------------------------------------------------------------

    def argument_count(self) -> int:
        """Number of the method's arguments beside self and those with a default."""
        parameters = inspect.signature(getattr(self.objective, self.method)).parameters.values()
        return sum(parameter.default is inspect.Parameter.empty for parameter in parameters)

    def _where(self) -> str:
        return f"{type(self.objective).__name__}.{self.method}: "

    def _results(self, returned: Any, leaves: dict[str, Tensor]) -> list[Tensor]:
        if self.kind == "sample":
            self.outputs = []
            return [self._picture(returned)]
        if self.kind == "evaluate":
            scalars = self._evaluated(returned)
            self.outputs = [{"scalar": name} for name in scalars]
            return list(scalars.values())
        loss, named = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
        loss = self._loss(loss)
        if not isinstance(named, dict):
            raise ExportError(
                f"{self._where()}beside the loss it returns a {type(named).__name__}: return loss, {{name: scalar}}"
            )
        if self.loss_name in named:
            raise ExportError(
                f"{self._where()}the scalar {self.loss_name} is named as the phase's loss: give it another name"
            )
        scalars = {self.loss_name: self._scalar(self.loss_name, loss), **self._scalars(named)}
        gradients = self._gradients(self._summed(loss), leaves)
        self.outputs = [*({"gradient": name} for name in leaves), *({"scalar": name} for name in scalars)]
        return [*gradients, *scalars.values()]

    def _summed(self, value: Tensor) -> Tensor:
        return value * self.count if self.objective.reduction == "mean" else value

    def _loss(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise ExportError(
                f"{self._where()}it returns {_described(loss)}, not a loss: return a tensor of no dimensions"
            )
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ExportError(
                f"{self._where()}the loss is {_described(loss)}; it must be a floating-point tensor of no dimensions:"
                " sum it over the batch"
            )
        if not loss.requires_grad:
            assert self.phase is not None
            raise ExportError(f"{self._where()}the loss depends on no parameter of {', '.join(self.phase.updates)}")
        return loss

    def _scalars(self, named: dict[str, Any]) -> dict[str, Tensor]:
        if len(named) >= SCALARS:
            raise ExportError(f"{self._where()}it returns {len(named)} scalars; at most {SCALARS - 1} beside the loss")
        for name in named:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ExportError(
                    f"{self._where()}{name!r} is not the name of a scalar: 1 to 64 lower-case letters, digits and underscores"
                )
            if name in _TAKEN_SCALARS:
                raise ExportError(
                    f"{self._where()}the scalar {name} is named as a column of metrics is: give it another name"
                )
        return {name: self._scalar(name, value) for name, value in named.items()}

    def _scalar(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() != 0 or value.is_complex():
            raise ExportError(
                f"{self._where()}the scalar {name} is {_described(value)}; it must be a tensor of no dimensions"
            )
        return self._summed(value.detach()).to(self.precision)

    def _evaluated(self, returned: Any) -> dict[str, Tensor]:
        named = {"loss": returned} if isinstance(returned, Tensor) else returned
        if not isinstance(named, dict) or not named:
            raise ExportError(
                f"{self._where()}it returns {_described(named)}; it must return scalars by name: {{name: scalar}}"
            )
        return self._scalars(named)

    def _picture(self, returned: Any) -> Tensor:
        found = tuple(returned.shape) if isinstance(returned, Tensor) else ()
        if isinstance(self.data, Images):
            shape = self.data.parts(self.count)[0].shape
            is_right = found == shape
        else:
            shape = f"({self.count}, 1 or 3, height, width)"
            is_right = len(found) == 4 and found[0] == self.count and found[1] in (1, 3) and min(found) > 0
        if not is_right:
            raise ExportError(
                f"{self._where()}it returns {_described(returned)}; it must return images of shape {shape}"
            )
        self.pictures = found
        return returned.to(self.precision)

    def _gradients(self, loss: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
        try:
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise ExportError(
                f"{self._where()}it calls backward() itself: return the loss; its gradient is taken here"
            ) from None
        self.unused = [name for name, gradient in zip(leaves, gradients) if gradient is None]
        for name, gradient in zip(leaves, gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise ExportError(f"{self._where()}the gradient of {name} is sparse: leave sparse=True out")
        return [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves.values(), gradients)
        ]

    def _changes(
        self, inputs: Sequence[Tensor], versions: dict[str, tuple[Tensor, int]], after: dict[str, Tensor], watch: Watch
    ) -> list[Tensor]:
        """Updates of the buffers that the method changed."""
        found, names = [], []
        for entry, old in zip(self.tensors.entries, inputs):
            was, version = versions[entry.key]
            new = after[entry.key]
            if entry.kind == "parameter" or (
                new is was and new._version == version and storage(new) not in watch.written
            ):
                continue
            if entry.kind == "constant":
                raise ExportError(
                    f"{self._where()}the buffer {entry.key} changes, and is not persistent: register it as persistent"
                )
            if self.kind != "phase":
                raise ExportError(
                    f"{self._where()}the buffer {entry.key} changes, and only phases may change the state"
                )
            if new.shape != old.shape:
                raise ExportError(f"{self._where()}the buffer {entry.key} changes its shape")
            names.append(entry.state_name)
            found.append(new.detach().to(self.precision) - old.detach())
        at = sum("gradient" in output for output in self.outputs)
        self.outputs[at:at] = [{"buffer": name} for name in names]
        return found


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    return f"the Python number {value}" if isinstance(value, (int, float)) else f"a {type(value).__name__}"


# ---- Capture ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Global settings of PyTorch under which methods run: one way to compute, no fast path."""
    fast, deterministic = torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.mha.set_fastpath_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    # It compares a mask's values to find out whether it is causal, for speed alone.
    causal = mock.patch(
        "torch.nn.modules.transformer._detect_is_causal_mask", lambda mask, is_causal, size: bool(is_causal)
    )
    try:
        with causal:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def _no_other_random_numbers(where: str) -> Iterator[None]:
    """Refuses random numbers of Python's: in a graph they would be the same for ever."""
    python, arrays = random.getstate(), numpy.random.get_state()
    yield
    same = all(numpy.array_equal(old, new) for old, new in zip(arrays, numpy.random.get_state()))
    for library, is_same in (("random", random.getstate() == python), ("numpy.random", same)):
        if not is_same:
            raise ExportError(f"{where}it draws from {library}, which a graph would repeat for ever: draw from `draw`")


def capture(method: Method, name: str) -> Graph:
    """Captures a method as a graph.

    Raises:
        ExportError: the method does what a graph cannot hold.
    """
    entries = method.tensors.entries
    fixed = [*method.values(), *method.batch()]
    with settings(), _no_other_random_numbers(method._where()):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            recorded = Source(method.device)
            method.run([fake.from_tensor(tensor) for tensor in fixed], recorded)
        written_draws = [storage(tensor) in method.written for tensor in recorded.taken]
        specs = method.specs = recorded.specs
        drawn = [torch.zeros(spec.shape, dtype=spec.dtype, device=method.device) for spec in specs]

        def flat(*tensors: Tensor) -> list[Tensor]:
            draws = [d.clone() if written else d for d, written in zip(tensors[len(fixed) :], written_draws)]
            return method.run(tensors[: len(fixed)], Source(method.device, draws))

        module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*fixed, *drawn)
    parts = method.data.parts(method.count)
    inputs = [
        *({"parameter" if entry.kind == "parameter" else "buffer": entry.state_name} for entry in entries),
        *(
            [*({"classes": True} if part.name == "classes" else {} for part in parts), {}]
            if method.kind == "sample"
            else [*({"batch": part.name} for part in parts), {"step": True}]
        ),
    ]
    kept = _prune(module, [entry.kind == "constant" for entry in entries], fixed)
    _check_constants(method, module)
    reads = [at for at in kept if at < len(fixed)]
    draws = [at - len(fixed) for at in kept if at >= len(fixed)]
    return Graph(
        name=name,
        module=module,
        examples=[([*fixed, *drawn])[at] for at in kept],
        inputs=[*(inputs[at] for at in reads), *({"draw": number} for number in range(len(draws)))],
        outputs=method.outputs,
        draws=[specs[at] for at in draws],
        loss=method.loss_name,
        unused=method.unused,
    )


def _prune(module: fx.GraphModule, constant: list[bool], fixed: list[Tensor]) -> list[int]:
    """Removes what no output needs; turns constants into attributes; returns the places of the inputs that are left."""
    graph = module.graph
    graph.eliminate_dead_code()
    kept = []
    for at, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.users and at < len(constant) and constant[at]:
            module.register_buffer(f"constant_{at}", fixed[at])
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"constant_{at}"))
        if node.users:
            kept.append(at)
        else:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return kept


def _check_constants(method: Method, module: fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        if isinstance(value, Tensor) and value.requires_grad:
            raise ExportError(
                f"{method._where()}it uses a parameter of shape {tuple(value.shape)} that no module has, so it would not be"
                " trained: set it as an attribute, or use nn.ParameterList"
            )


def check_phases(objective: Objective) -> list[Phase]:
    """Phases of an objective with all networks known.

    Raises:
        ExportError: a phase is not sound.
    """
    where = type(objective).__name__
    learning = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    # Frozen networks are known, and not updated.
    networks = list(dict.fromkeys(name.partition(".")[0] if "." in name else OWN for name in learning))
    phases = list(objective.phases)
    if not phases:
        if not callable(getattr(objective, "loss", None)):
            raise ExportError(f"{where} has no phases: write a method loss(self, batch, draw), or list phases")
        phases = [Phase("loss", updates=networks)]
    if not objective.training:
        raise ExportError(f"{where} is in evaluation mode: call .train() first")
    for phase in phases:
        if not _NAME.fullmatch(phase.name) or not phase.name.isidentifier():
            raise ExportError(
                f"{where}: {phase.name!r} is not the name of a phase: lower-case letters, digits, underscores"
            )
        if phase.name in _TAKEN_PHASES:
            raise ExportError(f"{where}: a phase cannot be called {phase.name}: give it another name")
        if not callable(getattr(type(objective), phase.name, None)) or hasattr(nn.Module, phase.name):
            raise ExportError(f"{where}: the phase {phase.name} has no method: write {phase.name}(self, batch, draw)")
        unknown = [name for name in phase.updates if name not in networks]
        if unknown or not phase.updates:
            raise ExportError(
                f"{where}: the phase {phase.name} updates {', '.join(unknown) or 'nothing'}; there are the networks"
                f" {', '.join(networks) or '(none)'} with parameters that require a gradient"
            )
        if phase.every < 1 or phase.repeat < 1 or phase.batch not in (None, "next", "same", "none"):
            options = f"every={phase.every}, repeat={phase.repeat}, batch={phase.batch!r}"
            raise ExportError(f"{where}: the phase {phase.name} has {options}")
    if len({phase.name for phase in phases}) < len(phases):
        raise ExportError(f"{where}: two phases have one name")
    if objective.reduction not in ("sum", "mean"):
        raise ExportError(f"{where}: reduction is {objective.reduction!r}; it is 'sum' or 'mean'")
    averages = {f"{name}_ema" for name in objective.average}
    for name, _ in objective.named_children():
        if name in _TAKEN_NETWORKS or name in averages or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
            raise ExportError(f"{where}: a network cannot be called {name}: give it another name")
    unknown = [name for name in objective.average if name not in networks]
    if unknown:
        raise ExportError(f"{where}: average names {', '.join(unknown)}; there are the networks {', '.join(networks)}")
    return phases


@contextlib.contextmanager
def evaluation_mode(objective: Objective) -> Iterator[None]:
    """Puts all modules into evaluation mode, and back into the modes that they had."""
    modes = {module: module.training for module in objective.modules()}
    objective.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
