"""Checkpoints in half precision, whose weights stay in their files although a bundle is in float32."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from vocabtrim_export.sources.weight_files import tensor_dtypes

_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
_FLOAT32 = "F32"
_NO_FLOATS = {"BOOL", "I64"}


def half_dtype(files: Sequence[Path]) -> torch.dtype | None:
    """Returns float16 or bfloat16 where a checkpoint's weights are so, some in float32 apart; None for others."""
    dtypes = {dtype for file in files for dtype in tensor_dtypes(file).values()} - _NO_FLOATS - {_FLOAT32}
    return _HALF.get(dtypes.pop()) if len(dtypes) == 1 else None


def put_back_float32(
    model: PreTrainedModel, dtype: torch.dtype, files: Sequence[Path], unread: Collection[str]
) -> bool:
    """Give a model that was loaded in half precision the tensors that its checkpoint has in float32, as they are.

    Args:
        model: The model. Its parameters are changed in place.
        dtype: The half precision that it was loaded in.
        files: The .safetensors files of its checkpoint.
        unread: The checkpoint's tensors that the model does not have.

    Returns:
        Whether the model now holds every number as it would when loaded in float32: not where a float32 tensor has
        another name in the model or was converted, nor where the model's code computed a buffer in half precision.
    """
    if any(buffer.dtype == dtype for buffer in model.buffers()):
        return False
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept_in_float32 = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    for name, tensor in _float32_tensors(files):
        if name in parameters and parameters[name].shape == tensor.shape:
            parameters[name].data = tensor
        elif name not in unread and name not in kept_in_float32:
            return False
    return True


def _float32_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields the float32 tensors of a checkpoint by name; they stay in their files."""
    for file in files:
        if _FLOAT32 not in tensor_dtypes(file).values():
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                if opened.get_slice(name).get_dtype() == _FLOAT32:
                    yield name, opened.get_tensor(name)
