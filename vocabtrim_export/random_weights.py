"""Bundles of random weights in the shape of a known model: its latency, without its weights.

No tensor is held twice, and none is held whole before it is written: each is a window on one small piece of noise.
A head is no shape of its own here: its target would have to be made to give the features that it reads.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from engines.bundle import Role, read_bundle
from engines.errors import VocabtrimError
from engines.vocab_map import VocabMap
from vocabtrim_export.bundle_writer import BundlePlan, write_bundle
from vocabtrim_export.export import context_length
from vocabtrim_export.graph.files import Progress
from vocabtrim_export.graph.quantize import Quantization
from vocabtrim_export.lowering.composites import rotary_modules
from vocabtrim_export.lowering.trace import Traced, trace
from vocabtrim_export.models import DTYPES, Source
from vocabtrim_export.output import replacing

_WORDS = 64  # of the tokenizer: it only has to exist
_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
_QUANTIZED_BYTES = {"int8": 1.16, "int4": 0.67}  # a weight, with a scale and a zero point for each block of 32, fp32


def _llama3(factor: float) -> dict[str, Any]:
    context = {"original_max_position_embeddings": 8192}
    bands = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **bands, **context}}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its transformers configuration. model_type: as `AutoConfig.for_model` takes it."""

    name: str
    model_type: str
    settings: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.settings["vocab_size"])


def _shape(name: str, model_type: str, sizes: Sequence[int], **settings: Any) -> Shape:
    """sizes: vocabulary, hidden, intermediate, layers, attention heads, key/value heads, head, context."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    keys = [*names.split(), "head_dim", "max_position_embeddings"]
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return Shape(name, model_type, dict(zip(keys, sizes, strict=True)) | none | settings)


# From the models' own config.json.
SHAPES = {
    shape.name: shape
    for shape in (
        _shape(
            "llama-3.2-1b",
            "llama",
            (128_256, 2048, 8192, 16, 32, 8, 64, 131_072),
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            **_llama3(32.0),
        ),
        _shape(
            "llama-3.1-8b",
            "llama",
            (128_256, 4096, 14_336, 32, 32, 8, 128, 131_072),
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            **_llama3(8.0),
        ),
        _shape(
            "qwen2.5-0.5b",
            "qwen2",
            (151_936, 896, 4864, 24, 14, 2, 64, 32_768),
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        _shape("tiny", "llama", (512, 64, 96, 2, 4, 2, 16, 1024), tie_word_embeddings=True),
    )
}


@dataclass(frozen=True, slots=True)
class RandomSettings:
    """drafter_rows: rows of each drafter's head, None for all. drafter_shape: None makes them of the target's model.

    quantize_drafter: None does as `quantize` says.
    """

    shape: str
    drafter_shape: str | None = None
    drafter_rows: tuple[int | None, ...] = (None,)
    dtype: str = "fp32"
    quantize: Quantization = "none"
    quantize_drafter: Quantization | None = None
    max_length: int = 1024


@dataclass(frozen=True, slots=True)
class RandomBundles:
    """drafters: by the rows that were asked for, "8192 rows" or "full"."""

    target: Path
    drafters: Mapping[str, Path]


def random_source(shape: Shape) -> Source:
    """A model of `shape` with random weights that take no memory to speak of, and a tokenizer of a few words."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(_WORDS)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0")
    digest = hashlib.sha256(f"random weights, {shape.name}".encode()).hexdigest()
    return Source(f"random weights, {shape.name}", _model(shape), tokenizer, digest)


def random_bundles(settings: RandomSettings, directory: Path, progress: Progress) -> RandomBundles:
    """Write a target and its drafters into `directory`; what an earlier call with these settings wrote is used.

    Drafters of the target's model share its KV cache where both have one dtype.
    Raises `VocabtrimError` where a head has fewer rows than asked for, the vocabularies differ, or disk or memory
    cannot hold the bundles.
    """
    shape, drafter_shape = SHAPES[settings.shape], SHAPES[settings.drafter_shape or settings.shape]
    if drafter_shape.vocab_size != shape.vocab_size:
        raise VocabtrimError(f"{drafter_shape.name} cannot draft for {shape.name}: their vocabularies differ")
    for rows in settings.drafter_rows:
        if rows is not None and rows > shape.vocab_size:
            raise VocabtrimError(f"--k {rows} is more than the {shape.vocab_size} rows that {shape.name} has")
    sources = {each.name: random_source(each) for each in (shape, drafter_shape)}
    for source in sources.values():
        context_length(source, settings.max_length)
    plans = _plans(sources[shape.name], sources[drafter_shape.name], settings)
    missing = [name for name in plans if not _is_whole(directory / name)]
    _check_room(shape, directory, list(plans.values()), [plans[name] for name in missing])
    for source in sources.values():
        names = [name for name in missing if plans[name].source is source]
        if names:
            progress("trace", 0, 1)
            traced: Traced = trace(source.model, DTYPES[settings.dtype], settings.max_length)
            progress("trace", 1, 1)
        for name in names:
            with replacing([directory / name]) as (fresh,):
                write_bundle(fresh, traced, plans[name], progress)
    target, *drafters = (directory / name for name in plans)
    labels = ["full" if rows is None else f"{rows} rows" for rows in settings.drafter_rows]
    return RandomBundles(target, dict(zip(labels, drafters, strict=True)))


def _plans(target: Source, drafter: Source, settings: RandomSettings) -> dict[str, BundlePlan]:
    """By the name of the bundle's directory, the target's first."""

    def entry(role: Role, quantization: Quantization, rows: int | None) -> tuple[str, BundlePlan]:
        source = target if role == "target" else drafter
        shape = source.name.rpartition(" ")[2]
        name = f"{shape}-{settings.dtype}-{settings.max_length}-{role}-{quantization}"
        kept = None if rows is None else VocabMap.from_ids(range(rows), source.vocab_size)
        plan = BundlePlan(role, source, settings.dtype, quantization, settings.max_length, kept)
        return name if role == "target" else f"{name}-{rows or 'full'}", plan

    quantization = settings.quantize_drafter or settings.quantize
    drafters = [entry("drafter", quantization, rows) for rows in settings.drafter_rows]
    return dict([entry("target", settings.quantize, None), *drafters])


def _is_whole(bundle: Path) -> bool:
    """Whether it is there, undamaged and of this version's format."""
    try:
        read_bundle(bundle)
    except VocabtrimError:
        return False
    return True


def _model(shape: Shape) -> PreTrainedModel:
    config = AutoConfig.for_model(shape.model_type, **shape.settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    noise = torch.randn(max(sum(tensor.shape) for tensor in state.values()), generator=torch.Generator().manual_seed(0))
    model.load_state_dict({name: _window(noise, name, tensor) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    for rotary in rotary_modules(model):  # its frequencies are no weights: as the configuration has them
        fresh = type(rotary)(config)
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, buffer)
    return model.eval()  # type: ignore[no-any-return]


def _window(noise: Tensor, name: str, like: Tensor) -> Tensor:
    """A matrix whose rows are overlapping windows on `noise`; norms are ones and biases zeros."""
    if like.ndim == 1:
        return torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
    scaled = noise[: sum(like.shape)] * like.shape[1] ** -0.5  # so that activations stay near one
    window: Tensor = scaled.as_strided(like.shape, (1, 1))
    return window


def _check_room(shape: Shape, directory: Path, loaded: list[BundlePlan], written: list[BundlePlan]) -> None:
    """Raise `VocabtrimError` where the disk cannot hold `written`, or the memory what `loaded` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    checks = ("disk space", written, shutil.disk_usage(directory).free), ("memory", loaded, available_memory())
    for what, plans, room in checks:
        needed = sum(bundle_bytes(plan) for plan in plans)
        if needed > room:
            raise VocabtrimError(
                f"{shape.name} needs {needed / 1e9:.1f} GB of {what} for {len(plans)} bundles and there are "
                f"{room / 1e9:.1f}: use --dtype fp16, --quantize int4 or fewer --k"
            )


def bundle_bytes(plan: BundlePlan) -> float:
    """About what a bundle's weights take: the embedding in its dtype, the head and the layers as they are quantised."""
    model: Any = plan.source.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rows = len(plan.vocab_map) if plan.vocab_map else len(head)
    layers = sum(p.numel() for p in model.parameters()) - embedding.numel()
    layers -= 0 if head is embedding else head.numel()
    products = layers + rows * head.shape[1]
    return float(
        embedding.numel() * _BYTES[plan.dtype] + products * _QUANTIZED_BYTES.get(plan.quantization, _BYTES[plan.dtype])
    )


def available_memory() -> int:
    """Bytes that can be used without swapping, where the system tells; else all there are."""
    info = Path("/proc/meminfo")
    for line in info.read_text("utf-8").splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
