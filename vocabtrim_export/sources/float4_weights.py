"""Weights of 4-bit floating-point numbers (E2M1) in blocks with a scale each: mxfp4 and nvfp4."""

import torch
from torch import Tensor

_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers of 4 bits; the highest bit is the sign


def float4(packed: Tensor) -> Tensor:
    """Unpack uint8[..., n] to float32[..., 2n]: two numbers a byte, the first in the low nibble."""
    numbers = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)])
    return numbers[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def exponents(scales: Tensor) -> Tensor:
    """Returns float32, the powers of 2 that uint8 exponents (E8M0, 127 more than they are) stand for."""
    return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)


def scaled(packed: Tensor, scales: Tensor) -> Tensor:
    """Dequantise numbers of 4 bits.

    Args:
        packed: uint8[out, in / 2].
        scales: float32[out, blocks], the factor of each block of a row.

    Returns:
        float32[out, in].

    Raises:
        IndexError: The two do not belong together.
    """
    numbers = float4(packed)
    if scales.ndim != 2 or len(scales) != len(numbers) or numbers.shape[1] % scales.shape[1]:
        raise IndexError(f"{list(packed.shape)} bytes and {list(scales.shape)} scales do not belong together")
    return numbers * scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)


def mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weights of experts, [experts, in, out], expert by expert.

    Args:
        blocks: uint8[experts, out, in / 32, 16]: two numbers a byte, the first in the low nibble.
        scales: uint8[experts, out, in / 32]: exponents of 2, 127 more than they are.
        dtype: The dtype of the weights, in which every product of such a number and scale is exact, but for float16.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise IndexError(f"blocks {list(blocks.shape)} and scales {list(scales.shape)} do not belong together")
    experts = zip(blocks, scales, strict=True)
    return torch.stack([scaled(packed.flatten(1), exponents(scale)).to(dtype).T for packed, scale in experts])
