"""Random operations inside modules, turned into draws; and operations that a graph cannot hold, refused by line.

1. Every random number of a graph comes from a `Source`, so a graph is a function of its inputs.
2. What cannot be turned into draws is refused: nothing random is left in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from ganglion._errors import ExportError
from ganglion._place import place
from ganglion.objective import Draw, DrawSpec

aten = torch.ops.aten
# These write running statistics into arguments that their schemas call constant.
_BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update"}
# The smallest exponential number, as a uniform one may be 0; 2 ** -25 is half the step of uniform numbers.
_LEAST = 2.0**-25


class Source(Draw):
    """Draws of a graph: recorded in the first pass, taken from the graph's inputs in later ones."""

    def __init__(self, device: str, given: Sequence[Tensor] | None = None) -> None:
        super().__init__(device=device)
        self.specs: list[DrawSpec] = []
        self.taken: list[Tensor] = []
        self._given = given

    def _take(self, spec: DrawSpec) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            raise ExportError(
                "random numbers are drawn during a backward pass, as activation checkpointing does, and would not be those"
                " of the forward pass: leave the checkpointing out, or the dropout inside it"
            )
        if self._given is None:
            drawn = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        else:
            drawn = self._given[len(self.specs)]
            if tuple(drawn.shape) != spec.shape:
                raise ExportError("the method draws other shapes each time that it runs")
        self.specs.append(spec)
        self.taken.append(drawn)
        return drawn


def storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor."""
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Sees every operation of a method: takes random numbers from the source, refuses what a graph cannot hold.

    Args:
        source: source of random numbers.
        protected: names of the parameters, by their memory: none may be written.
    """

    def __init__(self, source: Source, protected: dict[int, str]) -> None:
        super().__init__()
        self.source = source
        self.protected = protected
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._note_writes(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = self._draw(func, args, kwargs)
            if drawn is not NotImplemented:
                return drawn
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            raise ExportError(
                f"{place()}the value of a tensor is read, as by `if`, `float()` or `.item()`; a graph is the"
                " same for all values: use torch.where, or leave it a tensor"
            ) from None
        except DynamicOutputShapeException:
            raise ExportError(
                f"{place()}the shape of the result of {name(func)} depends on values; a graph has fixed shapes: use"
                " torch.where, or multiply by a mask"
            ) from None

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _written(func, args, kwargs):
            self.written.add(storage(tensor))
            parameter = self.protected.get(storage(tensor))
            if parameter:
                raise ExportError(
                    f"{place()}the parameter {parameter} is changed in place ({name(func)}); only the phases' optimizers"
                    " change parameters: return a loss, or set requires_grad_(False) on what you update yourself"
                )

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("generator") is not None:
            raise ExportError(f"{place()}{name(func)} draws from a generator of its own: leave `generator=` out")
        known = _DRAWS.get(func)
        if known is not None:
            return known(self.source, *args, **kwargs)
        if _draws_nothing(func, args, kwargs):
            return NotImplemented
        raise ExportError(
            f"{place()}{name(func)} is random and cannot be turned into draws: compute it from draw.uniform or draw.normal"
        )


def name(func: Any) -> str:
    """Name of an operation as PyTorch's users know it."""
    return "torch." + func.name().split("::")[-1].split(".")[0].lstrip("_")


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args)), **kwargs}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = _arguments(func, args, kwargs)
    if func._schema.name.split("::")[-1] in _BATCH_NORMS:
        training = given.get("training", True)
        tensors = [given.get("running_mean"), given.get("running_var")] if training else []
    else:
        schema = func._schema.arguments
        tensors = [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
    flat = [part for tensor in tensors for part in (tensor if isinstance(tensor, (list, tuple)) else [tensor])]
    return [tensor for tensor in flat if isinstance(tensor, Tensor)]


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw does not with these arguments."""
    given = _arguments(func, args, kwargs)
    if func._schema.name == "aten::_fused_sdp_choice":
        return True
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    for key in ("dropout_p", "dropout"):
        if key in defaults:
            return given.get(key, defaults[key]) == 0.0
    return "training" in defaults and not given.get("training", defaults["training"])


# ---- One function for each random operation, with the arguments of its schema -----------------------------------------


def _as(drawn: Tensor, like: Any = None, **options: Any) -> Tensor:
    """A draw in the kind of tensor that the operation was asked for."""
    wanted = options.get("dtype") or (like.dtype if like is not None else None)
    if wanted is None:
        wanted = torch.get_default_dtype() if drawn.dtype.is_floating_point else torch.int64
    device = options.get("device") or (like.device if like is not None else None)
    return drawn.to(device=device, dtype=wanted)


def _creates(draw: Callable[[Source, tuple[int, ...]], Tensor]) -> Callable[..., Tensor]:
    return lambda source, size, **options: _as(draw(source, tuple(size)), **options)


def _like(draw: Callable[[Source, tuple[int, ...]], Tensor]) -> Callable[..., Tensor]:
    return lambda source, tensor, **options: _as(draw(source, tuple(tensor.shape)), tensor, **options)


def _fills(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(source: Source, tensor: Tensor, *ranges: Any, generator: None = None, **more: Any) -> Tensor:
        return tensor.copy_(draw(source, tuple(tensor.shape), *ranges, **more))

    return fill


def _normal(source: Source, shape: tuple[int, ...], mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    drawn = source.normal(shape)
    return drawn if mean is None or (mean == 0.0 and std == 1.0) else drawn * std + mean


def _normal_of(source: Source, mean: Any = 0.0, std: Any = 1.0, generator: None = None) -> Tensor:
    given = [part for part in (mean, std) if isinstance(part, Tensor)]
    drawn = source.normal(torch.broadcast_shapes(*(part.shape for part in given)))
    return _as(drawn, given[0]) * std + mean


def _normal_sized(source: Source, mean: float, std: float, size: Any, **options: Any) -> Tensor:
    return _as(source.normal(tuple(size)), **options) * std + mean


def _uniform(source: Source, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    # `from` is the schema's name, so it comes by position only.
    return source.uniform(shape, low, high)


def _exponential(source: Source, shape: tuple[int, ...], rate: float = 1.0) -> Tensor:
    return (-torch.log1p(-source.uniform(shape))).clamp_min(_LEAST) / rate


def _log_normal(source: Source, shape: tuple[int, ...], mean: float = 1.0, std: float = 2.0) -> Tensor:
    return (source.normal(shape) * std + mean).exp()


def _integers(source: Source, shape: tuple[int, ...], low: int, high: int | None = None) -> Tensor:
    if high is None:
        raise ExportError(f"{place()}tensor.random_ without an upper limit: say random_(low, high)")
    return source.integers(shape, low, high)


def _randint(source: Source, *ranges: Any, **options: Any) -> Tensor:
    low, high, size = ranges if len(ranges) == 3 else (0, *ranges)
    return _as(source.integers(tuple(size), low, high), **{"dtype": torch.int64, **options})


def _randint_like(source: Source, tensor: Tensor, *ranges: int, **options: Any) -> Tensor:
    low, high = ranges if len(ranges) == 2 else (0, *ranges)
    return _as(source.integers(tuple(tensor.shape), low, high), tensor, **options)


def _bernoulli(source: Source, tensor: Tensor, p: float | None = None, generator: None = None) -> Tensor:
    """Of probabilities, or with one probability in the shape of a tensor."""
    if p is not None:
        return _as(source.bernoulli(tuple(tensor.shape), p), tensor)
    return _as(source.uniform(tuple(tensor.shape)) < tensor, tensor)


def _bernoulli_fill(source: Source, tensor: Tensor, p: Any = 0.5, generator: None = None) -> Tensor:
    shape = tuple(tensor.shape)
    return tensor.copy_(source.uniform(shape) < p if isinstance(p, Tensor) else source.bernoulli(shape, p))


def _dropout(source: Source, tensor: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return tensor.clone(), torch.ones_like(tensor, dtype=torch.bool)
    kept = source.bernoulli(tuple(tensor.shape), 1.0 - p)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return tensor * _as(kept, tensor) * scale, kept > 0.0


def _permutation(source: Source, n: int, **options: Any) -> Tensor:
    return _as(source.uniform(n).argsort(stable=True), **{"dtype": torch.int64, **options})


_DRAWS: dict[Any, Callable[..., Any]] = {
    aten.randn.default: _creates(lambda source, shape: source.normal(shape)),
    aten.randn_like.default: _like(lambda source, shape: source.normal(shape)),
    aten.rand.default: _creates(lambda source, shape: source.uniform(shape)),
    aten.rand_like.default: _like(lambda source, shape: source.uniform(shape)),
    aten.normal_.default: _fills(_normal),
    aten.normal.Tensor_float: _normal_of,
    aten.normal.float_Tensor: _normal_of,
    aten.normal.Tensor_Tensor: _normal_of,
    aten.normal.float_float: _normal_sized,
    aten.uniform_.default: _fills(_uniform),
    aten.exponential_.default: _fills(_exponential),
    aten.log_normal_.default: _fills(_log_normal),
    getattr(aten.random_, "from"): _fills(_integers),
    aten.random_.to: _fills(lambda source, shape, high: source.integers(shape, 0, high)),
    aten.randint.default: _randint,
    aten.randint.low: _randint,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli_.float: _bernoulli_fill,
    aten.bernoulli_.Tensor: _bernoulli_fill,
    aten.native_dropout.default: _dropout,
    aten.randperm.default: _permutation,
}
