"""Trains networks written in PyTorch on 1, 2 and 3 workers, loads the result back into PyTorch and draws from it.

    python3 tests/networks/check.py --programs target/release     # needs PyTorch and safetensors

Exit code 0: equal digests, all keys matched, PyTorch draws what the TorchScript draws, and training moved every tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import make
import torch
from safetensors.torch import load_file

STEPS = 60
LIMIT_SECONDS = 300


def train(programs, networks, run_dir, workers):
    settings = [
        "model.kind=script",
        f"model.generator={networks}/G.pt",
        f"model.discriminator={networks}/D.pt",
        f"model.latent_dim={make.LATENT}",
        f"job.steps={STEPS}",
        "job.shard_batch=4",
        "job.data_shards=6",
    ]
    command = [programs / "coordinator", "--workers", str(workers), "--run-dir", run_dir]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_SECONDS)
    checkpoint = run_dir / f"checkpoints/step-{STEPS:08}"
    return json.loads((checkpoint / "manifest.json").read_text())["state_digest"], checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True)
    programs = parser.parse_args().programs.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make.main(folder / "networks")
        runs = [train(programs, folder / "networks", folder / f"run-{n}", n) for n in (1, 2, 3)]
        digests = {digest for digest, _ in runs}
        print("digests on 1, 2 and 3 workers:", *sorted(digests))
        assert len(digests) == 1, "the number of workers changed the result"

        weights = load_file(runs[0][1] / "generator_ema.safetensors")
        generator = make.Generator()
        print(generator.load_state_dict(weights))
        script = torch.jit.load(folder / "networks/G.pt")
        first = {name: tensor.clone() for name, tensor in script.state_dict().items()}
        still = [name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.equal(first[name])]
        assert not still, f"training did not move {still}"
        script.load_state_dict(weights)
        noise = torch.randn(16, make.LATENT, 1, 1)
        with torch.no_grad():
            images = generator.eval()(noise)
            difference = (images - script.eval()(noise)).abs().max().item()
        print(f"drew {tuple(images.shape)} from {images.min():.2f} to {images.max():.2f}; apart {difference}")
        assert images.shape == (16, 1, 28, 28) and difference == 0.0


if __name__ == "__main__":
    sys.exit(main())
