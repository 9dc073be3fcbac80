"""torchft: every process a replica group of its own, with its default time limits.

torchft_peer.py RANK

Both gradients are taken before one commit. With a quorum for each of the two optimizers a joiner can be at the discriminator's
turn while the others are at the generator's, and Gloo ends the process.
"""

import os
import sys
from datetime import timedelta

import torchft
from gan import GLOBAL_BATCH, Gan, Log
from torch.distributed import TCPStore

REPLICAS = 4


def train(rank):
    """Trains until it is killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    log, gan = Log(rank), None
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=lambda state: gan.load_state_dict(state),
        state_dict=lambda: gan.state_dict(),
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        replica_id=f"replica_{rank}_",
        lighthouse_addr=os.environ["BENCH_LIGHTHOUSE"],
    )
    gan = Gan(lambda module: torchft.DistributedDataParallel(manager, module))
    log.write("start", 0)
    while True:
        manager.start_quorum()
        gan.discriminator_gradient(GLOBAL_BATCH // REPLICAS)
        gan.generator_gradient(GLOBAL_BATCH // REPLICAS)
        committed = manager.should_commit()
        if committed:
            for adam in gan.adams:
                adam.step()
        log.write("step" if committed else "lost", manager.current_step(), members=manager.num_participants())


train(int(sys.argv[1]))
