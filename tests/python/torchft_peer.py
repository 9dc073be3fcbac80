"""torchft: every process a replica group of its own, as its documentation shows, with the limits that it has by default.

`torchft_peer.py lighthouse` serves the quorums and writes its address to the log; `torchft_peer.py RANK` trains.
"""

import os
import socket
import sys
from datetime import timedelta

from gan import GLOBAL_BATCH, Gan, Log

REPLICAS = 4
JOIN_TIMEOUT_MS = os.environ.get("BENCH_JOIN_TIMEOUT_MS", "10000")


def serve():
    """The lighthouse, with the options of torchft's README."""
    from torchft._torchft import lighthouse_main

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    sys.argv = ["torchft_lighthouse", "--bind", address]
    sys.argv += ["--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", JOIN_TIMEOUT_MS]
    Log(-1).write("lighthouse", 0, address="http://" + address)
    lighthouse_main()


def train(rank):
    """Trains until it is killed."""
    import torchft
    from torch.distributed import TCPStore

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
    gan = Gan(
        lambda network: torchft.DistributedDataParallel(manager, network),
        lambda adam: torchft.Optimizer(manager, adam),
    )
    log.write("start", 0)
    while True:
        before = manager.current_step()
        gan.step(GLOBAL_BATCH // REPLICAS)
        # Each of the two updates of a step is a step of torchft's, and is committed or lost by itself.
        done = manager.current_step() - before
        log.write("step" if done == 2 else "lost", manager.current_step(), members=manager.num_participants())


if sys.argv[1] == "lighthouse":
    serve()
else:
    train(int(sys.argv[1]))
