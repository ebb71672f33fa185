"""Loading what a user calls MODEL: a hub id, a local model directory, or a `.gguf` file."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from engines.bundle.read import file_digest
from engines.bundle.tokenizer import tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.drafters.detect import head_kind
from vocabtrim_export.sources.gguf_extras import rope_parameters, without_additions
from vocabtrim_export.sources.quantized_checkpoints import dense_weights, is_readable
from vocabtrim_export.sources.weight_files import PICKLES, count_weights, pickled

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MOST_RATIO = 16  # a checkpoint may pack several weights in a number


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model with its tokenizer. digest: sha256 over its weight files."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str

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
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, by the generation config and the tokenizer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None}))


def load_source(spec: str, dtype: torch.dtype) -> Source:
    """Load MODEL in `dtype`. Raises `VocabtrimError` with what is wrong with it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    files, where, options = _locate(spec)
    weights = sum(count_weights(file) for file in files)
    options["trust_remote_code"] = False  # never a question on the terminal, never a model's own code
    try:
        if files and "gguf_file" not in options:
            _check_size(spec, where, options, weights)
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = _load(where, files, dtype, options)
    except VocabtrimError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise VocabtrimError(f"cannot load {spec}: {_first_line(error)}") from error
    model, loading = loaded
    if "gguf_file" in options:
        tokenizer = without_additions(tokenizer, model.get_input_embeddings().weight.shape[0])
    _forget_quantization(model)
    _check(spec, model, tokenizer)
    if missing := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise VocabtrimError(f"the weights of {spec} do not fit its config.json: no usable {missing[0]} among them")
    return Source(spec, model.eval(), tokenizer, _digest(spec, files, model))


def _load(where: str, files: list[Path], dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """(model, what was missing), of a quantised checkpoint by its dense weights."""
    how: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if "gguf_file" in options:
        if turned := rope_parameters(files[0]):
            how["config"] = AutoConfig.from_pretrained(where, **options)
            how["config"].rope_parameters = turned
        return AutoModelForCausalLM.from_pretrained(where, **how, **options)
    config: Any = AutoConfig.from_pretrained(where, **options)
    quantization = getattr(config, "quantization_config", None)
    if not files or not isinstance(quantization, dict) or not is_readable(quantization):
        return AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, **how, **options)
    del config.quantization_config
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config))
    weights = dense_weights(files, quantization, dtype)
    model, loading = kind.from_pretrained(None, config=config, state_dict=weights, **how)
    if (Path(where) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(where)
    return model, loading


@contextmanager
def calibration_model(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` in the dtype that this CPU samples fastest in.

    A bfloat16 copy where the CPU has the instructions: two to three times as fast as float32 there. Else float32,
    to which float16 and bfloat16 convert and back without loss.
    """
    before = model.dtype
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield model if before == torch.bfloat16 else _cast(copy.deepcopy(model), torch.bfloat16)
        return
    _cast(model, torch.float32)
    try:
        yield model
    finally:
        _cast(model, before)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters in place. Not the buffers: rotary frequencies in half precision would turn too far."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _locate(spec: str) -> tuple[list[Path], str, dict[str, Any]]:
    """The weight files of a local MODEL (none for a hub id), and how transformers is to open it."""
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickled(path)
        if path.suffix != ".gguf":
            raise VocabtrimError(f"{spec} is a file but no .gguf: give the directory that holds config.json")
        return [path], str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return _locate_directory(path)
    if spec.count("/") > 1 or spec.startswith((".", "/", "~")) or spec.endswith(".gguf"):
        raise VocabtrimError(f"no model at {spec}: the path does not exist")
    return [], spec, {}


def _locate_directory(path: Path) -> tuple[list[Path], str, dict[str, Any]]:
    if head_kind(str(path.absolute())):
        raise VocabtrimError(f"{path} is a head and no model: give it as --drafter, with its --target")
    weights = sorted(path.glob("*.safetensors"))
    if (path / "config.json").is_file() and weights:
        return weights, str(path), {}
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs, str(path), {"gguf_file": ggufs[0].name}
    if ggufs:
        raise VocabtrimError(f"{path} holds {len(ggufs)} .gguf files: name one of them")
    for pickle in sorted(file for file in path.iterdir() if file.suffix in PICKLES):
        raise pickled(pickle)
    if any(path.glob("*.onnx")):
        raise VocabtrimError(
            f"{path} holds an ONNX model: as a --drafter it can be trimmed, here the original weights are needed"
        )
    missing = ".safetensors weights" if (path / "config.json").is_file() else "config.json"
    raise VocabtrimError(f"{path} is not a model directory: it has no {missing}")


def _check_size(spec: str, where: str, options: Mapping[str, Any], weights: int) -> None:
    """Refuse a config.json that asks for far more weights than there are, before they are allocated."""
    config = AutoConfig.from_pretrained(where, **options)
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


def _check(spec: str, model: PreTrainedModel, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise VocabtrimError(f"{spec} has no tokenizer.json: a fast tokenizer is needed")
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise VocabtrimError(
            f"the tokenizer of {spec} does not match its weights: it has ids up to {highest}, the model {rows} rows"
        )
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise VocabtrimError(f"{spec} ({model.config.model_type}) has no linear LM head to trim")


def _digest(spec: str, files: list[Path], model: PreTrainedModel) -> str:
    """sha256 over the weight files' own digests; of a hub model, over its id and the commit it was fetched at."""
    parts = [file_digest(file) for file in files] or [spec, str(getattr(model.config, "_commit_hash", None))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
