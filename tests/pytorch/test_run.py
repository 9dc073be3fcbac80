"""Training from Python: progress, records and weights; wrong input; and nothing that is left running."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path
from unittest import mock

import ganglion
import torch
import torch.nn.functional as F
from common import DIGITS, InFolder, mlp
from ganglion import _display

LIMIT_SECONDS = 120
SETTINGS = {"checkpoint.every_steps": 20, "sample.every_steps": 20, "metrics.every_steps": 5, "job.data_shards": 4}


class Digits(ganglion.Objective):
    """Classifies digits, and draws some, badly."""

    average = ["painter"]

    def __init__(self):
        super().__init__()
        self.net, self.painter = mlp(784, 8, 10), mlp(4, 8, 784)

    def loss(self, batch, draw):
        logits = self.net(batch.images)
        nll = F.cross_entropy(logits, batch.classes, reduction="sum")
        drawn = self.painter(draw.normal(len(batch), 4))
        return nll + F.mse_loss(drawn, batch.images.flatten(1), reduction="sum"), {"nll": nll}

    def sample(self, draw, n):
        return self.painter(draw.normal(n, 4)).tanh().unflatten(1, (1, 28, 28))


def processes(folder):
    """Returns the processes that know a folder by their arguments, but this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                said = (entry / "cmdline").read_bytes() + os.readlink(entry / "cwd").encode()
            except OSError:
                continue
            if str(folder).encode() in said:
                found.append(int(entry.name))
    return found


class Runs(InFolder):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        torch.manual_seed(0)
        cls.digits = Digits()
        cls.package = Path(folder.name) / "digits.pt2"
        ganglion.export(cls.digits, cls.package, data=DIGITS, shard_batch=4, quiet=True)

    def train(self, name="run", **options):
        options = {"workers": 1, "steps": 40, "settings": SETTINGS, "progress": False, **options}
        return ganglion.train(self.package, run_dir=self.folder / name, **options)

    def nothing_is_left(self):
        limit = time.monotonic() + LIMIT_SECONDS
        while processes(self.folder):
            self.assertLess(time.monotonic(), limit, f"still running: {processes(self.folder)}")
            time.sleep(0.1)

    def test_a_run_and_what_it_wrote(self):
        run = self.train(optimizer__learning_rate=1e-3, seed=3)
        self.assertFalse(run.running)
        self.assertEqual(run.progress().step, 40)
        self.assertEqual(run.progress().steps, 40)
        rows = run.metrics()
        self.assertEqual([row["step"] for row in rows], list(range(5, 41, 5)))
        self.assertTrue(all({"loss", "nll"} <= set(row) for row in rows))
        self.assertEqual([checkpoint.step for checkpoint in run.checkpoints()], [20, 40])
        self.assertEqual([picture.step for picture in run.samples()], [20, 40])
        self.assertTrue(run.samples()[0]._repr_png_().startswith(b"\x89PNG"))
        self.weights(run)
        self.assertTrue(ganglion.sample(run, 10).path.read_bytes().startswith(b"\x89PNG"))
        self.assertEqual(ganglion.load(run.path).metrics(), rows)
        page = _display.page_of(run)
        for part in ("step 40/40", "<polyline", "data:image/png;base64,"):
            self.assertIn(part, page)
        self.nothing_is_left()

    def test_a_notebook_sees_curves_and_samples(self):
        shown = []

        class Handle:
            def update(self, page):
                shown.append(page)

        notebook = types.ModuleType("IPython")
        notebook.get_ipython = lambda: types.SimpleNamespace(kernel=True)
        notebook.display = types.ModuleType("IPython.display")
        notebook.display.HTML = str
        notebook.display.display = lambda page, display_id: shown.append(page) or Handle()
        with mock.patch.dict(sys.modules, {"IPython": notebook, "IPython.display": notebook.display}):
            self.train(progress=True)
        self.assertGreater(len(shown), 1)
        self.assertIn("<svg", shown[-1])
        self.assertIn("data:image/png", shown[-1])

    def weights(self, run):
        first = {name: tensor.clone() for name, tensor in self.digits.state_dict().items()}
        trained = Digits()
        trained.load_state_dict(run.state_dict())
        averaged = run.state_dict(average=True)
        for name, tensor in trained.state_dict().items():
            self.assertFalse(tensor.equal(first[name]), f"{name} did not move")
            self.assertEqual(tensor.equal(averaged[name]), name.startswith("net."), name)
        self.assertFalse(run.state_dict(step=20)["net.1.weight"].equal(trained.net[1].weight))
        with self.assertRaisesRegex(ganglion.Error, "no checkpoint of step 7; there are: 20, 40"):
            run.state_dict(step=7)

    def test_stopped_scaled_and_resumed_it_has_the_same_bits(self):
        undisturbed = self.train("undisturbed", workers=2, steps=400)
        with self.train("disturbed", steps=400, wait=False) as run:
            self.assertTrue(run.running)
            self.until(lambda: run.progress().step > 0)
            run.scale(2)
            run.stop()
        self.assertFalse(run.running)
        self.nothing_is_left()
        resumed = self.train("disturbed", workers=3, steps=400)
        self.assertEqual(resumed.checkpoints()[-1].digest, undisturbed.checkpoints()[-1].digest)

    def until(self, condition):
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            self.assertLess(time.monotonic(), limit)
            time.sleep(0.02)

    def test_wrong_input_has_the_words_of_the_coordinator(self):
        with self.assertRaisesRegex(ganglion.Error, r"^job\.stepz: unknown key; did you mean job\.steps\?$"):
            self.train(stepz=3)
        with self.assertRaisesRegex(ganglion.Error, "unknown key"):
            self.train(optimizer__speed=3, wait=False)
        with self.assertRaisesRegex(ganglion.Error, "there is no run there"):
            ganglion.load(self.folder)
        for wrong in ({"seed": None}, {"seed": object()}):
            with self.assertRaisesRegex(ganglion.Error, "job.seed"):
                self.train(**wrong)
        self.nothing_is_left()

    def script(self, body):
        """Starts another Python that trains for long, and waits until it does."""
        source = f"""
import signal, sys; sys.path[:0] = {sys.path!r}
# A shell's background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import ganglion
run = ganglion.train({str(self.package)!r}, run_dir={str(self.folder / "run")!r}, steps=10_000_000, wait=False)
{body}
"""
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", source], stdin=pipe, stderr=pipe, text=True)
        self.addCleanup(process.stdin.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        run = ganglion.Run(self.folder / "run")
        self.until(lambda: run.progress().step > 0 or process.poll() is not None)
        self.assertIsNone(process.poll(), "it ended by itself")
        return process

    def test_ctrl_c_leaves_nothing_running(self):
        process = self.script("run.wait()")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        self.assertIn("KeyboardInterrupt", said)
        self.assertIn("the same call goes on from there", said)
        self.nothing_is_left()
        self.assertTrue(ganglion.load(self.folder / "run").checkpoints(), "it was stopped without a checkpoint")

    def test_an_exception_leaves_nothing_running(self):
        process = self.script("sys.stdin.readline(); raise ValueError('mine')")
        self.assertIn("ValueError: mine", process.communicate("go on\n", timeout=LIMIT_SECONDS)[1])
        self.nothing_is_left()

    def test_a_killed_process_leaves_nothing_running(self):
        process = self.script("run.wait()")
        process.kill()
        process.wait()
        self.nothing_is_left()
        self.assertTrue(ganglion.load(self.folder / "run").checkpoints(), "it was stopped without a checkpoint")


if __name__ == "__main__":
    unittest.main()
