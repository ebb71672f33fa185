"""`transformers_reference`: the original model predicts the tokens that a bundle's output is compared with."""

import inspect

import numpy as np
import torch
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.vocabulary import Vocabulary, shared_tokens
from engines.errors import VocabtrimError
from runtime.verification.teacher_forcing import GivenText, Predict
from vocabtrim_export.generation_rules import generation_rules
from vocabtrim_export.sources.rotation import fix_long_tables
from vocabtrim_export.sources.source import Source, load_source


def transformers_reference(spec: str, engine: Engine) -> Predict:
    """Load a model in transformers, in float32, to predict tokens.

    Args:
        spec: The model: a hub id, a local directory or a .gguf file. It may be in another file format than the target's
            source (a .gguf file for a bundle made from safetensors), as long as its tokens are the same.
        engine: The target that is compared with it.

    Returns:
        A function that computes the logits after each position of a text.

    Raises:
        VocabtrimError: The model's tokens or rules differ from the target's, the target is quantised, or the model
            cannot be loaded.
    """
    target = engine.manifest
    if target.quantization != "none":
        raise VocabtrimError(
            f"the target's weights are {target.quantization}, so that its output need not be that of {spec}: "
            "leave --reference out to check it against its own engine"
        )
    source = load_source(spec, torch.float32)
    _check_tokens(spec, source, engine)
    if generation_rules(source.model.generation_config) != target.rules:
        raise VocabtrimError(
            f"the generation config of {spec} has other rules than the target's bundle: export the bundle again"
        )
    model = source.model
    fix_long_tables(spec, model, target.context_length)
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def predict(text: GivenText) -> NDArray[np.float32]:
        asked = len(text.tokens)
        keep = {"logits_to_keep": asked} if can_keep else {}
        rows: NDArray[np.float32] = model(torch.tensor([text.fed]), **keep).logits[0, -asked:].numpy()
        missing = max(0, target.vocab_size - rows.shape[1])  # rows that a file of the same model may leave out
        return np.pad(rows, ((0, 0), (0, missing)), constant_values=-np.inf)[:, : target.vocab_size]

    return predict


def _check_tokens(spec: str, source: Source, engine: Engine) -> None:
    if source.tokenizer_digest == engine.manifest.tokenizer:
        return
    file = engine.tokenizer_file
    try:
        if file is None:
            raise VocabtrimError("the target's bundle has no tokenizer to compare: leave --reference out")
        ours = Vocabulary.load(file, engine.manifest.vocab_size)
        shared_tokens(ours, Vocabulary.of(source.tokenizer.backend_tokenizer, source.vocab_size))
    except VocabtrimError as error:
        raise VocabtrimError(
            f"{spec} has another tokenizer than the target ({error}): give the model that it was exported from"
        ) from error
