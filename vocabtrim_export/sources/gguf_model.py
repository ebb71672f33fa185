"""A model from a `.gguf` file: transformers' configuration and names, and settings that transformers does not read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engines.errors import VocabtrimError
from vocabtrim_export.progress import BytesDone
from vocabtrim_export.sources.gguf_config import read_config
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.gguf_keys import check_kind, unread_note
from vocabtrim_export.sources.gguf_rotation import rope_parameters
from vocabtrim_export.sources.gguf_weights import load_weights
from vocabtrim_export.sources.mapped import check_room, holder
from vocabtrim_export.sources.refusals import check_architecture
from vocabtrim_export.sources.unread_tensors import check_unread

_BIASES = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}
_EPSILON = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
# What a file states of what the model computes, and the names that transformers' configurations have for it.
_STATED = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.layer_norm_rms_epsilon": _EPSILON,
}
_EXPERTS = {  # sizes that transformers takes from its own defaults, which are those of one release
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Gemma's 27B models divide their queries by another number than the smaller ones; the file does not say so.
_QUERIES_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
# Factors that change what the model computes and that transformers does not read from a file.
_FACTORS = (
    *("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.clamp_kqv"),
    "attention.max_alibi_bias",
)

_SAMPLING = "general.sampling."
# Architectures that transformers reads tensor by tensor, with rearrangements that its older tables do not have.
_READ_BY_TRANSFORMERS = ("qwen35", "qwen35moe", "lfm2")


def load_gguf(
    header: GgufHeader,
    dtype: torch.dtype,
    progress: BytesDone = lambda _done, _total: None,
    scratch: Path | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the weights of a file, dequantised.

    Args:
        header: The file's header.
        dtype: The dtype of the model's parameters.
        progress: Called with (bytes read, bytes to read).
        scratch: See `load_source`.

    Returns:
        The model, and notes for the user.

    Raises:
        VocabtrimError: transformers would misread the file.
    """
    check_kind(header)
    config = read_config(header)
    check_architecture(str(header.path), config)
    read = config.to_dict()
    assumed = _correct(config, header)
    model, loading = _load(header, config, read, dtype, progress, scratch)
    for name, there, wanted in sorted(loading["mismatched_keys"]):
        raise VocabtrimError(
            f"{header.path} does not fit its own metadata: {name} has the shape {list(there)}, it asks for "
            f"{list(wanted)}"
        )
    missing = [name for name in loading["missing_keys"] if not any(name.endswith(ending) for ending in assumed)]
    if missing:
        raise VocabtrimError(f"{header.path} does not fit its own metadata: no usable {missing[0]} in it")
    _check_rotated(model, header)
    layers = int(model.config.get_text_config().num_hidden_layers)
    notes = check_unread(str(header.path), _unread(model, header), layers)
    return model, (*notes, *unread_note(header), *_sampling_note(header))


def _sampling_note(header: GgufHeader) -> tuple[str, ...]:
    """Returns a note about the file's sampling settings, which llama.cpp would use."""
    sampling = {
        key.removeprefix(_SAMPLING): value for key, value in header.metadata.items() if key.startswith(_SAMPLING)
    }
    if not sampling:
        return ()
    values = ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in sampling.items()
    )
    return (f"{header.path} asks llama.cpp to sample with {values}: not applied unless you give such options",)


def _load(
    header: GgufHeader,
    config: Any,
    read: dict[str, Any],
    dtype: torch.dtype,
    progress: BytesDone,
    scratch: Path | None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Returns the model and transformers' account of the tensors; `read` is the configuration before corrections."""
    how: dict[str, Any] = {"dtype": dtype, "config": config, "output_loading_info": True}
    how["ignore_mismatched_sizes"] = True  # they are listed then, and refused by the caller in one line
    if header.architecture in _READ_BY_TRANSFORMERS:
        where, file = str(header.path.parent), header.path.name
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, **how)
    else:
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)
        if scratch is not None:
            needed = sum(tensor.weights for tensor in header.tensors.values()) * dtype.itemsize
            check_room(scratch, needed, f"{header.path}, dequantised,")
        weights = load_weights(header, read, skeleton, dtype, progress, holder(scratch))
        loaded = type(skeleton).from_pretrained(None, state_dict=weights, **how)
    return loaded[0], loaded[1]


def _correct(config: Any, header: GgufHeader) -> tuple[str, ...]:
    """Put the file's settings that transformers does not read into `config`.

    Returns:
        The endings of the names of biases that the file may lack: they are zero then.
    """
    parameters = header.hyperparameters()
    for name in _FACTORS:
        if parameters.get(name, 1.0) not in (0, 1):
            raise VocabtrimError(f"{header.path} scales by {name}, which is not read: give the original weights")
    _turn(config, rope_parameters(header), header)
    _set_head_size(config, parameters, header)
    for key, name in _EXPERTS.items():
        if (size := parameters.get(key)) and hasattr(config, name):
            setattr(config, name, int(size))
    for key, names in _STATED.items():
        if value := parameters.get(key):
            attribute = next((name for name in names if hasattr(config, name)), None)
            if attribute is None:
                raise VocabtrimError(
                    f"{header.path} states {key}, which transformers' {config.model_type} lacks: give the original "
                    "weights"
                )
            setattr(config, attribute, float(value))
    _set_windows(config, parameters)
    if header.architecture in ("gemma2", "gemma3"):
        by_width = (header.architecture, parameters.get("block_count")) in _QUERIES_BY_WIDTH
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if by_width else config.head_dim
    assumed: list[str] = []
    for tensor, switch in _BIASES.items():
        if f"blk.0.{tensor}" in header.tensors and getattr(config, switch, None) is False:
            setattr(config, switch, True)
            assumed += ["o_proj.bias"] if switch == "attention_bias" else []
    return tuple(assumed)


def _turn(config: Any, stated: Mapping[str, Any], header: GgufHeader) -> None:
    """Set what the file states of the rotation, most of which transformers' tables of a file's keys lack."""
    rotation = getattr(config, "rope_parameters", None)
    if isinstance(rotation, dict):
        parameters = header.hyperparameters()
        if "sliding_attention" in rotation and (base := parameters.get("rope.freq_base_swa")):
            rotation["sliding_attention"]["rope_theta"] = float(base)
        rotation = rotation.get("full_attention", rotation)
        rotation.update(stated)
        first = stated.get("original_max_position_embeddings")
        if first and hasattr(config, "original_max_position_embeddings"):  # Phi-3's own, which goes before the other
            config.original_max_position_embeddings = first
        rotated, size = (parameters.get(key) for key in ("rope.dimension_count", "attention.key_length"))
        if rotated and "partial_rotary_factor" in rotation:  # only these architectures rotate a part of a head
            rotation["partial_rotary_factor"] = rotated / (size or config.hidden_size // config.num_attention_heads)
    elif "rope_type" in stated:
        raise VocabtrimError(
            f"{header.path} scales its rotation ({stated['rope_type']}), which transformers' {config.model_type} does "
            "not: give the original weights"
        )


def _set_windows(config: Any, parameters: Mapping[str, Any]) -> None:
    """Set the length of the window, and which layers have one where the file says so, as llama.cpp reads it."""
    window = parameters.get("attention.sliding_window")
    if isinstance(window, int) and 0 < window < config.max_position_embeddings and hasattr(config, "sliding_window"):
        config.sliding_window = window
    pattern: Any = parameters.get("attention.sliding_window_pattern")
    if pattern is None or not getattr(config, "layer_types", None):
        return
    layers = range(config.num_hidden_layers)
    slides = [not pattern or i % pattern < pattern - 1 for i in layers] if isinstance(pattern, int) else list(pattern)
    config.layer_types = ["sliding_attention" if each else "full_attention" for each in slides]


def _set_head_size(config: Any, parameters: Mapping[str, Any], header: GgufHeader) -> None:
    size, values = parameters.get("attention.key_length"), parameters.get("attention.value_length")
    if size is None or header.architecture == "gemma4":
        return
    if values not in (None, size):
        raise VocabtrimError(
            f"{header.path} has keys of {size} numbers and values of {values}, which is not read: give the original "
            "weights"
        )
    if getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) != size:
        config.head_dim = int(size)


def _check_rotated(model: torch.nn.Module, header: GgufHeader) -> None:
    wanted = header.hyperparameters().get("rope.dimension_count")
    sizes = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if wanted and sizes and wanted not in sizes:
        raise VocabtrimError(
            f"{header.path} rotates {wanted} of the numbers in a head, transformers would rotate {max(sizes)}: "
            "give the original weights"
        )


def _unread(model: PreTrainedModel, header: GgufHeader) -> list[str]:
    """Returns the file's tensors that are not in the model; none where the numbers of weights agree."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    read = {name: tensor.weights for name, tensor in header.tensors.items() if not name.startswith("rope_")}
    if sum(read.values()) <= sum(held.values()):
        return []
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    known = {"output.weight"} if header.architecture in ("falcon", "bloom") else set()  # the embedding once more
    for name in model.state_dict():
        start, _, ending = name.rpartition(".")
        if there := names.get_name(start):
            known.add(f"{there}.{ending}")
    return sorted(read.keys() - known)
