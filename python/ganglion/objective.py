"""Objectives: a training step in plain PyTorch, as methods of a module.

An objective's children are its networks. A phase is one optimizer update of a step; its method computes the loss of
one data shard of samples. `ganglion.export` captures and compiles the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ganglion._errors import Error, ExportError
from ganglion._place import place

__all__ = ["Adam", "Batch", "Draw", "Images", "Objective", "Phase", "images"]


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam's default settings of a phase (Kingma and Ba, 2015); a job file's `[optimizer]` overrides them.

    Args:
        learning_rate: step size.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the square root of the second moment.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


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
    optimizer: Adam | None = None
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Images:
    """Shape of the data: images, and classes if there are such. Made by `ganglion.images`."""

    channels: int
    height: int
    width: int
    classes: int = 0


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


class Batch:
    """Samples of one data shard.

    Attributes:
        images: float32 of shape (n, channels, height, width), in [-1, 1].
        classes: int64 of shape (n).
    """

    def __init__(self, images: Tensor, classes: Tensor | None = None) -> None:
        self.images = images
        self._classes = classes

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
        return self.images.shape[0]


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
    (n), returns images (n, channels, height, width) in [-1, 1]; `evaluate(self, batch, draw)` returns scalars by
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
    optimizer: Adam = Adam()
    reduction: Literal["sum", "mean"] = "sum"
