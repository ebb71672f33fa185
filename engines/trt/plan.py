"""Check that a TensorRT plan can run on this machine, and open it."""

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
    """Check that plans can run here.

    Args:
        plans: The manifest's description of the plans.
        version: The version of the library.
        compute_capability: The GPU's, such as "8.6".
        where: The bundle, for messages.

    Raises:
        VocabtrimError: They were built for another version or GPU.
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
    """Open a plan.

    Args:
        library: TensorRT or TensorRT-RTX.
        runtime: The library's runtime.
        log: Its logger.
        plan: The plan's file.
        weights: The ONNX model that a plan without weights takes them from; None for a plan with weights.

    Returns:
        The ICudaEngine.

    Raises:
        VocabtrimError: Gives the library's own reason.
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
    """Returns the names of the inputs, or of the outputs, of an ICudaEngine."""
    mode = library.api.TensorIOMode.INPUT if inputs else library.api.TensorIOMode.OUTPUT
    names = [str(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def stored_dtype(engine: Any, name: str) -> np.dtype[Any]:
    """Returns the NumPy dtype that holds a tensor of a plan; bfloat16 is held as its bits in uint16."""
    return np.dtype(_STORED[engine.get_tensor_dtype(name).name])
