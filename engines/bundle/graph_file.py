"""`GraphFile`: where an ONNX file's weights are, and its metadata, read and checked before ONNX Runtime opens it."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import TOKEN_TABLE
from engines.bundle.typed_json import brief
from engines.errors import VocabtrimError

PREFIX = "vocabtrim."
HEAD_TENSORS = f"{PREFIX}head_tensors"
_BLOCK = 1 << 20
# The bits of one element, by TensorProto.DataType.
_BITS = dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8) | dict.fromkeys((4, 5, 10, 16), 16)
_BITS |= dict.fromkeys((1, 6, 12), 32) | dict.fromkeys((7, 11, 13), 64) | dict.fromkeys((21, 22, 23), 4)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """An initializer and where its bytes are.

    Attributes:
        dtype: Its TensorProto.DataType.
        shape: Its shape.
        file: The name of the file, in the directory of the graph, that holds its bytes; None where `data` holds them.
        offset: Their first byte in `file`.
        length: Their number.
        data: The bytes that are in the graph itself; empty where there is a file.
    """

    dtype: int
    shape: tuple[int, ...]
    file: str | None
    offset: int
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph whose weights have not been read.

    Attributes:
        path: The ONNX file.
        metadata: The model's metadata properties.
        tensors: The initializers by name.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> "GraphFile":
        """Parse `path` and check all of its tensors, including those in attributes and subgraphs.

        Data outside the graph must be in a file of its directory, within that file's size, and as long as the tensor's
        shape says. Nothing is allocated for the tensors.

        Raises:
            VocabtrimError: The file is not an ONNX graph, or a tensor, which is named, is not so.
        """
        import onnx

        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's and onnx's exceptions have no common base
            raise VocabtrimError(f"{path} is not an ONNX graph ({brief(error)}): export it again") from error
        if model.training_info:
            raise VocabtrimError(f"{path} holds training graphs, which no bundle does: export the bundle again")
        for tensor in _all_tensors(model):
            _stored(tensor, path)
        tensors = {tensor.name: _stored(tensor, path) for tensor in model.graph.initializer}
        return cls(path, {entry.key: entry.value for entry in model.metadata_props}, tensors)

    def digest(self, names: list[str]) -> str:
        """Returns the sha256, in hex, over the name, type, shape and bytes of these initializers, in this order."""
        sha = hashlib.sha256()
        for name in names:
            tensor = self._tensor(name)
            sha.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for block in self._blocks(tensor):
                sha.update(block)
        return sha.hexdigest()

    def table(self) -> NDArray[np.int64]:
        """Returns int64[rows], the table of kept token ids that the graph's last `Gather` reads."""
        return np.frombuffer(b"".join(self._blocks(self._tensor(TOKEN_TABLE))), "<i8")

    def head_tensors(self) -> list[str]:
        """Returns the names of the initializers that the LM head reads, from the metadata that the exporter wrote.

        Raises:
            VocabtrimError: The metadata does not name them.
        """
        try:
            names = json.loads(self.metadata.get(HEAD_TENSORS, "[]"))
        except (ValueError, RecursionError):
            names = []
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise VocabtrimError(f"{self.path} does not say which tensors its head reads: export the bundle again")
        return names

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise VocabtrimError(f"{self.path} has no tensor {name[:80]}: export the bundle again")
        return self.tensors[name]

    def _blocks(self, tensor: StoredTensor) -> Iterator[bytes]:
        if tensor.file is None:
            yield tensor.data
            return
        with (self.path.parent / tensor.file).open("rb") as file:
            file.seek(tensor.offset)
            left = tensor.length
            while left and (block := file.read(min(left, _BLOCK))):
                left -= len(block)
                yield block


def _stored(tensor: Any, path: Path) -> StoredTensor:
    from onnx import TensorProto

    shape = tuple(tensor.dims)
    if any(size < 0 for size in shape):
        raise VocabtrimError(f"{path}: the tensor {tensor.name[:80]} has a negative dimension: export it again")
    if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
        return StoredTensor(tensor.data_type, shape, None, 0, len(tensor.raw_data), tensor.raw_data)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, where = entries.get("location", ""), f"{path}: the data of the tensor {tensor.name[:80]}"
    if not isinstance(name, str) or not is_plain_name(name):  # bytes: no UTF-8
        raise VocabtrimError(f"{where} lies at {name[:200]!r}, which is not inside the bundle")
    file = path.parent / name
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        size = file.stat().st_size
    except (ValueError, OSError) as error:
        raise VocabtrimError(f"{where} cannot be found in {name}: export the bundle again") from error
    bits = _BITS.get(tensor.data_type)  # None: strings, which never lie outside the graph
    if bits is None or offset < 0 or length != -(-math.prod(shape) * bits // 8) or offset + length > size:
        raise VocabtrimError(f"{where} does not fit into {name}, or not its shape: export the bundle again")
    return StoredTensor(tensor.data_type, shape, name, offset, length, b"")


def is_plain_name(name: str) -> bool:
    """Returns whether `name` is a plain file name: no path separator, not "." or ".."."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _all_tensors(model: Any) -> Iterator[Any]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)
