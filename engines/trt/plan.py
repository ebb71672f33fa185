"""A TensorRT plan: whether it can run here, and opening it."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.read import TensorRT
from engines.errors import VocabtrimError
from engines.trt.library import NAMES, Library, Log

# TensorRT's type → numpy's. numpy has no bfloat16: its bits are kept, and nothing else of a plan is a uint16.
_STORED = {"INT64": np.int64, "HALF": np.float16, "BF16": np.uint16, "FLOAT": np.float32}


def check_plans(plans: TensorRT, version: str, compute_capability: str, where: str) -> None:
    """Raise `VocabtrimError` unless a library of `version` can run `plans` on a GPU of `compute_capability`.

    where: the bundle, for the message.
    """
    name = NAMES[plans.flavor]
    again = f"vocabtrim-export … --format trt --compute-capability {compute_capability}"
    if plans.flavor == "tensorrt":
        again += ", on this machine"
    if plans.version != version:
        raise VocabtrimError(
            f"{where} was built by {name} {plans.version}; {version}, which is installed, cannot open it: "
            f"install {plans.version} or build it again ({again})"
        )
    if compute_capability not in plans.compute_capabilities:
        raise VocabtrimError(
            f"{where} was built for GPUs of compute capability {' or '.join(plans.compute_capabilities)}, "
            f"this one has {compute_capability}: build it again ({again})"
        )


def open_engine(library: Library, runtime: Any, log: Log, plan: Path, weights: Path | None) -> Any:
    """The ICudaEngine of a plan file. weights: the ONNX model that a plan without weights takes them from.

    Raises `VocabtrimError` with the library's own reason.
    """
    log.clear()
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        hint = " (it opens plans that were exported with --version-compatible)" if library.lean else ""
        raise VocabtrimError(f"{library.name} cannot open {plan}{hint}: {log.reason()}")
    if weights is not None:
        if library.lean:
            raise VocabtrimError(f"{plan} takes its weights at load, which {library.name} cannot: install tensorrt")
        refitter = library.api.Refitter(engine, log)
        parser = library.api.OnnxParserRefitter(refitter, log)
        if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
            raise VocabtrimError(f"{library.name} cannot put the weights of {weights} into {plan}: {log.reason()}")
    return engine


def tensor_names(library: Library, engine: Any, *, inputs: bool) -> list[str]:
    """The inputs, or else the outputs, of an ICudaEngine."""
    mode = library.api.TensorIOMode.INPUT if inputs else library.api.TensorIOMode.OUTPUT
    names = [str(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def stored_dtype(engine: Any, name: str) -> np.dtype[Any]:
    """The numpy type that holds a tensor of a plan; bfloat16 as its bits in uint16."""
    return np.dtype(_STORED[engine.get_tensor_dtype(name).name])
