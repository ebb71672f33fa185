"""The header of a `.gguf` file: its metadata, its tensors, and checks of the whole."""

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_reader import GgufReader, GgufTensor, broken

_SHAPE = ("block_count", "embedding_length", "feed_forward_length")  # a decoder has more weights than their product
_MOST_RATIO = 16
_FIRST_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


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
        """The architecture's name in llama.cpp; "" where the file states none."""
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
                return GgufHeader(path, *GgufReader(data, path).read())
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
        raise broken(path, f"its metadata describes a model of over {claimed} weights, it holds {header.weights}")
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
