"""The language model inside a multimodal checkpoint: its configuration and its tensors, by the names it has alone."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from engines.errors import VocabtrimError
from vocabtrim_export.sources.mapped import Hold
from vocabtrim_export.sources.weight_files import tensor_shapes

# Text models that transformers registers only inside a multimodal one, and the language model that they are: on text
# alone their three-dimensional positions are the plain ones.
_SAME_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# What the code of the whole always does, and the language model's does only where its config says so.
_ALWAYS: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")
_PREFIX = re.compile(r"^(?:thinker\.)?(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
_HEAD = re.compile(r"^(?:thinker\.)?(?:model\.)?(?:language_model\.|text_model\.)?lm_head\.")
_OTHER_PARTS = re.compile(
    r"^(?:thinker\.)?(?:model\.)?(?:vision|visual|image|img|audio|multi_modal|mm_|connector|embed_vision|embed_audio"
    r"|patch|aligner|vit|vqmodel|video|qformer|query_tokens|language_projection|perceiver|sam_|talker|token2wav|code2wav)"
)


def text_config(spec: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the language model in `config`: itself, or its text model's where it is multimodal.

    Raises:
        VocabtrimError: transformers cannot run that text model by itself.
    """
    if config.is_encoder_decoder:
        return config
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several: an encoder-decoder of different models
        return config
    if text is config or text in (None, config):
        return config
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text
    if text.model_type in _SAME_AS:
        return _as_language_model(text)
    raise VocabtrimError(
        f"{spec} ({config.model_type}) is a multimodal model whose text model ({text.model_type}) transformers cannot "
        "run by itself: give a model whose text model is a known one, such as Llama, Qwen3 or Gemma 3"
    )


def is_multimodal(config: PreTrainedConfig, text: PreTrainedConfig) -> bool:
    """Returns whether `text`, from `text_config`, is a part of `config`."""
    return text is not config


def multimodal_note(spec: str, text: PreTrainedConfig) -> str:
    """Returns the note that only the text model of a multimodal model is exported."""
    return f"{spec} is multimodal: its text model ({text.model_type}) is exported, for prompts of text alone"


def text_tensor_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the names that the language model's tensors of a multimodal checkpoint have in the model alone.

    The keys are their names in the checkpoint. Where the language model has a prefix of its own, everything else
    belongs to other parts. Where it has none, the tensors of vision and audio towers and their projectors are left out
    by name.
    """
    names = list(names)
    has_prefix = any(map(_PREFIX.match, names))
    renamed = {}
    for name in names:
        if _HEAD.match(name):
            renamed[name] = _HEAD.sub("lm_head.", name)
        elif _PREFIX.match(name):
            renamed[name] = _PREFIX.sub("model.", name)
        elif not has_prefix and not _OTHER_PARTS.match(name):
            renamed[name] = name
    return renamed


def text_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Returns the language model's tensors of the .safetensors `files`; the rest is not read."""
    names = {file: list(tensor_shapes(file)) for file in files}
    renamed = text_tensor_names(name for listed in names.values() for name in listed)  # one file may hold towers alone
    weights: dict[str, Tensor] = {}
    for file, listed in names.items():
        with safe_open(file, "pt") as opened:
            weights |= {renamed[name]: opened.get_tensor(name) for name in listed if name in renamed}
    return weights


def upright_experts(weights: dict[str, Tensor], text: PreTrainedConfig, hold: Hold) -> dict[str, Tensor]:
    """Transpose the experts of Qwen3-VL's mixtures, which are stored as [experts, inputs, outputs].

    Args:
        weights: The language model's tensors, by the names that it has alone.
        text: Its configuration.
        hold: Keeps a transposed tensor, see `holder`.
    """
    if text.model_type != "qwen3_moe":
        return weights
    inner, outer = text.moe_intermediate_size, text.hidden_size
    shapes = {"gate_up": (2 * inner, outer), "down": (outer, inner)}
    experts = {name: shapes[match[1]] for name in weights if (match := _EXPERTS.search(name))}
    lying = {name for name, shape in experts.items() if weights[name].shape[1:] == shape[::-1] != shape}
    return {name: hold(tensor.mT) if name in lying else tensor for name, tensor in weights.items()}


def _as_language_model(text: PreTrainedConfig) -> PreTrainedConfig:
    kind: Any = CONFIG_MAPPING[_SAME_AS[text.model_type]]
    settings = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    rope = dict(settings.get("rope_parameters") or {})
    rope.pop("mrope_section", None)
    rope.pop("mrope_interleaved", None)
    rope["rope_type"] = "default" if rope.get("rope_type") in (None, "mrope") else rope["rope_type"]
    config: PreTrainedConfig = kind(**settings | {"rope_parameters": rope} | _ALWAYS.get(text.model_type, {}))
    return config
