"""`DeviceRows`: hidden states that stay on the device."""

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.cuda import runtime as cuda
from engines.numbers import from_float32, to_float32
from engines.ort.session import numpy_dtype
from engines.ort_cuda.binding import Place, element_type
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.provider import explain_out_of_memory


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Hidden states on the device, one a row, at an address that never changes.

    Attributes:
        memory: [1, count, size].
        onnx_type: ONNX Runtime's name of the elements' type, such as "tensor(float16)".
        stream: The stream that copies are queued on.
    """

    memory: ort.OrtValue
    onnx_type: str
    stream: cuda.CudaStream

    @property
    def count(self) -> int:
        """The number of rows that there is memory for."""
        return int(self.memory.shape()[1])

    @property
    def size(self) -> int:
        """The numbers in a row."""
        return int(self.memory.shape()[2])

    def place(self, first: int, count: int) -> Place:
        """Returns the place of `count` rows from row `first` on, [1, count, size]."""
        address = self.memory.data_ptr() + first * self._bytes(1)
        return Place(element_type(self.onnx_type), (1, count, self.size), address)

    def read(self, count: int) -> NDArray[np.float32]:
        """Returns the first rows, float32[count, size], copied to the host. Waits for the queued work."""
        stored = np.empty((count, self.size), numpy_dtype(self.onnx_type))
        self.stream.copy(stored.ctypes.data, self.memory.data_ptr(), stored.nbytes)
        self.stream.synchronize()
        return to_float32(stored)

    def write(self, rows: NDArray[np.float32]) -> None:
        """Queue a copy of `rows`, float32[count, size], over the first rows."""
        stored = np.ascontiguousarray(from_float32(rows, numpy_dtype(self.onnx_type)))
        self.stream.copy(self.memory.data_ptr(), stored.ctypes.data, stored.nbytes)

    def take(self, source: "DeviceRows", first: int, count: int) -> None:
        """Queue a copy of `count` rows of `source`, from its row `first` on, over the first rows."""
        self.stream.copy(self.memory.data_ptr(), source.place(first, count).address, self._bytes(count))

    def _bytes(self, count: int) -> int:
        return count * self.size * numpy_dtype(self.onnx_type).itemsize


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Work that copies the first `count` rows of `source` over those of `target`."""

    source: DeviceRows
    target: DeviceRows
    count: int

    def enqueue(self) -> None:
        self.target.take(self.source, 0, self.count)


def allocate_rows(engine: OnnxRuntimeCudaEngine, session: ort.InferenceSession, name: str, count: int) -> DeviceRows:
    """Allocate `count` rows of the input or output `name` of `session`.

    Raises:
        VocabtrimError: The session has no such input or output.
    """
    (value,) = (value for value in [*session.get_inputs(), *session.get_outputs()] if value.name == name)
    try:
        memory = engine.gpu.allocate((1, count, int(value.shape[-1])), element_type(value.type))
    except Exception as error:
        explain_out_of_memory(error, engine._bundle)
        raise
    return DeviceRows(memory, value.type, engine.gpu.stream)
