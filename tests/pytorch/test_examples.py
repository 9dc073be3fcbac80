"""Each example runs as its head says, computes what PyTorch does, and has the same bits on any cluster."""

import ast
import importlib
import json
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

sys.path.insert(0, str(ROOT / "examples"))

# Steps from one checkpoint to the next, and the objective that --small trains. The teacher of `distill` is the run of
# `flow_matching`.
EXAMPLES = {
    "vae": (100, lambda example: example.VAE(width=16, latent=4)),
    "gan": (100, lambda example: example.GAN(latent=8, width=4)),
    "classifier": (100, lambda example: example.Classifier(width=2)),
    "flow_matching": (20, lambda example: example.FlowMatching(width=4, levels=2, euler_steps=2)),
    "distill": (20, lambda example: example.Distillation(example.UNet(width=4, levels=2), width=4)),
    "stylegan2": (20, lambda example: example.StyleGAN2(width=2, levels=2, latent=8, depth=2)),
}
# A number of steps that no run comes to: however fast it trains, it is stopped before its end.
ENDLESS = 1_000_000
LIMIT_SECONDS = 600
# Distance of an output, relative to float64, and against that of eager PyTorch: where its terms nearly cancel, float32 has
# no more digits either way.
TOLERANCE, OF_EAGER = 1e-5, 2.0


def settings(every_steps):
    """Returns settings of a training with a checkpoint every so many steps."""
    checkpoints = {"checkpoint.every_steps": every_steps}
    return {"job.data_shards": 4, "sample.every_steps": 0, "metrics.every_steps": 1, **checkpoints}


def run_notebook(path, folder):
    """Runs the code cells of a notebook in a folder, and returns what Jupyter would show of their values."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names, shown, before = {"__name__": "__main__"}, [], os.getcwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(cells):
            lines = ast.parse("".join(cell["source"])).body
            last = lines.pop() if isinstance(lines[-1], ast.Expr) else None
            place = f"{path.name}, code cell {number}"
            exec(compile(ast.Module(lines, []), place, "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), place, "eval"), names)
                forms = [getattr(value, form, None) for form in ("_repr_png_", "_repr_html_", "__repr__")]
                shown.append(next(form() for form in forms if form is not None))
    finally:
        os.chdir(before)
    return shown


def moved(objective):
    """Returns the weights with noise."""
    weights = nn.utils.parameters_to_vector(objective.parameters()).detach()
    return weights + 0.02 * torch.randn(weights.shape)


class Examples(InFolder):
    def train(self, package, name, **options):
        return ganglion.train(package, run_dir=self.folder / name, progress=False, **options)

    def until(self, run, step):
        limit = time.monotonic() + LIMIT_SECONDS
        while run.progress().step < step:
            self.assertTrue(run.running, "it ended by itself")
            self.assertLess(time.monotonic(), limit)
            time.sleep(0.01)

    def disturbed(self, package, name, every_steps):
        """Trains through the death of a worker, a stop and a resume."""
        options = {"settings": settings(every_steps)}
        with self.train(package, name, steps=ENDLESS, workers=2, wait=False, **options) as run:
            self.until(run, 1)
            worker = next(event["pid"] for event in run.events() if event["kind"] == "worker_joined")
            os.kill(worker, signal.SIGKILL)
            self.until(run, every_steps)
            run.stop()
        steps = run.checkpoints()[-1].step + every_steps
        return self.train(package, name, steps=steps, workers=3, **options)

    def test_examples(self):
        for name, (every_steps, make) in EXAMPLES.items():
            with self.subTest(name):
                run_dir = self.folder / "runs" / name
                command = [sys.executable, ROOT / f"examples/{name}.py", "--small", "--steps", "4"]
                subprocess.run(command, check=True, timeout=LIMIT_SECONDS, cwd=self.folder)
                self.assertEqual(ganglion.load(run_dir).progress().step, 4)
                package = run_dir.with_suffix(".pt2")

                torch.manual_seed(0)
                objective = make(importlib.import_module(name))
                # Of weights that are zero at first some gradients are, too.
                nn.utils.vector_to_parameters(moved(objective), objective.parameters())
                for distance in ganglion.check(objective, package, quiet=True):
                    self.assertLess(distance.package, max(TOLERANCE, OF_EAGER * distance.eager), distance)
                newest = [self.disturbed(package, f"{name}-disturbed", every_steps).checkpoints()[-1]]
                options = {"settings": settings(every_steps), "steps": newest[0].step}
                for workers in (1, 2, 3):
                    run = self.train(package, f"{name}-{workers}", workers=workers, **options)
                    newest.append(run.checkpoints()[-1])
                self.assertEqual(len({checkpoint.step for checkpoint in newest}), 1)
                self.assertEqual(len({checkpoint.digest for checkpoint in newest}), 1, "the cluster changed the result")

    def test_the_notebook_runs_top_to_bottom(self):
        shown = run_notebook(ROOT / "examples/quickstart.ipynb", self.folder)
        self.assertTrue(any(b"PNG" in value for value in shown if isinstance(value, bytes)), "no picture is shown")
        self.assertTrue(any("<svg" in value for value in shown if isinstance(value, str)), "no curve is shown")

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
        classifier = importlib.import_module("classifier").Classifier(width=2)
        package = self.export(classifier, shard_batch=16, data=DIGITS)
        run = self.train(package, "run", steps=100, settings=settings(50), data=f"idx:{images}", workers=2)

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
