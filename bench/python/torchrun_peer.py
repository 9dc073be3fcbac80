"""PyTorch's elastic launcher: DDP over Gloo, a checkpoint at a fixed interval of steps, resumed from after a restart.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 4 --max-restarts 100 torchrun_peer.py

Without that variable a restart finds the addresses of the dead in the launcher's store, and Gloo gives up.
"""

import os

import torch
import torch.distributed as dist
from gan import GLOBAL_BATCH, Gan, Log
from torch.nn.parallel import DistributedDataParallel

CHECKPOINT_EVERY = 50


def main():
    """Trains until it is killed."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log, path = Log(rank), os.environ["BENCH_LOG"] + ".checkpoint"
    gan, step = Gan(DistributedDataParallel), 0
    if os.path.exists(path):
        saved = torch.load(path)
        gan.load_state_dict(saved["gan"])
        step = saved["step"]
    log.write("start", step)
    while True:
        gan.discriminator_gradient(GLOBAL_BATCH // world_size)
        gan.adams[1].step()
        gan.generator_gradient(GLOBAL_BATCH // world_size)
        gan.adams[0].step()
        step += 1
        log.write("step", step, members=world_size)
        if step % CHECKPOINT_EVERY == 0 and rank == 0:
            torch.save({"step": step, "gan": gan.state_dict()}, path + ".new")
            os.replace(path + ".new", path)


main()
