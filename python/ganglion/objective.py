"""Objectives: a training step in plain PyTorch, as methods of a module.

An objective's children are its networks. A phase is one optimizer update of a step; its method computes the loss of
one data shard of samples. `ganglion.export` captures and compiles the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ganglion._errors import Error, ExportError
from ganglion._place import place

__all__ = [
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
]


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam's default settings of a phase (Kingma and Ba, 2015); a job file's `[optimizer]` overrides them.

    Args:
        learning_rate: step size.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the square root of the second moment.
        clip_norm: largest norm of the gradient of a phase; a longer gradient is scaled down to it.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Form in a manifest."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"kind": type(self).__name__.lower(), **settings}


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """AdamW's default settings of a phase (Loshchilov and Hutter, 2019): Adam, and a decay of weights beside it.

    Embeddings, normalisations and what has fewer than two dimensions, such as biases, do not decay.

    Args:
        weight_decay: an update shrinks weights by this share times the step size.
    """

    weight_decay: float = 0.01


@dataclasses.dataclass(frozen=True)
class SGD:
    """Default settings of a phase for stochastic gradient descent with momentum (Sutskever et al., 2013), as PyTorch's.

    Args:
        learning_rate: step size.
        momentum: share of the momentum that stays in an update.
        nesterov: look ahead along the new momentum.
        weight_decay: weight of an L2 penalty; on the tensors that decay with `AdamW`.
        clip_norm: largest norm of the gradient of a phase; a longer gradient is scaled down to it.
    """

    learning_rate: float = 1e-2
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None

    to_json = Adam.to_json


@dataclasses.dataclass(frozen=True)
class Phase:
    """One optimizer update of a step; the objective's method of the same name computes its loss.

    Args:
        name: the method's name: lower-case letters, digits, underscores.
        updates: networks (names of the objective's children) whose parameters the update moves.
        every: run in each step s, counted from 0, with s % every == 0.
        batch: "next" takes the next samples of the data, "same" those that a phase of this step has read, "none" no
            samples. By default "next" for the first phase that reads samples and "same" for later ones.
        optimizer: settings of this phase; by default the objective's.
        repeat: run it so often in a row. Each run is a phase of its own, called NAME, NAME_2 and so on, and by default
            takes new samples if the first does.
    """

    name: str
    updates: Sequence[str]
    every: int = 1
    batch: Literal["next", "same", "none"] | None = None
    optimizer: Adam | SGD | None = None
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Images:
    """Shape of the data: images, and classes if there are such. Made by `ganglion.images`."""

    channels: int
    height: int
    width: int
    classes: int = 0

    def parts(self, count: int) -> list[Part]:
        """Parts of a batch of samples, in the order in which a method takes them."""
        images = Part("images", (count, self.channels, self.height, self.width), torch.float32)
        return [images, Part("classes", (count,), torch.int64)]

    def batch(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch of these parts."""
        return Batch(tensors[0], tensors[1] if self.classes else None)

    def random(self, draw: Draw, count: int) -> list[Tensor]:
        """Parts of a batch with random content."""
        images, classes = self.parts(count)
        drawn = draw.uniform(images.shape, -1.0, 1.0)
        return [drawn, draw.integers(classes.shape, 0, max(self.classes, 1))]

    def to_json(self, reads_classes: bool) -> dict[str, Any]:
        """Form in a manifest."""
        images = {"channels": self.channels, "height": self.height, "width": self.width}
        return {"images": images, "classes": self.classes if reads_classes else 0}


@dataclasses.dataclass(frozen=True)
class Text:
    """Size of the data: pieces of text. Made by `ganglion.text`."""

    context: int
    vocabulary: int
    classes = 0

    def parts(self, count: int) -> list[Part]:
        """Parts of a batch of samples."""
        return [Part("tokens", (count, self.context + 1), torch.int64)]

    def batch(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch of these parts."""
        return Batch(tokens=tensors[0])

    def random(self, draw: Draw, count: int) -> list[Tensor]:
        """Parts of a batch with random content."""
        return [draw.integers(part.shape, 0, self.vocabulary) for part in self.parts(count)]

    def to_json(self, reads_classes: bool) -> dict[str, Any]:
        """Form in a manifest."""
        return {"tokens": {"context": self.context, "vocabulary": self.vocabulary}, "classes": 0}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Shapes of the data: arrays by their names. Made by `ganglion.arrays`."""

    arrays: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    classes = 0

    def parts(self, count: int) -> list[Part]:
        """Parts of a batch of samples."""
        return [Part({"array": name}, (count, *shape), kind) for name, shape, kind in self.arrays]

    def batch(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch of these parts."""
        return Batch(arrays={name: tensor for (name, _, _), tensor in zip(self.arrays, tensors)})

    def random(self, draw: Draw, count: int) -> list[Tensor]:
        """Parts of a batch with random content: numbers in [-1, 1], or zeros and ones."""
        return [
            (draw.uniform(p.shape, -1.0, 1.0) if p.kind.is_floating_point else draw.integers(p.shape, 0, 2)).to(p.kind)
            for p in self.parts(count)
        ]

    def to_json(self, reads_classes: bool) -> dict[str, Any]:
        """Form in a manifest."""
        names = {kind: name for name, kind in _KINDS.items()}
        arrays = [{"name": name, "kind": names[kind], "shape": list(shape)} for name, shape, kind in self.arrays]
        return {"arrays": arrays, "classes": 0}


Data = Images | Text | Arrays


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a batch.

    Attributes:
        name: its name in a manifest.
        shape: with the number of samples.
        kind: kind of its numbers.
    """

    name: str | dict[str, str]
    shape: tuple[int, ...]
    kind: torch.dtype


def images(channels: int, size: int | tuple[int, int], classes: int = 0) -> Images:
    """Describes data of images.

    Args:
        channels: 1 for grey, 3 for RGB.
        size: side of square images, or (height, width).
        classes: number of classes, if a method reads `batch.classes`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if channels not in (1, 3) or min(height, width) < 1 or classes < 0:
        raise Error(f"images have 1 or 3 channels and a positive size, not {channels} x {height} x {width}")
    return Images(channels, height, width, classes)


def text(context: int, vocabulary: int = 256) -> Text:
    """Describes data of text, `data.kind = "text"` in a job.

    Args:
        context: tokens that a sample predicts; a sample has one more.
        vocabulary: number of different tokens; 256 for bytes.
    """
    if context < 1 or vocabulary < 1:
        raise Error(f"text has a context and a vocabulary of at least 1, not {context} and {vocabulary}")
    return Text(context, vocabulary)


def arrays(**arrays: tuple[int | Sequence[int], Any]) -> Arrays:
    """Describes data of arrays, `data.kind = "arrays"` in a job: NAME=(shape of one sample, kind).

    A kind is a name such as "float32", or a dtype of PyTorch or NumPy; numbers of NumPy's uint16 and uint32 come as
    int32 and int64.

    Example:
        >>> ganglion.arrays(signal=((2, 1000), "float32"), label=((), "int64"))
    """
    found = []
    for name, about in sorted(arrays.items()):
        if name in ("images", "classes", "tokens") or name.startswith("_") or not name.isascii() or len(name) > 64:
            raise Error(f"an array cannot be called {name}: give it another name")
        if not isinstance(about, tuple) or len(about) != 2:
            raise Error(f"the array {name} is described by its shape and kind: {name}=((3, 4), 'float32')")
        kind = str(about[1] if isinstance(about[1], (str, torch.dtype)) else getattr(about[1], "__name__", about[1]))
        kind = kind.removeprefix("torch.")
        if kind not in _KINDS:
            raise Error(f"the array {name} is of {kind}; there are {', '.join(_KINDS)}")
        shape = _shape((about[0],)) if isinstance(about[0], int) else tuple(int(side) for side in about[0])
        if min(shape, default=1) < 1:
            raise Error(f"the array {name} has shape {shape}; each side is at least 1")
        found.append((name, shape, _KINDS[kind]))
    if not found:
        raise Error("arrays: name at least one, as in arrays(x=((3, 4), 'float32'))")
    return Arrays(tuple(found))


_KINDS = {
    name: getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}


def data_of(about: Mapping[str, Any]) -> Data:
    """Data of a manifest."""
    if "tokens" in about:
        return Text(**about["tokens"])
    if "arrays" in about:
        return Arrays(tuple((one["name"], tuple(one["shape"]), _KINDS[one["kind"]]) for one in about["arrays"]))
    return Images(**about["images"], classes=about["classes"])


class Batch:
    """Samples of one data shard: images, tokens, or arrays by their names.

    Attributes:
        images: float32 of shape (n, channels, height, width), in [-1, 1].
        classes: int64 of shape (n).
        tokens: int64 of shape (n, context + 1).
    """

    def __init__(
        self,
        images: Tensor | None = None,
        classes: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        arrays: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._classes = classes
        self._parts = {"images": images, "tokens": tokens, **(arrays or {})}
        self._parts = {name: part for name, part in self._parts.items() if part is not None}

    def __getattr__(self, name: str) -> Tensor:
        # Python asks so for what is neither set nor a method.
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._parts:
            there = ", ".join(f"batch.{part}" for part in self._parts)
            raise ExportError(f"{place()}batch.{name} is read, and the data of this package have {there}")
        return self._parts[name]

    @property
    def classes(self) -> Tensor:
        """Classes of the samples: int64 of shape (n), from 0."""
        if self._classes is None:
            raise ExportError(
                f"{place()}batch.classes is read, and the data have none: say how many, as in images(..., classes=10)"
            )
        return self._classes

    def __len__(self) -> int:
        """Number of samples n."""
        return next(iter(self._parts.values())).shape[0]


@dataclasses.dataclass(frozen=True)
class DrawSpec:
    """Kind, range and shape of one draw."""

    kind: str
    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0
    p: float = 0.5

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.kind == "integers" else torch.float32

    def to_json(self) -> dict[str, Any]:
        """Form in a manifest."""
        ranges = {"uniform": ("low", "high"), "integers": ("low", "high"), "bernoulli": ("p",)}
        parts = {name: getattr(self, name) for name in ranges.get(self.kind, ())}
        return {"kind": self.kind, **parts, "shape": list(self.shape)}


class Draw:
    """Random numbers of a shard gradient.

    In training they depend on the run's seed, the step, the phase, the data shard and the place in the method, and on
    nothing else. Made by hand, a `Draw` serves to call an objective's methods in a notebook:
    `vae.loss(batch, ganglion.Draw(seed=0))`.

    Args:
        seed: seed of the numbers.
        device: device of the tensors.
    """

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int | Sequence[int]) -> Tensor:
        """Standard normal numbers: float32 of the given shape, `normal(n, 64)` or `normal((n, 64))`."""
        return self._take(DrawSpec("normal", _shape(shape)))

    def uniform(self, shape: int | Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high): float32 of the given shape."""
        if not low < high:
            raise ExportError(f"draw.uniform: the range [{low}, {high}) is empty")
        return self._take(DrawSpec("uniform", _shape((shape,)), low=float(low), high=float(high)))

    def integers(self, shape: int | Sequence[int], low: int, high: int) -> Tensor:
        """Integers from low to high - 1: int64 of the given shape."""
        if not low < high:
            raise ExportError(f"draw.integers: there is none from {low} to {high} - 1")
        return self._take(DrawSpec("integers", _shape((shape,)), low=int(low), high=int(high)))

    def bernoulli(self, shape: int | Sequence[int], p: float) -> Tensor:
        """Ones with probability p, else zeros: float32 of the given shape."""
        if not 0.0 <= p <= 1.0:
            raise ExportError(f"draw.bernoulli: {p} is no probability")
        return self._take(DrawSpec("bernoulli", _shape((shape,)), p=float(p)))

    def _take(self, spec: DrawSpec) -> Tensor:
        generator, shape = self._generator, spec.shape
        if spec.kind == "normal":
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        elif spec.kind == "uniform":
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32) * (spec.high - spec.low) + spec.low
        elif spec.kind == "integers":
            drawn = torch.randint(int(spec.low), int(spec.high), shape, generator=generator)
        else:
            drawn = (torch.rand(shape, generator=generator, dtype=torch.float32) < spec.p).float()
        return drawn.to(self._device)


def _shape(shape: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    sides = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return tuple(int(side) for side in sides)  # type: ignore[union-attr, arg-type]


class Objective(nn.Module):
    """Networks and how to train them, in plain PyTorch.

    The modules that are set as attributes are the networks. With one phase, write `loss`; with several, list them in
    `phases` and write a method for each. A method takes `(self, batch, draw)`, or `(self, batch, draw, step)` with
    the number of steps done as a float32 tensor of no dimensions. It returns the loss, or the loss and scalars by
    name: `return loss, {"kl": kl}`. Parameters of networks that the phase does not update need no gradient in it.

    Two methods are optional: `sample(self, draw, n)`, or `sample(self, draw, n, classes)` with int64 classes of shape
    (n), returns images (n, channels, height, width) in [-1, 1], of the data's shape where these are images; `evaluate(self, batch, draw)` returns scalars by
    name, on samples that are not trained on. Both run in evaluation mode.

    Attributes:
        phases: phases in the order of a step; by default one, `loss`, that updates all networks.
        average: networks of which a moving average is kept, for samples and evaluation.
        average_half_life: half-life of the averages, in samples.
        optimizer: default settings of all phases.
        reduction: "sum" if losses and scalars are sums over the batch's samples, "mean" if they are means.

    Example:
        >>> class VAE(ganglion.Objective):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = Encoder(), Decoder()
        ...     def loss(self, batch, draw):
        ...         mean, logvar = self.encoder(batch.images).chunk(2, 1)
        ...         images = self.decoder(mean + draw.normal(mean.shape) * (logvar / 2).exp())
        ...         recon = F.mse_loss(images, batch.images, reduction="sum")
        ...         kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        ...         return recon + kl, {"recon": recon, "kl": kl}
        ...     def sample(self, draw, n):
        ...         return self.decoder(draw.normal(n, 32))
    """

    phases: Sequence[Phase] = ()
    average: Sequence[str] = ()
    average_half_life: float = 10_000
    optimizer: Adam | SGD = Adam()
    reduction: Literal["sum", "mean"] = "sum"
