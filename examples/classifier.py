"""A classifier: nothing random but the order of the samples, losses as means over the batch.

python examples/classifier.py --workers 2
"""

import argparse
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(ganglion.Objective):
    """A convolutional network, with its accuracy as a scalar."""

    reduction = "mean"
    optimizer = ganglion.Adam(learning_rate=1e-3)

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 49, 10),
        )

    def loss(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.network(batch.images)
        return F.cross_entropy(logits, batch.classes), {"accuracy": accuracy(logits, batch.classes)}

    def evaluate(self, batch: ganglion.Batch, draw: ganglion.Draw) -> dict[str, Tensor]:
        logits = self.network(batch.images)
        return {"cross_entropy": F.cross_entropy(logits, batch.classes), "accuracy": accuracy(logits, batch.classes)}


def accuracy(logits: Tensor, classes: Tensor) -> Tensor:
    """Share of samples whose largest logit is that of their class."""
    return (logits.argmax(dim=1) == classes).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--data", default="mnist-10k", help="28 x 28 grey images with classes, such as folder:pictures")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/classifier"))
    parser.add_argument("--small", action="store_true", help="a tiny network, for a quick try")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    classifier = Classifier(width=2) if arguments.small else Classifier()
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    data = ganglion.images(1, 28, classes=10)
    package = ganglion.export(classifier, arguments.run_dir.with_suffix(".pt2"), data=data, shard_batch=16)
    run = ganglion.train(
        package, workers=arguments.workers, data=arguments.data, run_dir=arguments.run_dir, steps=arguments.steps
    )
    classifier.load_state_dict(run.state_dict())
    print({name: value for name, value in run.metrics()[-1].items() if name in ("step", "loss", "accuracy")})


if __name__ == "__main__":
    main()
