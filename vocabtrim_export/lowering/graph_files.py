"""Writing graphs: weights are in a file next to the graph, and graphs of one bundle can share them."""

import fcntl
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import onnx
import onnx_ir as ir

from engines.bundle.read import MODEL_NAME, WEIGHTS_NAME
from vocabtrim_export.lowering.graph import BYTES_OF, name_of
from vocabtrim_export.progress import Progress

HEAD_WEIGHTS_NAME = "head.onnx.data"
_FICLONE = 0x40049409  # from linux/fs.h; the module fcntl lacks it
_SMALL = 256  # bytes: what is not larger lies in the graph


def save_graph(model: ir.Model, directory: Path, task: str, progress: Progress) -> None:
    """Write `model.onnx`, and its weights to `model.onnx.data`.

    An initializer that is a view (see `DecoderGraph.add_view`) names the bytes of the one that it is a view of.

    Args:
        model: The graph.
        directory: The directory to write to.
        task: The task's name for `progress`.
        progress: Called with (task, megabytes of weights written, all megabytes).
    """
    values = [value for value in _weights(model) if BYTES_OF not in value.meta]
    sizes = [value.const_value.nbytes for value in values if value.const_value is not None]
    before = [size >> 20 for size in accumulate(sizes, initial=0)]
    total = before[-1] + 1

    def report(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(task, before[info.index], total)  # this tensor is written next

    _store(values, directory, WEIGHTS_NAME, report)
    progress(task, total, total)
    for value in _weights(model):
        if BYTES_OF in value.meta:
            value.const_value = _view(value, model.graph.initializers[value.meta[BYTES_OF]], directory)
    ir.save(model, directory / MODEL_NAME)


def _weights(model: ir.Model) -> list[ir.Value]:
    """Returns the initializers that are stored outside the graph."""
    values = model.graph.initializers.values()
    return [value for value in values if value.const_value is not None and value.const_value.nbytes > _SMALL]


def _store(
    values: Sequence[ir.Value],
    directory: Path,
    name: str,
    report: Callable[[ir.TensorProtocol, ir.external_data.CallbackInfo], None] | None = None,
) -> None:
    """Write the values of these initializers to the file `name`, and have them name it."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    stored = ir.external_data.convert_tensors_to_external(tensors, directory, name, callback=report)
    for value, tensor in zip(values, stored, strict=True):
        value.const_value = tensor


def _view(value: ir.Value, of: ir.Value, directory: Path) -> ir.ExternalTensor:
    tensor, stored = value.const_value, of.const_value
    assert tensor is not None
    assert isinstance(stored, ir.ExternalTensor)
    assert tensor.nbytes == stored.length
    name, shape = name_of(value), ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        stored.location, stored.offset, stored.length, tensor.dtype, shape=shape, name=name, base_dir=directory
    )


def save_like(model: ir.Model, directory: Path, twin: Path, own: Collection[str]) -> None:
    """Write `model.onnx` with a clone of the weights of the graph in `twin`, and a file for the weights that differ.

    Args:
        model: The graph.
        directory: The directory to write to.
        twin: The directory of a bundle whose other weights have the same names and values.
        own: The initializers that differ.
    """
    clone_file(twin / WEIGHTS_NAME, directory / WEIGHTS_NAME)
    written = ir.load(twin / MODEL_NAME).graph.initializers
    differing = []
    for name, value in model.graph.initializers.items():
        if name in own:
            differing.append(value)
        else:
            value.const_value = written[name].const_value
    _store(differing, directory, HEAD_WEIGHTS_NAME)
    ir.save(model, directory / MODEL_NAME)


def clone_file(source: Path, place: Path) -> None:
    """Copy a file. On Btrfs, XFS and bcachefs the copy shares the blocks of `source`, which takes no space or time.

    A hard link would do so everywhere, but the onnx package refuses external data that has more than one name.
    """
    try:
        with source.open("rb") as original, place.open("wb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
    except OSError:  # a file system without reflinks, or two different ones
        shutil.copyfile(source, place)


def save_small(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, and its weights to a file of their own next to it."""
    ir.save(model, path, external_data=f"{path.name}.data")


def save_sharing_weights(model: ir.Model, directory: Path, name: str) -> None:
    """Write `model` as `name` next to a `model.onnx` whose weights it shares by their names."""
    written = ir.load(directory / MODEL_NAME).graph.initializers
    for value in model.graph.initializers.values():
        if value.name is not None and value.name in written:
            value.const_value = written[value.name].const_value
    ir.save(model, directory / name)


def stamp_graph(path: Path, metadata: Mapping[str, str]) -> None:
    """Give a written graph this metadata in place of any that it has. Its bytes depend on its content alone."""
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    path.write_bytes(model.SerializeToString(deterministic=True))
