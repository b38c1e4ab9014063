"""A rank that trains until it is killed, for `test_killed_rank.py`. Says in FOLDER/<rank> that it is under way.

Nothing but the mean distance is exchanged: what ends the others is our own reduction.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from normbt_kernels import LinearNormBTLoss

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    loss_fn, head = LinearNormBTLoss(), torch.ones(8, requires_grad=True)
    for step in range(10**9):
        loss_fn(torch.randn(4, 8), head).backward()
        if step == 3:
            Path(sys.argv[1], str(dist.get_rank())).touch()
