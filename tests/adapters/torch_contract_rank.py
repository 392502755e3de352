"""One rank of the contract under torchrun: runs every body in a world of its own, and writes what it saw.

torchrun --nproc-per-node=N torch_contract_rank.py FOLDER
"""

import json
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from bnworker import World
from bnworker.transports import peers
from bnworker.transports import torch as transports
from support.contract import BODIES, names
from support.contract.timing import watch

SMALL_CHUNK = 100_000  # elements: every larger array takes several messages


def main(folder: Path) -> None:
    """Run the bodies; a failing one is told to the other ranks, so that they go on to the next."""
    warnings.simplefilter("error")
    peers.CHUNK = SMALL_CHUNK
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen: dict[str, dict[str, object]] = {}
    for name in names("torch", dist.get_world_size()):
        deterministic = name == "float_sums_have_the_order_of_the_ranks"
        transport = transports.TorchTransport(timeout=60, deterministic=deterministic)
        watched = watch(transport)
        world = World(transport, install=False)
        try:
            seen[name] = {"saw": BODIES[name].run(world)}
        except BaseException as error:  # noqa: BLE001 - the outcome of a body, whatever it is
            seen[name] = {"failed": traceback.format_exc()}
            world._depart(f"failed with {type(error).__name__}")
        else:
            world.leave()
        seen[name] |= asdict(watched)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
