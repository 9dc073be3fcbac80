"""The VAE `vae-28` as PyTorch's users train it, for the comparisons of `make bench`.

- `usual`: DistributedDataParallel as its tutorial says, Adam with its defaults, a DataLoader feeds it.
- `tuned`: fused Adam, gradients as views of DDP's buckets, channels_last for convolutions, data in memory, the C library
  told to keep freed memory; with `--compile`, torch.compile of the network as well.

The networks, their initial weights, the loss and the binarisation are those of `worker/src/nn/vae.rs` and
`worker/src/objective/vae/`. Rank 0 prints what peer.py prints; the two losses of a step are recon and kl, in nats an image.
"""

import argparse
import pathlib
import sys

import torch
import torch.nn.functional as F
from ddp import leave, share, tell, train, wrap
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from peer import digits

LATENT, LEARNING_RATE = 32, 1e-3


class Vae(nn.Module):
    """Images (n, 1, 28, 28) in [0, 1] to the sums of recon and of kl."""

    def __init__(self, width):
        super().__init__()
        hidden, smallest = 16 * width, 2 * width * 7 * 7
        self.encoder = nn.Sequential(
            *[nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(), nn.Flatten()],
            *[nn.Linear(smallest, hidden), nn.SiLU(), nn.Linear(hidden, 2 * LATENT)],
        )
        self.decoder = nn.Sequential(
            *[nn.Linear(LATENT, hidden), nn.SiLU(), nn.Linear(hidden, smallest), nn.SiLU()],
            *[nn.Unflatten(1, (2 * width, 7, 7)), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU()],
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                initialise(module, 2**0.5, module.weight[0].numel())
            elif isinstance(module, nn.ConvTranspose2d):
                # A pixel of the larger map gets a quarter of the kernel's weights.
                initialise(module, 2**0.5, 4 * module.in_channels)
        initialise(self.encoder[-1], 0.5, hidden)
        initialise(self.decoder[-1], 1.0, 4 * width)

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, 1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        recon = F.binary_cross_entropy_with_logits(self.decoder(latent), images, reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()
        return recon, kl


def initialise(module, gain, inputs):
    nn.init.normal_(module.weight, 0.0, gain / inputs**0.5)
    nn.init.zeros_(module.bias)


def batches(images, chosen):
    """Binarised images of each step, by the chosen way."""
    rank, world_size = share()
    if chosen.way == "usual":
        dataset = TensorDataset(images)
        sampler = DistributedSampler(dataset, rank=rank, num_replicas=world_size, seed=chosen.seed)
        loader = DataLoader(dataset, chosen.batch, sampler=sampler, drop_last=True)
        while True:
            for (batch,) in loader:
                yield (torch.rand_like(batch) < batch).float()
    images = images[rank::world_size].contiguous()
    while True:
        for places in torch.randperm(len(images)).split(chosen.batch):
            if len(places) == chosen.batch:
                batch = images[places]
                yield (torch.rand_like(batch) < batch).float().contiguous(memory_format=torch.channels_last)


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["usual", "tuned"], required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="images of one process in one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--started", type=float, required=True, help="when the command was given, in Unix seconds")
    return parser.parse_args()


def main():
    chosen = options()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    tuned = chosen.way == "tuned"
    model = Vae(chosen.width)
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=tuned)
    network = wrap(model, chosen)
    torch.manual_seed(1000 * chosen.seed + share()[0])
    images = batches((digits(chosen.data, 28) + 1) / 2, chosen)

    def step(_):
        adam.zero_grad(set_to_none=not tuned)
        recon, kl = network(next(images))
        ((recon + kl) / chosen.batch).backward()
        adam.step()
        return [recon.item() / chosen.batch, kl.item() / chosen.batch]

    tell(train(chosen, step))
    leave()


if __name__ == "__main__":
    main()
