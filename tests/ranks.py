"""Functions run on every rank of a Gloo group, each in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta

import torch
import torch.distributed as dist

PRELOADED = [
    *("torch.distributed", "mgt_fast.train.finetune", "mgt_fast.train.pretrain", "pytest"),
    *("torch._dynamo", "pandas"),  # which the first step of an optimiser imports, for two seconds
]
"""Imported once, then forked; the server does not find the tests' own modules."""


def run_ranks(function, size, folder, *args):
    """Return function(rank, *args) of each rank.

    Args:
        function: of a module's top level; what it returns must not hold tensors.
        size: number of ranks.
        folder: where they meet.
        args: further arguments.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(size, context) as pool:
        tasks = [pool.submit(_run, rank, size, str(folder / "ranks"), function, args) for rank in range(size)]
        for task in as_completed(tasks):
            task.result()  # the first error is the cause of others
        return [task.result() for task in tasks]


def _run(rank, size, file, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        return function(rank, *args)
    finally:
        dist.destroy_process_group()
