"""The transformer of `gpt.py` as PyTorch's users train it, for the comparisons of `make bench PARTS=packages`.

- `usual`: DistributedDataParallel as its tutorial says, Adam with its defaults.
- `tuned`: fused Adam, gradients as views of DDP's buckets, the C library told to keep freed memory; with `--compile`,
  torch.compile of the network as well.

Rank 0 prints what peer.py prints.
"""

import argparse
import pathlib
import sys

import torch
from ddp import leave, share, tell, train, wrap
from gpt import LEARNING_RATE, Transformer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from peer import digits


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
    rank, world_size = share()
    model = Transformer()
    tuned = chosen.way == "tuned"
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), fused=tuned)
    network = wrap(model, chosen)
    torch.manual_seed(rank)
    images = digits(chosen.data, 8)[rank::world_size]

    def step(_):
        batch = images[torch.randint(len(images), (chosen.batch,))]
        adam.zero_grad(set_to_none=not tuned)
        loss = network(batch)
        loss.backward()
        adam.step()
        return 2 * [loss.item()]

    tell(train(chosen, step))
    leave()


if __name__ == "__main__":
    main()
