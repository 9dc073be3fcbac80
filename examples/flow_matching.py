"""Flow matching (Lipman et al., 2023) with classes and classifier-free guidance (Ho and Salimans, 2022).

python examples/flow_matching.py --workers 2
"""

import argparse
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block (n, inputs, h, w) -> (n, outputs, h, w), scaled and shifted by an embedding of time and class."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(hidden))


class UNet(nn.Module):
    """Velocity (n, 1, h, w) at images of that shape, times (n) and classes (n); each level halves the size."""

    def __init__(self, width: int = 32, levels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.none, self.embedding = classes, 4 * width
        self.classes = nn.Embedding(classes + 1, self.embedding)
        self.times = nn.Sequential(
            nn.Linear(self.embedding, self.embedding), nn.SiLU(), nn.Linear(self.embedding, self.embedding)
        )
        widths = [width, *[2 * width] * (levels - 1)]
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList([Block(a, b, self.embedding) for a, b in zip([width, *widths], widths)])
        self.middle = Block(widths[-1], widths[-1], self.embedding)
        self.up = nn.ModuleList(
            [Block(a + b, b, self.embedding) for a, b in zip([widths[-1], *widths[:0:-1]], widths[::-1])]
        )
        self.head = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        # The first velocity is zero.
        nn.init.zeros_(self.head[2].weight)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        embedding = F.silu(self.times(waves(times, self.embedding)) + self.classes(classes))
        x = self.stem(x)
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x, embedding)
            kept.append(x)
        x = self.middle(x, embedding)
        for level, block in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2.0) if level else x
            x = block(torch.cat([x, kept.pop()], dim=1), embedding)
        return self.head(x)


def waves(times: Tensor, size: int) -> Tensor:
    """Sines and cosines (n, size) of times (n) in [0, 1] (Vaswani et al., 2017, section 3.5)."""
    rates = 1000 * torch.logspace(0, -4, size // 2, device=times.device)
    phases = times[:, None] * rates
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def guided(velocity: nn.Module, x: Tensor, times: Tensor, classes: Tensor, guidance: float) -> Tensor:
    """Velocity towards the classes, away from that without a class (Ho and Salimans, equation 6)."""
    none = torch.full_like(classes, velocity.none)
    towards, free = velocity(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([classes, none])).chunk(2)
    return free + guidance * (towards - free)


class FlowMatching(ganglion.Objective):
    """Straight paths from noise (time 0) to images (time 1)."""

    average = ["velocity"]
    optimizer = ganglion.Adam(learning_rate=1e-3)
    reduction = "mean"

    def __init__(self, width: int = 32, levels: int = 3, euler_steps: int = 20, guidance: float = 2.0) -> None:
        super().__init__()
        self.euler_steps, self.guidance = euler_steps, guidance
        self.velocity = UNet(width, levels)

    def loss(self, batch: ganglion.Batch, draw: ganglion.Draw) -> Tensor:
        """Conditional flow matching with optimal transport paths (equation 23, sigma_min = 0)."""
        n, images, noise = len(batch), batch.images, draw.normal(batch.images.shape)
        times = draw.uniform(n)
        # One sample of ten has no class, so one network learns both velocities.
        classes = torch.where(draw.bernoulli(n, 0.1) > 0, self.velocity.none, batch.classes)
        between = torch.lerp(noise, images, times[:, None, None, None])
        return F.mse_loss(self.velocity(between, times, classes), images - noise)

    def sample(self, draw: ganglion.Draw, n: int, classes: Tensor) -> Tensor:
        """Euler's method from time 0 to 1."""
        x, length = draw.normal(n, 1, 28, 28), 1 / self.euler_steps
        for step in range(self.euler_steps):
            times = torch.full((n,), step * length, device=x.device)
            x = x + length * guided(self.velocity, x, times, classes, self.guidance)
        return x.clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--data", default="mnist-10k", help="28 x 28 grey images with classes, such as folder:pictures")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/flow_matching"))
    parser.add_argument("--small", action="store_true", help="a tiny network, for a quick try")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    flow = FlowMatching(width=4, levels=2, euler_steps=2) if arguments.small else FlowMatching()
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    data = ganglion.images(1, 28, classes=10)
    package = ganglion.export(flow, arguments.run_dir.with_suffix(".pt2"), data=data, shard_batch=16)
    run = ganglion.train(
        package, workers=arguments.workers, data=arguments.data, run_dir=arguments.run_dir, steps=arguments.steps
    )
    print(ganglion.sample(run).path)


if __name__ == "__main__":
    main()
