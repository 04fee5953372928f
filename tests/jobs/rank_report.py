"""A job's program: joins the others as training does, and says where it is and what a sum over all ranks gives."""

import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import launch as launching
from parallel.errors import LaunchError

try:
    facts = launching.detect()
    launching.start(facts, torch.device("cpu"), timedelta(seconds=60))
    total = torch.tensor([facts.rank + 1.0])
    if facts.world_size > 1:
        dist.all_reduce(total)
    print(
        f"rank {facts.rank}/{facts.world_size} local {facts.local_rank}/{facts.local_world_size} on {socket.gethostname()} "
        f"by {facts.launcher}: sum {total.item():g}\n",
        end="",
        flush=True,
    )
    launching.stop()
except LaunchError as error:
    sys.exit(f"error: {error}")
