"""`--format eagle3`: the EAGLE-3 checkpoint with fewer rows, which the same runtimes load.

`d2t` holds offsets: row i of the head is token i + d2t[i] of the target. `t2d` marks the tokens that have a row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.bundle.typed_json import read
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.output import replacing
from vocabtrim_export.drafters.row_tokens import row_token_ids
from vocabtrim_export.formats.eagle3_layout import check_layout
from vocabtrim_export.formats.exported import Exported
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.weight_files import checkpoint_files

_HEAD, _D2T, _T2D = "lm_head.weight", "d2t", "t2d"


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """A checkpoint as it was read: its configuration and its tensors by name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def vocab_size(self) -> int:
        """Tokens of the target."""
        return int(self.config["vocab_size"])


def read_head(path: Path) -> Eagle3Head:
    """Read a directory with config.json and .safetensors files.

    Raises:
        VocabtrimError: It is no EAGLE-3 head.
    """
    files = checkpoint_files(path)
    if not (path / "config.json").is_file() or not files:
        raise VocabtrimError(f"{path} is no EAGLE-3 head: it needs config.json and .safetensors weights")
    config = read(path / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise VocabtrimError(f"cannot read {file}: {error}; fetch it again") from error
    if not isinstance(config, dict) or type(config.get("vocab_size")) is not int or "fc.weight" not in tensors:
        raise VocabtrimError(f"{path} is no EAGLE-3 head: it has no fc.weight, or its config.json no vocab_size")
    return Eagle3Head(path, config, tensors)


def write(exported: Exported, directory: Path) -> None:
    """Write the head that was exported, with the rows that its bundle keeps."""
    drafter, target = exported.sources["drafter"], exported.sources["target"]
    vocab = target.vocab_size
    kept = exported.vocab_map or VocabMap.from_ids(range(vocab), vocab)
    embeddings: Any = target.model.get_output_embeddings()
    _fill(local_path(drafter.name), kept, directory, embeddings.weight)


def write_eagle3(head: Path, vocab_map: VocabMap, directory: Path, target_head: Tensor | None = None) -> VocabMap:
    """Write an EAGLE-3 checkpoint with only the head rows of `vocab_map`, whole or not at all.

    Where the head has a `d2t` already, the rows are the tokens that both keep.

    Args:
        head: The checkpoint.
        vocab_map: The tokens to keep.
        directory: The directory to write to.
        target_head: [vocab, hidden], the target's LM head, for a checkpoint without `lm_head.weight`, which uses it.

    Returns:
        The map that was written.

    Raises:
        VocabtrimError: The map is of another vocabulary, the checkpoint's `d2t` is not valid, or the runtimes would not
            load the checkpoint's layout.
    """
    with replacing([directory]) as (fresh,):
        return _fill(head, vocab_map, fresh, target_head)


def _fill(head: Path, vocab_map: VocabMap, directory: Path, target_head: Tensor | None) -> VocabMap:
    source = read_head(head)
    if vocab_map.full_vocab != source.vocab_size:
        raise VocabtrimError(
            f"the map is of a {vocab_map.full_vocab}-token vocabulary, the target of {head} has {source.vocab_size}"
        )
    rows = _rows(source, target_head)
    d2t, t2d = (None if tensor is None else tensor.numpy() for tensor in map(source.tensors.get, (_D2T, _T2D)))
    token_ids = torch.from_numpy(row_token_ids(d2t, t2d, len(rows), source.vocab_size, str(head)))
    kept, order = _common(token_ids, vocab_map, head)
    tensors = {name: tensor.contiguous() for name, tensor in source.tensors.items()}
    tensors[_HEAD] = rows[order].contiguous()
    tensors[_D2T] = torch.from_numpy(kept.kept_token_ids.copy()) - torch.arange(len(kept))
    tensors[_T2D] = torch.from_numpy(kept.inverse >= 0)
    config = dict(source.config) | {"draft_vocab_size": len(kept), "tie_word_embeddings": False}
    check_layout(config, tensors, str(head))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return kept


def _rows(head: Eagle3Head, target_head: Tensor | None) -> Tensor:
    """Returns the head's own rows, or the target's where it has none."""
    if _HEAD in head.tensors:
        return head.tensors[_HEAD]
    if target_head is None:
        raise VocabtrimError(f"{head.path} has no lm_head.weight: its head is the target's, so give the target too")
    width = head.tensors["fc.weight"].shape[0]
    if target_head.shape != (head.vocab_size, width):
        raise VocabtrimError(
            f"{head.path} needs a target's head of {head.vocab_size} × {width}, not {list(target_head.shape)}"
        )
    return target_head.detach().to(head.tensors["fc.weight"].dtype)


def _common(token_ids: Tensor, vocab_map: VocabMap, head: Path) -> tuple[VocabMap, Tensor]:
    """Returns the tokens that the head and the map both keep, ascending, and the rows that they had in the old head."""
    wanted = torch.from_numpy(vocab_map.inverse.copy())[token_ids] >= 0
    rows = torch.nonzero(wanted).flatten()
    if not len(rows):
        raise VocabtrimError(f"{head} has a row for none of the map's tokens")
    order = rows[token_ids[rows].argsort()]
    return VocabMap(token_ids[order].numpy(), vocab_map.full_vocab), order
