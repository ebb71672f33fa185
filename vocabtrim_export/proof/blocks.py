"""Quantised weights read from a graph, dequantised, and compared with a model's own."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocabtrim_export.lowering.cores import map_on_cores

EVERY = slice(None)
_PART = 2**18  # weights that a core works on at once: they stay in its cache, and no whole tensor is copied
# Largest root mean square error of a row, as a share of the row's own: what rounding to 4 or 8 bits in blocks never
# comes near, and another row's values exceed.
_MOST_ERROR = {"int4": 0.6, "int8": 0.1, "fp8": 0.1}


def is_rounded(given: Tensor, own: Tensor, quantization: str) -> bool:
    """Returns whether `given` is `own`, [out, in], rounded to `quantization`: none of its rows is another's."""
    most = _MOST_ERROR.get(quantization, 0.0)
    return given.shape == own.shape and float(_row_errors(given, own).max()) <= most


def _row_errors(given: Tensor, own: Tensor) -> Tensor:
    """Returns the error of each row as a share of its size, [out]; 0 for a row of zeros that is still one."""
    return torch.cat(map_on_cores(lambda rows: _part_errors(given[rows], own[rows]), _parts(given)))


def _parts(matrix: Tensor) -> list[slice]:
    """Returns the rows of `matrix` in parts."""
    count = max(1, _PART // matrix.shape[1])
    return [slice(begin, begin + count) for begin in range(0, len(matrix), count)]


@torch.inference_mode()  # in each thread: a model's own weights may ask for gradients
def _part_errors(given: Tensor, own: Tensor) -> Tensor:
    own = own.float()
    difference = torch.linalg.vector_norm(given - own, dim=-1)
    return torch.where(difference == 0, 0, difference / torch.linalg.vector_norm(own, dim=-1))  # NaN stays NaN


class Memory:
    """Memory for one float32 matrix after another. Fresh memory takes longer to get than a matrix to dequantise."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Returns float32[rows, columns] of any values. It lies where the matrix before it lay, which is then lost."""
        if self._numbers.numel() < rows * columns:
            self._numbers = torch.empty(rows * columns)
        return self._numbers[: rows * columns].view(rows, columns)


def from_blocks(
    written: Mapping[str, ir.Value],
    tensor: str,
    bits: int,
    memory: Memory,
    *,
    expert: int | None = None,
    rows: slice = EVERY,
) -> Tensor:
    """Returns the float32[out, in] that blocks of MatMulNBits, QMoE or GatherBlockQuantized stand for.

    Args:
        written: The graph's initializers.
        tensor: The weight's name; its parts have longer ones.
        bits: 4 or 8.
        memory: Where the result lies.
        expert: The expert whose matrix is read, of QMoE's [experts, out, in]; None for other operators.
        rows: The rows to return.
    """
    arrays = [_array(written[f"{tensor}.{part}"]) for part in ("quantized", "zero_points", "scales")]
    values, zeros, scales = [(array if expert is None else array[expert])[rows] for array in arrays]
    weight = memory.matrix(len(values), values[0].size * 8 // bits)

    @torch.inference_mode()  # which holds for a thread, and the model may run in it
    def fill(part: slice) -> None:
        weight[part] = _rows_from_blocks(_tensor(values[part]), _tensor(zeros[part]), _tensor(scales[part]), bits)

    map_on_cores(fill, _parts(weight))
    return weight


def _rows_from_blocks(values: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    if bits == 4:
        values, zeros = (torch.stack([x & 15, x >> 4], -1).flatten(-2) for x in (values, zeros))
    zeros, values = zeros[:, : scales.shape[1]], values.reshape(*scales.shape, -1)
    return values.float().sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def read_tensor(value: ir.Value) -> Tensor:
    """Returns the tensor; a type that PyTorch cannot read from NumPy becomes float32, which holds it exactly."""
    return _tensor(_array(value))


def _array(value: ir.Value) -> NDArray[np.generic]:
    """Returns the tensor as it lies in the mapped file."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _tensor(numbers: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(numbers.copy() if numbers.dtype.kind in "ui" else numbers.astype("float32"))
