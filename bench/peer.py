"""The same GANs as PyTorch's users train them, for the comparisons of `make bench` and `make bench-gpu`.

Two ways, one thread a process, and where torchrun started it data-parallel by DistributedDataParallel over Gloo:

- `usual`: as PyTorch's own DCGAN example has it, wrapped as its DDP tutorial says. Adam with its defaults, the
  discriminator sees real and fake images in two passes, nothing is frozen, a DataLoader feeds it.
- `tuned`: the fastest that we found to write. Fused Adam, the discriminator frozen in the generator's phase, real and fake
  images in one pass where there is no batch normalisation (one reduce less), gradients as views of DDP's buckets,
  channels_last for convolutions, data in memory (that of the device), the C library told to keep freed memory; with
  `--compile`, torch.compile as well: of the networks, or in a process alone of whole losses, which is faster.

Rank 0 prints one JSON object: seconds since `--started` to the first step, milliseconds of each further step, both losses
of each step, and the largest resident memory of its process in MiB. On a GPU a step ends when the GPU has done all of it.
"""

import argparse
import gzip
import json
import os
import pathlib
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

LATENT = 100


def mlp_28(width, channels):
    def perceptron(inputs, outputs):
        hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
        return [*hidden, nn.Linear(width, outputs)]

    generator = nn.Sequential(nn.Flatten(), *perceptron(LATENT, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    return generator, nn.Sequential(nn.Flatten(), *perceptron(784, 1))


def up(inputs, outputs, kernel, stride, padding):
    return nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, bias=False)


def down(inputs, outputs, kernel, stride, padding):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)


def dcgan_28(width, channels):
    generator = nn.Sequential(
        *[up(LATENT, 4 * width, 7, 1, 0), nn.BatchNorm2d(4 * width), nn.ReLU()],
        *[up(4 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()],
        *[up(2 * width, channels, 4, 2, 1), nn.Tanh()],
    )
    discriminator = nn.Sequential(
        *[down(channels, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)],
        *[down(2 * width, 4 * width, 4, 2, 1), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2)],
        *[down(4 * width, 1, 7, 1, 0), nn.Flatten()],
    )
    return generator, discriminator


def dcgan_64(width, channels):
    generator = [up(LATENT, 8 * width, 4, 1, 0), nn.BatchNorm2d(8 * width), nn.ReLU()]
    for factor in (4, 2, 1):
        generator += [up(2 * factor * width, factor * width, 4, 2, 1), nn.BatchNorm2d(factor * width), nn.ReLU()]
    generator += [up(width, channels, 4, 2, 1), nn.Tanh()]
    discriminator = [down(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for factor in (2, 4, 8):
        discriminator += [down(factor * width // 2, factor * width, 4, 2, 1), nn.BatchNorm2d(factor * width)]
        discriminator += [nn.LeakyReLU(0.2)]
    discriminator += [down(8 * width, 1, 4, 1, 0), nn.Flatten()]
    return nn.Sequential(*generator), nn.Sequential(*discriminator)


def initialise(module):
    """DCGAN's weights, Radford et al. (2015), section 3; linear layers keep PyTorch's."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


MODELS = {"mlp-28": (mlp_28, 28), "dcgan-28": (dcgan_28, 28), "dcgan-64": (dcgan_64, 64)}


def digits(path, size):
    """MNIST in [-1, 1], scaled to `size` pixels a side."""
    content = gzip.decompress(path.read_bytes())
    count, height, width = (int.from_bytes(content[at : at + 4], "big") for at in (4, 8, 12))
    pixels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(count, 1, height, width)
    images = pixels.float() / 127.5 - 1.0
    return images if size == height else nn.functional.interpolate(images, size=(size, size), mode="bilinear")


def is_distributed():
    return "RANK" in os.environ


def data_parallel(net, **keep):
    return DistributedDataParallel(net, **keep) if is_distributed() else net


def share():
    """This process's rank and the world size."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


class Usual:
    """As in PyTorch's examples."""

    def __init__(self, options, generator, discriminator, images):
        self.device = options.device
        self.generator, self.discriminator = (data_parallel(net) for net in (generator, discriminator))
        self.g_adam, self.d_adam = (
            torch.optim.Adam(net.parameters(), lr=options.learning_rate, betas=(0.5, 0.999))
            for net in (generator, discriminator)
        )
        self.criterion = nn.BCEWithLogitsLoss()
        self.autocast = lambda: torch.autocast(self.device, torch.bfloat16, enabled=options.precision == "bf16")
        self.batch = options.batch
        dataset = TensorDataset(images)
        sampler = DistributedSampler(dataset, rank=share()[0], num_replicas=share()[1])
        pinned = self.device == "cuda"
        self.loader = DataLoader(dataset, options.batch, sampler=sampler, drop_last=True, pin_memory=pinned)
        self.batches = iter(self.loader)

    def next(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch[0].to(self.device, non_blocking=True)

    def step(self):
        real = self.next()
        label = torch.full((self.batch,), 1.0, device=self.device)
        self.discriminator.zero_grad()
        with self.autocast():
            output = self.discriminator(real).view(-1)
            error_real = self.criterion(output.float(), label)
        error_real.backward()
        with self.autocast():
            fake = self.generator(torch.randn(self.batch, LATENT, 1, 1, device=self.device))
            label.fill_(0.0)
            output = self.discriminator(fake.detach()).view(-1)
            error_fake = self.criterion(output.float(), label)
        error_fake.backward()
        self.d_adam.step()
        self.generator.zero_grad()
        label.fill_(1.0)
        with self.autocast():
            output = self.discriminator(fake).view(-1)
            error = self.criterion(output.float(), label)
        error.backward()
        self.g_adam.step()
        return (error_real + error_fake).item(), error.item()


class Tuned:
    """The fastest version that we could write."""

    def __init__(self, options, generator, discriminator, images):
        convolutional = any(isinstance(module, nn.Conv2d) for module in discriminator.modules())
        self.format = torch.channels_last if convolutional else torch.contiguous_format
        self.nets = [net.to(memory_format=self.format) for net in (generator, discriminator)]
        self.device = options.device
        self.compiles = bool(options.compile)
        compiled = (lambda what: torch.compile(what, mode=options.compile)) if options.compile else lambda what: what
        self.raw = [compiled(net) if is_distributed() else net for net in self.nets]
        self.has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in discriminator.modules())
        keep = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        self.generator, self.discriminator = (data_parallel(net, **keep) for net in self.raw)
        parts = (self.draw, self.discriminator_loss, self.generator_loss)
        if not is_distributed():
            self.draw, self.discriminator_loss, self.generator_loss = (compiled(part) for part in parts)
        self.adams = [
            torch.optim.Adam(net.parameters(), lr=options.learning_rate, betas=(0.5, 0.999), fused=True)
            for net in self.nets
        ]
        self.autocast = lambda: torch.autocast(self.device, torch.bfloat16, enabled=options.precision == "bf16")
        self.batch = options.batch
        rank, world_size = share()
        self.images = images[rank::world_size].to(self.device).contiguous(memory_format=self.format)
        self.order, self.place = torch.randperm(len(self.images)), 0

    def next(self):
        if self.place + self.batch > len(self.order):
            self.order, self.place = torch.randperm(len(self.images)), 0
        chosen = self.order[self.place : self.place + self.batch]
        self.place += self.batch
        return self.images[chosen.to(self.device)]

    def noise(self):
        return torch.randn(self.batch, LATENT, 1, 1, device=self.device)

    def draw(self, noise):
        with self.autocast():
            fake = self.raw[0](noise)
        return fake.to(self.images.dtype).contiguous(memory_format=self.format)

    def discriminator_loss(self, real, fake):
        with self.autocast():
            if self.has_batch_norm:
                on_real, on_fake = self.discriminator(real), self.discriminator(fake)
            else:
                on_real, on_fake = self.discriminator(torch.cat([real, fake])).split(self.batch)
        return softplus(-on_real.float()).mean() + softplus(on_fake.float()).mean()

    def generator_loss(self, noise):
        with self.autocast():
            logits = self.raw[1](self.generator(noise))
        return softplus(-logits.float()).mean()

    def step(self):
        if self.compiles:
            # Tells CUDA graphs that the results of the step before are no longer needed.
            torch.compiler.cudagraph_mark_step_begin()
        real = self.next()
        with torch.no_grad():
            fake = self.draw(self.noise())
        self.adams[1].zero_grad(set_to_none=False)
        d_loss = self.discriminator_loss(real, fake)
        d_loss.backward()
        self.adams[1].step()
        self.nets[1].requires_grad_(False)
        self.adams[0].zero_grad(set_to_none=False)
        g_loss = self.generator_loss(self.noise())
        g_loss.backward()
        self.adams[0].step()
        self.nets[1].requires_grad_(True)
        return d_loss.item(), g_loss.item()


def largest_resident_mib():
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["usual", "tuned"], required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="images of one process in one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile's mode")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--started", type=float, required=True, help="when the command was given, in Unix seconds")
    return parser.parse_args()


def main():
    chosen = options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if is_distributed():
        dist.init_process_group("gloo")
    make, size = MODELS[chosen.model]
    generator, discriminator = (net.apply(initialise).to(chosen.device) for net in make(chosen.width, 1))
    torch.manual_seed(share()[0])
    way = {"usual": Usual, "tuned": Tuned}[chosen.way]
    trainer = way(chosen, generator, discriminator, digits(chosen.data, size))
    losses, times, first = [], [], None
    for _ in range(chosen.steps):
        begun = time.perf_counter()
        losses.append(trainer.step())
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
        first = first or time.time() - chosen.started
    if share()[0] == 0:
        figures = {"first_step": first, "steps": times[1:], "losses": losses, "resident": largest_resident_mib()}
        print(json.dumps(figures))
    if is_distributed():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
