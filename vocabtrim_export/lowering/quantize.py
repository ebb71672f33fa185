"""Weight-only quantisation of a matrix in blocks of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vocabtrim_export.lowering.cores import map_on_cores

Quantization = Literal["none", "int8", "int4", "fp8"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}
BLOCK = 32  # inputs of a block, but where 8 bits allow more
_WIDE_BLOCKS = (128, 64)
HEAD = "head"
_WEIGHTS_AT_ONCE = 1 << 17
# clipping a block's extremes gains more than it costs with 16 levels, and nothing with 256
_SHRINKS = {4: (0.85, 0.925, 1.0), 8: (1.0,)}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [out, in] in blocks along its input: w ≈ (q − zero) · scale.

    Every row depends on itself alone, so selecting rows before or after quantisation gives the same result.

    Attributes:
        packed: uint8[out, blocks, block·bits/8], low nibble first.
        scales: [out, blocks].
        zero_points: uint8[out, ceil(blocks·bits/8)].
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor


def block_size(bits: int, size: int) -> int:
    """Returns how many of a row's inputs share a scale and a zero point.

    With 8 bits a wide block loses little and a product takes a fifth less time; with 4 bits drafts get worse.

    Args:
        bits: 4 or 8.
        size: The inputs of a row. Wide blocks are taken where they divide it.
    """
    wide = _WIDE_BLOCKS if bits == 8 else ()
    return next((block for block in wide if size % block == 0), BLOCK)


def quantize_blocks(
    weight: Tensor, bits: int, moments: Tensor | None = None, block: int = BLOCK, dtype: torch.dtype | None = None
) -> Blocks:
    """Quantise a weight, choosing for each block the best of several scales and zero points.

    With `moments` the best has the least error of the product, eᵀ·moments·e for the block's rounding error e; without,
    the least squared error.

    Args:
        weight: [out, in], or several such, [n, out, in], which count as n·out rows.
        bits: 4 or 8.
        moments: E[x xᵀ] of each block's inputs, float32[blocks, block, block].
        block: The inputs of a block.
        dtype: The weight is first cast to this dtype, a few rows at a time; None leaves it as it is.
    """

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _quantize_rows(rows.to(dtype or weight.dtype), bits, moments, block)

    parts = map_on_cores(quantize, rows_in_cache(weight))
    packed, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
    return Blocks(packed, scales, zero_points)


def _quantize_rows(weight: Tensor, bits: int, moments: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    blocks = blocks_first(weight, block)
    top = (1 << bits) - 1
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    span = blocks.amax(-1, keepdim=True).clamp(min=0) - low
    span = torch.where(span == 0, 1.0, span)
    zero_low = (-low / span * top).floor()
    least = torch.full(span.shape, float("inf"), dtype=torch.float64)
    best_q, best_scale, best_zero = torch.zeros_like(blocks), span, zero_low
    q, off = torch.empty_like(blocks), torch.empty_like(blocks)
    for shrink in _SHRINKS[bits]:
        scale = (span * (shrink / top)).to(weight.dtype).float()
        for zero in (zero_low, (zero_low + 1).clamp(max=top)):
            torch.div(blocks, scale, out=q).add_(zero).round_().clamp_(0, top)
            error = product_error(torch.sub(q, zero, out=off).mul_(scale).sub_(blocks), moments)
            better = error < least
            least = torch.where(better, error, least)
            torch.where(better, q, best_q, out=best_q)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return (
        pack(best_q.to(torch.uint8).transpose(0, 1), bits),
        best_scale[..., 0].T.to(weight.dtype),
        pack(best_zero[..., 0].T.to(torch.uint8), bits),
    )


def rows_in_cache(weight: Tensor) -> Sequence[Tensor]:
    """Returns the rows of a weight, [out, in] or [n, out, in], in parts [rows, in].

    Each has intermediate values that fit in a core's cache.
    """
    rows = max(1, _WEIGHTS_AT_ONCE // weight.shape[-1])
    return [part for matrix in (weight if weight.ndim == 3 else (weight,)) for part in matrix.split(rows)]


def blocks_first(weight: Tensor, block: int = BLOCK) -> Tensor:
    """Returns a weight [out, in] as float32[blocks, out, block], the layout of a product with each block's moments."""
    out, size = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -size % block))
    return padded.view(out, -1, block).transpose(0, 1).contiguous()


def product_error(off: Tensor, moments: Tensor | None) -> Tensor:
    """Returns the cost of a rounding error as float64[blocks, out, 1].

    It is computed in float64, so that the tiling of a matrix product, which depends on the number of rows, does not
    change which candidate is best.

    Args:
        off: The rounding error, float32[blocks, out, block].
        moments: See `quantize_blocks`.
    """
    wide = off.double()
    weighted = wide if moments is None else wide @ moments.double()
    return (weighted * wide).sum(-1, keepdim=True)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack two 4-bit values a byte along the last axis, the first in the low nibble."""
    if bits == 8:
        return values
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return padded[..., ::2] | (padded[..., 1::2] << 4)
