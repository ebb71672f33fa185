"""ONNX Runtime sessions: their options, their thread pools, and errors in one line."""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.cores import usable_cores
from engines.errors import VocabtrimError

_OLDEST = (1, 31)  # releases before 1.30 compute the logits of more tokens than a graph's inputs ask for, or fail
# optimizers of ONNX Runtime that keep in memory what is computed from weights
_KEEPING = ("ConstantFolding", "CommonSubexpressionElimination")


def share(array: NDArray[Any]) -> ort.OrtValue:
    """Returns an OrtValue on the memory of `array`, which it keeps alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def host_array(value: ort.OrtValue) -> NDArray[np.generic]:
    """Returns an array on the memory of a tensor on the host, which its owner must keep alive."""
    shape, dtype = tuple(value.shape()), numpy_dtype(value.data_type())
    raw = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(memoryview(raw), dtype).reshape(shape)


def numpy_dtype(onnx_type: str) -> np.dtype[np.generic]:
    """Returns the dtype of an ONNX type such as "tensor(float16)"; for bfloat16, which NumPy lacks, uint16."""
    name = re.fullmatch(r"tensor\((\w+)\)", onnx_type)
    others = {"float": "float32", "bfloat16": "uint16"}
    kind = name[1] if name else onnx_type
    return np.dtype(others.get(kind, kind))


def new_session(
    model: Path | bytes,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    profile_prefix: Path | None = None,
    weights_in_file: bool = False,
) -> ort.InferenceSession:
    """Open a session with a thread pool of its own, which changes nothing for the other sessions of the process.

    If the program has set up ONNX Runtime's global thread pool, every session must use that one, and so does this.

    Args:
        model: An ONNX file, or its bytes.
        providers: ONNX Runtime's execution providers, the preferred one first.
        profile_prefix: The prefix of the file to write a profile to; None for no profile.
        weights_in_file: Whether weights stay in the mapped file, as they are, and products are slower. Otherwise
            ONNX Runtime copies them into the layouts of its kernels, computes once what depends on them alone, and
            fuses products with `DequantizeLinear` behind their weights into kernels that round activations to 8 bits;
            `QMoE` rounds them in its copied layout alone.

    Raises:
        VocabtrimError: ONNX Runtime is too old.
        Exception: An error of ONNX Runtime's; its exceptions have no common base.
    """
    _check_version(ort.__version__)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error is raised; it would also be printed, in colour
    options.intra_op_num_threads = _threads()
    # Without this, an idle engine's threads spin and take the cores from the other engine of the pair.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights_in_file:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_reuse = False  # before 1.32 a KV cache that grows gets the memory of the smaller one
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    how: dict[str, Any] = {"providers": providers, "enable_fallback": 0}
    if weights_in_file:
        how["disabled_optimizers"] = _KEEPING
    try:
        return ort.InferenceSession(model, options, **how)
    except RuntimeError as error:
        if "global thread pool" not in str(error):
            raise
    options.use_per_session_threads = False
    return ort.InferenceSession(model, options, **how)


def _threads() -> int:
    """Returns the number of threads of a session: the cores of a process that may use only some, else 0, the default.

    ONNX Runtime has a thread for each core of the machine and binds it to that core, also where taskset, a container or
    a scheduler gives the process some cores only: threads then take other programs' cores, or wait for each other on
    one. With a number given, it binds none.
    """
    cores = usable_cores()
    return 0 if cores == os.cpu_count() else cores


def _check_version(version: str) -> None:
    """Refuse a release of ONNX Runtime that is too old. pip checks onnxruntime's, and not that of onnxruntime-gpu."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise VocabtrimError(
            f"ONNX Runtime {version} is too old for these bundles: install onnxruntime, or onnxruntime-gpu, {oldest} "
            "or newer"
        )


def open_session(path: Path, profile_prefix: Path | None = None, weights_in_file: bool = False) -> ort.InferenceSession:
    """Open a session on the CPU.

    Args:
        path: The ONNX file.
        profile_prefix: See `new_session`.
        weights_in_file: See `new_session`.

    Raises:
        VocabtrimError: ONNX Runtime cannot open the file.
    """
    try:
        return new_session(path, profile_prefix=profile_prefix, weights_in_file=weights_in_file)
    except VocabtrimError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VocabtrimError(f"ONNX Runtime cannot open {path} on the CPU: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Returns the message of an exception of ONNX Runtime, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
