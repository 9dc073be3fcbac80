"""Packages of what `make bench PARTS=packages` trains, written with `ganglion`: a GAN and a transformer.

python3 bench/python/packages.py mlp-28 64 mlp-28.pt2       a package for shards of 64 samples
"""

import sys
from pathlib import Path

import torch
from gpt import LEARNING_RATE, Transformer
from torch.nn.functional import softplus

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent.parent.parent / "python"),
]
import ganglion  # noqa: E402
from peer import LATENT, mlp_28  # noqa: E402


class MlpGan(ganglion.Objective):
    """The GAN `mlp-28`, with its losses."""

    phases = [ganglion.Phase("discriminator", updates=["d"]), ganglion.Phase("generator", updates=["g"])]
    optimizer = ganglion.Adam(learning_rate=2e-4, beta1=0.5, beta2=0.999)
    average = ["g"]

    def __init__(self):
        super().__init__()
        self.g, self.d = mlp_28(256, 1)

    def discriminator(self, batch, draw):
        """Real and generated images in one pass."""
        real = batch.images
        with torch.no_grad():
            fake = self.g(draw.normal((len(real), LATENT)))
        on_real, on_fake = self.d(torch.cat([real, fake])).split(len(real))
        return softplus(-on_real).sum() + softplus(on_fake).sum()

    def generator(self, batch, draw):
        """The discriminator only propagates the gradient."""
        return softplus(-self.d(self.g(draw.normal((len(batch), LATENT))))).sum()


class Gpt(ganglion.Objective):
    """The transformer of `gpt.py`."""

    optimizer = ganglion.Adam(learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.999)
    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.transformer = Transformer()

    def loss(self, batch, draw):
        """Mean over all tokens; the draws are those of its dropout."""
        return self.transformer(batch.images)


def main():
    name, shard_batch, path = sys.argv[1:]
    torch.manual_seed(0)
    objective, size = {"mlp-28": (MlpGan, 28), "gpt": (Gpt, 8)}[name]
    data = ganglion.images(channels=1, size=size)
    ganglion.export(objective(), path, data=data, shard_batch=int(shard_batch))


if __name__ == "__main__":
    main()
