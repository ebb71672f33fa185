"""One bundle written: graph and weights, tokenizer, VocabMap, and the manifest with their digests."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from engines.bundle.checks import graph_metadata
from engines.bundle.experts import Picks
from engines.bundle.graph_file import HEAD_TENSORS, GraphFile
from engines.bundle.graph_io import SLOT_WEIGHT, TOKEN_IDS, TOKEN_TABLE
from engines.bundle.read import (
    FEATURES_NAME,
    HEAD_ROWS_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    VOCAB_MAP_NAME,
    FileDigest,
    Manifest,
    Role,
    TensorRT,
    file_digest,
)
from engines.bundle.vocab_map import VocabMap
from engines.generation_rules import GenerationRules
from vocabtrim_export.drafters.base import FeatureHead, ParallelHeads
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.generation_rules import generation_rules
from vocabtrim_export.lowering.graph_files import clone_file, save_graph, save_like, save_small, stamp_graph
from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.pipeline import Weights, lower, lower_features, lower_slot_rows
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.progress import Progress
from vocabtrim_export.sources.source import DTYPES, Source
from vocabtrim_export.tracing.trace import Traced
from vocabtrim_export.trt.bundle import write_tensorrt
from vocabtrim_export.trt.polygraphy import write_loader
from vocabtrim_export.trt.settings import TensorRTSettings
from vocabtrim_export.version import __version__

_PROMPT = "The drafter proposes a few tokens; the target reads all of them at once and keeps those it agrees with."
_TOOLS = ("torch", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """The content of one bundle.

    Attributes:
        role: "drafter" or "target".
        source: The loaded model.
        dtype: "fp32", "fp16" or "bf16".
        quantization: The quantisation of the weights.
        context_length: The tokens that the KV cache holds.
        vocab_map: The tokens that the head keeps; None for a full head.
        coverage: The share of held-out tokens that the head keeps, if it was measured.
        calibration: The source of the token counts (`TokenCounts.describe`).
        moments: See `input_moments`; int4 is better with them.
        picks: See `distinct_experts`; empty where it was not measured.
        trt: Settings for TensorRT plans; None makes a bundle for ONNX Runtime.
        features_given: The layers of a target whose inputs a head reads.
        slots: In-context slots of a trimmed head.
        lost_token_ids: int64[n], ascending, the tokens that may enter the slots.
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
    picks: Picks = field(default_factory=dict)
    trt: TensorRTSettings | None = None
    features_given: tuple[int, ...] = ()
    slots: int = 0
    lost_token_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def head_rows(self) -> NDArray[np.int64] | None:
        """int64[K], the rows of the model's LM head that the bundle keeps; None for all."""
        return None if self.vocab_map is None else self.rows_of(self.vocab_map.kept_token_ids)

    @property
    def weights(self) -> Weights:
        rows = None if self.head_rows is None else torch.from_numpy(self.head_rows)
        pads = self.role == "target" and self.quantization == "int8"  # int4's products have a kernel for a lone row
        return Weights(DTYPES[self.dtype], self.quantization, self.vocab_map, self.moments, rows, self.slots, pads)

    def rows_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rows, int64[n], of the tokens int64[n] in the model's LM head."""
        return self.source.rows_of(token_ids) if isinstance(self.source, HeadSource) else token_ids.copy()


def write_bundle(
    directory: Path, traced: Traced | None, plan: BundlePlan, progress: Progress, twin: Path | None = None
) -> Manifest:
    """Fill a directory with the bundle that `plan` describes.

    Args:
        directory: Empty.
        traced: The model's trace; None for `ParallelHeads`.
        plan: The description of the bundle.
        progress: Called with (task, done, total).
        twin: A bundle for ONNX Runtime of the same model, dtype, quantisation and context, whose weights are
            copied, except those of the LM head.
    """
    lowered, tensorrt = _write_graphs(directory, traced, plan, progress, twin)
    _save_tokenizer(plan.source, directory)
    if plan.vocab_map is not None:
        (directory / VOCAB_MAP_NAME).write_bytes(plan.vocab_map.to_bytes())
    if plan.slots and traced is not None:
        _save_head_rows(directory, traced, plan)
    graph = GraphFile.read(directory / MODEL_NAME)
    names = list(lowered.head_tensors)
    manifest = replace(_manifest(plan, lowered), head=graph.digest(names), tensorrt=tensorrt)
    for path in directory.glob("*.onnx"):
        stamp_graph(path, graph_metadata(manifest) | {HEAD_TENSORS: json.dumps(names)})
    if tensorrt is not None:
        write_loader(directory, manifest, plan.source.tokenizer.encode(_PROMPT), _slot_size(lowered))
    manifest = replace(manifest, files={path.name: _digest(path) for path in sorted(directory.iterdir())})
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return manifest


def add_file(directory: Path, manifest: Manifest, name: str) -> Manifest:
    """Name one more file of a bundle in its manifest, which is written again and returned."""
    manifest = replace(manifest, files={**manifest.files, name: _digest(directory / name)})
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return manifest


def _digest(path: Path) -> FileDigest:
    return FileDigest(path.stat().st_size, file_digest(path))


def _write_graphs(
    directory: Path, traced: Traced | None, plan: BundlePlan, progress: Progress, twin: Path | None
) -> tuple[Lowered, TensorRT | None]:
    model, weights = plan.source.model, plan.weights
    if traced is None:
        assert isinstance(model, ParallelHeads)
        lowered = model.lower(weights)
    elif plan.trt is not None:
        return write_tensorrt(directory, traced, weights, plan.role, plan.context_length, plan.trt, progress)
    else:
        lowered = lower(traced, weights)
    if twin:
        save_like(lowered.model, directory, twin, {*lowered.head_tensors, TOKEN_TABLE})
    else:
        save_graph(lowered.model, directory, f"write {plan.role}", progress)
    if isinstance(model, FeatureHead) and model.fuse is not None:
        if twin:
            features = f"{FEATURES_NAME}.data"
            shutil.copyfile(twin / FEATURES_NAME, directory / FEATURES_NAME)  # its metadata is written again below
            clone_file(twin / features, directory / features)
        else:
            save_small(lower_features(model.fuse, weights), directory / FEATURES_NAME)
    return lowered, None


def _save_head_rows(directory: Path, traced: Traced, plan: BundlePlan) -> None:
    """Write the rows of the tokens that the trimmed head lacks, in the order of these tokens, and their ids."""
    rows = torch.from_numpy(plan.rows_of(plan.lost_token_ids))
    parts = lower_slot_rows(traced, plan.weights, rows, is_standard=plan.trt is not None)
    tensors = {name: _as_bits(weight.load()) for name, weight in parts.items()}
    save_file({TOKEN_IDS: torch.from_numpy(plan.lost_token_ids.copy()), **tensors}, directory / HEAD_ROWS_NAME)
    shutil.copymode(directory / MODEL_NAME, directory / HEAD_ROWS_NAME)  # save_file lets only the owner read it


def _slot_size(lowered: Lowered) -> int:
    """Returns how many numbers a row of the head has; 0 where the graph has no slots."""
    sizes = (value.shape[0] for value in lowered.model.graph.inputs if value.name == SLOT_WEIGHT and value.shape)
    size = next(sizes, 0)
    return size if isinstance(size, int) else 0


def _as_bits(tensor: Tensor) -> Tensor:
    """Returns a bfloat16 tensor as uint16, because NumPy lacks bfloat16, and other tensors as they are."""
    return tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor


def _save_tokenizer(source: Source, directory: Path) -> None:
    try:
        # Several named templates stay in tokenizer_config.json: their own files would lie in a directory.
        is_single = not isinstance(source.tokenizer.chat_template, dict)
        source.tokenizer.save_pretrained(directory, save_jinja_files=is_single)
    except Exception as error:  # the library raises a bare Exception for the system's errors
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(directory)) from error


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
        head="",
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
        tool_versions={"vocabtrim-export": __version__} | {tool: version(tool) for tool in _TOOLS},
        vocab_map=plan.vocab_map.digest if plan.vocab_map else None,
        coverage=plan.coverage,
        calibration=plan.calibration,
        rules=generation_rules(source.model.generation_config) if plan.role == "target" else GenerationRules(),
        slots=plan.slots,
        experts=tuple(
            replace(each, distinct=plan.picks.get((each.num_experts, each.per_token), ())) for each in lowered.experts
        ),
        **_features(plan),
    )


def _features(plan: BundlePlan) -> dict[str, Any]:
    """Returns the fields of the manifest that describe the features given or read."""
    if isinstance(plan.source, HeadSource):
        size = int(plan.source.model.config.feature_size)
        return {"kind": plan.source.kind, "feature_layers": plan.source.feature_layers, "feature_size": size}
    size = len(plan.features_given) * int(plan.source.model.config.get_text_config().hidden_size)
    return {"feature_layers": plan.features_given, "feature_size": size}
