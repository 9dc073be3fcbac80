"""Exports small packages into a folder, for tests of training: two networks with their own updates, and one network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "python"))

import ganglion
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 4


class Gan(ganglion.Objective):
    """A conditional GAN with batch normalisation, dropout, a penalty in every third step, and a moving average."""

    phases = [
        ganglion.Phase("discriminator", updates=["d", "embedding"]),
        ganglion.Phase("penalty", updates=["d"], every=3, batch="same"),
        ganglion.Phase("generator", updates=["g"], batch="same"),
    ]
    average = ["g"]
    average_half_life = 500
    optimizer = ganglion.Adam(1e-3, 0.5)

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(18, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 784), nn.Tanh())
        self.d = nn.Sequential(nn.Linear(784, 32), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(32, 8))
        self.embedding = nn.Embedding(10, 8)

    def drawn(self, draw, classes):
        noise = draw.normal(len(classes), 8)
        return self.g(torch.cat([noise, F.one_hot(classes, 10).float()], 1)).unflatten(1, (1, 28, 28))

    def rated(self, images, classes):
        return (self.d(images.flatten(1)) * self.embedding(classes)).sum(1)

    def discriminator(self, batch, draw):
        fake = self.drawn(draw, batch.classes).detach()
        real = self.rated(batch.images, batch.classes)
        loss = F.softplus(-real).sum() + F.softplus(self.rated(fake, batch.classes)).sum()
        return loss, {"score_real": real.sum()}

    def penalty(self, batch, draw, step):
        images = batch.images.requires_grad_()
        (gradient,) = torch.autograd.grad(self.rated(images, batch.classes).sum(), images, create_graph=True)
        return gradient.square().sum() * (step / 10).clamp(max=1)

    def generator(self, batch, draw):
        classes = draw.integers(len(batch), low=0, high=10)
        return F.softplus(-self.rated(self.drawn(draw, classes), classes)).sum()

    def sample(self, draw, n, classes):
        return self.drawn(draw, classes)


class Classifier(ganglion.Objective):
    """A classifier with dropout, and its evaluation."""

    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))

    def scalars(self, batch):
        logits = self.net(batch.images)
        accuracy = (logits.argmax(1) == batch.classes).float().mean()
        return F.cross_entropy(logits, batch.classes), accuracy

    def loss(self, batch, draw):
        loss, accuracy = self.scalars(batch)
        return loss, {"accuracy": accuracy}

    def evaluate(self, batch, draw):
        loss, accuracy = self.scalars(batch)
        return {"held_out_loss": loss, "held_out_accuracy": accuracy}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    data = ganglion.images(channels=1, size=28, classes=10)
    for name, objective in [("gan", Gan()), ("classifier", Classifier())]:
        ganglion.export(objective, folder / f"{name}.pt2", data=data, shard_batch=BATCH, samples=20, quiet=True)
