"""Each example runs as its head says, and has the same bits on any cluster."""

import importlib.util
import os
import signal
import struct
import subprocess
import sys
import time
import unittest

import ganglion
import torch
from common import DIGITS, ROOT, InFolder
from torch import nn

EXAMPLES = ["vae", "gan", "classifier"]
LIMIT_SECONDS = 600
STEPS = 300
SETTINGS = {"job.data_shards": 4, "checkpoint.every_steps": 100, "sample.every_steps": 0, "metrics.every_steps": 1}


def module(name):
    """Returns an example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Examples(InFolder):
    def train(self, package, name, **options):
        options = {"steps": STEPS, "settings": SETTINGS, "progress": False, **options}
        return ganglion.train(package, run_dir=self.folder / name, **options)

    def until(self, run, step):
        limit = time.monotonic() + LIMIT_SECONDS
        while run.progress().step < step:
            self.assertTrue(run.running, "it ended by itself")
            self.assertLess(time.monotonic(), limit)
            time.sleep(0.01)

    def disturbed(self, package, name):
        """Trains through the death of a worker, a stop and a resume."""
        with self.train(package, name, workers=2, wait=False) as run:
            self.until(run, 1)
            worker = next(event["pid"] for event in run.events() if event["kind"] == "worker_joined")
            os.kill(worker, signal.SIGKILL)
            self.until(run, 100)
            run.stop()
        self.assertLess(run.progress().step, STEPS, "it was stopped too late")
        return self.train(package, name, workers=3)

    def test_examples(self):
        for name in EXAMPLES:
            with self.subTest(name):
                run_dir = self.folder / name
                command = [
                    sys.executable,
                    ROOT / f"examples/{name}.py",
                    "--small",
                    "--steps",
                    "4",
                    "--run-dir",
                    run_dir,
                ]
                subprocess.run(command, check=True, timeout=LIMIT_SECONDS, cwd=self.folder)
                self.assertEqual(ganglion.load(run_dir).progress().step, 4)
                package = run_dir.with_suffix(".pt2")
                digests = {
                    self.train(package, f"{name}-{workers}", workers=workers).checkpoints()[-1].digest
                    for workers in (1, 2, 3)
                }
                digests.add(self.disturbed(package, f"{name}-disturbed").checkpoints()[-1].digest)
                self.assertEqual(len(digests), 1, "the cluster changed the result")

    def test_a_hundred_steps_are_those_of_pytorch(self):
        # All samples in each step: so their order does not matter.
        torch.manual_seed(1)
        pixels = torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8)
        classes = torch.randint(0, 10, (64,), dtype=torch.uint8)
        images = self.folder / "train-images-idx3-ubyte"
        images.write_bytes(struct.pack(">IIII", 0x803, 64, 28, 28) + pixels.numpy().tobytes())
        labels = self.folder / "train-labels-idx1-ubyte"
        labels.write_bytes(struct.pack(">II", 0x801, 64) + classes.numpy().tobytes())

        torch.manual_seed(0)
        classifier = module("classifier").Classifier(width=2)
        package = self.export(classifier, shard_batch=16, data=DIGITS)
        run = self.train(package, "run", data=f"idx:{images}", workers=2, steps=100)

        batch = ganglion.Batch(pixels[:, None].float() / 127.5 - 1, classes.long())
        optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
        for _ in range(100):
            optimizer.zero_grad()
            loss, _ = classifier.loss(batch, ganglion.Draw())
            loss.backward()
            optimizer.step()
        ours = nn.utils.parameters_to_vector(run.state_dict().values())
        theirs = nn.utils.parameters_to_vector(classifier.parameters()).detach()
        distance = float((ours - theirs).norm() / theirs.norm())
        print(f"relative distance after 100 steps: {distance:.1e}", file=sys.stderr)
        self.assertLess(distance, 1e-4)
        self.assertAlmostEqual(run.metrics()[-1]["loss"], loss.item(), places=4)


if __name__ == "__main__":
    unittest.main()
