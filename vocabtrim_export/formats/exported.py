"""`Exported`: the input of the formats that are written in addition to an export's bundles."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.manifest import (
    HEAD_ROWS_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    VOCAB_MAP_NAME,
    WEIGHTS_NAME,
    Manifest,
    Role,
)
from engines.bundle.vocab_map import VocabMap
from vocabtrim_export.bundles.output import FORMAT_MARK
from vocabtrim_export.sources.source import Source
from vocabtrim_export.version import __version__

_NOT_TOKENIZER = {HEAD_ROWS_NAME, MANIFEST_NAME, MODEL_NAME, WEIGHTS_NAME, VOCAB_MAP_NAME}


@dataclass(frozen=True, slots=True)
class Exported:
    """The bundles that were just written and the models behind them.

    Attributes:
        bundles: The bundles' directories by role.
        manifests: Their manifests by role.
        sources: The models by role.
        vocab_map: The tokens of the drafter's head; None for a full head.
    """

    bundles: Mapping[Role, Path]
    manifests: Mapping[Role, Manifest]
    sources: Mapping[Role, Source]
    vocab_map: VocabMap | None


def write_mark(exported: Exported, directory: Path, name: str) -> None:
    """Write the file that names the format and its map; an export may replace a directory that holds this file."""
    manifest = exported.manifests["drafter"]
    mark = {
        "format": name,
        "head_rows": manifest.head_rows,
        "vocab_size": manifest.vocab_size,
        "vocab_map": manifest.vocab_map,
        "tokenizer": manifest.tokenizer,
        "source": manifest.source,
        "source_digest": manifest.source_digest,
        "tool_versions": {"vocabtrim-export": __version__},
    }
    (directory / FORMAT_MARK).write_text(json.dumps(mark, indent=2) + "\n", "utf-8")


def copy_tokenizer(exported: Exported, role: Role, directory: Path) -> None:
    """Copy the tokenizer's files of a bundle, whatever their names."""
    for name in sorted(set(exported.manifests[role].files) - _NOT_TOKENIZER):
        shutil.copyfile(exported.bundles[role] / name, directory / name)
