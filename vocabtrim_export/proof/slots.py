"""In-context slots that a proof fills, and the model's logits for the tokens in them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.bundle.graph_io import SLOT_TOKEN_IDS, SLOT_WEIGHT
from engines.bundle.head_rows import HeadRows
from engines.bundle.manifest import HEAD_ROWS_NAME
from engines.bundle.vocab_map import NOT_KEPT
from engines.slots import Slots
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.proof.blocks import is_rounded
from vocabtrim_export.proof.tokens import Calls

_FILLED = 8
_GAIN = 8.0  # a row is fed times this number: the token in one of the slots then wins, and token_ids must name it


class FilledSlots:
    """Slots that hold a few tokens which the trimmed head lacks, by the rows that the bundle stores for them.

    Each row is fed times one of two numbers, by turns; by default one of them wins whatever the sign of the logits.

    Args:
        directory: The bundle's.
        plan: The description of the bundle, which has slots.
        gains: These numbers.

    Attributes:
        head: The name of the model's LM head.
        token_ids: int64[n], the tokens, in the first n slots.
        filled: The graph's inputs by name, with these tokens in its slots.
        emptied: The same with no token, but with the rows that were there.
        kept_token_ids: int64[K + slots], the token of each column of the logits; `NOT_KEPT` for an empty slot.
        inverse: int64[full_vocab], the column of each token.

    Raises:
        VocabtrimError: The file of rows is not one for this head.
    """

    def __init__(self, directory: Path, plan: BundlePlan, gains: tuple[float, float] = (_GAIN, -_GAIN)) -> None:
        assert plan.vocab_map is not None
        lost = plan.lost_token_ids
        spaced = np.linspace(0, len(lost) - 1, min(_FILLED, plan.slots, len(lost))).astype(np.int64)
        self.token_ids = lost[spaced]
        stored = "none" if plan.trt else plan.quantization  # TensorRT's are stored dequantised
        rows = HeadRows(directory / HEAD_ROWS_NAME, plan.vocab_map, stored)
        head: Any = plan.source.model.get_output_embeddings()
        self.head = next(name for name, module in plan.source.model.named_modules() if module is head)
        own = plan.rows_of(self.token_ids)
        self._own = head.weight.data[own].float()
        self._written = torch.from_numpy(rows.read(self.token_ids)[0])[:, : self._own.shape[1]]
        self._bias: Any = None if head.bias is None else head.bias.data[own].float()
        self._gains = np.resize(np.array(gains, np.float32), len(self.token_ids))
        self._quantization = plan.quantization
        slots = Slots(plan.vocab_map, rows, (self._own.shape[1], plan.slots), np.dtype(np.float32))
        slots.see(self.token_ids.tolist())
        weight: NDArray[np.float32] = slots.inputs[SLOT_WEIGHT].view(np.float32)
        weight[:, : len(self._gains)] *= self._gains
        self.filled: Mapping[str, NDArray[np.generic]] = slots.inputs
        self.emptied = {**slots.inputs, SLOT_TOKEN_IDS: np.full(plan.slots, NOT_KEPT, np.int64)}
        self.kept_token_ids, self.inverse = slots.kept_token_ids, slots.inverse

    @property
    def are_the_models(self) -> bool:
        """Whether the written rows of a quantised head are the model's, rounded; logits prove any other head."""
        return self._quantization == "none" or is_rounded(self._written, self._own, self._quantization)

    def by_call(self, calls: Calls) -> list[Mapping[str, NDArray[np.generic]]]:
        """Returns the graph's inputs for each call of a proof: slots are emptied before the last."""
        return [*[self.filled] * (len(calls.lengths) - 1), self.emptied]

    @contextmanager
    def as_columns(self, head: nn.Module, rows: torch.Tensor | None) -> Iterator[None]:
        """Give the model's LM head only some of its own rows, and one for each token in a slot, for the block.

        Args:
            head: The LM head.
            rows: int64[K], the rows; None: all that the head then has.
        """
        before: list[tuple[Any, Any]] = []
        slotted = self._own if self._quantization == "none" else self._written

        def enter(module: Any, _inputs: Any) -> None:
            before.append((module.weight, module.bias))
            weight, bias = module.weight.data, None if module.bias is None else module.bias.data
            if rows is not None:
                weight, bias = weight[rows], None if bias is None else bias[rows]
            gained = slotted * torch.from_numpy(self._gains)[:, None]
            module.weight = nn.Parameter(torch.cat((weight, gained)), requires_grad=False)
            if bias is not None:
                module.bias = nn.Parameter(torch.cat((bias, self._bias)), requires_grad=False)

        def leave(module: Any, _inputs: Any, _output: Any) -> None:
            module.weight, module.bias = before.pop()

        # Behind the hooks of `dequantized` on the way in, before them on the way out.
        handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, prepend=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def with_empty(self, logits: NDArray[np.float32], calls: Calls) -> NDArray[np.float32]:
        """Returns the model's `logits`, [S, K + n], as the graph must compute them by call.

        Those of empty slots are -inf.
        """
        filled = len(self.token_ids)
        empty = len(self.kept_token_ids) - logits.shape[1]
        every = np.pad(logits, ((0, 0), (0, empty)), constant_values=-np.inf)
        every[len(every) - calls.lengths[-1] :, logits.shape[1] - filled :] = -np.inf
        return every


def filled_slots(directory: Path, plan: BundlePlan) -> FilledSlots | None:
    """Returns the slots of a bundle, filled; None where it has none."""
    return FilledSlots(directory, plan) if plan.slots else None
