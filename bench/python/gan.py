"""The GAN of the default job as PyTorch's users write it, for comparisons with other trainers.

The same networks, losses, optimizers and global batch as `configs/mnist-mlp.toml`; random numbers stand in for digits.
"""

import json
import os
import time

import torch
from torch import nn
from torch.nn.functional import softplus

LATENT, WIDTH, PIXELS = 100, 256, 784
GLOBAL_BATCH = 64


def perceptron(inputs, outputs, *last):
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, outputs),
        *last,
    )


class Gan:
    """Two networks and their optimizers. `wrap` makes a network data-parallel."""

    def __init__(self, wrap):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.modules = perceptron(LATENT, PIXELS, nn.Tanh()), perceptron(PIXELS, 1)
        self.generator, self.discriminator = (wrap(module) for module in self.modules)
        self.adams = [torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.5, 0.999)) for module in self.modules]

    def discriminator_gradient(self, batch):
        """Real and fake images in one pass, which saves a reduce."""
        real = torch.rand(batch, PIXELS) * 2 - 1
        with torch.no_grad():
            fake = self.modules[0](torch.randn(batch, LATENT))
        self.adams[1].zero_grad()
        logits = self.discriminator(torch.cat([real, fake]))
        (softplus(-logits[:batch]).mean() + softplus(logits[batch:]).mean()).backward()

    def generator_gradient(self, batch):
        """The discriminator only propagates the gradient."""
        self.adams[0].zero_grad()
        self.modules[1].requires_grad_(False)
        softplus(-self.modules[1](self.generator(torch.randn(batch, LATENT)))).mean().backward()
        self.modules[1].requires_grad_(True)

    def state_dict(self):
        """State for a later process."""
        return {
            "modules": [module.state_dict() for module in self.modules],
            "adams": [adam.state_dict() for adam in self.adams],
        }

    def load_state_dict(self, state):
        """Restores a result of `state_dict`."""
        for module, part in zip(self.modules, state["modules"]):
            module.load_state_dict(part)
        for adam, part in zip(self.adams, state["adams"]):
            adam.load_state_dict(part)


class Log:
    """One file for all processes, one line per event."""

    def __init__(self, rank):
        self.rank = rank
        self.file = os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, kind, step, **more):
        """Writes a line with one call: lines of several processes do not mix."""
        line = {"kind": kind, "step": step, "rank": self.rank, "pid": os.getpid(), "time": time.time(), **more}
        os.write(self.file, (json.dumps(line) + "\n").encode())
