"""`--format openvino`: the graphs as OpenVINO's own files."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

from engines.errors import VocabtrimError
from engines.manifest import MODEL_NAME
from vocabtrim_export.formats.exported import Exported, copy_tokenizer
from vocabtrim_export.formats.masked import write_masked

NAME = "openvino_model.xml"


def write(exported: Exported, directory: Path) -> None:
    """`drafter` and, where there is one, `target`: `openvino_model.xml` with its weights, and the tokenizer.

    Both give a full row of logits for every token, as `write_masked` says. Raises `VocabtrimError` where OpenVINO
    cannot convert a graph.
    """
    openvino: Any = importlib.import_module("openvino")
    width = max(manifest.vocab_size for manifest in exported.manifests.values())
    for role, bundle in exported.bundles.items():
        (directory / role).mkdir()
        with tempfile.TemporaryDirectory(dir=directory) as aside:
            write_masked(bundle, Path(aside), width)
            try:
                model = openvino.Core().read_model(Path(aside) / MODEL_NAME)
                openvino.save_model(model, directory / role / NAME, compress_to_fp16=False)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[0]
                raise VocabtrimError(f"--format openvino: OpenVINO cannot convert the {role}: {first}") from error
            del model  # its weights are mapped from files that go away
        copy_tokenizer(exported, role, directory / role)
