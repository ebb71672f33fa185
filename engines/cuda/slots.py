"""`DeviceSlots`: in-context slots whose weights are on a GPU."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import SLOT_BIAS, SLOT_TOKEN_IDS, SLOT_WEIGHT
from engines.bundle.head_rows import HeadRows
from engines.bundle.vocab_map import VocabMap
from engines.cuda.runtime import CudaStream
from engines.slots import Slots


class DeviceSlots(Slots):
    """Slots with a copy of their inputs on a GPU, at addresses that never change, so that CUDA graphs stay valid.

    A change is queued on the stream at once, so it is done before whatever is queued later. A token that enters costs a
    copy of its column, [hidden] numbers, and one of the M token ids; steps copy nothing.

    Attributes:
        addresses: The GPU addresses of the graph's inputs, by name.
    """

    def __init__(
        self,
        vocab_map: VocabMap,
        rows: HeadRows,
        shape: tuple[int, int],
        dtype: np.dtype[np.generic],
        stream: CudaStream,
        allocate: Callable[[int], int],
    ) -> None:
        """Make empty slots.

        Args:
            vocab_map: See `Slots`.
            rows: See `Slots`.
            shape: See `Slots`.
            dtype: See `Slots`.
            stream: The stream that copies are queued on.
            allocate: Takes a number of bytes and returns the address of that much GPU memory, which the caller owns.

        Raises:
            VocabtrimError: The GPU has no room.
        """
        super().__init__(vocab_map, rows, shape, dtype)
        self._stream = stream
        self.addresses = {name: allocate(array.nbytes) for name, array in self.inputs.items()}
        for name in self.addresses:
            self._copy(name)

    def clear(self) -> None:
        super().clear()
        self._copy(SLOT_TOKEN_IDS)

    def _write(self, token_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        super()._write(token_ids, slots)
        size = self._weight.itemsize
        hidden, pitch = self._weight.shape[0], self._weight.strides[0]
        for columns in np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1):  # adjacent columns are one copy
            offset = size * int(columns[0])
            target, source = self.addresses[SLOT_WEIGHT] + offset, self._weight.ctypes.data + offset
            self._stream.copy_columns(target, source, pitch, size * len(columns), hidden)
        if SLOT_BIAS in self.addresses:
            self._copy(SLOT_BIAS)
        self._copy(SLOT_TOKEN_IDS)

    def _copy(self, name: str) -> None:
        """Queue a copy of a whole input."""
        array = self.inputs[name]
        self._stream.copy(self.addresses[name], array.ctypes.data, array.nbytes)
