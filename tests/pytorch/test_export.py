"""Packages compute what eager PyTorch does, and say what is in them."""

import json
import os
import shutil
import subprocess
import sys
import time
import unittest
import zipfile

import ganglion
import torch
import torch.nn.functional as F
from common import DIGITS, ROOT, InFolder, mlp
from ganglion._package import read_manifest, read_tensors
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# Distances of single outputs, relative to float64.
TOLERANCE = 1e-5


class Noise(nn.Module):
    """Adds noise, as a module of somebody else's does."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Rich(ganglion.Objective):
    """A GAN with all that a capture must handle, and is no good for anything else."""

    phases = [
        ganglion.Phase("critic", updates=["d"], optimizer=ganglion.Adam(1e-4, beta1=0.0)),
        ganglion.Phase("penalty", updates=["d"], every=4, repeat=2),
        ganglion.Phase("generator", updates=["g", "objective"], batch="next"),
    ]
    average = ["g"]
    average_half_life = 500
    optimizer = ganglion.Adam(2e-4, beta1=0.5)

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(8 + 10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 784), nn.Tanh())
        self.d = nn.Sequential(
            nn.Flatten(), spectral_norm(nn.Linear(784, 16)), nn.LeakyReLU(0.2), nn.Dropout(0.3), Noise()
        )
        self.d.append(nn.Linear(16, 1))
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()
        self.twin = nn.Linear(784, 4).requires_grad_(False)
        self.twin.weight = self.teacher[1].weight
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("ramp", torch.linspace(0, 1, 16), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def fake(self, n, draw, classes):
        noise = torch.cat([draw.normal(n, 8), F.one_hot(classes, 10)], 1)
        return self.g(noise).unflatten(1, (1, 28, 28))

    def critic(self, batch, draw):
        self.calls += 1
        fake = self.fake(len(batch), draw, draw.integers(len(batch), 0, 10)).detach()
        real = self.d(batch.images[torch.randperm(len(batch))])
        return F.softplus(-real).sum() + F.softplus(self.d(fake)).sum(), {"score_real": real.sigmoid().sum()}

    def penalty(self, batch, draw, step):
        images = batch.images.requires_grad_()
        (gradient,) = torch.autograd.grad(self.d(images).sum(), images, create_graph=True)
        return gradient.square().sum() * (step / 2000).clamp(max=1.0)

    def generator(self, batch, draw):
        fake = self.fake(len(batch), draw, batch.classes)
        features = (self.teacher(fake) + self.twin(fake.flatten(1))) * self.temperature
        like = (features - self.teacher(batch.images)).square().sum()
        kept = draw.bernoulli(len(batch), 0.5) * draw.uniform(len(batch), 0.5, 1.5)
        return (F.softplus(-self.d(fake))[:, 0] * kept).sum() + 0.1 * like + 0 * self.ramp.sum()

    def sample(self, draw, n, classes):
        return self.fake(n, draw, classes)

    def evaluate(self, batch, draw):
        return {"score_held_out": self.d(batch.images).sigmoid().sum()}


class Wide(ganglion.Objective):
    """20 million parameters."""

    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.net = mlp(784, 4096, 4096, 10)

    def loss(self, batch, draw):
        return F.cross_entropy(self.net(batch.images), batch.classes)


class Packages(InFolder):
    def test_a_rich_objective(self):
        torch.manual_seed(0)
        rich = Rich()
        package = self.export(rich, shard_batch=4, samples=6)
        manifest = read_manifest(package)
        self.assertEqual(manifest, json.loads(json.dumps(package.manifest)))
        self.networks(rich, manifest)
        self.phases(manifest)
        self.first_weights(rich, package)
        distances = ganglion.check(rich, quiet=True)
        graphs = {distance.graph for distance in distances}
        self.assertEqual(graphs, {"critic", "penalty", "generator", "sample", "evaluate"})
        for distance in distances:
            self.assertLess(distance.package, TOLERANCE, distance)
        run = ganglion.train(package, workers=2, steps=8, run_dir=self.folder / "run", progress=False)
        calls = run.state_dict()["calls"]
        self.assertEqual(float(calls), 8.0)
        rich.load_state_dict(run.state_dict(average=True))
        self.assertTrue(rich.twin.weight is rich.teacher[1].weight)
        ganglion.sample(run, 10)

    def networks(self, rich, manifest):
        networks = {network["name"]: network for network in manifest["networks"]}
        self.assertEqual(list(networks), ["g", "d", "teacher", "twin", "objective"])
        self.assertEqual(networks["g"]["average"], {"name": "g_ema", "half_life_samples": 500})
        self.assertEqual(networks["objective"]["parameters"], [{"name": "temperature", "shape": []}])
        self.assertEqual(networks["objective"]["buffers"], [{"name": "calls", "shape": []}])
        self.assertEqual(networks["teacher"]["parameters"], [])
        self.assertEqual([buffer["name"] for buffer in networks["twin"]["buffers"]], ["bias"])
        self.assertEqual(manifest["aliases"], {"twin.weight": "teacher.1.weight"})
        self.assertEqual(manifest["data"], {"images": {"channels": 1, "height": 28, "width": 28}, "classes": 10})

    def phases(self, manifest):
        critic, penalty, second, generator = manifest["phases"]
        self.assertEqual([phase["batch"] for phase in manifest["phases"]], ["next", "same", "same", "next"])
        self.assertEqual([phase["every"] for phase in manifest["phases"]], [1, 4, 4, 1])
        self.assertEqual(second, {**penalty, "name": "penalty_2"})
        self.assertEqual(critic["optimizer"]["beta1"], 0.0)
        self.assertEqual(generator["optimizer"]["learning_rate"], 2e-4)
        self.assertIn({"step": True}, penalty["inputs"])
        self.assertNotIn({"batch": "classes"}, critic["inputs"])
        kinds = [draw["kind"] for draw in critic["draws"]]
        self.assertEqual(kinds, ["integers", "normal", "uniform", "bernoulli", "normal", "bernoulli", "normal"])
        self.assertIn({"kind": "uniform", "low": 0.5, "high": 1.5, "shape": [4]}, generator["draws"])
        changed = [output["buffer"] for output in critic["outputs"] if "buffer" in output]
        self.assertIn("objective.calls", changed)
        self.assertIn("g.1.running_mean", changed)
        self.assertFalse([name for name in changed if name.startswith("teacher")])
        gradients = [output["gradient"] for output in generator["outputs"] if "gradient" in output]
        self.assertEqual(gradients[0], "objective.temperature")
        self.assertTrue(all(name.startswith(("g.", "objective.")) for name in gradients))
        self.assertEqual([o["scalar"] for o in critic["outputs"] if "scalar" in o], ["critic_loss", "score_real"])
        self.assertEqual(critic["loss"], "critic_loss")
        self.assertEqual(manifest["sample"]["output"], [6, 1, 28, 28])
        self.assertIn({"classes": True}, manifest["sample"]["inputs"])
        # Dropout is off in evaluation mode; the noise is not.
        self.assertEqual(manifest["evaluate"]["draws"], [{"kind": "normal", "shape": [4, 16]}])

    def first_weights(self, rich, package):
        with zipfile.ZipFile(package.path) as archive:
            names = archive.namelist()
            archive.extract(next(name for name in names if name.endswith("ganglion/weights.safetensors")), self.folder)
            code = sum(archive.getinfo(name).file_size for name in names if "/aotinductor/" in name)
        found = next(self.folder.rglob("weights.safetensors"))
        weights = read_tensors(found)
        state = rich.state_dict()
        self.assertEqual(len(weights), len(state) - len(package.manifest["aliases"]))
        for name, tensor in weights.items():
            self.assertEqual(tensor.dtype, torch.float32)
            self.assertTrue(tensor.equal(state[name.removeprefix("objective.")].float()), name)
        self.assertLess(code, 10e6)

    def test_twenty_million_parameters(self):
        begun = time.monotonic()
        package = self.export(Wide(), shard_batch=2)
        print(f"20 million parameters: exported in {time.monotonic() - begun:.1f} s", file=sys.stderr)
        manifest = read_manifest(package)
        count = sum(torch.Size(tensor["shape"]).numel() for tensor in manifest["networks"][0]["parameters"])
        self.assertGreater(count, 20e6)
        with zipfile.ZipFile(package.path) as archive:
            code = sum(entry.file_size for entry in archive.infolist() if "/aotinductor/" in entry.filename)
        self.assertLess(code, 2e6, "weights are in the code")

    def test_the_same_source_gives_the_same_package(self):
        source = (
            "import sys, torch, common, ganglion, test_refusals; torch.manual_seed(0);"
            "ganglion.export(test_refusals.Base(), sys.argv[1], data=common.DIGITS, shard_batch=4, cpu='x86-64-v3', quiet=True)"
        )
        made = []
        # The compiler's folder is named in the code, for messages.
        cache = self.folder / "cache"
        for place in ("a", "b"):
            (self.folder / place).mkdir()
            path = self.folder / place / "x.pt2"
            shutil.rmtree(cache, ignore_errors=True)
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
            subprocess.run(
                [sys.executable, "-c", source, path], check=True, env=environment, cwd=ROOT / "tests/pytorch"
            )
            made.append(path)
        self.assertEqual(made[0].read_bytes(), made[1].read_bytes())
        used = read_manifest(made[0])["cpu"]
        self.assertEqual(used["arch"], os.uname().machine)
        self.assertIn("avx2", used["features"])
        self.assertFalse([name for name in used["features"] if name.startswith("avx512")])

    def test_what_was_captured_is_said(self):
        text = str(ganglion.Package(self.folder / "x.pt2", _manifest(), 1.0))
        for part in ("network net: 7 parameters", "phase loss: updates net", "draws normal (4, 8)", "scalars loss, kl"):
            self.assertIn(part, text)


def _manifest():
    network = {"name": "net", "parameters": [{"name": "w", "shape": [7]}], "buffers": [], "average": None}
    phase = {
        "name": "loss",
        "graph": "loss",
        "updates": ["net"],
        "every": 1,
        "draws": [{"kind": "normal", "shape": [4, 8]}],
    }
    phase["outputs"] = [{"gradient": "net.w"}, {"scalar": "loss"}, {"scalar": "kl"}]
    return {"networks": [network], "phases": [phase], "data": DIGITS}


if __name__ == "__main__":
    unittest.main()
