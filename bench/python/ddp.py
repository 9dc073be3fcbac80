"""Training loop of the programs that models of one network are compared with: timed steps, alone or with DDP."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peer import largest_resident_mib


def share():
    """Rank of this process, and number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wrap(model, chosen):
    """The model as it is trained: compiled if that is asked for, in a group of processes if there are several."""
    network = torch.compile(model) if chosen.compile else model
    if share()[1] > 1:
        dist.init_process_group("gloo")
        network = DistributedDataParallel(network, gradient_as_bucket_view=chosen.way == "tuned")
    return network


def train(chosen, step):
    """Times all steps; `step` takes the number of one and returns its losses. Returns the figures of the run."""
    losses, times, first = [], [], None
    for number in range(chosen.steps):
        begun = time.perf_counter()
        losses.append(step(number))
        times.append(1e3 * (time.perf_counter() - begun))
        first = first or time.time() - chosen.started
    return {"first_step": first, "steps": times[1:], "losses": losses, "resident": largest_resident_mib()}


def tell(figures):
    """Prints the figures, from one of the processes."""
    if share()[0] == 0:
        print(json.dumps(figures))


def leave():
    """Ends the group of processes, if there are several."""
    if share()[1] > 1:
        dist.destroy_process_group()
