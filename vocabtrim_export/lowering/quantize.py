"""Weight-only quantisation of a matrix in blocks of its rows."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantization = Literal["none", "int8", "int4", "fp8"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}
BLOCK = 32
HEAD = "head"
_ROWS_AT_ONCE = 2048
# clipping a block's extremes a little costs less than it gains with 16 levels, nothing with 256
_SHRINKS = {4: (0.85, 0.925, 1.0), 8: (1.0,)}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [out, in] in blocks of `BLOCK` along its input: w ≈ (q − zero) · scale.

    Every row depends on itself alone, so selecting rows before or after quantisation gives the same result.

    Attributes:
        packed: uint8[out, blocks, BLOCK·bits/8], low nibble first.
        scales: [out, blocks].
        zero_points: uint8[out, ceil(blocks·bits/8)].
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor


def quantize_blocks(weight: Tensor, bits: int, moments: Tensor | None = None) -> Blocks:
    """Quantise a weight, choosing for each block the best of several scales and zero points.

    With `moments` the best has the least error of the product, eᵀ·moments·e for the block's rounding error e; without,
    the least squared error.

    Args:
        weight: [out, in].
        bits: 4 or 8.
        moments: E[x xᵀ] of each block's inputs, float32[blocks, BLOCK, BLOCK].
    """
    parts = [_quantize_rows(rows, bits, moments) for rows in weight.split(_ROWS_AT_ONCE)]
    packed, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
    return Blocks(packed, scales, zero_points)


def _quantize_rows(weight: Tensor, bits: int, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out, size = weight.shape
    count, top = -(-size // BLOCK), (1 << bits) - 1
    blocks = torch.nn.functional.pad(weight.float(), (0, count * BLOCK - size)).view(out, count, BLOCK)
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    span = blocks.amax(-1, keepdim=True).clamp(min=0) - low
    span = torch.where(span == 0, 1.0, span)
    zero_low = (-low / span * top).floor()
    least = torch.full(span.shape, float("inf"), dtype=torch.float64)
    best_q, best_scale, best_zero = torch.zeros_like(blocks, dtype=torch.uint8), span, zero_low
    for shrink in _SHRINKS[bits]:
        scale = (span * (shrink / top)).to(weight.dtype).float()
        for zero in (zero_low, (zero_low + 1).clamp(max=top)):
            q = (blocks / scale + zero).round_().clamp_(0, top)
            error = product_error((q - zero) * scale - blocks, moments)
            better = error < least
            least = torch.where(better, error, least)
            best_q = torch.where(better, q.to(torch.uint8), best_q)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return (
        pack(best_q, bits),
        best_scale[..., 0].to(weight.dtype),
        pack(best_zero[..., 0].to(torch.uint8), bits),
    )


def product_error(off: Tensor, moments: Tensor | None) -> Tensor:
    """Returns the cost of the rounding error `off`, [out, blocks, n·BLOCK], as float64[out, blocks, 1].

    It is computed in float64, so that the tiling of a matrix product, which depends on the number of rows, does not
    change which candidate is best. moments: see `quantize_blocks`.
    """
    out, blocks, _ = off.shape
    off = off.double().view(out, -1, BLOCK)
    weighted = off if moments is None else (off.transpose(0, 1) @ moments.double()).transpose(0, 1)
    return (weighted * off).reshape(out, blocks, -1).sum(-1, keepdim=True)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack two 4-bit values a byte along the last axis, the first in the low nibble."""
    if bits == 8:
        return values
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return padded[..., ::2] | (padded[..., 1::2] << 4)
