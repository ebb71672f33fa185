"""`BoundModel`: a session whose inputs and outputs are bound to fixed addresses of the device."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.cuda import runtime as cuda
from engines.numbers import to_float32
from engines.ort.session import numpy_dtype

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such dtype


class Place(NamedTuple):
    """The memory that an input is read from or an output is written to.

    Attributes:
        dtype: See `element_type`.
        shape: The tensor's shape.
        address: An address of the device.
    """

    dtype: Any
    shape: tuple[int, ...]
    address: int


class Work(Protocol):
    """Work for the device."""

    def enqueue(self) -> None:
        """Put it on the stream and do not wait for it."""


@dataclass(frozen=True, slots=True)
class BoundSession:
    """A session with a binding of all of its inputs and outputs."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions

    def enqueue(self) -> None:
        """Put the run on the stream and do not wait for it."""
        self.session.run_with_iobinding(self.binding, self.options)


@dataclass(frozen=True, slots=True)
class BoundModel(BoundSession):
    """A bound session on a decoder, whose logits stay on the device.

    Attributes:
        stream: The session's stream.
        logits: [1, keep, head_rows].
        logits_type: ONNX Runtime's name for their type, such as "tensor(float16)".
    """

    stream: cuda.CudaStream
    logits: ort.OrtValue
    logits_type: str

    def read_logits(self) -> NDArray[np.float32]:
        """Returns the logits of the last run, float32[keep, head_rows]. Waits for them."""
        stored = np.empty(self.logits.shape()[1:], numpy_dtype(self.logits_type))
        self.stream.copy(stored.ctypes.data, self.logits.data_ptr(), stored.nbytes)
        self.stream.synchronize()
        return to_float32(stored)


def run_options() -> ort.RunOptions:
    """Returns the options of all runs: they do not wait, and ONNX Runtime captures no CUDA graph.

    `Replayed` captures a larger one instead.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def element_type(onnx_type: str) -> Any:
    """Returns the element type that `OrtValue` takes.

    Args:
        onnx_type: ONNX Runtime's name of the type, such as "tensor(float16)".
    """
    return _BFLOAT16 if onnx_type == "tensor(bfloat16)" else numpy_dtype(onnx_type)
