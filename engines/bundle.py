"""The bundle: a directory that holds one engine's files, and `vocabtrim.json`, which says what they are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engines.errors import VocabtrimError
from engines.vocab_map import VocabMap

FORMAT_VERSION = 2
MANIFEST_NAME = "vocabtrim.json"
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
VOCAB_MAP_NAME = "vocab_map.safetensors"
PLAN_NAME = "model.engine"
DRAFT_MODEL_NAME = "draft.onnx"
DRAFT_PLAN_NAME = "draft.engine"

Role = Literal["target", "drafter"]
Phase = Literal["draft", "verify", "prefill"]
Flavor = Literal["none", "tensorrt", "rtx"]


@dataclass(frozen=True, slots=True)
class Profile:
    """One fixed shape: `tokens` fed, `keep` of their positions predicted, `span` slots of the KV cache attended to."""

    phase: Phase
    tokens: int
    keep: int
    span: int


@dataclass(frozen=True, slots=True)
class TensorRT:
    """What a bundle of `--format trt` holds beside the graph.

    flavor, version: the library that built the plans; no other version opens them. "none": there are only graphs.
    compute_capabilities: of the GPUs that they were built for, such as "8.6".
    profiles: the optimization profiles of `model.engine`, in its order.
    draft_length: tokens that one call of `draft.engine` drafts (γ), 0 where there is none. It has one optimization
    profile for each of `spans`.
    weights_stripped: the plans hold no weights; `model.onnx` and `draft.onnx` refit them at load.
    """

    flavor: Flavor
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    draft_length: int
    weights_stripped: bool

    @property
    def spans(self) -> tuple[int, ...]:
        """Numbers of slots that attention can read, ascending; the last is the whole KV cache."""
        return tuple(sorted({profile.span for profile in self.profiles}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TensorRT":
        profiles = tuple(Profile(**profile) for profile in data["profiles"])
        fields = dict(data) | {"profiles": profiles, "compute_capabilities": tuple(data["compute_capabilities"])}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds, as kept in `vocabtrim.json`.

    vocab_size: tokens of the full vocabulary. head_rows: rows of the LM head, fewer in a trimmed drafter.
    context_length: tokens the KV cache holds.
    weight_bytes_per_step: bytes of weights that one decode step reads (the head's included, of the embedding one row).
    head_bytes: the head's share of these. kv_bytes_per_token: bytes of keys and values per cached token.
    vocab_map: digest of the VocabMap, None for a full head. coverage: share of held-out calibration tokens it keeps.
    tokenizer: digest of the token ↔ id table. source_digest: sha256 over the source's weights.
    files: name → sha256 of every other file of the bundle.
    tensorrt: the plans of a bundle of `--format trt`; its graph has fixed shapes and standard operators.
    """

    role: Role
    source: str
    source_digest: str
    architecture: str
    vocab_size: int
    head_rows: int
    tokenizer: str
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
    files: Mapping[str, str]
    tool_versions: Mapping[str, str]
    vocab_map: str | None = None
    coverage: float | None = None
    calibration: Mapping[str, Any] | None = None
    tensorrt: TensorRT | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse `vocabtrim.json`; `where` names it in the error of a malformed one."""
        try:
            data = json.loads(text)
            version = data["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise VocabtrimError(f"{where} is not a bundle manifest ({error})") from error
        if version != FORMAT_VERSION:
            raise VocabtrimError(
                f"{where} has bundle format {version}, this version reads {FORMAT_VERSION}: export the bundle again"
            )
        if unknown := set(data) ^ {field.name for field in fields(cls)}:
            raise VocabtrimError(f"{where} has missing or unknown fields: {', '.join(sorted(unknown))}")
        for name in ("eos_token_ids", "inputs", "outputs"):
            data[name] = tuple(data[name])
        if data["tensorrt"] is not None:
            try:
                data["tensorrt"] = TensorRT.from_dict(data["tensorrt"])
            except (KeyError, TypeError) as error:
                raise VocabtrimError(f"{where}: malformed field tensorrt ({error})") from error
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and checked: every file is there and has the digest that its manifest states."""

    path: Path
    manifest: Manifest
    vocab_map: VocabMap | None


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle directory and check all of its files. Raises `VocabtrimError` naming the file that is wrong."""
    root = Path(path)
    manifest_path = root / MANIFEST_NAME
    if not root.is_dir():
        raise VocabtrimError(f"no bundle at {root}: make one with `vocabtrim-export --output {root.parent}`")
    if not manifest_path.is_file():
        inside = [name for name in ("target", "drafter") if (root / name / MANIFEST_NAME).is_file()]
        hint = f"; did you mean {root / inside[0]}?" if inside else ""
        raise VocabtrimError(f"{root} is not a bundle: it has no {MANIFEST_NAME}{hint}")
    manifest = Manifest.from_json(manifest_path.read_text("utf-8"), str(manifest_path))
    for name, digest in manifest.files.items():
        _check_file(root, name, digest)
    vocab_map = VocabMap.load(root / VOCAB_MAP_NAME) if manifest.vocab_map else None
    if vocab_map is not None:
        found = vocab_map.digest, len(vocab_map), vocab_map.full_vocab
        if found != (manifest.vocab_map, manifest.head_rows, manifest.vocab_size):
            raise VocabtrimError(
                f"{root / VOCAB_MAP_NAME} is not the VocabMap that {MANIFEST_NAME} names: export again"
            )
    return Bundle(root, manifest, vocab_map)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(root: Path, name: str, digest: str) -> None:
    if Path(name).name != name:
        raise VocabtrimError(f"{root / MANIFEST_NAME} names the file {name!r}, which is not inside the bundle")
    if not (root / name).is_file():
        raise VocabtrimError(f"{root} lacks {name}, which its {MANIFEST_NAME} names: export the bundle again")
    if file_digest(root / name) != digest:
        raise VocabtrimError(f"{root / name} does not match its digest in {MANIFEST_NAME}: copy or export it again")
