"""Objectives that cannot be captured are refused by name and line, with how to fix them."""

import random
import unittest
from unittest import mock

import ganglion
import numpy
import torch
import torch.nn.functional as F
from common import InFolder, mlp
from torch import nn


class Base(ganglion.Objective):
    def __init__(self):
        super().__init__()
        self.net = mlp(784, 8, 10)

    def loss(self, batch, draw):
        return F.cross_entropy(self.net(batch.images), batch.classes, reduction="sum")


def objective(loss):
    """Returns an objective with another loss."""
    return type("Mine", (Base,), {"loss": loss})()


class Refusals(InFolder):
    def refuses(self, wrong, *parts, line="", **options):
        with self.assertRaises(ganglion.ExportError) as caught:
            self.export(wrong, **options)
        text = str(caught.exception)
        for part in parts:
            self.assertIn(part, text)
        if line:
            self.assertRegex(text, r"test_refusals\.py:\d+: `")
            self.assertIn(line, text)
        self.assertEqual(list(self.folder.iterdir()), [], "a refused export left a file")

    def test_control_flow_by_values(self):
        def loss(self, batch, draw):
            total = self.net(batch.images).sum()
            if total > 0:
                total = -total
            return total

        self.refuses(objective(loss), "the value of a tensor is read", "torch.where", line="if total > 0:")

    def test_shapes_by_values(self):
        def loss(self, batch, draw):
            logits = self.net(batch.images)
            return logits[logits > 0].sum()

        self.refuses(objective(loss), "depends on values", "mask", line="logits[logits > 0]")

    def test_random_operations_without_draws(self):
        def loss(self, batch, draw):
            logits = self.net(batch.images)
            picked = torch.multinomial(logits.detach().exp(), 1)
            return logits.gather(1, picked).sum()

        self.refuses(objective(loss), "torch.multinomial is random", "draw.uniform", line="picked = torch.multinomial")

    def test_generators_of_their_own(self):
        def loss(self, batch, draw):
            noise = torch.randn(len(batch), 10, generator=torch.Generator())
            return (self.net(batch.images) * noise).sum()

        self.refuses(objective(loss), "generator", line="noise = torch.randn")

    def test_random_numbers_of_python_and_numpy(self):
        for library, draws in (("random", random.random), ("numpy.random", numpy.random.rand)):

            def loss(self, batch, draw, draws=draws):
                return self.net(batch.images).sum() * draws()

            self.refuses(objective(loss), f"draws from {library}, ", "`draw`")

    def test_parameters_changed_in_place(self):
        def loss(self, batch, draw):
            with torch.no_grad():
                self.net[1].weight.clamp_(-0.1, 0.1)
            return self.net(batch.images).sum()

        self.refuses(objective(loss), "the parameter net.1.weight is changed in place", line="clamp_(-0.1, 0.1)")

    def test_optimizers_in_a_phase(self):
        def loss(self, batch, draw):
            total = self.net(batch.images).sum()
            total.backward()
            return total

        self.refuses(objective(loss), "calls backward() itself")

    def test_operations_that_are_not_deterministic(self):
        def loss(self, batch, draw):
            logits = self.net(batch.images)
            put = torch.zeros(40).put_(torch.zeros(40, dtype=torch.int64), logits.flatten(), accumulate=False)
            return put.sum()

        self.refuses(objective(loss), "put_ is not deterministic on cpu", line="put_(torch.zeros")

    def test_scalars_that_are_none(self):
        for value, what in ((0.5, "the Python number 0.5"), (torch.ones(4), "shape (4,)"), ("x", "a str")):
            wrong = objective(lambda self, batch, draw, v=value: (self.net(batch.images).sum(), {"extra": v}))
            self.refuses(wrong, "Mine.", "the scalar extra is", what, "no dimensions")
        wrong = objective(lambda self, batch, draw: (self.net(batch.images).sum(), {"KL loss": torch.ones(())}))
        self.refuses(wrong, "'KL loss' is not the name of a scalar")
        wrong = objective(lambda self, batch, draw: (self.net(batch.images).sum(), {"loss": torch.ones(())}))
        self.refuses(wrong, "the scalar loss is named as the phase's loss")

    def test_losses_that_are_none(self):
        self.refuses(
            objective(lambda self, batch, draw: self.net(batch.images)), "shape (4, 10)", "sum it over the batch"
        )
        self.refuses(objective(lambda self, batch, draw: 1.0), "the Python number 1.0")
        self.refuses(objective(lambda self, batch, draw: batch.images.sum()), "depends on no parameter of net")

    def test_parameters_that_no_loss_uses(self):
        wrong = Base()
        wrong.spare = nn.Linear(3, 4)
        self.refuses(wrong, "no loss depends on spare.weight, spare.bias", "requires_grad_(False)", "remove it")
        wrong.phases = [ganglion.Phase("loss", updates=["net"])]
        self.refuses(wrong, "no phase updates spare.weight, spare.bias", "requires_grad_(False)")

    def test_parameters_that_no_module_has(self):
        hidden = [nn.Parameter(torch.ones(10))]
        wrong = objective(lambda self, batch, draw: (self.net(batch.images) * hidden[0]).sum())
        self.refuses(wrong, "a parameter of shape (10,) that no module has", "nn.ParameterList")

    def test_float64(self):
        self.refuses(Base().double(), "the parameter net.1.weight is float64", ".float()")

    def test_unknown_networks(self):
        wrong = Base()
        wrong.phases = [ganglion.Phase("loss", updates=["encoder"])]
        self.refuses(wrong, "the phase loss updates encoder", "there are the networks net")
        wrong.frozen = nn.Linear(3, 4).requires_grad_(False)
        wrong.phases = [ganglion.Phase("loss", updates=["frozen"])]
        self.refuses(wrong, "the phase loss updates frozen", "there are the networks net with parameters that require")
        wrong.phases = [ganglion.Phase("critic", updates=["net"])]
        self.refuses(wrong, "the phase critic has no method", "critic(self, batch, draw)")
        wrong.phases, wrong.average = [], ["encoder"]
        self.refuses(wrong, "average names encoder")

    def test_objectives_without_phases(self):
        class Empty(ganglion.Objective):
            def __init__(self):
                super().__init__()
                self.net = mlp(784, 10)

        self.refuses(Empty(), "Empty has no phases", "loss(self, batch, draw)")

    def test_evaluation_mode(self):
        self.refuses(Base().eval(), "evaluation mode", ".train()")

    def test_cadences_of_phases_that_read_first(self):
        wrong = Base()
        wrong.phases = [ganglion.Phase("loss", updates=["net"], every=2)]
        self.refuses(wrong, "the phase loss is the first to read samples, and runs every 2 steps")

    def test_phases_that_do_not_fit_together(self):
        class Pair(Base):
            phases = [ganglion.Phase("loss", updates=["net"]), ganglion.Phase("again", updates=["net"])]

            def loss(self, batch, draw):
                return super().loss(batch, draw), {"twice": torch.ones(())}

            def again(self, batch, draw):
                return self.loss(batch, draw)

        self.refuses(Pair(), "the phases loss and again both return a scalar twice", "name them apart")
        wrong = objective(lambda self, batch, draw: self.net(draw.normal(len(batch), 784)).sum())
        self.refuses(wrong, "no phase reads samples", "batch='next'")
        wrong.phases = [ganglion.Phase("beta1", updates=["net"])]
        self.refuses(wrong, "a phase cannot be called beta1")
        wrong = objective(lambda self, batch, draw: (self.net(batch.images).sum(), {"epoch": torch.ones(())}))
        self.refuses(wrong, "the scalar epoch is named as a column of metrics is")

    def test_classes_of_data_without(self):
        self.refuses(Base(), "batch.classes is read", "classes=10", data=ganglion.images(1, 28))

    def test_samples_of_another_shape(self):
        wrong = Base()
        wrong.__class__ = type("Mine", (Base,), {"sample": lambda self, draw, n: draw.normal(n, 784)})
        self.refuses(wrong, "Mine.sample: it returns a tensor of shape (4, 784)", "(4, 1, 28, 28)")

    def test_buffers_that_evaluation_changes(self):
        class Counting(Base):
            def __init__(self):
                super().__init__()
                self.net.register_buffer("calls", torch.zeros(()))

            def evaluate(self, batch, draw):
                self.net.calls += 1
                return {"nll": self.loss(batch, draw)}

        self.refuses(Counting(), "the buffer net.calls changes", "only phases")

    def test_draws_in_a_backward_pass(self):
        def loss(self, batch, draw):
            hidden = torch.utils.checkpoint.checkpoint(
                lambda x: F.dropout(self.net(x)), batch.images, use_reentrant=False
            )
            return hidden.sum()

        self.refuses(objective(loss), "drawn during a backward pass", "checkpointing")

    def test_wrong_arguments(self):
        for options, part in (
            ({"cpu": "avx9"}, "cpu='avx9'"),
            ({"device": "tpu"}, "device='tpu'"),
            ({"shard_batch": 0}, "at least 1"),
        ):
            with self.assertRaisesRegex(ganglion.Error, part):
                self.export(Base(), **options)
        old = self.folder.parent / f"{self.folder.name}-g++"
        old.write_text("#!/bin/sh\n[ $1 = --version ] || { echo bad value for -march >&2; exit 1; }\n")
        old.chmod(0o755)
        self.addCleanup(old.unlink)
        for compiler, part in (
            ("missing-g++", "needs a C.. compiler"),
            (str(old), "does not compile for x86-64.*bad value"),
        ):
            with (
                mock.patch("torch._inductor.config.cpp.cxx", (compiler,)),
                self.assertRaisesRegex(ganglion.Error, part),
            ):
                self.export(Base())
        with mock.patch("torch.__version__", "2.10.0"), self.assertRaisesRegex(ganglion.Error, "is needed"):
            self.export(Base())
        with self.assertRaisesRegex(ganglion.Error, "NAME.pt2"):
            ganglion.export(Base(), self.folder / "missing" / "x.pt2", data=ganglion.images(1, 28))


if __name__ == "__main__":
    unittest.main()
