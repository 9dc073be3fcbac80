"""Packages of text and of arrays: captured, compared with PyTorch, trained with the same bits on any cluster."""

import unittest

import ganglion
import numpy
import torch
import torch.nn.functional as F
from common import InFolder, mlp
from torch import nn

SETTINGS = {"checkpoint.every_steps": 20, "metrics.every_steps": 1, "job.data_shards": 4}


class Letters(ganglion.Objective):
    """Predicts the next byte by the one before, with dropout, and its evaluation."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(256, 16), nn.Dropout(0.1), nn.Linear(16, 256)

    def nll(self, tokens):
        logits = self.head(self.dropout(self.embedding(tokens[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / (tokens.shape[1] - 1)

    def loss(self, batch, draw):
        assert len(batch) == 4
        return self.nll(batch.tokens)

    def evaluate(self, batch, draw):
        return {"held_out_nll": self.nll(batch.tokens)}


class Signals(ganglion.Objective):
    """Tells labels from signals; its samples are pictures of its first layer."""

    def __init__(self):
        super().__init__()
        self.net = mlp(6, 8, 3)

    def loss(self, batch, draw):
        signal = torch.where(batch.mask[:, None, None], batch.signal, 0.0) + batch.offset.float()[:, None, None]
        return F.cross_entropy(self.net(signal), batch.label, reduction="sum")

    def sample(self, draw, n):
        return (self.net[1].weight.expand(n, 1, 8, 6) + 0.1 * draw.normal(n, 1, 8, 6)).tanh()


ARRAYS = {
    "signal": ((2, 3), "float32"),
    "label": ((), torch.int64),
    "mask": ((), bool),
    "offset": ((), numpy.float64),
}


class Data(InFolder):
    def trained(self, package, name, data, workers, steps=40, **settings):
        run_dir = self.folder / name
        options = {"workers": workers, "steps": steps, "progress": False, "run_dir": run_dir}
        return ganglion.train(package, data=data, settings={**SETTINGS, **settings}, **options)

    def same_bits(self, package, data, **settings):
        run = self.trained(package, "one", data, 1, **settings)
        other = self.trained(package, "two", data, 2, steps=20, **settings)
        other = self.trained(package, "two", data, 3, **settings)
        self.assertEqual(run.checkpoints()[-1].digest, other.checkpoints()[-1].digest)
        rows = run.metrics()
        self.assertLess(rows[-1]["loss"], rows[0]["loss"])
        return run

    def near(self, objective):
        for distance in ganglion.check(objective, quiet=True):
            self.assertLess(distance.package, 1e-5, distance)

    def test_text(self):
        torch.manual_seed(0)
        letters = Letters()
        package = self.export(letters, data=ganglion.text(context=16))
        self.near(letters)
        held_out = self.folder / "held-out.txt"
        for path, words in ((self.folder / "a.txt", 900), (held_out, 100)):
            path.write_text("the quick brown fox jumps over the lazy dog. " * words)
        settings = {"evaluation.held_out": str(held_out), "evaluation.every_steps": 20, "optimizer.learning_rate": 1e-2}
        run = self.same_bits(package, f"text:{self.folder / 'a.txt'}", **settings)
        self.assertIn("held_out_nll", (run.path / "events.jsonl").read_text())

    def test_arrays(self):
        torch.manual_seed(0)
        signals = Signals()
        package = self.export(signals, data=ganglion.arrays(**ARRAYS))
        self.near(signals)
        folder = self.folder / "arrays"
        folder.mkdir()
        random = numpy.random.default_rng(0)
        label = random.integers(0, 3, 500)
        numpy.save(folder / "label.npy", label)
        numpy.save(folder / "signal.npy", (random.normal(size=(500, 2, 3)) + label[:, None, None]).astype("f4"))
        numpy.save(folder / "mask.npy", random.random(500) < 0.9)
        numpy.save(folder / "offset.npy", random.normal(size=500))
        numpy.save(folder / "spare.npy", label)
        run = self.same_bits(package, f"arrays:{folder}", **{"optimizer.learning_rate": 1e-2, "sample.every_steps": 20})
        self.assertEqual([picture.step for picture in run.samples()], [20, 40])

    def test_what_the_data_have_not_is_named(self):
        class Wrong(Letters):
            def loss(self, batch, draw):
                return self.nll(batch.words)

        with self.assertRaises(ganglion.ExportError) as caught:
            self.export(Wrong(), data=ganglion.text(context=16))
        self.assertIn("batch.words is read, and the data of this package have batch.tokens", str(caught.exception))
        for wrong, part in (
            (lambda: ganglion.text(context=0), "at least 1"),
            (lambda: ganglion.arrays(), "name at least one"),
            (lambda: ganglion.arrays(images=((), "int64")), "cannot be called images"),
            (lambda: ganglion.arrays(x=((2, 0), "float32")), "each side is at least 1"),
            (lambda: ganglion.arrays(x=((2,), "complex64")), "is of complex64; there are bool, uint8"),
            (lambda: ganglion.arrays(x=(2, 3)), "there are bool, uint8"),
        ):
            with self.assertRaises(ganglion.Error) as caught:
                wrong()
            self.assertIn(part, str(caught.exception))

    def test_samples_are_images(self):
        class Wrong(Signals):
            def sample(self, draw, n):
                return draw.normal(n, 6)

        with self.assertRaises(ganglion.ExportError) as caught:
            self.export(Wrong(), data=ganglion.arrays(**ARRAYS))
        self.assertIn("it must return images of shape (4, 1 or 3, height, width)", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
