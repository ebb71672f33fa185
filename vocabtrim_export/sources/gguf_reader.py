"""Reads the values of a `.gguf` header. Its counts, lengths, shapes and offsets are checked before they are used."""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import VocabtrimError

_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 1 << 16  # metadata keys, or tensors
_MOST_ITEMS = 1 << 24  # items of a list, far more than any tokenizer has
_MOST_NAME = 1 << 16  # bytes
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The place of a tensor in its file.

    Attributes:
        shape: The shape in PyTorch's order, the slowest dimension first; the file stores it reversed.
        kind: The number of its type in ggml.
        start: Its first byte in the file.
        length: Its length in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    length: int

    @property
    def weights(self) -> int:
        """Numbers that the tensor holds."""
        return math.prod(self.shape)


def broken(path: Path, what: str) -> VocabtrimError:
    """Returns the error for a file whose header is not valid."""
    return VocabtrimError(f"{path} is damaged or no GGUF file: {what}; fetch it again")


class GgufReader:
    """A position in the mapped file, and functions that read the values there."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 4

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor], dict[str, slice]]:
        """Returns the metadata, the tensors, and the bytes of each metadata entry; see `GgufHeader`.

        Raises:
            VocabtrimError: The file is damaged, or of a version or byte order that is not supported.
        """
        version = self.number("<I")
        if version in (2 << 24, 3 << 24):
            raise VocabtrimError(
                f"{self.path} is a big-endian GGUF: convert it with gguf's `gguf-convert-endian FILE little`"
            )
        if version not in (2, 3):
            raise VocabtrimError(
                f"{self.path} is GGUF version {version}, and only versions 2 and 3 can be read: convert it"
            )
        tensors, keys = self.number("<Q"), self.number("<Q")
        if max(tensors, keys) > _MOST_VALUES:
            raise self.broken(f"it claims {tensors} tensors and {keys} metadata keys")
        metadata: dict[str, Any] = {}
        entries: dict[str, slice] = {}
        for _ in range(keys):
            begin = self.at
            name, kind = self.text(_MOST_NAME), self.number("<I")
            metadata[name] = self.value(kind)
            entries[name] = slice(begin, self.at)
        infos = dict(self.tensor() for _ in range(tensors))
        return metadata, self.placed(infos, metadata.get("general.alignment", _ALIGNMENT)), entries

    def placed(self, tensors: Mapping[str, GgufTensor], alignment: Any) -> dict[str, GgufTensor]:
        """Returns the tensors with their starts counted from the file's own."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.broken(f"it claims an alignment of {alignment}")
        begin = -(-self.at // alignment) * alignment
        for name, tensor in tensors.items():
            if begin + tensor.start + tensor.length > self.size:
                raise self.broken(f"the tensor {name} would end beyond the file")
        return {name: replace(tensor, start=begin + tensor.start) for name, tensor in tensors.items()}

    def tensor(self) -> tuple[str, GgufTensor]:
        """Returns the name of the next tensor, and its place counted from where the tensors begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text(_MOST_NAME)[:80]
        dimensions = self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.broken(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in set(GGMLQuantizationType):
            raise self.broken(f"the tensor {name} is of the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return name, GgufTensor(shape, kind, offset, -(-math.prod(shape) // block) * block_bytes)

    def value(self, kind: int) -> Any:
        """Read a value of the metadata.

        Args:
            kind: The number by which GGUF names the value's type.

        Raises:
            VocabtrimError: The file claims what it cannot hold.
        """
        if kind == _STRING:
            return self.text(self.size)
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0].item()
        item, count = self.number("<I"), self.number("<Q")
        if item != _STRING:
            return self.numbers(item, count)
        if count * 8 > self.left() or count > _MOST_ITEMS:
            raise self.broken(f"a list claims {count} strings")
        return self.texts(count)

    def texts(self, count: int) -> list[str]:
        """Returns `count` strings, each stored after its length: a vocabulary or its merges, hundreds of thousands."""
        texts, data, at, last, length_at = [], self.data, self.at, self.size - 8, _LENGTH.unpack_from
        for _ in range(count):
            if at > last:
                raise self.broken("it ends in the middle of a list")
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > last + 8:
                raise self.broken("a string of a list would end beyond the file")
            texts.append(data[start:at].decode("utf-8", "replace"))
        self.at = at
        return texts

    def numbers(self, kind: int, count: int) -> Any:
        """Read numbers of one type.

        Args:
            kind: The number by which GGUF names their type.
            count: How many there are.

        Returns:
            A read-only array [count] of that type.

        Raises:
            VocabtrimError: The type is unknown, or the file is shorter.
        """
        if kind not in _NUMBERS:  # a list of lists is refused too; no writer produces one
            raise self.broken(f"its metadata has a value of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        if count * dtype.itemsize > self.left() or count > _MOST_ITEMS:
            raise self.broken(f"its metadata claims a value of {count * dtype.itemsize} bytes")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def number(self, form: str) -> int:
        """Read one number in a format of `struct`.

        Raises:
            VocabtrimError: The file ends before it.
        """
        if struct.calcsize(form) > self.left():
            raise self.broken("it ends in the middle of its header")
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, most: int) -> str:
        """Read a text of at most so many bytes. What is not UTF-8 in it is replaced.

        Raises:
            VocabtrimError: It claims to be longer, or the file is shorter.
        """
        length = self.number("<Q")
        if length > min(most, self.left()):
            raise self.broken(f"it claims a name of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]

    def left(self) -> int:
        return self.size - self.at

    def broken(self, what: str) -> VocabtrimError:
        return broken(self.path, what)
