"""Loading what a user calls MODEL: a hub id, a local model directory, or a `.gguf` file."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version

from engines.bundle.read import file_digest
from engines.bundle.tokenizer import tokenizer_digest
from engines.bundle.typed_json import read
from engines.bundle.vocabulary import Vocabulary
from engines.errors import VocabtrimError
from vocabtrim_export.sources.end_tokens import add_end_tokens, eos_token_ids
from vocabtrim_export.sources.gguf_header import check_whole, read_header
from vocabtrim_export.sources.gguf_model import load_gguf
from vocabtrim_export.sources.gguf_tokenizer import read_tokenizer
from vocabtrim_export.sources.gguf_weights import BytesDone
from vocabtrim_export.sources.locate import locate
from vocabtrim_export.sources.quantized_checkpoints import dense_weights, is_readable
from vocabtrim_export.sources.refusals import check_architecture
from vocabtrim_export.sources.runtime_tokenizer import template_note
from vocabtrim_export.sources.text_models import (
    is_multimodal,
    multimodal_note,
    text_config,
    text_tensor_names,
    text_weights,
)
from vocabtrim_export.sources.unread_tensors import check_unread
from vocabtrim_export.sources.weight_files import count_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NO_CODE = {"trust_remote_code": False}  # never a question on the terminal, never a model's own code
_MOST_RATIO = 16  # a checkpoint may pack several weights in a number


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model with its tokenizer. digest: sha256 over its weight files. notes: what the user should know."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def backend(self) -> Tokenizer:
        return self.tokenizer.backend_tokenizer

    @property
    def tokenizer_digest(self) -> str:
        return tokenizer_digest(self.backend)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding table."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.backend, self.vocab_size)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, ascending: `load_source` has put them all into the generation config."""
        return tuple(sorted(eos_token_ids(self.tokenizer, self.model.generation_config)))


def load_source(spec: str, dtype: torch.dtype, progress: BytesDone = lambda _done, _total: None) -> Source:
    """Load a model and its tokenizer.

    Args:
        spec: MODEL as the user gave it: a directory, a `.gguf` file or a hub id.
        dtype: The dtype of the model's parameters.
        progress: Called with (bytes read, bytes to read).

    Raises:
        VocabtrimError: The model is of a kind that is not read, or its files are damaged.
    """
    files, where = locate(spec)
    size = sum(file.stat().st_size for file in files)
    progress(0, size)
    weights = sum(count_weights(file) for file in files)
    try:
        loaded = (
            _load_file(files[0], dtype, progress)
            if files[0].suffix == ".gguf"
            else _load(spec, where, files, weights, dtype)
        )
    except VocabtrimError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise VocabtrimError(f"cannot load {spec}: {_first_line(error)}") from error
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
        _read_config(spec, where)
        tokenizer = _read_tokenizer(spec, where)
    except VocabtrimError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise VocabtrimError(f"cannot load {spec}: {_first_line(error)}") from error
    _check_fast(spec, tokenizer)
    return tokenizer  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """end_token_ids: those that a file names beside the configs' own."""

    model: PreTrainedModel
    tokenizer: Any
    end_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def _load_file(file: Path, dtype: torch.dtype, progress: BytesDone) -> _Loaded:
    header = read_header(file)
    check_whole(header)
    read = read_tokenizer(header)
    model, notes = load_gguf(header, dtype, progress)
    return _Loaded(model, read.tokenizer, read.end_token_ids, (*read.notes, *notes))


def _load(spec: str, where: str, files: list[Path], weights: int, dtype: torch.dtype) -> _Loaded:
    """The model in the directory `where`."""
    config = _read_config(spec, where)
    text = text_config(spec, config)
    check_architecture(spec, text)
    _check_size(spec, text, weights)
    tokenizer = _read_tokenizer(spec, where)
    model, loading = _load_weights(where, files, dtype, config, text)
    _check_fit(spec, loading)
    if (Path(where) / "generation_config.json").is_file():  # transformers passes over one that it cannot read
        model.generation_config = GenerationConfig.from_pretrained(where)
    notes: tuple[str, ...] = (multimodal_note(spec, text),) if is_multimodal(config, text) else ()
    notes += _own_code_note(spec, config)
    notes += check_unread(spec, loading["unexpected_keys"], int(model.config.num_hidden_layers))
    return _Loaded(model, tokenizer, notes=notes)


def _read_config(spec: str, where: str) -> PreTrainedConfig:
    """The configuration in the directory `where`, of an architecture that transformers itself has."""
    raw = read(Path(where) / "config.json")
    stated = raw.get("model_type") if isinstance(raw, dict) else None
    if stated and stated not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise VocabtrimError(f"{spec} ({stated}) brings its own code (auto_map in config.json), which is never run")
        raise VocabtrimError(f"{spec}: transformers {transformers_version} has no architecture {stated!r}")
    config: PreTrainedConfig = AutoConfig.from_pretrained(where, **_NO_CODE)
    return config


def _own_code_note(spec: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """A note where a checkpoint of a known architecture brings a model class of its own."""
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        return ()
    return (
        f"{spec} brings its own code (auto_map in config.json), which is not run: it is read as transformers' own "
        f"{config.model_type}",
    )


def _load_weights(
    where: str, files: list[Path], dtype: torch.dtype, config: PreTrainedConfig, text: PreTrainedConfig
) -> Any:
    """(model, transformers' account of the tensors), of a quantised checkpoint by its dense weights and of a
    multimodal one by its text model's."""
    how: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    quantization: Any = getattr(config, "quantization_config", None)
    is_quantized = isinstance(quantization, dict) and is_readable(quantization)
    multimodal = is_multimodal(config, text)
    if not is_quantized and not multimodal:
        return AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, **how)
    if is_quantized:
        weights = dense_weights(files, quantization, dtype)
        if multimodal:
            weights = {name: weights[stored] for stored, name in text_tensor_names(weights).items()}
    else:
        weights = text_weights(files)
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    if "lm_head.weight" not in weights and getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True  # the whole's rule holds for a head that the whole has
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    return kind.from_pretrained(None, config=text, state_dict=weights, **how)


def _read_tokenizer(spec: str, where: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(where, **_NO_CODE)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise VocabtrimError(
            f"cannot read the tokenizer of {spec}: {_first_line(error)}; fetch its files again (tokenizer.json or "
            "tokenizer.model, tokenizer_config.json, chat_template.jinja)"
        ) from error


def _check_fit(spec: str, loading: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the configuration. loading: transformers' account of the tensors."""
    begin = f"the weights of {spec} do not fit its config.json: "
    for name, there, wanted in sorted(loading["mismatched_keys"]):
        raise VocabtrimError(f"{begin}{name} has the shape {list(there)}, config.json asks for {list(wanted)}")
    missing, unread = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing == ["lm_head.weight"]:
        raise VocabtrimError(
            f'{begin}no usable lm_head.weight among them; if its head is its embedding, set "tie_word_embeddings" to '
            "true there"
        )
    if missing:
        names = f"; they have names such as {unread[0]}" if unread else ""
        raise VocabtrimError(f"{begin}no usable {missing[0]} among them{names}")


def _check_size(spec: str, config: PreTrainedConfig, weights: int) -> None:
    """Refuse a config.json that asks for far more weights than there are, before they are allocated."""
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > _MOST_RATIO * weights:
        raise VocabtrimError(
            f"the weights of {spec} do not fit its config.json: it asks for {wanted}, there are {weights}"
        )


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF's weights are dequantised as they load; the model must not call itself quantised any more."""
    if hasattr(model.config, "quantization_config"):
        if getattr(model.config.quantization_config, "quant_method", "gguf") != "gguf":
            raise VocabtrimError(
                "this checkpoint is quantised in a way that is not read (GPTQ, AWQ and compressed-tensors are): give "
                "its unquantised weights or a .gguf file"
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
        raise VocabtrimError(f"{spec} ({model.config.model_type}) has no linear LM head to trim")


def _digest(files: list[Path]) -> str:
    """sha256 over the weight files' own digests."""
    return hashlib.sha256("\n".join(map(file_digest, files)).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return " ".join([type(error).__name__, *lines])
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
