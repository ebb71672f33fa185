"""Weights in mapped files: what is not in use need not be in memory."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.bundle.atomic_replace import ASIDE
from engines.errors import VocabtrimError

Hold: TypeAlias = Callable[[Tensor], Tensor]
_JOINING = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
_SMALL = 1 << 20  # bytes: what is smaller stays in memory


def holder(directory: Path | None) -> Hold:
    """Returns a function that gives a tensor of the same values, in a mapped file without a name in `directory`.

    The file is gone with its tensor. Without a directory, and for small tensors, the tensor itself is given.
    """

    def hold(tensor: Tensor) -> Tensor:
        return tensor if directory is None or tensor.nbytes < _SMALL else _in_file(tensor.contiguous(), directory)

    return hold


class MappedResults(TorchDispatchMode):
    """A context in which large results of PyTorch's `cat` and `stack` are kept in mapped files.

    transformers stacks the experts of a checkpoint while it loads them; in memory, they would be most of the model.
    Only the operations of the thread that opens the context are seen.

    Args:
        hold: The function that keeps a tensor, from `holder`.
    """

    def __init__(self, hold: Hold) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hold = hold

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._hold(result) if func in _JOINING and result.device.type == "cpu" else result


def check_room(directory: Path, needed: float, what: str) -> None:
    """Refuse work that the disk of `directory` has no room for.

    Args:
        directory: An existing directory.
        needed: The bytes.
        what: The part that needs them, to begin a sentence with.

    Raises:
        VocabtrimError: Less is free, with both numbers.
    """
    usage = shutil.disk_usage(directory)
    if usage.total and usage.free < needed:  # a file system of the kernel has no size; writing there fails by itself
        raise VocabtrimError(
            f"{what} needs {needed / 1e9:.1f} GB of disk space in {directory} and there are {usage.free / 1e9:.1f}: "
            "free some, or choose another --output"
        )


def _in_file(tensor: Tensor, directory: Path) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=ASIDE) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a mapped file that has no room kills its writer
        except OSError:
            check_room(directory, tensor.nbytes, "a weight")
            raise
        storage: Any = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=tensor.nbytes)
    held: Tensor = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
    return held.copy_(tensor)
