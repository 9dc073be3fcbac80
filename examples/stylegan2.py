"""StyleGAN2 (Karras et al., 2020), small: style mixing, noise inputs, lazy regularisation, averaged weights.

python examples/stylegan2.py --workers 2
python examples/stylegan2.py --size 64 --channels 3 --data folder:pictures
"""

import argparse
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Layers: weights are N(0, 1), and scaled where they are used (Karras et al., 2018, section 4.1) -------------------


class Linear(nn.Module):
    """Linear layer (n, inputs) -> (n, outputs) that learns at `speed` times the optimizer's rate."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, speed: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / speed)
        self.bias = nn.Parameter(torch.full((outputs,), bias / speed))
        self.scale, self.speed = speed / inputs**0.5, speed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight, self.speed * self.bias)


class Smooth(nn.Module):
    """Low-pass filter with the weights 1, 3, 3, 1 of images (n, c, h, w); also to half and to twice the size."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", line[:, None] * line, persistent=False)

    def forward(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self._kernels(x), padding=padding, groups=x.shape[1])

    def half(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._kernels(x), padding=1, stride=2, groups=x.shape[1])

    def double(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, 4 * self._kernels(x), padding=1, stride=2, groups=x.shape[1])

    def _kernels(self, x: Tensor) -> Tensor:
        return self.kernel.to(x.dtype).repeat(x.shape[1], 1, 1, 1)


class Conv(nn.Module):
    """Convolution (n, inputs, h, w) -> (n, outputs, h, w), or to half the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = 1 / (inputs * kernel**2) ** 0.5, kernel // 2
        self.smooth = Smooth() if down else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale * self.weight
        if self.smooth is None:
            return F.conv2d(x, weight, self.bias, padding=self.padding)
        return F.conv2d(self.smooth(x, self.padding + 1), weight, self.bias, stride=2)


class StyledConv(nn.Module):
    """Convolution (n, inputs, h, w) -> (n, outputs, h, w) by styles (n, latent), or to twice the size.

    Weights are modulated and demodulated (equations 1 and 3): products with a number for each input, and for each
    output. Here activations are multiplied instead, which is the same, and all samples share one convolution.
    """

    def __init__(
        self, inputs: int, outputs: int, latent: int, kernel: int = 3, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.style = Linear(latent, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.scale, self.padding = 1 / (inputs * kernel**2) ** 0.5, kernel // 2
        self.demodulate, self.smooth = demodulate, Smooth() if up else None

    def forward(self, x: Tensor, styles: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        weight, style = self.scale * self.weight, self.style(styles)
        x = x * style[:, :, None, None]
        if self.smooth is None:
            x = F.conv2d(x, weight, padding=self.padding)
        else:
            x = 4 * self.smooth(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1)
        if self.demodulate:
            norm = (F.linear(style.square(), weight.square().sum(dim=(2, 3))) + 1e-8).rsqrt()
            x = x * norm[:, :, None, None]
        return x + noise + self.bias


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance."""
    return 2**0.5 * F.leaky_relu(x, 0.2)


# ---- Networks --------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Mapping from latents to styles, and synthesis of images with skip connections (figure 7b)."""

    def __init__(self, sides: list[int], widths: list[int], channels: int, latent: int, depth: int) -> None:
        super().__init__()
        self.sides, self.latent = sides, latent
        # The mapping learns a hundred times slower (Karras et al., 2019, appendix C). For small data StyleGAN2-ADA has
        # two layers (Karras et al., 2020a).
        self.mapping = nn.ModuleList([Linear(latent, latent, speed=0.01) for _ in range(depth)])
        self.start = nn.Parameter(torch.randn(1, widths[0], sides[0], sides[0]))
        pairs = list(zip(widths, widths[1:]))
        self.convs = nn.ModuleList([StyledConv(widths[0], widths[0], latent)])
        for narrow, wide in pairs:
            self.convs += [StyledConv(narrow, wide, latent, up=True), StyledConv(wide, wide, latent)]
        self.images = nn.ModuleList([StyledConv(width, channels, latent, 1, demodulate=False) for width in widths])
        self.strengths = nn.Parameter(torch.zeros(len(self.convs)))
        self.layers = len(self.convs) + 1
        self.smooth = Smooth()

    def styles(self, latents: Tensor) -> Tensor:
        """Styles (n, latent) of latents (n, latent)."""
        x = latents * (latents.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            x = leaky(layer(x))
        return x

    def mixed(self, draw: ganglion.Draw, n: int) -> Tensor:
        """Styles (n, layers, latent), nine of ten mixed of two latents (Karras et al., 2019, section 3.1)."""
        first, second = self.styles(draw.normal(2 * n, self.latent))[:, None].expand(-1, self.layers, -1).chunk(2)
        cut = torch.where(draw.bernoulli(n, 0.9) > 0, draw.integers(n, 1, self.layers), self.layers)
        place = torch.arange(self.layers, device=cut.device)
        return torch.where((place < cut[:, None])[:, :, None], first, second)

    def forward(self, styles: Tensor, draw: ganglion.Draw) -> Tensor:
        """Images (n, channels, side, side) of styles (n, layers, latent)."""
        n, image = len(styles), None
        x = self.start.expand(n, -1, -1, -1)
        for at, conv in enumerate(self.convs):
            side = self.sides[(at + 1) // 2]
            x = leaky(conv(x, styles[:, at], self.strengths[at] * draw.normal(n, 1, side, side)))
            if at % 2 == 0:
                # An image takes the style of the next convolution.
                new = self.images[at // 2](x, styles[:, at + 1])
                image = new if image is None else self.smooth.double(image) + new
        return image


class Residual(nn.Module):
    """Block of the discriminator, to half the size (figure 7c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = Conv(inputs, inputs), Conv(inputs, outputs, down=True)
        self.skip, self.smooth = Conv(inputs, outputs, kernel=1, bias=False), Smooth()

    def forward(self, x: Tensor) -> Tensor:
        return (leaky(self.second(leaky(self.first(x)))) + self.skip(self.smooth.half(x))) / 2**0.5


class Discriminator(nn.Module):
    """Residual network from images (n, channels, side, side) to logits (n)."""

    def __init__(self, sides: list[int], widths: list[int], channels: int) -> None:
        super().__init__()
        self.start = Conv(channels, widths[-1], kernel=1)
        self.blocks = nn.Sequential(*(Residual(a, b) for a, b in zip(widths[:0:-1], widths[-2::-1])))
        self.last = Conv(widths[0] + 1, widths[0])
        self.hidden, self.logit = Linear(widths[0] * sides[0] ** 2, widths[0]), Linear(widths[0], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(leaky(self.start(images)))
        x = leaky(self.last(torch.cat([x, deviation(x)], dim=1)))
        return self.logit(leaky(self.hidden(x.flatten(1)))).flatten()


def deviation(x: Tensor, group: int = 4) -> Tensor:
    """Standard deviation in groups of samples as one more channel (Karras et al., 2018, section 3)."""
    n, _, h, w = x.shape
    apart = x.unflatten(0, (min(group, n), -1))
    spread = (apart.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return spread.repeat(len(apart))[:, None, None, None].expand(n, 1, h, w)


# ---- Objective -------------------------------------------------------------------------------------------------------


def lazy(every: int) -> ganglion.Adam:
    """Adam for a network that is also regularised every so many steps (appendix B)."""
    share = every / (every + 1)
    return ganglion.Adam(learning_rate=0.002 * share, beta1=0.0, beta2=0.99**share)


class StyleGAN2(ganglion.Objective):
    """Non-saturating logistic loss; R1 every 16 steps, path length regularisation every 4 (section 3)."""

    PATHS, R1 = 4, 16
    phases = [
        ganglion.Phase("generator", updates=["g"], optimizer=lazy(PATHS)),
        ganglion.Phase("path_length", updates=["g"], every=PATHS, optimizer=lazy(PATHS)),
        ganglion.Phase("discriminator", updates=["d"], optimizer=lazy(R1)),
        ganglion.Phase("r1", updates=["d"], every=R1, optimizer=lazy(R1)),
    ]
    average = ["g"]

    def __init__(
        self,
        size: int = 28,
        channels: int = 1,
        width: int = 32,
        levels: int = 3,
        latent: int = 64,
        depth: int = 2,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        sides = [size >> level for level in reversed(range(levels))]
        widths = [min(4, 1 << level) * width for level in reversed(range(levels))]
        self.g = Generator(sides, widths, channels, latent, depth)
        self.d = Discriminator(sides, widths, channels)
        self.register_buffer("mean_length", torch.zeros(()))

    def generator(self, batch: ganglion.Batch, draw: ganglion.Draw) -> Tensor:
        fake = self.g(self.g.mixed(draw, len(batch)), draw)
        return F.softplus(-self.d(fake)).sum()

    def path_length(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Deviation of the lengths of gradients by styles from their moving mean (equation 4)."""
        styles = self.g.mixed(draw, len(batch))
        images = self.g(styles, draw)
        noise = draw.normal(images.shape) / images[0, 0].numel() ** 0.5
        (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
        lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
        self.mean_length.lerp_(lengths.detach().mean(), 0.01)
        penalty = (lengths - self.mean_length).square().sum()
        # Weighted by 2, and by the cadence.
        return 2 * self.PATHS * penalty, {"path": lengths.sum()}

    def discriminator(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.g(self.g.mixed(draw, len(batch)), draw)
        real_logits, fake_logits = self.d(batch.images), self.d(fake)
        scores = {"score_real": real_logits.sigmoid().sum(), "score_fake": fake_logits.sigmoid().sum()}
        return F.softplus(-real_logits).sum() + F.softplus(fake_logits).sum(), scores

    def r1(self, batch: ganglion.Batch, draw: ganglion.Draw) -> Tensor:
        images = batch.images.requires_grad_()
        (gradient,) = torch.autograd.grad(self.d(images).sum(), images, create_graph=True)
        return self.R1 * self.gamma / 2 * gradient.square().sum()

    def sample(self, draw: ganglion.Draw, n: int) -> Tensor:
        styles = self.g.styles(draw.normal(n, self.g.latent))[:, None].expand(-1, self.g.layers, -1)
        return self.g(styles, draw).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--data", default="mnist-10k", help="square images, such as folder:pictures")
    parser.add_argument("--size", type=int, default=28, help="side of the images, a multiple of 4")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--width", type=int, default=16, help="channels at the full size")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/stylegan2"))
    parser.add_argument("--small", action="store_true", help="tiny networks, for a quick try")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    size, channels = arguments.size, arguments.channels
    # The smallest size is 4 to 7.
    levels = (size // 4).bit_length()
    if arguments.small:
        gan = StyleGAN2(size, channels, width=2, levels=2, latent=8, depth=2)
    else:
        gan = StyleGAN2(size, channels, arguments.width, levels)
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    data = ganglion.images(channels, size)
    package = ganglion.export(gan, arguments.run_dir.with_suffix(".pt2"), data=data, shard_batch=8)
    # Batches of 4 x 8 = 32, as in the paper: the first samples are all alike, and only many updates part them.
    run = ganglion.train(
        package,
        workers=arguments.workers,
        data=arguments.data,
        run_dir=arguments.run_dir,
        steps=arguments.steps,
        data_shards=4,
    )
    print(ganglion.sample(run).path)


if __name__ == "__main__":
    main()
