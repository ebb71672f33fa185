"""The original model as the judge of what a bundle generates."""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bundle.read import Manifest
from engines.errors import VocabtrimError
from runtime.verification.teacher_forcing import Predict
from vocabtrim_export.generation_rules import generation_rules
from vocabtrim_export.sources.rotation import fix_long_tables
from vocabtrim_export.sources.source import load_source


def transformers_reference(spec: str, target: Manifest) -> Predict:
    """What MODEL predicts in transformers, in float32. Raises `VocabtrimError` where it cannot judge `target`."""
    if target.quantization != "none":
        raise VocabtrimError(
            f"the target's weights are {target.quantization}, so that its output need not be that of {spec}: "
            "leave --reference out to check it against its own engine"
        )
    source = load_source(spec, torch.float32)
    if source.tokenizer_digest != target.tokenizer:
        raise VocabtrimError(f"{spec} has another tokenizer than the target: give the model that it was exported from")
    if generation_rules(source.model.generation_config) != target.rules:
        raise VocabtrimError(
            f"the generation config of {spec} has other rules than the target's bundle: export the bundle again"
        )
    model = source.model
    fix_long_tables(spec, model, target.context_length)
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def predict(prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        keep = {"logits_to_keep": len(tokens)} if can_keep else {}
        rows: NDArray[np.float32] = model(ids, **keep).logits[0, -len(tokens) :].numpy()
        return rows[:, : target.vocab_size]

    return predict
