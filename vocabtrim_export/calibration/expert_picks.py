"""How many distinct experts of a layer consecutive tokens of a text pick: what a verification reads of a mixture."""

from collections import defaultdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engines.bundle.experts import Picks
from vocabtrim_export.calibration import builtin_corpus
from vocabtrim_export.calibration.moments import without_logits
from vocabtrim_export.tracing.experts import expert_modules

_TEXTS, _SIZE = 8, 64  # texts that are read, and the tokens of each
_MOST = 17  # consecutive tokens: the verification of 16 drafted ones


def distinct_experts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Picks:
    """Let a mixture read some 500 tokens of the text that comes with every Python, and count the experts it picks.

    Returns:
        `Experts.distinct` by (experts of a layer, experts that one token picks).
    """
    texts = _texts(model, tokenizer)
    means: dict[tuple[int, int], list[tuple[float, ...]]] = defaultdict(list)

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        index, num_experts = inputs[1], len(module.gate_up_proj)
        by_text = index.reshape(len(texts), -1, index.shape[-1])
        means[num_experts, index.shape[-1]].append(mean_distinct(by_text, num_experts))

    hooks = [module.register_forward_pre_hook(count) for _, module in expert_modules(model)]
    try:
        with torch.inference_mode(), without_logits(model.get_output_embeddings()):
            model(input_ids=texts, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {form: tuple(map(fmean, zip(*layers, strict=True))) for form, layers in means.items()}


def mean_distinct(index: Tensor, num_experts: int) -> tuple[float, ...]:
    """Returns the mean number of distinct experts that 1, 2, 3, … consecutive tokens of the same text pick.

    Args:
        index: int64[texts, tokens, k], the experts that each token picks.
        num_experts: The experts of the layer.
    """
    picked = torch.zeros(*index.shape[:2], num_experts, dtype=torch.bool).scatter_(2, index.cpu(), True)
    within, means = picked, []
    for tokens in range(1, min(_MOST, index.shape[1]) + 1):
        means.append(float(within.sum(-1, dtype=torch.float32).mean()))
        within = within[:, :-1] | picked[:, tokens:]
    return tuple(means)


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Returns int64[texts, tokens], the beginnings of documents spread evenly over the corpus."""
    documents = builtin_corpus().documents
    size = min(_SIZE, int(getattr(model.config.get_text_config(), "max_position_embeddings", _SIZE)))
    texts = []
    for document in documents[:: max(1, len(documents) // _TEXTS)]:
        ids = tokenizer(document.text)["input_ids"][:size]
        texts += [ids] if len(ids) == size else []
    return torch.tensor(texts[:_TEXTS])
