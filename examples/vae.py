"""A variational autoencoder (Kingma and Welling, 2013): one phase that updates two networks.

python examples/vae.py --workers 2
"""

import argparse
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VAE(ganglion.Objective):
    """Encoder and decoder; the loss is the negative evidence lower bound."""

    average = ["encoder", "decoder"]
    optimizer = ganglion.Adam(learning_rate=1e-3)

    def __init__(self, width: int = 512, latent: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 784)
        )

    def bound(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, Tensor]:
        """Both terms of the bound, summed over the batch (equation 10)."""
        mean, log_variance = self.encoder(batch.images).chunk(2, dim=1)
        latent = mean + draw.normal(mean.shape) * (log_variance / 2).exp()
        # Grey values as probabilities of white.
        target = (batch.images.flatten(1) + 1) / 2
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(latent), target, reduction="sum")
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return reconstruction, divergence

    def loss(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, divergence = self.bound(batch, draw)
        return reconstruction + divergence, {"reconstruction": reconstruction, "divergence": divergence}

    def sample(self, draw: ganglion.Draw, n: int) -> Tensor:
        return self.decoder(draw.normal(n, self.latent)).sigmoid().unflatten(1, (1, 28, 28)) * 2 - 1

    def evaluate(self, batch: ganglion.Batch, draw: ganglion.Draw) -> dict[str, Tensor]:
        return {"negative_bound": sum(self.bound(batch, draw))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--data", default="mnist-10k", help="28 x 28 grey images, such as idx:train-images-idx3-ubyte.gz"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/vae"))
    parser.add_argument("--small", action="store_true", help="a tiny network, for a quick try")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    vae = VAE(width=16, latent=4) if arguments.small else VAE()
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    package = ganglion.export(vae, arguments.run_dir.with_suffix(".pt2"), data=ganglion.images(1, 28), shard_batch=16)
    run = ganglion.train(
        package, workers=arguments.workers, data=arguments.data, run_dir=arguments.run_dir, steps=arguments.steps
    )
    vae.load_state_dict(run.state_dict(average=True))
    print(ganglion.sample(run).path)


if __name__ == "__main__":
    main()
