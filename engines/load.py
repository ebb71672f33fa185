"""`load_engine`: loads a bundle with the library that runs its format on a device."""

import importlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from engines.base import DeviceName, Engine, Neighbour
from engines.bundle.read import opened_bundle
from engines.errors import VocabtrimError
from engines.generation_rules import UNSUPPORTED_NOTE

_LOG = logging.getLogger("engines")


@dataclass(frozen=True, slots=True)
class Backend:
    """The library that runs bundles of one format on one device.

    Attributes:
        title: The name of the library that computes, for messages.
        module: A module with `load(bundle, neighbour, profile)`. `neighbour` gives what `load_engine` is to share a
            cache with; the other arguments are those of `load_engine`. It returns an `Engine`, or raises
            `VocabtrimError` for a bundle that it cannot run.
        package: The package to install for it.
    """

    title: str
    module: str
    package: str


# (device, whether the bundle is one of `--format trt`) → its backend. A new backend is a folder and a line here.
BACKENDS: Mapping[tuple[DeviceName, bool], Backend] = {
    ("cpu", False): Backend("ONNX Runtime", "engines.ort.load", "onnxruntime"),
    ("cpu", True): Backend("ONNX Runtime", "engines.trt.load_reference", "onnxruntime"),
    ("cuda", False): Backend("ONNX Runtime", "engines.ort_cuda.load", "'vocabtrim-export[cuda]'"),
    ("cuda", True): Backend("TensorRT", "engines.trt.load", "'vocabtrim-export[trt]'"),
}


def load_engine(
    path: str | Path, device: str = "cpu", share_cache_with: Engine | None = None, profile: Path | None = None
) -> Engine:
    """Check a bundle and load it, with an empty KV cache of its context length.

    Args:
        path: The bundle.
        device: "cpu" runs any bundle on ONNX Runtime, one of `--format trt` to check it; "cuda" runs TensorRT plans
            where the bundle is of that format, else ONNX Runtime's CUDA.
        share_cache_with: An engine whose KV cache is used where both run on one device, were made from the same weights
            and have caches of one form; else the new engine has its own. A model that drafts for itself then reads the
            target's keys and values. On ONNX Runtime's CUDA the two engines share a stream in any case.
        profile: A file for the time of each operator, written when the engine is closed; only with ONNX Runtime on the
            CPU. The product that reads an EAGLE head's features is in NAME_features, in the same directory.

    Raises:
        VocabtrimError: The bundle is damaged, the device is unknown, or its runtime is not installed.
    """
    return _load(path, device, lambda: share_cache_with, profile)


def load_pair(
    target: str | Path, drafter: str | Path, device: str = "cpu", drafter_device: str | None = None
) -> tuple[Engine, Engine]:
    """Load a target, and a drafter that shares the target's KV cache where it can (see `load_engine`).

    On the CPU both load at the same time: preparing weights takes one core.

    Args:
        target: The target's bundle.
        drafter: The drafter's bundle.
        device: The target's device, see `load_engine`.
        drafter_device: The drafter's device; None: the target's.

    Raises:
        VocabtrimError: See `load_engine`. Where neither can be loaded, this is the target's error.
    """
    drafter_device = drafter_device or device
    with ExitStack() as opened, ThreadPoolExecutor(max_workers=2) as threads:
        if device == drafter_device == "cpu":
            loading = threads.submit(load_engine, target)
            drafting = threads.submit(_load, drafter, drafter_device, loading.result, None)
            pair = opened.enter_context(loading.result()), opened.enter_context(drafting.result())
        else:  # CUDA's state belongs to a thread
            first = opened.enter_context(load_engine(target, device))
            pair = first, opened.enter_context(load_engine(drafter, drafter_device, first))
        opened.pop_all()
    return pair


def _load(path: str | Path, device: str, neighbour: Neighbour, profile: Path | None) -> Engine:
    devices = {name: name for name, _ in BACKENDS}
    if device not in devices:
        known = " or ".join(map(repr, devices))
        raise VocabtrimError(f"unknown device {device!r}: bundles run on {known}")
    with opened_bundle(path) as bundle:
        if bundle.manifest.rules.unsupported:
            _LOG.warning("%s: %s: %s", path, UNSUPPORTED_NOTE, ", ".join(bundle.manifest.rules.unsupported))
        backend = BACKENDS[devices[device], bundle.manifest.tensorrt is not None]
        try:
            engine: Engine = importlib.import_module(backend.module).load(bundle, neighbour, profile)
        except ImportError as error:
            raise VocabtrimError(f"{backend.title} cannot be used ({error}): pip install {backend.package}") from error
    return engine
