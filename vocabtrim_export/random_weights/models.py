"""Models of random weights in the shapes of known ones, and EAGLE-3 heads for them.

The tensors share one small piece of noise as overlapping windows, so a model takes next to no memory before it is
written.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from vocabtrim_export.drafters.eagle3 import EagleConfig, EagleHead
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.sources.source import Source
from vocabtrim_export.tracing.composites import rotary_modules

_WORDS = 64  # the tokenizer's; it only has to exist


def _llama3(factor: float) -> dict[str, Any]:
    context = {"original_max_position_embeddings": 8192}
    bands = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **bands, **context}}


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a known model.

    Attributes:
        name: Its name.
        model_type: The type for `AutoConfig.for_model`.
        settings: The fields of its configuration.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.settings["vocab_size"])


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The shape of an EAGLE-3 head whose layer is as large as one of its target's.

    Attributes:
        target: The name of the target's `Shape`.
        rows: Rows of its LM head.
        feature_layers: The target's layers whose inputs it reads.
    """

    name: str
    target: str
    rows: int
    feature_layers: tuple[int, ...]


def _shape(name: str, model_type: str, sizes: Sequence[int], **settings: Any) -> Shape:
    """Returns a shape.

    Args:
        name: Its name.
        model_type: See `Shape`.
        sizes: Vocabulary, hidden, intermediate, layers, attention heads, key/value heads, head, context.
        settings: Other fields of the configuration.
    """
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    keys = [*names.split(), "head_dim", "max_position_embeddings"]
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return Shape(name, model_type, dict(zip(keys, sizes, strict=True)) | none | settings)


# From the models' own config.json.
SHAPES = {
    shape.name: shape
    for shape in (
        _shape(
            "llama-3.2-1b",
            "llama",
            (128_256, 2048, 8192, 16, 32, 8, 64, 131_072),
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            **_llama3(32.0),
        ),
        _shape(
            "llama-3.1-8b",
            "llama",
            (128_256, 4096, 14_336, 32, 32, 8, 128, 131_072),
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            **_llama3(8.0),
        ),
        _shape(
            "qwen2.5-0.5b",
            "qwen2",
            (151_936, 896, 4864, 24, 14, 2, 64, 32_768),
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        _shape(
            "smollm2-135m",
            "llama",
            (49_152, 576, 1536, 30, 9, 3, 64, 8192),
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        ),
        _shape("tiny", "llama", (512, 64, 96, 2, 4, 2, 16, 1024), tie_word_embeddings=True),
    )
}

# The 8B's from config.json of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B: hidden 4096, intermediate 14336, 32 heads, 8 of keys
# and values, draft_vocab_size 32000; layers by EAGLE-3's rule (2, L/2, L - 3). The 1B's is made by the same rules.
HEAD_SHAPES = {
    head.name: head
    for head in (
        HeadShape("eagle3-llama-3.1-8b", "llama-3.1-8b", 32_000, (2, 16, 29)),
        HeadShape("eagle3-llama-3.2-1b", "llama-3.2-1b", 32_000, (2, 8, 13)),
        HeadShape("eagle3-tiny", "tiny", 256, (0, 1)),
    )
}


def random_source(shape: Shape) -> Source:
    """Returns a model of `shape` with random weights that take almost no memory, and a tokenizer of a few words."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(_WORDS)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0")
    config = AutoConfig.for_model(shape.model_type, **shape.settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    _fill(model)
    return Source(_name(shape), model, tokenizer, _digest(shape))


def random_head(shape: HeadShape, target: Source) -> HeadSource:
    """Returns a head of `shape` with random weights for `target`, its tokenizer included; row i is token i."""
    config: Any = target.model.config
    names = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"
    sizes = {name: getattr(config, name) for name in [*names.split(), "max_position_embeddings", "rms_norm_eps"]}
    features = len(shape.feature_layers) * config.hidden_size
    with torch.device("meta"):
        model = EagleHead(EagleConfig(**sizes, num_hidden_layers=1, feature_size=features, head_rows=shape.rows))
    _fill(model)
    model.generation_config = target.model.generation_config
    ids = np.arange(shape.rows)
    return HeadSource(_name(shape), model, target.tokenizer, _digest(shape), "eagle3", ids, shape.feature_layers)


def _name(shape: Shape | HeadShape) -> str:
    return f"random weights, {shape.name}"


def _digest(shape: Shape | HeadShape) -> str:
    return hashlib.sha256(_name(shape).encode()).hexdigest()


def _fill(model: Any) -> None:
    """Give a model on the device "meta" its weights."""
    state = model.state_dict()
    noise = torch.randn(max(sum(tensor.shape) for tensor in state.values()), generator=torch.Generator().manual_seed(0))
    model.load_state_dict({name: _window(noise, name, tensor) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    for rotary in rotary_modules(model):  # its frequencies are no weights: they follow from the configuration
        fresh = type(rotary)(model.config)
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, buffer)
    model.eval()


def _window(noise: Tensor, name: str, like: Tensor) -> Tensor:
    """Returns a matrix whose rows are overlapping windows of `noise`; norms are ones and biases zeros."""
    if like.ndim == 1:
        return torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
    scaled = noise[: sum(like.shape)] * like.shape[1] ** -0.5  # so that activations stay near one
    window: Tensor = scaled.as_strided(like.shape, (1, 1))
    return window
