"""The header of a `.gguf` file, walked before anybody allocates what it claims: counts, lengths, shapes and places."""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from engines.errors import VocabtrimError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SHAPE = ("block_count", "embedding_length", "feed_forward_length")  # below their product no decoder stays
_MOST_RATIO = 16
_MOST_VALUES = 1 << 16  # metadata keys, or tensors
_MOST_NAME = 1 << 16
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


def check_gguf(path: Path) -> int:
    """Walk the header of `path`. Returns the number of weights that its tensors hold.

    Raises `VocabtrimError` for a file that is no GGUF of version 2 or 3, and for one whose header claims what the
    file is too short for.
    """
    try:
        with path.open("rb") as file:
            return _Header(file, path).walk()
    except OSError as error:
        raise VocabtrimError(f"cannot read {path}: {error.strerror}") from error


class _Header:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size
        self.scalars: dict[str, int] = {}

    def walk(self) -> int:
        if self.file.read(4) != b"GGUF":
            raise VocabtrimError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise VocabtrimError(f"{self.path} is GGUF version {version}, of which 2 and 3 can be read: convert it")
        tensors, keys = self.number("<Q"), self.number("<Q")
        if max(tensors, keys) > _MOST_VALUES:
            raise self.broken(f"it claims {tensors} tensors and {keys} metadata keys")
        for _ in range(keys):
            name, kind = self.text(_MOST_NAME), self.number("<I")
            if kind == _UINT32:
                self.scalars[name.decode("utf-8", "replace").split(".", 1)[-1]] = self.number("<I")
            else:
                self.skip_value(kind)
        alignment = self.scalars.get("alignment", _ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise self.broken(f"it claims an alignment of {alignment}")
        infos = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        for tensor, _, offset, length in infos:
            if start + offset + length > self.size:
                raise self.broken(f"the tensor {tensor} would end beyond the file")
        weights = sum(count for _, count, _, _ in infos)
        claimed = math.prod(self.scalars.get(name, 0) for name in _SHAPE)
        if claimed > _MOST_RATIO * weights:
            raise self.broken(f"its metadata describes a model of over {claimed} weights, it holds {weights}")
        return weights

    def tensor(self) -> tuple[str, int, int, int]:
        """Name, number of weights, offset and length in bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text(_MOST_NAME).decode("utf-8", "replace")[:80]
        dimensions = self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.broken(f"the tensor {name} has {dimensions} dimensions")
        weights = math.prod(self.number("<Q") for _ in range(dimensions))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in set(GGMLQuantizationType):
            raise self.broken(f"the tensor {name} is of the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return name, weights, offset, -(-weights // block) * block_bytes

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item == _STRING:
                if count * 8 > self.left():
                    raise self.broken(f"a list claims {count} strings")
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                self.skip(count * self.size_of(item))
        else:
            self.skip(self.size_of(kind))

    def size_of(self, kind: int) -> int:
        if kind not in _SIZES:  # lists of lists, which nobody writes, among them
            raise self.broken(f"its metadata has a value of the unknown type {kind}")
        return _SIZES[kind]

    def number(self, form: str) -> int:
        data = self.file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise self.broken("it ends in the middle of its header")
        return int(struct.unpack(form, data)[0])

    def text(self, most: int) -> bytes:
        length = self.number("<Q")
        if length > min(most, self.left()):
            raise self.broken(f"it claims a name of {length} bytes")
        return self.file.read(length)

    def skip(self, length: int) -> None:
        if length > self.left():
            raise self.broken(f"its metadata claims a value of {length} bytes")
        self.file.seek(length, 1)

    def left(self) -> int:
        return self.size - self.file.tell()

    def broken(self, what: str) -> VocabtrimError:
        return VocabtrimError(f"{self.path} is damaged or no GGUF file: {what}; fetch it again")
