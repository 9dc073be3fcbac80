"""The transformer of `gpt.py` as PyTorch's users train it, for the comparisons of `make bench PARTS=packages`.

- `usual`: DistributedDataParallel as its tutorial says, Adam with its defaults.
- `tuned`: fused Adam, gradients as views of DDP's buckets, the C library told to keep freed memory; with `--compile`,
  torch.compile of the network as well.

Rank 0 prints what peer.py prints.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from gpt import LEARNING_RATE, Transformer
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from peer import digits, largest_resident_mib


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["usual", "tuned"], required=True)
    parser.add_argument("--batch", type=int, required=True, help="images of one process in one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--started", type=float, required=True, help="when the command was given, in Unix seconds")
    return parser.parse_args()


def main():
    chosen = options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = Transformer()
    tuned = chosen.way == "tuned"
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), fused=tuned)
    network = torch.compile(model) if chosen.compile else model
    if world_size > 1:
        dist.init_process_group("gloo")
        network = DistributedDataParallel(network, gradient_as_bucket_view=tuned)
    torch.manual_seed(rank)
    images = digits(chosen.data, 8)[rank::world_size]
    losses, times, first = [], [], None
    for _ in range(chosen.steps):
        begun = time.perf_counter()
        batch = images[torch.randint(len(images), (chosen.batch,))]
        adam.zero_grad(set_to_none=not tuned)
        loss = network(batch)
        loss.backward()
        adam.step()
        losses.append(2 * [loss.item()])
        times.append(1e3 * (time.perf_counter() - begun))
        first = first or time.time() - chosen.started
    if rank == 0:
        figures = {"first_step": first, "steps": times[1:], "losses": losses, "resident": largest_resident_mib()}
        print(json.dumps(figures))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
