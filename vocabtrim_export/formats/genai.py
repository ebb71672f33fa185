"""`--format genai`: a model directory with a drafter, for ONNX Runtime GenAI's own speculative decoding."""

import json
from pathlib import Path
from typing import Any

from engines.bundle.graph_io import INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT
from engines.bundle.manifest import MODEL_NAME, Role
from vocabtrim_export.formats.exported import Exported, copy_tokenizer
from vocabtrim_export.formats.masked import check_widths, write_masked

CONFIG_NAME = "genai_config.json"
_DRAFT_LENGTH = 4
_PAST, _PRESENT = f"{PAST}%d.", f"{PRESENT}%d."


def write(exported: Exported, directory: Path) -> None:
    """Write both graphs, the tokenizer and `genai_config.json`, whose `model.draft` is the drafter.

    GenAI refuses a drafter whose logits are narrower than the target's, so a trimmed head's logits are scattered into a
    full row.

    Raises:
        VocabtrimError: The drafter has more tokens than its target.
    """
    check_widths(exported, "genai")
    target = exported.manifests["target"]
    for role in ("target", "drafter"):
        (directory / role).mkdir()
        vocab = exported.manifests[role].vocab_size
        write_masked(exported.bundles[role], directory / role, vocab, target.vocab_size)
    copy_tokenizer(exported, "target", directory)
    (directory / CONFIG_NAME).write_text(json.dumps(_config(exported), indent=2) + "\n", "utf-8")


def _config(exported: Exported) -> dict[str, Any]:
    target = exported.manifests["target"]
    tokenizer = exported.sources["target"].tokenizer
    context = min(manifest.context_length for manifest in exported.manifests.values())
    ends = list(target.eos_token_ids)
    first = ends[0] if ends else 0
    return {
        "model": {
            "type": "decoder",  # GenAI's generic decoder, without special treatment of an architecture
            "bos_token_id": first if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
            "eos_token_id": ends or [first],
            "pad_token_id": first if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            "vocab_size": target.vocab_size,
            "context_length": context,
            "decoder": _decoder(exported, "target"),
            "draft": _decoder(exported, "drafter"),
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True},
        "speculative": {"max_draft_tokens": _DRAFT_LENGTH},
    }


def _decoder(exported: Exported, role: Role) -> dict[str, Any]:
    manifest = exported.manifests[role]
    config = exported.sources[role].model.config.get_text_config()
    inputs = {name: name for name in (INPUT_IDS, POSITION_IDS) if name in manifest.inputs}
    return {
        "session_options": {"provider_options": []},
        "filename": f"{role}/{MODEL_NAME}",
        "head_size": manifest.head_dim,
        "hidden_size": int(config.hidden_size),
        "num_attention_heads": int(config.num_attention_heads),
        "num_hidden_layers": manifest.num_layers,
        "num_key_value_heads": manifest.num_kv_heads,
        "inputs": inputs
        | {"attention_mask": "attention_mask", "past_key_names": _PAST + "key", "past_value_names": _PAST + "value"},
        "outputs": {
            "logits": LOGITS,
            "present_key_names": _PRESENT + "key",
            "present_value_names": _PRESENT + "value",
        },
    }
