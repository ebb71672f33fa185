"""Measure this machine's memory bandwidth: the limit of decoding."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from engines.base import DeviceName, Engine
from engines.cores import usable_cores
from engines.cuda.bandwidth import copy_bandwidth

BUFFER_BYTES = 1 << 29  # beyond the last-level cache of large servers


def read_bandwidth(threads: int | None = None, buffer_bytes: int = BUFFER_BYTES, seconds: float = 0.7) -> float:
    """Measure the read bandwidth of main memory, in bytes/s.

    Each thread takes the maximum of its share of an int64 buffer, which NumPy does without the GIL and faster than
    memory delivers. The result is the best pass after a warm-up: anything slower was disturbed.

    Args:
        threads: The number of threads; None: one per usable core.
        buffer_bytes: Bytes of the buffer, far more than the caches hold.
        seconds: The time to measure for, in seconds.
    """
    workers = threads or usable_cores()
    chunks = np.array_split(np.ones(buffer_bytes // 8, np.int64), workers)  # ones: pages of zeros may share memory
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(np.max, chunks))
        end = perf_counter() + seconds
        while not best or perf_counter() < end:
            start = perf_counter()
            list(pool.map(np.max, chunks))
            best = max(best, sum(chunk.nbytes for chunk in chunks) / (perf_counter() - start))
    return best


def bandwidths(engines: Iterable[Engine], given: float | None = None) -> dict[DeviceName, float]:
    """Returns the bytes/s that the memory of each device delivers.

    Args:
        engines: The engines whose devices are measured.
        given: The value to return instead of measuring.
    """
    devices = {engine.device for engine in engines}
    return {device: given or (copy_bandwidth() if device == "cuda" else read_bandwidth()) for device in sorted(devices)}
