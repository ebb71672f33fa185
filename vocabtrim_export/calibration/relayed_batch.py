"""The work on an unfinished batch in a process that cannot save it: another one fetches and saves it."""

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

from vocabtrim_export.calibration.partial_batch import pack

if TYPE_CHECKING:
    from torch import Tensor


class RelayedBatch:
    """The segments of one batch: those that were saved earlier, and new ones until they are fetched.

    Args:
        key: See `PartialBatch`.
        segments: The earlier segments.
        seconds: The time between two segments.
    """

    def __init__(self, key: str, segments: Sequence[bytes], seconds: float) -> None:
        self.key, self.segments, self.seconds = key, segments, seconds
        self.last = monotonic()
        self._new: list[bytes] = []
        self._lock = Lock()

    @property
    def is_due(self) -> bool:
        return monotonic() - self.last >= self.seconds

    def load(self) -> Iterator[dict[str, "Tensor"]]:
        """Yield the earlier segments, and drop them."""
        from safetensors.torch import load

        segments, self.segments = self.segments, ()
        yield from map(load, segments)

    def save(self, segment: Mapping[str, "Tensor"]) -> None:
        """Set the next segment aside."""
        packed = pack(segment, self.key)
        with self._lock:
            self._new.append(packed)
        self.last = monotonic()

    def take(self) -> list[bytes]:
        """Returns the segments that were set aside since the last call."""
        with self._lock:
            new, self._new = self._new, []
        return new
