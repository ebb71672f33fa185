"""config.json of an EAGLE head, in the layouts of SafeAILab and SpecForge, ModelOpt, and speculators."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engines.bundle.typed_json import decode, read
from engines.errors import VocabtrimError
from vocabtrim_export.sources.head_kinds import eagle_kind

_UNCOVERED = {"eagle3": ("norm_before_fc", "fc_norm", "norm_output"), "eagle": ("layernorms", "add_para_norm")}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """The sizes of the head's one Llama layer, by transformers' names. vocab_size is the target's."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    rope_theta: float | None
    rope_scaling: Any
    rope_parameters: Any


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """The settings of an EAGLE head, from its config.json.

    Attributes:
        kind: "eagle" for EAGLE-1 and EAGLE-2, whose heads are alike, or "eagle3".
        layer: The head's one layer.
        feature_layers: The target's layers whose inputs the head reads; None: the kind's default ones.
        norm_before_residual: See `EagleConfig`.
        target_hidden_size: Numbers in the features of one layer.
        target_digest: Identifies the target's weights; None where the head does not state it.
    """

    kind: Literal["eagle", "eagle3"]
    layer: LayerConfig
    feature_layers: tuple[int, ...] | None
    norm_before_residual: bool
    target_hidden_size: int
    target_digest: str | None


def read_head_config(directory: Path, tensors: Iterable[str]) -> HeadConfig:
    """Read config.json.

    Args:
        directory: The checkpoint.
        tensors: The names of its tensors.

    Raises:
        VocabtrimError: The head is of a form that is not covered, or config.json lacks what is needed.
    """
    where = directory / "config.json"
    data = read(where)
    inner = data.get("transformer_layer_config")
    raw = inner if isinstance(inner, dict) else data
    kind = eagle_kind(data, tensors)
    if raw.get("num_hidden_layers", 1) != 1:
        raise VocabtrimError(
            f"{directory} holds an EAGLE head of several layers: only heads of one layer can be exported"
        )
    for option in _UNCOVERED[kind]:
        if data.get(option):
            raise VocabtrimError(f"{where} sets {option}, which cannot be exported yet")
    defaults = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    values = {field.name: raw.get(field.name, defaults.get(field.name)) for field in fields(LayerConfig)}
    layer: LayerConfig = decode(LayerConfig, values, str(where))
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if getattr(layer, name) == 0:
            raise VocabtrimError(f"{where}: {name} is 0; expected 1 or more")
    if layer.num_attention_heads % (layer.num_key_value_heads or 1):
        raise VocabtrimError(f"{where}: num_attention_heads is no multiple of num_key_value_heads")
    target_hidden = decode(int | None, data.get("target_hidden_size"), f"{where}: target_hidden_size")
    return HeadConfig(
        kind,
        layer,
        _feature_layers(data, str(where)) if kind == "eagle3" else None,
        decode(bool, data.get("norm_before_residual", False), f"{where}: norm_before_residual"),
        target_hidden or layer.hidden_size,
        decode(str | None, data.get("target_digest"), f"{where}: target_digest"),
    )


def _feature_layers(data: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Returns the target's layers whose inputs the head reads, or None where config.json names none.

    At the top level config.json counts as vLLM does: i stands for the input of layer i. In `eagle_config`, which
    SpecForge and ModelOpt write and SGLang reads, i stands for the output of layer i.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    nested = data.get("eagle_config")
    top: tuple[int, ...] = decode(tuple[int, ...], data.get(name) or [], f"{where}: {name}")
    if top or not isinstance(nested, dict):
        return top or None
    outputs: tuple[int, ...] = decode(tuple[int, ...], nested.get(name) or [], f"{where}: eagle_config.{name}")
    return tuple(layer + 1 for layer in outputs) or None
