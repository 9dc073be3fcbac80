"""A DCGAN (Radford et al., 2016) of one's own, with batch norm, dropout and R1 every four steps (Mescheder et al., 2018).

python examples/gan.py --workers 2
"""

import argparse
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def generator(latent: int, width: int) -> nn.Module:
    """Network from noise (n, latent) to images (n, 1, 28, 28)."""
    return nn.Sequential(
        nn.Unflatten(1, (latent, 1, 1)),
        nn.ConvTranspose2d(latent, 2 * width, 7, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def discriminator(width: int) -> nn.Module:
    """Network from images (n, 1, 28, 28) to logits (n)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Dropout2d(0.1),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Dropout2d(0.1),
        nn.Conv2d(2 * width, 1, 7),
        nn.Flatten(0),
    )


class GAN(ganglion.Objective):
    """Non-saturating loss, and R1 as a phase with a cadence of its own."""

    PENALTY, EVERY = 1.0, 4
    phases = [
        ganglion.Phase("discriminator", updates=["d"]),
        ganglion.Phase("penalty", updates=["d"], every=EVERY),
        ganglion.Phase("generator", updates=["g"]),
    ]
    average = ["g"]
    optimizer = ganglion.Adam(learning_rate=2e-4, beta1=0.5)

    def __init__(self, latent: int = 64, width: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.g, self.d = generator(latent, width), discriminator(width)

    def discriminator(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.g(draw.normal(len(batch), self.latent))
        real_logits, fake_logits = self.d(batch.images), self.d(fake)
        scores = {"score_real": real_logits.sigmoid().sum(), "score_fake": fake_logits.sigmoid().sum()}
        return F.softplus(-real_logits).sum() + F.softplus(fake_logits).sum(), scores

    def penalty(self, batch: ganglion.Batch, draw: ganglion.Draw) -> Tensor:
        images = batch.images.requires_grad_()
        (gradient,) = torch.autograd.grad(self.d(images).sum(), images, create_graph=True)
        return self.EVERY * self.PENALTY / 2 * gradient.square().sum()

    def generator(self, batch: ganglion.Batch, draw: ganglion.Draw) -> Tensor:
        return F.softplus(-self.d(self.g(draw.normal(len(batch), self.latent)))).sum()

    def sample(self, draw: ganglion.Draw, n: int) -> Tensor:
        return self.g(draw.normal(n, self.latent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--data", default="mnist-10k", help="28 x 28 grey images, such as idx:train-images-idx3-ubyte.gz"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/gan"))
    parser.add_argument("--small", action="store_true", help="tiny networks, for a quick try")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    gan = GAN(latent=8, width=4) if arguments.small else GAN()
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    package = ganglion.export(gan, arguments.run_dir.with_suffix(".pt2"), data=ganglion.images(1, 28), shard_batch=16)
    run = ganglion.train(
        package, workers=arguments.workers, data=arguments.data, run_dir=arguments.run_dir, steps=arguments.steps
    )
    gan.load_state_dict(run.state_dict(average=True))
    print(ganglion.sample(run).path)


if __name__ == "__main__":
    main()
