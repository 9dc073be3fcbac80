"""Optimizers, clipping and schedules are PyTorch's: the same weights after 20 steps."""

import ganglion
import torch
from common import InFolder
from ganglion._package import read_manifest
from torch import nn

STEPS = 20
# Steps of the warm-up, and of it and the decay together.
WARMUP, DECAY = 5, 15
TOLERANCE = 2e-6


class Net(nn.Module):
    """A weight, a bias, an embedding and a normalisation."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.end = nn.Embedding(5, 4), nn.LayerNorm((5, 4)), nn.Linear(4, 3)

    def forward(self):
        return self.end(self.norm(self.table(torch.arange(5))))


class Course(ganglion.Objective):
    """A loss that depends on the step and on no samples, so that a loop in PyTorch has the same."""

    reduction = "mean"

    def __init__(self, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer = Net(), optimizer

    def loss(self, batch, draw, step):
        target = torch.sin(torch.arange(15.0).view(5, 3) + step)
        return ((self.net() - target) ** 2).sum() + 0 * batch.images.sum()


def loop(objective, make, clip_norm, scale):
    """Trains in eager PyTorch; returns the norms of the gradients."""
    net = objective.net
    decays = [net.end.weight]
    others = [net.table.weight, *net.norm.parameters(), net.end.bias]
    optimizer = make([{"params": decays}, {"params": others, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    batch, norms = ganglion.Batch(torch.zeros(1, 1, 28, 28)), []
    for step in range(STEPS):
        optimizer.zero_grad()
        objective.loss(batch, None, torch.tensor(float(step))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip_norm)))
        optimizer.step()
        schedule.step()
    return norms


def linear(step):
    return min(1, (step + 1) / WARMUP) * (1 - min(1, max(0, step - WARMUP) / (DECAY - WARMUP)))


class Optimizers(InFolder):
    def compare(self, optimizer, make, scale=lambda step: 1.0, **settings):
        objective = Course(optimizer)
        package = self.export(objective, shard_batch=2)
        manifest = read_manifest(package)
        tensors = {tensor["name"]: tensor for tensor in manifest["networks"][0]["parameters"]}
        marked = {name for name, tensor in tensors.items() if tensor.get("decays") is False}
        self.assertEqual(marked, {"table.weight", "norm.weight", "norm.bias"})
        settings |= {"job.data_shards": 3, "metrics.every_steps": 1, "checkpoint.every_steps": 9}
        options = {"workers": 2, "steps": STEPS, "settings": settings, "progress": False}
        run = ganglion.train(package, run_dir=self.folder / "run", **options)
        norms = loop(objective, make, optimizer.clip_norm or float("inf"), scale)
        for name, found in run.state_dict().items():
            self.assertLess(float((found - objective.state_dict()[name]).abs().max()), TOLERANCE, name)
        rows = run.metrics()
        if optimizer.clip_norm is None:
            self.assertNotIn("gradient_norm", rows[0])
            return
        self.assertTrue(min(norms) < optimizer.clip_norm < max(norms), f"clipped at times: {norms}")
        for row, norm in zip(rows, norms, strict=True):
            self.assertLess(abs(row["gradient_norm"] - norm), 1e-5 * norm)

    def test_adamw_with_clipping_a_warm_up_and_a_linear_decay(self):
        self.compare(
            ganglion.AdamW(1e-2, beta2=0.95, weight_decay=0.3, clip_norm=12.0),
            lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3),
            linear,
            **{"optimizer.warmup_steps": WARMUP, "optimizer.decay": "linear", "optimizer.decay_steps": DECAY},
        )

    def test_sgd_with_nesterov(self):
        self.compare(
            ganglion.SGD(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
            lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        )

    def test_wrong_settings_are_refused(self):
        for optimizer, says in [
            (torch.optim.SGD([torch.zeros(1)], lr=1.0), "there are ganglion.Adam, ganglion.AdamW and ganglion.SGD"),
            (ganglion.Adam(clip_norm=0), "clip_norm=0; it must be above 0"),
            (ganglion.SGD(nesterov=True), "nesterov=True without a momentum"),
        ]:
            with self.assertRaisesRegex(ganglion.ExportError, says):
                self.export(Course(optimizer))
