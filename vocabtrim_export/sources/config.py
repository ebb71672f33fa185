"""Reads a model's config.json, and checks that a model can be made from it, before any weight is read."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import __version__ as transformers_version

from engines.bundle.typed_json import read
from engines.errors import VocabtrimError

NO_CODE = {"trust_remote_code": False}  # transformers must neither ask on the terminal nor run a model's own code
_MOST_RATIO = 16  # a checkpoint may pack several weights in a number
_MODELOPT = "hf_quant_config.json"  # where ModelOpt's first releases state the quantisation, and nowhere else
_FIRST_LONGROPE = "su"  # what the first releases of Phi-3 call LongRoPE


def read_config(spec: str, where: str) -> PreTrainedConfig:
    """Read the config of a model whose architecture transformers itself has.

    Args:
        spec: MODEL as the user gave it, for errors.
        where: The directory.

    Raises:
        VocabtrimError: transformers lacks the architecture, or cannot read its settings.
    """
    raw = read(Path(where) / "config.json")
    stated = raw.get("model_type") if isinstance(raw, dict) else None
    if stated and stated not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise VocabtrimError(
                f"{spec} ({stated}) brings its own code (auto_map in config.json), which is never run: give a model of "
                "an architecture that transformers has"
            )
        raise VocabtrimError(
            f"{spec}: transformers {transformers_version} has no architecture {stated!r}: update transformers"
        )
    try:
        config = _with_longrope(raw) or AutoConfig.from_pretrained(where, **NO_CODE)
    except Exception as error:  # transformers raises many kinds
        raise _unreadable(spec, stated, error) from error
    _add_modelopt(config, Path(where) / _MODELOPT)
    config._attn_implementation = None  # such as flash_attention_2, which this machine need not have
    return config


def check_size(spec: str, config: PreTrainedConfig, weights: int) -> None:
    """Refuse a config.json that no model can be made from, or one that describes far more weights than there are.

    No memory is allocated.

    Args:
        spec: MODEL as the user gave it.
        config: The language model's own configuration.
        weights: The number of weights in the checkpoint.

    Raises:
        VocabtrimError: The configuration is refused.
    """
    try:
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds
        raise _unreadable(spec, config.model_type, error) from error
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > _MOST_RATIO * weights:
        raise VocabtrimError(
            f"the weights of {spec} do not fit its config.json: it asks for {wanted}, there are {weights}"
        )


def first_line(error: Exception) -> str:
    """Returns the message of an exception of transformers, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return " ".join([type(error).__name__, *lines])
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _with_longrope(raw: Any) -> PreTrainedConfig | None:
    """Returns the config of a Phi-3 that calls its rotation "su", a name that transformers no longer reads."""
    rotation = raw.get("rope_scaling") if isinstance(raw, dict) else None
    if not isinstance(rotation, dict) or rotation.get("rope_type", rotation.get("type")) != _FIRST_LONGROPE:
        return None
    factors = {name: value for name, value in rotation.items() if name not in ("type", "rope_type")}
    kind = CONFIG_MAPPING[raw["model_type"]]
    config: PreTrainedConfig = kind.from_dict(raw | {"rope_scaling": factors | {"rope_type": "longrope"}})
    return config


def _add_modelopt(config: PreTrainedConfig, file: Path) -> None:
    """Put the quantisation of a checkpoint of ModelOpt into the config that does not state it."""
    if not file.is_file() or getattr(config, "quantization_config", None) is not None:
        return
    stated = read(file)
    quantization = stated.get("quantization") if isinstance(stated, dict) else None
    if isinstance(quantization, dict) and quantization.get("quant_algo"):
        config.quantization_config = {"quant_method": "modelopt", **quantization}


def _unreadable(spec: str, kind: Any, error: Exception) -> VocabtrimError:
    return VocabtrimError(
        f"transformers cannot make a model ({kind}) of the config.json of {spec}: {first_line(error)}; compare its "
        "settings with those of the model's release"
    )
