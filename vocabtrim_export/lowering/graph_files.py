"""Writing graphs: weights are in a file beside the graph, and graphs of one bundle can share them."""

import fcntl
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from engines.bundle.read import MODEL_NAME, WEIGHTS_NAME

HEAD_WEIGHTS_NAME = "head.onnx.data"
_FICLONE = 0x40049409  # from linux/fs.h; the module fcntl lacks it
Progress = Callable[[str, int, int], None]


def save_graph(model: ir.Model, directory: Path, task: str, progress: Progress) -> None:
    """Write `model.onnx`, and its weights to `model.onnx.data`.

    Args:
        model: The graph.
        directory: Where to write.
        task: The task's name for `progress`.
        progress: Called with (task, tensors written, all tensors).
    """
    progress(task, 0, 1)

    def report(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(task, info.index + 1, info.total)

    ir.save(model, directory / MODEL_NAME, external_data=WEIGHTS_NAME, callback=report)


def save_like(model: ir.Model, directory: Path, twin: Path, own: Collection[str]) -> None:
    """Write `model.onnx` with a clone of the weights of the graph in `twin`, and a file for the weights that differ.

    Args:
        model: The graph.
        directory: Where to write.
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
    tensors = [value.const_value for value in differing if value.const_value is not None]
    stored = ir.external_data.convert_tensors_to_external(tensors, directory, HEAD_WEIGHTS_NAME)
    for value, tensor in zip(differing, stored, strict=True):
        value.const_value = tensor
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
    """Write `model` to `path`, and its weights to a file of their own beside it."""
    ir.save(model, path, external_data=f"{path.name}.data")


def save_sharing_weights(model: ir.Model, directory: Path, name: str) -> None:
    """Write `model` as `name` beside a `model.onnx` whose weights it shares by their names."""
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
