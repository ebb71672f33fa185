"""Tensors of a checkpoint that the loaded model does not have: known to be harmless, named in a note, or refused."""

import re
from collections.abc import Iterable, Sequence

from engines.errors import VocabtrimError

MERGE = (
    'merge it into its base: python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\", copy the tokenizer's files, and give "
    "that directory"
)
# Buffers that a model computes from its configuration.
_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|(^|\.)(h\.\d+\.attn|attention)\.bias$"
    r"|(^|\.)position_ids$|(^|\.)(embed_positions|rotary_pos_emb)\.(inv_freq|weights)$"
)
_MTP = re.compile(r"(^|\.)mtp(_layers|_block)?\.|\.(eh_proj|shared_head)\.|(^|\.)nextn_")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# Tensors that do not change the next token's logits: a note tells the user that they are left out.
_NOTED = (
    (
        re.compile(r"attn\.([qkv]|kv|prob)_scale$|\.[qkv]_proj\.(output|[kv])_scale$"),
        "scales for a KV cache of 8 bits (the bundle's KV cache is not quantised)",
    ),
    (re.compile(r"(^|\.)(v_head|value_head|reward_head|score|classifier)\."), "a head that scores texts"),
    (re.compile(r"(^|\.)medusa_heads?\."), "Medusa heads (as --drafter they need a directory of their own)"),
)
# Reasons why a tensor is not read, by its name.
_CAUSES = (
    (
        re.compile(r"lora_|(^|\.)adapters?[._]|modules_to_save|^base_model\.model\."),
        "the weights of an adapter: " + MERGE,
    ),
    (
        re.compile(
            r"(qweight|qzeros|g_idx|scales?|scale_inv|absmax|quant_map|quant_state.*|SCB|zero_points?|_packed|_blocks)$"
        ),
        "side tensors of a quantisation that is not read: give the unquantised weights or a .gguf file",
    ),
    (
        re.compile(r"\.(bias|[qkvo]?_?bias)$"),
        "biases that the model has no place for by its config.json (a .gguf file: by its header): give a checkpoint "
        "whose configuration names them",
    ),
)


def check_unread(spec: str, unread: Iterable[str], layers: int) -> tuple[str, ...]:
    """Account for every tensor that is in a checkpoint and not in the model that was loaded from it.

    Args:
        spec: MODEL as the user gave it.
        unread: The names of those tensors in the checkpoint's format.
        layers: Decoder layers that the model has.

    Returns:
        Notes for the user about tensors that are left out and do not change the model's output.

    Raises:
        VocabtrimError: A tensor remains that the model may have needed; the line names it and its likely meaning.
    """
    names = [name for name in unread if not _HARMLESS.search(name)]
    notes = []
    predicting = set(multi_token_prediction(names, layers))
    if predicting:
        notes.append(
            f"the multi-token-prediction layers of {spec} are no part of the target: --drafter mtp drafts with them"
        )
    left = [name for name in names if name not in predicting]
    for pattern, what in _NOTED:
        if any(map(pattern.search, left)):
            notes.append(f"{spec} also holds {what}, which the export leaves behind")
            left = [name for name in left if not pattern.search(name)]
    if left:
        raise _refusal(spec, sorted(left), layers)
    return tuple(notes)


def multi_token_prediction(names: Sequence[str], layers: int) -> list[str]:
    """Returns the tensors of multi-token-prediction layers.

    These have such a name, or are in a layer beyond the model's `layers` that has a tensor with such a name.
    """
    marked = {_layer(name) for name in names if _MTP.search(name)} - {None}
    beyond = {layer for layer in marked if layer is not None and layer >= layers}
    return [name for name in names if _MTP.search(name) or _layer(name) in beyond]


def _layer(name: str) -> int | None:
    layer = _LAYER.search(name)
    return int(layer[1]) if layer else None


def _refusal(spec: str, names: list[str], layers: int) -> VocabtrimError:
    if any((_layer(name) or 0) >= layers for name in names):
        cause = f"layers beyond the {layers} that its config.json states: correct num_hidden_layers"
    else:
        causes = (why for pattern, why in _CAUSES if any(map(pattern.search, names)))
        cause = next(causes, "tensors that its architecture has no place for: give the checkpoint that belongs to it")
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return VocabtrimError(f"nothing reads {names[0]}{more} in {spec}, which are {cause}")
