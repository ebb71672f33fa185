"""The header of a `.gguf` file. Its counts, lengths, shapes and offsets are checked before they are used."""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
_SHAPE = ("block_count", "embedding_length", "feed_forward_length")  # a decoder has more weights than their product
_MOST_RATIO = 16
_MOST_VALUES = 1 << 16  # metadata keys, or tensors
_MOST_ITEMS = 1 << 24  # items of a list, far more than any tokenizer has
_MOST_NAME = 1 << 16  # bytes
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")
_FIRST_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is in its file.

    Attributes:
        shape: As PyTorch has it, the slowest dimension first; the file stores it reversed.
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


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a `.gguf` file.

    Attributes:
        path: The file.
        metadata: Values by key: numbers, booleans, strings, lists of strings and arrays of numbers.
        tensors: The tensors by name.
        entries: The bytes of each metadata entry in the file, its key and type included.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    entries: Mapping[str, slice] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Numbers that all tensors hold together."""
        return sum(tensor.weights for tensor in self.tensors.values())

    @property
    def parts(self) -> int:
        """Number of files that the model is split into."""
        count = self.metadata.get("split.count", 1)
        return count if isinstance(count, int) else 1

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def hyperparameters(self) -> dict[str, Any]:
        """Returns the values of the architecture's own keys, by the key without `ARCHITECTURE.`."""
        start = f"{self.architecture}."
        return {key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(start)}


def read_header(path: Path) -> GgufHeader:
    """Read the header of `path`.

    Raises:
        VocabtrimError: `path` is not GGUF of version 2 or 3, or its header describes more than the file holds.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise VocabtrimError(f"{path} is not a GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, path).read()
    except OSError as error:
        raise VocabtrimError(f"cannot read {path}: {error.strerror}") from error


def check_gguf(path: Path) -> int:
    """Returns the number of weights that the file at `path` holds.

    Raises:
        VocabtrimError: See `read_header`; or the metadata describes a model that is far larger than the file.
    """
    header = read_header(path)
    parameters = header.hyperparameters()
    claimed = math.prod(value if isinstance(value := parameters.get(name, 0), int) else 0 for name in _SHAPE)
    if claimed > _MOST_RATIO * header.weights and header.parts == 1:
        raise _broken(path, f"its metadata describes a model of over {claimed} weights, it holds {header.weights}")
    return header.weights


def is_part(path: Path) -> bool:
    """Returns whether the file's name is that of a part of a split model."""
    return _FIRST_PART.fullmatch(path.name) is not None


def check_whole(header: GgufHeader) -> None:
    """Check that a file is not a part of a split model.

    Raises:
        VocabtrimError: It is one of several parts; the message says how to merge them.
    """
    if header.parts <= 1 and not is_part(header.path):
        return
    match = _FIRST_PART.fullmatch(header.path.name)
    first = header.path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else header.path
    merged = header.path.with_name(f"{match[1]}.gguf") if match else header.path.with_name("merged.gguf")
    raise VocabtrimError(
        f"{header.path} is one part of a split model: merge the parts first, with llama.cpp's "
        f"`llama-gguf-split --merge {first} {merged}`, and give the merged file"
    )


def _broken(path: Path, what: str) -> VocabtrimError:
    return VocabtrimError(f"{path} is damaged or no GGUF file: {what}; fetch it again")


class _Reader:
    """A position in the mapped file, and functions that read the values there."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 4

    def read(self) -> GgufHeader:
        version = self.number("<I")
        if version in (2 << 24, 3 << 24):
            raise VocabtrimError(
                f"{self.path} is a big-endian GGUF: convert it with gguf's `gguf-convert-endian FILE little`"
            )
        if version not in (2, 3):
            raise VocabtrimError(f"{self.path} is GGUF version {version}, of which 2 and 3 can be read: convert it")
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
        return GgufHeader(
            self.path, metadata, self.placed(infos, metadata.get("general.alignment", _ALIGNMENT)), entries
        )

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
        if kind not in _NUMBERS:  # a list of lists is refused too; no writer produces one
            raise self.broken(f"its metadata has a value of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        if count * dtype.itemsize > self.left() or count > _MOST_ITEMS:
            raise self.broken(f"its metadata claims a value of {count * dtype.itemsize} bytes")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def number(self, form: str) -> int:
        if struct.calcsize(form) > self.left():
            raise self.broken("it ends in the middle of its header")
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, most: int) -> str:
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
        return _broken(self.path, what)
