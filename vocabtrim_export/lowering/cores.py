"""Work on many small tensors with all cores, each of them alone on one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_on_cores(compute: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Returns what `compute` gives for each item, computed by as many threads as PyTorch uses.

    Each thread's operations run on that thread alone. PyTorch's own threads split every operation instead and wait for
    each other after it, which takes longer than small operations do, and far longer on a busy machine.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [compute(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(compute, items))
    finally:
        torch.set_num_threads(threads)  # what the pool's threads set holds for the process's later threads too
