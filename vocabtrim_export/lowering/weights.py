"""`Weight`: a weight that is computed when it is written, so that an export never holds two copies of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a known shape and dtype whose values are computed when they are asked for.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        stored: Returns the values before they are cast to `dtype`; views of the model's memory where that is possible.
        moments: float32[blocks, BLOCK, BLOCK], the second moments of the inputs that a product multiplies this weight
            with; None if they are not known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: Callable[[], Tensor]
    moments: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None, moments: Tensor | None = None) -> "Weight":
        """Returns `tensor`, cast to `dtype` if it is a floating-point tensor."""
        target = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return cls(tuple(tensor.shape), target, tensor.detach, moments)

    def load(self) -> Tensor:
        """Returns the values, contiguous."""
        return self.stored().to(self.dtype, memory_format=torch.contiguous_format)

    def rows(self, ids: Tensor) -> "Weight":
        """Returns the rows `ids: int64[n]`."""
        return Weight((len(ids), *self.shape[1:]), self.dtype, lambda: self.stored()[ids], self.moments)

    def transposed(self) -> "Weight":
        """Returns the matrix with rows and columns exchanged."""
        return Weight(self.shape[::-1], self.dtype, lambda: self.stored().t(), self.moments)

    def reshaped(self, shape: tuple[int, ...]) -> "Weight":
        """Returns the same numbers in another shape, without the moments of the inputs."""
        return Weight(shape, self.dtype, lambda: self.stored().reshape(shape))

    def plus(self, number: float) -> "Weight":
        """Returns every value plus `number`, added in float32."""
        return Weight(self.shape, self.dtype, lambda: self.load().float() + number)

    def to_ir(self, name: str) -> ir.LazyTensor:
        """Returns an initializer's values, which are loaded when the graph is written."""
        dtype = from_torch_dtype(self.dtype)
        return ir.LazyTensor(lambda: TorchTensor(self.load(), name=name), dtype, ir.Shape(self.shape), name=name)


class Parts:
    """The tensors that one computation gives: computed when one is taken that is not held, each held until it is taken.

    A graph that is written takes all parts of a weight one after another, and then holds none of them.
    """

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self._compute = compute
        self._held: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        """Returns the part at this index."""
        if index not in self._held:
            self._held = dict(enumerate(self._compute()))
        return self._held.pop(index)


def concatenate(weights: Sequence[Weight]) -> Weight:
    """Returns the rows of `weights`, one after another; all are multiplied with the same inputs."""
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    shape = rows, *first.shape[1:]
    return Weight(shape, first.dtype, lambda: torch.cat([weight.stored() for weight in weights]), first.moments)
