"""Second moments of the inputs of a model's linear layers: int4 quantisation weighs its rounding errors with them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from vocabtrim_export.calibration import builtin_corpus
from vocabtrim_export.drafters.base import FeatureHead, ParallelHeads
from vocabtrim_export.lowering.quantize import BLOCK, HEAD
from vocabtrim_export.tracing.layers import layer_inputs

_TOKENS, _PIECE = 2048, 256


def input_moments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, run: Callable[[Tensor], None] | None = None
) -> dict[str, Tensor]:
    """Measure E[x xᵀ] of the inputs of every linear layer, within each block of inputs.

    It is measured on some 2,000 tokens of the text that comes with every Python, whatever a calibration counted. So
    bundles of one model have the same quantised layers, and a trimmed drafter differs from a full one in its head
    alone.

    Args:
        model: The model whose layers are measured.
        tokenizer: Its tokenizer.
        run: Makes `model` read a text, int64[1, n]; needed for a model that reads more than tokens.

    Returns:
        float32[in / BLOCK, BLOCK, BLOCK] by the module's name, the LM head's under `HEAD`.
    """
    sums: dict[str, Tensor] = {}
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    hooks = [
        module.register_forward_pre_hook(_adder(sums, HEAD if module is head else name))
        for name, module in linears.items()
    ]
    try:
        with torch.inference_mode(), without_logits(head):
            for piece in _pieces(tokenizer, model):
                run(piece) if run else model(piece, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / max(float(total.diagonal(dim1=1, dim2=2).mean()), 1e-30) for name, total in sums.items()}


def _pieces(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> list[Tensor]:
    """Returns int64[1, n] token ids of documents spread evenly over the corpus."""
    documents = builtin_corpus().documents
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", _PIECE))
    size = min(_PIECE, context)
    chosen = documents[:: max(1, len(documents) * size // _TOKENS)]
    return [torch.tensor([tokenizer(document.text)["input_ids"][:size]]) for document in chosen]


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        blocks = nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK).transpose(0, 1)
        sums[name] = sums.get(name, torch.zeros(())) + blocks.transpose(1, 2) @ blocks

    return add


@contextmanager
def without_logits(head: Any) -> Iterator[None]:
    """Let an LM head return zeros for the block, which take no time and no memory; its hooks run as ever."""
    if head is None:
        yield
        return
    columns = int(head.weight.shape[0])
    head.forward = lambda x: x.new_zeros(1).expand(*x.shape[:-1], columns)
    try:
        yield
    finally:
        del head.forward


def head_run(
    head: FeatureHead | ParallelHeads, target: PreTrainedModel, layers: Sequence[int]
) -> Callable[[Tensor], None]:
    """Returns what `input_moments` runs for a head: the target reads a text, and the head reads its features.

    Args:
        head: The head.
        target: Its target, which gives the features.
        layers: The target's layers whose inputs the head reads.
    """

    def run(piece: Tensor) -> None:
        with layer_inputs(target, layers) as entered, without_logits(target.get_output_embeddings()):
            target(piece, use_cache=False)
        head.read_text(piece, torch.cat(entered(), -1))

    return run
