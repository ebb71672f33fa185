"""The work on an unfinished batch, on the disk: an interrupted calibration continues from it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 15.0


class Unfinished(Protocol):
    """Storage for the segments of an unfinished batch."""

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next segment."""

    def load(self) -> Iterator[dict[str, "Tensor"]]:
        """Yield the earlier segments."""

    def save(self, segment: Mapping[str, "Tensor"]) -> None:
        """Keep the next segment."""


class PartialBatch:
    """A directory of segments. Each holds the part of one batch computed since the segment before: mostly its KV cache.

    A segment appears whole or not at all. If the disk is full or cannot be written, only the saving is lost.

    Args:
        directory: The directory of the segments; it is created with the first one.
        key: Identifies the batch and everything that its tokens depend on: other batches' segments are ignored.
        seconds: The time between two segments.
    """

    def __init__(self, directory: Path, key: str, seconds: float = SECONDS) -> None:
        self.directory, self.key, self.seconds = directory, key, seconds
        self.count, self.last = 0, monotonic()
        self.disabled = False

    @property
    def is_due(self) -> bool:
        return not self.disabled and monotonic() - self.last >= self.seconds

    def load(self) -> Iterator[dict[str, "Tensor"]]:
        """Yield the segments of this batch that an earlier run left."""
        from safetensors.torch import load

        yield from map(load, self.stored())

    def stored(self) -> Iterator[bytes]:
        """Yield the same segments as they are in their files, and remove whatever else is there."""
        self.count = 0
        while (segment := self._read(self._path(self.count))) is not None:
            self.count += 1
            yield segment
        whole = {self._path(number) for number in range(self.count)}
        for path in sorted(self.directory.glob("*")):
            if path not in whole:
                path.unlink(missing_ok=True)

    def save(self, segment: Mapping[str, "Tensor"]) -> None:
        """Write the next segment."""
        self.append(pack(segment, self.key))

    def append(self, segment: bytes) -> None:
        """Write the next segment, which is packed."""
        path = self._path(self.count)
        aside = path.with_suffix(".new")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(segment)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            self.disabled = True
            with suppress(OSError):
                aside.unlink()
        self.count, self.last = self.count + 1, monotonic()

    def clear(self) -> None:
        """Remove the directory: the batch is done."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.safetensors"

    def _read(self, path: Path) -> bytes | None:
        try:
            with safe_open(path, "numpy") as file:
                is_mine = (file.metadata() or {}).get("key") == self.key
            return path.read_bytes() if is_mine else None
        except (OSError, SafetensorError):
            return None


def pack(segment: Mapping[str, "Tensor"], key: str) -> bytes:
    """Returns the content of a segment's file."""
    from safetensors.torch import save

    return save(dict(segment), {"key": key})
