"""Loads a MODEL: a hub id, a local model directory, or a `.gguf` file."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from engines.bundle.read import file_digest
from engines.bundle.tokenizer import tokenizer_digest
from engines.bundle.vocabulary import Vocabulary
from engines.errors import VocabtrimError
from vocabtrim_export.progress import BytesDone
from vocabtrim_export.sources.checkpoint import Loaded, load_checkpoint, read_checkpoint_tokenizer
from vocabtrim_export.sources.config import first_line, read_config
from vocabtrim_export.sources.end_tokens import add_end_tokens, eos_token_ids
from vocabtrim_export.sources.gguf_header import check_whole, read_header
from vocabtrim_export.sources.gguf_model import load_gguf
from vocabtrim_export.sources.gguf_tokenizer import read_tokenizer
from vocabtrim_export.sources.locate import locate
from vocabtrim_export.sources.runtime_tokenizer import template_note
from vocabtrim_export.sources.weight_files import count_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model with its tokenizer.

    Attributes:
        name: MODEL as the user gave it.
        model: The model, in evaluation mode.
        tokenizer: Its fast tokenizer.
        digest: sha256 over its weight files.
        notes: Notes for the user.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer of the library tokenizers, which the bundle's `tokenizer.json` holds."""
        return self.tokenizer.backend_tokenizer

    @property
    def tokenizer_digest(self) -> str:
        """The digest of the token ↔ id table."""
        return tokenizer_digest(self.backend)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding table."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that have a row in the model's embedding."""
        return Vocabulary.of(self.backend, self.vocab_size)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, ascending: `load_source` has put them all into the generation config."""
        return tuple(sorted(eos_token_ids(self.tokenizer, self.model.generation_config)))


def load_source(
    spec: str,
    dtype: torch.dtype,
    progress: BytesDone = lambda _done, _total: None,
    scratch: Path | None = None,
) -> Source:
    """Load a model and its tokenizer.

    Args:
        spec: MODEL as the user gave it: a directory, a `.gguf` file or a hub id.
        dtype: The dtype of the model's parameters.
        progress: Called with (bytes read, bytes to read).
        scratch: A directory for files without names; given, weights are mapped rather than held in memory. Those that
            are computed, as a `.gguf` file's, are in files there. Those of a checkpoint in half precision are in its
            own files where `dtype` is float32: the model's parameters then have the checkpoint's dtype.

    Raises:
        VocabtrimError: The model is of a kind that is not read, or its files are damaged.
    """
    files, where = locate(spec)
    size = sum(file.stat().st_size for file in files)
    progress(0, size)
    weights = sum(count_weights(file) for file in files)
    try:
        loaded = (
            _load_file(files[0], dtype, progress, scratch)
            if files[0].suffix == ".gguf"
            else load_checkpoint(spec, where, files, weights, dtype, scratch, progress)
        )
    except VocabtrimError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise VocabtrimError(f"cannot load {spec}: {first_line(error)}") from error
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    _forget_quantization(model)
    _check(spec, model, tokenizer)
    model.generation_config = model.generation_config or GenerationConfig()
    add_end_tokens(model.generation_config, model.config.get_text_config(), tokenizer, loaded.end_token_ids)
    progress(size, size)
    return Source(spec, model, tokenizer, _digest(files), notes=loaded.notes + template_note(tokenizer))


def load_tokenizer(spec: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, and nothing of its weights.

    Args:
        spec: MODEL as the user gave it: a directory, a `.gguf` file or a hub id.

    Raises:
        VocabtrimError: There is no model at `spec`, or its tokenizer cannot be read.
    """
    files, where = locate(spec)
    try:
        if files[0].suffix == ".gguf":
            header = read_header(files[0])
            check_whole(header)
            return read_tokenizer(header).tokenizer
        read_config(spec, where)
        tokenizer = read_checkpoint_tokenizer(spec, where)
    except VocabtrimError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise VocabtrimError(f"cannot load {spec}: {first_line(error)}") from error
    _check_fast(spec, tokenizer)
    return tokenizer  # type: ignore[no-any-return]


def _load_file(file: Path, dtype: torch.dtype, progress: BytesDone, scratch: Path | None) -> Loaded:
    header = read_header(file)
    check_whole(header)
    read = read_tokenizer(header)
    model, notes = load_gguf(header, dtype, progress, scratch)
    return Loaded(model, read.tokenizer, read.end_token_ids, (*read.notes, *notes))


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the quantisation from the config of a model whose weights were dequantised while loading."""
    if hasattr(model.config, "quantization_config"):
        if (method := getattr(model.config.quantization_config, "quant_method", "gguf")) != "gguf":
            raise VocabtrimError(
                f"transformers keeps the weights of this checkpoint as {method} on this machine: give its unquantised "
                "weights or a .gguf file, or hide the GPU (CUDA_VISIBLE_DEVICES=)"
            )
        del model.config.quantization_config


def _check_fast(spec: str, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise VocabtrimError(f"{spec} has no tokenizer.json: a fast tokenizer is needed")


def _check(spec: str, model: PreTrainedModel, tokenizer: Any) -> None:
    _check_fast(spec, tokenizer)
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if (beyond := Vocabulary.of(tokenizer.backend_tokenizer, rows).beyond) is not None:
        raise VocabtrimError(
            f"the tokenizer of {spec} does not match its weights: it has ids up to {beyond}, the model {rows} rows"
        )
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise VocabtrimError(f"{spec} ({model.config.model_type}) has no linear LM head to trim: give another model")


def _digest(files: list[Path]) -> str:
    """Returns sha256 over the weight files' own digests."""
    return hashlib.sha256("\n".join(map(file_digest, files)).encode()).hexdigest()
