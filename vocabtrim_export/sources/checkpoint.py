"""Loads a local directory in transformers' form: config, tokenizer and weights, also quantised or multimodal ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from engines.bundle.typed_json import read
from engines.errors import VocabtrimError
from vocabtrim_export.progress import BytesDone
from vocabtrim_export.sources.config import NO_CODE, check_size, first_line, read_config
from vocabtrim_export.sources.config_notes import ignored_window_note, own_code_note
from vocabtrim_export.sources.expert_tensors import check_experts, check_room_for_experts
from vocabtrim_export.sources.half_precision import half_dtype, put_back_float32
from vocabtrim_export.sources.mapped import MappedResults, holder
from vocabtrim_export.sources.quantized_checkpoints import check_plain, dense_weights, is_quantized
from vocabtrim_export.sources.refusals import check_architecture
from vocabtrim_export.sources.sentencepiece_tokenizer import follow_sentencepiece
from vocabtrim_export.sources.text_models import (
    is_multimodal,
    multimodal_note,
    text_config,
    text_tensor_names,
    text_weights,
    upright_experts,
)
from vocabtrim_export.sources.tokenizer_file import follow_tokenizer_file
from vocabtrim_export.sources.unread_tensors import check_unread

_NO_FILE = "Couldn't instantiate the backend tokenizer"  # how transformers says so
_FILES = (
    "fetch its files again (tokenizer.json or tokenizer.model, tokenizer_config.json, chat_template.jinja), or copy "
    "them from the model's release"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The content of a model's files.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        end_token_ids: The ids that a file names in addition to those of the configs.
        notes: Notes for the user.
    """

    model: PreTrainedModel
    tokenizer: Any
    end_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def load_checkpoint(
    spec: str,
    where: str,
    files: list[Path],
    weights: int,
    dtype: torch.dtype,
    scratch: Path | None,
    progress: BytesDone,
) -> Loaded:
    """Load the model in a directory.

    Args:
        spec: MODEL as the user gave it, for errors.
        where: The directory.
        files: Its weight files.
        weights: The number of weights in these.
        dtype: The dtype of the model's parameters.
        scratch: See `load_source`.
        progress: Called with (bytes read, bytes to read) of a quantised checkpoint, whose weights are computed.

    Raises:
        VocabtrimError: The model is of a kind that is not read, or its weights do not fit its config.
    """
    config = read_config(spec, where)
    text = text_config(spec, config)
    check_architecture(spec, text)
    check_size(spec, text, weights)
    check_experts(spec, files)
    tokenizer = read_checkpoint_tokenizer(spec, where)
    notes = _unquantized_note(spec, files, config, text)
    check_room_for_experts(spec, files, scratch)
    stored = half_dtype(files) if scratch is not None and dtype == torch.float32 else None
    model, loading = _load_weights(where, files, stored or dtype, config, text, scratch, progress)
    if stored and not put_back_float32(model, stored, files, loading["unexpected_keys"]):
        del model
        model, loading = _load_weights(where, files, dtype, config, text, scratch, progress)
    _check_fit(spec, loading)
    if (Path(where) / "generation_config.json").is_file():  # transformers passes over one that it cannot read
        model.generation_config = GenerationConfig.from_pretrained(where)
    notes += (multimodal_note(spec, text),) if is_multimodal(config, text) else ()
    notes += own_code_note(spec, config) + ignored_window_note(spec, text, type(model))
    notes += check_unread(spec, loading["unexpected_keys"], int(model.config.num_hidden_layers))
    return Loaded(model, tokenizer, notes=notes)


def _unquantized_note(
    spec: str, files: list[Path], config: PreTrainedConfig, text: PreTrainedConfig
) -> tuple[str, ...]:
    """Remove a quantisation from the config that the tensors do not have. Returns a note about it."""
    quantization: Any = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        check_plain(spec, files)
        return ()
    if is_quantized(spec, files, quantization):
        return ()
    for each in {id(config): config, id(text): text}.values():
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    method = quantization.get("quant_method", "an unnamed method")
    return (f"the config.json of {spec} says that it is quantised by {method}, its tensors are not: they are exported",)


def _load_weights(
    where: str,
    files: list[Path],
    dtype: torch.dtype,
    config: PreTrainedConfig,
    text: PreTrainedConfig,
    scratch: Path | None,
    progress: BytesDone,
) -> Any:
    """Returns the model, and transformers' account of its tensors.

    A quantised checkpoint is loaded from its dense weights, a multimodal one from those of its text model.
    """
    how: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    quantization: Any = getattr(config, "quantization_config", None)
    method = quantization["quant_method"] if quantization is not None else None
    multimodal = is_multimodal(config, text)
    if method is None and not multimodal:
        with MappedResults(holder(scratch)):
            return AutoModelForCausalLM.from_pretrained(where, config=config, use_safetensors=True, **how)
    if method is not None:
        weights = dense_weights(files, quantization, dtype, holder(scratch), progress)
        if multimodal:
            weights = {name: weights[stored] for stored, name in text_tensor_names(weights).items()}
    else:
        weights = text_weights(files)
    if multimodal:
        weights = upright_experts(weights, text, holder(scratch))
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    if "lm_head.weight" not in weights and getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True  # the head belongs to the whole model, and so does this setting
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    with MappedResults(holder(scratch)):
        return kind.from_pretrained(None, config=text, state_dict=weights, **how)


def read_checkpoint_tokenizer(spec: str, where: str) -> Any:
    """Read the tokenizer of a model.

    Raises:
        VocabtrimError: transformers cannot read it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **NO_CODE)
    except Exception as error:  # transformers and tokenizers raise many kinds
        why = "there is no file of one that transformers can read" if _NO_FILE in str(error) else first_line(error)
        raise VocabtrimError(f"cannot read the tokenizer of {spec}: {why}; {_FILES}") from error
    if tokenizer.is_fast:
        _check_has_tokens(spec, tokenizer)
        follow_tokenizer_file(where, tokenizer)
        follow_sentencepiece(spec, where, tokenizer)
    processors = Path(where) / "chat_template.json"  # where older multimodal checkpoints have their only template
    if not tokenizer.chat_template and processors.is_file():
        stated = read(processors)
        tokenizer.chat_template = stated.get("chat_template") if isinstance(stated, dict) else None
    return tokenizer


def _check_has_tokens(spec: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without tokens for text: transformers makes one where there are no files of its class."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if not tokenizer.get_vocab().keys() - added:
        raise VocabtrimError(
            f"the tokenizer of {spec} has no tokens but special ones: its files are missing, or of another kind than "
            f"{type(tokenizer).__name__}; {_FILES}"
        )


def _check_fit(spec: str, loading: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the configuration; `loading` is transformers' account of the tensors."""
    begin = f"the weights of {spec} do not fit its config.json: "
    for name, there, wanted in sorted(loading["mismatched_keys"]):
        raise VocabtrimError(f"{begin}{name} has the shape {list(there)}, config.json asks for {list(wanted)}")
    missing, unread = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing == ["lm_head.weight"]:
        raise VocabtrimError(
            f'{begin}no usable lm_head.weight among them; if its head is its embedding, set "tie_word_embeddings" to '
            "true there"
        )
    if missing and (wrapper := _wrapper(missing, unread)):
        raise VocabtrimError(
            f"{begin}every name begins with {wrapper!r}, as of a model that was saved inside a wrapper (torch.compile, "
            "DistributedDataParallel, PEFT); save the model inside, or take this off the names"
        )
    if missing:
        names = f"; they have names such as {unread[0]}" if unread else ""
        raise VocabtrimError(f"{begin}no usable {missing[0]} among them{names}")


def _wrapper(missing: list[str], unread: list[str]) -> str:
    """Returns what stands before the names of all missing tensors in the checkpoint; "" where they are not there."""
    end = missing[0]
    before = {name.removesuffix(end) for name in unread if name.endswith(f".{end}")}
    return next((each for each in before if {each + name for name in missing} <= set(unread)), "")
