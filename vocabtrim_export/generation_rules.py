"""The rules for decoding in a model's generation config: those that a bundle keeps, and those without support."""

from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from engines.errors import VocabtrimError
from engines.generation_rules import UNSUPPORTED_NOTE, GenerationRules

# other fields that change the output of `generate`, and the values with which they change nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "guidance_scale": (None, 1),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None,),  # transformers 4 applied them
    "exponential_decay_length_penalty": (None,),
    "remove_invalid_values": (None, False),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "stop_strings": (None,),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "cache_implementation": (None, *(set(ALL_CACHE_IMPLEMENTATIONS) - {"quantized"})),
    "constraints": (None,),
    "force_words_ids": (None,),
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
}
_WITHOUT_RULES = {"genai", "openvino", "triton"}  # `hf` keeps the config itself; the others hold no target
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1),
    "top_k": (None, 0),
    "top_p": (None, 1),
    "min_p": (None, 0),
}


def generation_rules(config: GenerationConfig | None) -> GenerationRules:
    """Returns the rules that transformers' `generate` applies to the logits by default with this generation config.

    Raises:
        VocabtrimError: A value is not valid.
    """

    def setting(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    new_tokens = setting("min_new_tokens", None)
    try:
        return GenerationRules(
            repetition_penalty=float(setting("repetition_penalty", 1.0)),
            no_repeat_ngram_size=max(0, int(setting("no_repeat_ngram_size", 0))),
            bad_words_ids=tuple(tuple(int(token) for token in word) for word in setting("bad_words_ids", ())),
            # transformers lets min_new_tokens win
            min_length=max(0, int(setting("min_length", 0))) if new_tokens is None else 0,
            min_new_tokens=max(0, int(new_tokens or 0)),
            suppress_tokens=_ids(setting("suppress_tokens", ())),
            begin_suppress_tokens=_ids(setting("begin_suppress_tokens", ())),
            unsupported=tuple(_others(config, _UNSUPPORTED)),
        )
    except (TypeError, ValueError) as error:
        raise VocabtrimError(f"the model's generation config has a rule that cannot be read: {error}") from error


def rule_notes(config: GenerationConfig | None, formats: Collection[str] = ()) -> list[str]:
    """Returns notes about a target's generation config: rules without support, and how it would sample.

    Args:
        config: The generation config.
        formats: The formats written besides the bundles; some of them hold no rules.
    """
    notes, rules = [], generation_rules(config)
    if rules.unsupported:
        notes.append(f"{UNSUPPORTED_NOTE}: {', '.join(rules.unsupported)}")
    without = [name for name in formats if name in _WITHOUT_RULES]
    if without and (applied := rules.applied()):
        notes.append(
            f"--format {', '.join(without)} holds no rules of the generation config ({applied}): set them there"
        )
    sampling = _others(config, _SAMPLING)
    if getattr(config, "do_sample", None) and sampling:
        notes.append(
            f"the model's generation config samples with {', '.join(sampling)}: decoding is greedy unless "
            "--temperature, --top-k, --top-p and --min-p ask for that"
        )
    return notes


def _ids(tokens: Any) -> tuple[int, ...]:
    """Returns the ids of tokens without negative ones, which some configs have and which name no token."""
    return tuple(int(token) for token in tokens if token >= 0)


def _others(config: GenerationConfig | None, neutral: dict[str, tuple[Any, ...]]) -> list[str]:
    values = {name: getattr(config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in values.items() if value not in neutral[name]]
