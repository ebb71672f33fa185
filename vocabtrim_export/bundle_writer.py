"""One bundle written: graph and weights, tokenizer, VocabMap, and the manifest that vouches for them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from engines.bundle import MANIFEST_NAME, MODEL_NAME, VOCAB_MAP_NAME, WEIGHTS_NAME, Manifest, Role, file_digest
from engines.vocab_map import VocabMap
from vocabtrim_export.graph.lower import Lowered, lower
from vocabtrim_export.graph.quantize import Quantization
from vocabtrim_export.lowering.trace import Traced
from vocabtrim_export.models import DTYPES, Source

Progress = Callable[[str, int, int], None]
_TOOLS = ("vocabtrim-export", "torch", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """What one bundle is to hold.

    vocab_map: None for a full head; coverage, calibration: how the map came about. moments: see `input_moments`.
    """

    role: Role
    source: Source
    dtype: str
    quantization: Quantization
    context_length: int
    vocab_map: VocabMap | None = None
    coverage: float | None = None
    calibration: Mapping[str, Any] | None = None
    moments: Mapping[str, Tensor] | None = None


def write_bundle(directory: Path, traced: Traced, plan: BundlePlan, progress: Progress) -> Manifest:
    """Fill the empty `directory` with the bundle that `plan` describes. progress: called with (task, done, total)."""
    task = f"write {plan.role}"
    progress(task, 0, 1)
    lowered = lower(traced, DTYPES[plan.dtype], plan.quantization, plan.vocab_map, plan.moments)

    def report(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(task, info.index + 1, info.total)

    ir.save(lowered.model, directory / MODEL_NAME, external_data=WEIGHTS_NAME, callback=report)
    plan.source.tokenizer.save_pretrained(directory)
    if plan.vocab_map is not None:
        (directory / VOCAB_MAP_NAME).write_bytes(plan.vocab_map.to_bytes())
    names = sorted(path.name for path in directory.iterdir())
    manifest = replace(_manifest(plan, lowered), files={name: file_digest(directory / name) for name in names})
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return manifest


def _manifest(plan: BundlePlan, lowered: Lowered) -> Manifest:
    source, graph = plan.source, lowered.model.graph
    return Manifest(
        role=plan.role,
        source=source.name,
        source_digest=source.digest,
        architecture=source.model.config.model_type,
        vocab_size=source.vocab_size,
        head_rows=len(plan.vocab_map) if plan.vocab_map else source.vocab_size,
        tokenizer=source.tokenizer_digest,
        eos_token_ids=source.eos_token_ids,
        dtype=plan.dtype,
        quantization=plan.quantization,
        context_length=plan.context_length,
        num_layers=lowered.num_layers,
        num_kv_heads=lowered.num_kv_heads,
        head_dim=lowered.head_dim,
        weight_bytes_per_step=lowered.weight_bytes_per_step,
        head_bytes=lowered.head_bytes,
        kv_bytes_per_token=lowered.kv_bytes_per_token,
        inputs=tuple(str(value.name) for value in graph.inputs),
        outputs=tuple(str(value.name) for value in graph.outputs),
        files={},
        tool_versions={tool: version(tool) for tool in _TOOLS},
        vocab_map=plan.vocab_map.digest if plan.vocab_map else None,
        coverage=plan.coverage,
        calibration=plan.calibration,
    )
