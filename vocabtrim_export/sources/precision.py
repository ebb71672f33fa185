"""A loaded model in another dtype for the time of a block."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def calibration_model(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give a model in the dtype that this CPU samples fastest in.

    It is a bfloat16 copy where the CPU has instructions for it, which makes it two to three times as fast. Elsewhere it
    is the model itself, in float32 until the context ends.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield model if model.dtype == torch.bfloat16 else _bfloat16_copy(model)
        return
    with in_float32(model):
        yield model


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model's parameters in float32 until the context ends.

    float16 and bfloat16 convert to float32 and back without loss.
    """
    before = model.dtype
    if before == torch.float32:
        yield
        return
    _cast(model, torch.float32)
    try:
        yield
    finally:
        _cast(model, before)


def _bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its parameters in bfloat16. They are never copied in their own dtype."""
    parameters = {
        id(each): torch.nn.Parameter(each.to(torch.bfloat16), requires_grad=False) for each in model.parameters()
    }
    return copy.deepcopy(model, parameters)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters in place.

    Buffers stay as they are: rotary frequencies in half precision would rotate by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
