"""Networks and folders that the tests share."""

import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "python"))

import ganglion  # noqa: E402
from torch import nn  # noqa: E402

DIGITS = ganglion.images(channels=1, size=28, classes=10)


def mlp(*widths):
    """Returns a network of linear layers."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


class InFolder(unittest.TestCase):
    """A test with an empty folder."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def export(self, objective, name="x", **options):
        path = self.folder / f"{name}.pt2"
        options = {"data": DIGITS, "shard_batch": 4, "samples": 4, "quiet": True, **options}
        return ganglion.export(objective, path, **options)
