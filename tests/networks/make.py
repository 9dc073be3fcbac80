"""Writes the networks that the tests train: a small DCGAN (Radford et al., 2015) for 28 x 28 images, as a user writes one.

    python3 tests/networks/make.py FOLDER      # needs PyTorch; writes G.pt, D.pt, features.pt, and the refused ones into FOLDER/refused

Inside are what is hard to keep the same on any number of workers: batch normalisation, dropout, and spectral normalisation
(Miyato et al., 2018, algorithm 1) with its vector as a buffer.
"""

import sys
from pathlib import Path

import torch
from torch import nn

LATENT, WIDTH = 8, 4


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(LATENT, 2 * WIDTH, 7, bias=False),
            nn.BatchNorm2d(2 * WIDTH),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(True),
            nn.Dropout(0.1),
            nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, noise):
        return self.main(noise)


class SpectralConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, 2, 1)
        self.register_buffer("u", nn.functional.normalize(torch.randn(outputs), dim=0))

    def forward(self, x):
        weight = self.conv.weight.flatten(1)
        with torch.no_grad():
            v = nn.functional.normalize(weight.t() @ self.u, dim=0)
            if self.training:
                self.u.copy_(nn.functional.normalize(weight @ v, dim=0))
        sigma = torch.dot(self.u.clone(), weight @ v)
        return nn.functional.conv2d(x, self.conv.weight / sigma, self.conv.bias, 2, 1)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            SpectralConv(1, WIDTH),
            nn.LeakyReLU(0.2, True),
            nn.Dropout2d(0.2),
            SpectralConv(WIDTH, 2 * WIDTH),
            nn.BatchNorm2d(2 * WIDTH),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * WIDTH, 1, 7),
        )

    def forward(self, images):
        return self.main(images).view(-1)


class Features(nn.Module):
    """Features for metrics: (n, 32) of images (n, 1, 28, 28). Without weights, so that it is equal everywhere."""

    def forward(self, images):
        rows, columns = (
            nn.functional.adaptive_avg_pool2d(images, (28, 1)),
            nn.functional.adaptive_avg_pool2d(images, (1, 28)),
        )
        whole = torch.cat([rows.flatten(1), columns.flatten(1)], 1)
        return nn.functional.adaptive_avg_pool1d(whole.unsqueeze(1), 32).squeeze(1)


def save(module, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(module).save(path)


def main(folder):
    torch.manual_seed(1)
    save(Generator(), folder / "G.pt")
    save(Discriminator(), folder / "D.pt")
    save(Features(), folder / "features.pt")
    refused = folder / "refused"
    save(nn.Sequential(Discriminator(), nn.Sigmoid()), refused / "sigmoid.pt")
    save(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)),
        refused / "counts.pt",
    )
    save(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), refused / "two-numbers.pt")
    save(nn.Sequential(nn.Flatten(), nn.Linear(784, 1)).double(), refused / "double.pt")
    traced = torch.jit.trace(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.Dropout()).train(),
        torch.ones(2, 1, 28, 28),
        check_trace=False,
    )
    traced.save(refused / "traced.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
