"""`vocabtrim.json`: what a bundle holds, with the digest of everything in it and of itself."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engines.bundle.experts import Experts
from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT
from engines.bundle.plans import TensorRT
from engines.bundle.typed_json import decode, parse
from engines.bundle.vocab_map import MAX_VOCAB
from engines.errors import VocabtrimError
from engines.generation_rules import GenerationRules

FORMAT_VERSION = 3
MANIFEST_NAME = "vocabtrim.json"
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
VOCAB_MAP_NAME = "vocab_map.safetensors"
PLAN_NAME = "model.engine"
DRAFT_MODEL_NAME = "draft.onnx"
DRAFT_PLAN_NAME = "draft.engine"
FEATURES_NAME = "features.onnx"
HEAD_ROWS_NAME = "head_rows.safetensors"
EXPECTED_NAME = "expected_logits.safetensors"

Role = Literal["target", "drafter"]
Interface = Literal["language-model", "feature-head", "parallel-heads"]


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes and the sha256 of its content, in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a bundle, as kept in `vocabtrim.json`.

    Attributes:
        role: "target" or "drafter".
        source: MODEL that the bundle was made from.
        source_digest: sha256, in hex, over the source's weights.
        architecture: The model type in transformers.
        vocab_size: Tokens of the full vocabulary.
        head_rows: Rows of the LM head, fewer in a trimmed drafter.
        tokenizer: Digest of the token ↔ id table.
        head: `head_digest` of the LM head's rows as `model.onnx` has them.
        eos_token_ids: The tokens that end a generation.
        dtype: "fp32", "fp16" or "bf16".
        quantization: "none", "int8", "int4" or "fp8".
        context_length: Tokens that the KV cache holds.
        num_layers: Layers that have a KV cache.
        num_kv_heads: Heads of keys and values in each of them.
        head_dim: Numbers in one key.
        weight_bytes_per_step: Bytes of weights that one decode step reads: the head's, one row of the embedding, and
            the experts that one token picks are included.
        head_bytes: The head's share of these.
        kv_bytes_per_token: Bytes of keys and values for each cached token.
        inputs: The names of the graph's inputs.
        outputs: The names of the graph's outputs.
        files: Every other file of the bundle by its name.
        tool_versions: The versions of what wrote the bundle.
        vocab_map: Digest of the VocabMap; None for a full head.
        coverage: Share of the held-out calibration tokens that the VocabMap keeps.
        calibration: The source of the token counts (`TokenCounts.describe`).
        tensorrt: The plans of a bundle of `--format trt`, whose graph has fixed shapes and standard operators.
        kind: "language-model", or the kind of a head that reads its target's hidden states, one of the exporter's
            `HEAD_KINDS`. It names the model; `interface` decides what runs it.
        feature_layers: The target's layers whose inputs, concatenated, are the features. A target gives them, a head
            reads them. The number of all layers stands for the input of the LM head.
        feature_size: Numbers in the features of one position.
        rules: The rules on logits in the target's generation config.
        slots: Columns of a trimmed drafter's logits behind those of `head_rows`, for tokens that its head lacks. Their
            rows come from `head_rows.safetensors`. weight_bytes_per_step and head_bytes include them.
        experts: The routed experts, one entry for each form that a layer's have; none in a dense model.
        format_version: The version of this file's format.
    """

    role: Role
    source: str
    source_digest: str
    architecture: str
    vocab_size: int
    head_rows: int
    tokenizer: str
    head: str
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization: str
    context_length: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weight_bytes_per_step: int
    head_bytes: int
    kv_bytes_per_token: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: Mapping[str, FileDigest]
    tool_versions: Mapping[str, str]
    vocab_map: str | None = None
    coverage: float | None = None
    calibration: Mapping[str, Any] | None = None
    tensorrt: TensorRT | None = None
    kind: str = "language-model"
    feature_layers: tuple[int, ...] = ()
    feature_size: int = 0
    rules: GenerationRules = field(default_factory=GenerationRules)
    slots: int = 0
    experts: tuple[Experts, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def interface(self) -> Interface:
        """The kind of inputs that the bundle's graph reads, which decides the engine that runs it.

        "language-model": tokens. "feature-head": tokens and hidden states, which `features.onnx` makes of the target's
        features where there is such a file. "parallel-heads": the target's features alone, with no KV cache.
        """
        if HIDDEN_INPUT in self.inputs:
            return "feature-head"
        return "parallel-heads" if FEATURES_OUTPUT in self.inputs else "language-model"

    def weight_bytes(self, tokens: float) -> float:
        """Returns the bytes of weights that a step of so many tokens is expected to read, experts included."""
        more = sum(each.expected_bytes(tokens) - each.expected_bytes(1) for each in self.experts)
        return self.weight_bytes_per_step + more

    @property
    def head_rows_quantization(self) -> str:
        """The quantisation of the rows in `head_rows.safetensors`: the head's own; for TensorRT, "none"."""
        return "none" if self.tensorrt else self.quantization

    @property
    def digest(self) -> str:
        """sha256, in hex, over the other fields: it identifies the bundle, for they name the digest of every file."""
        return _digest(asdict(self))

    def to_json(self) -> str:
        """Returns the text of `vocabtrim.json`: the fields, and `digest`, by which an edit shows."""
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse `vocabtrim.json`.

        Args:
            text: The file's content.
            where: The file's name in errors.

        Raises:
            VocabtrimError: The manifest has another format version, was edited, or is malformed.
        """
        data = parse(text, where)
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is not int:
            raise VocabtrimError(f"{where} is not a bundle manifest: it has no format_version")
        if version > FORMAT_VERSION:
            raise VocabtrimError(
                f"{where} has bundle format {version}, this version reads {FORMAT_VERSION}: update vocabtrim-export"
            )
        if version < FORMAT_VERSION:
            raise VocabtrimError(
                f"{where} has bundle format {version}, this version reads {FORMAT_VERSION}: export the bundle again"
            )
        if data.pop("digest", None) != _digest(data):
            raise VocabtrimError(f"{where} was edited, it does not match its own digest: export the bundle again")
        manifest: Manifest = decode(cls, _with_added(data), where)
        if not 0 < manifest.head_rows <= manifest.vocab_size <= MAX_VOCAB or not manifest.context_length:
            raise VocabtrimError(f"{where} has a vocabulary, head or context of an impossible size: export again")
        if manifest.slots > manifest.vocab_size - manifest.head_rows:
            raise VocabtrimError(f"{where} has more slots than tokens that its head lacks: export the bundle again")
        if manifest.slots and HEAD_ROWS_NAME not in manifest.files:
            raise VocabtrimError(f"{where} has slots and names no {HEAD_ROWS_NAME}: export the bundle again")
        if not all(
            0 < each.per_token <= each.num_experts >= max(each.distinct, default=0) for each in manifest.experts
        ):
            raise VocabtrimError(f"{where} has experts of an impossible number: export the bundle again")
        return manifest


# Fields that were added to this format later, with the values, as JSON, that stand for them in older manifests.
_ADDED: Mapping[str, Any] = {
    "kind": "language-model",
    "feature_layers": [],
    "feature_size": 0,
    "rules": json.loads(json.dumps(asdict(GenerationRules()))),
    "slots": 0,
    "experts": [],
}


def _with_added(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest's fields with those that were added later."""
    whole = {**_ADDED, **data}
    if isinstance(whole["experts"], list):
        whole["experts"] = [{"distinct": []} | each if isinstance(each, dict) else each for each in whole["experts"]]
    return whole


def _digest(data: Mapping[str, Any]) -> str:
    """sha256, in hex, of the manifest's fields as JSON without spaces, sorted."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
