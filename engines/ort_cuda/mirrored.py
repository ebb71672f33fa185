"""`MirroredBlock`: numbers that go to the device, and come back, in one copy each."""

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.cuda import runtime as cuda
from engines.ort_cuda.binding import Place
from engines.ort_cuda.gpu import Gpu


@dataclass(frozen=True, slots=True)
class MirroredBlock:
    """A block of values of 8 bytes in pinned memory of the host, and one as large on the device.

    Attributes:
        host: int64[n].
        device: int64[n].
        stream: The stream that copies are queued on.
    """

    host: NDArray[np.int64]
    device: ort.OrtValue
    stream: cuda.CudaStream

    def address(self, index: int) -> int:
        """Returns the device's address of value `index`."""
        return int(self.device.data_ptr()) + 8 * index

    def place(self, index: int, dtype: type[np.generic], shape: tuple[int, ...]) -> Place:
        """Returns the place of a tensor on the device.

        Args:
            index: The value of the block at which it begins.
            dtype: The tensor's dtype, of 8 bytes or fewer.
            shape: The tensor's shape.
        """
        return Place(dtype, shape, self.address(index))

    def send(self, stop: int) -> None:
        """Queue a copy of the first `stop` values to the device."""
        self.stream.copy(self.address(0), self.host.ctypes.data, 8 * stop)

    def receive(self, start: int) -> None:
        """Queue a copy of the values from number `start` on to the host."""
        self.stream.copy(self.host.ctypes.data + 8 * start, self.address(start), 8 * (len(self.host) - start))


def allocate_mirrored(gpu: Gpu, count: int) -> MirroredBlock:
    """Returns a block of `count` values."""
    return MirroredBlock(gpu.stream.pinned(count), gpu.allocate((count,), np.int64), gpu.stream)
