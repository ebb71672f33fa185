"""An EAGLE-3 checkpoint loaded as the drafter of a given target."""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engines.bundle import file_digest
from engines.errors import VocabtrimError
from engines.typed_json import brief
from vocabtrim_export.eagle.config import HeadConfig, read_head_config
from vocabtrim_export.eagle.model import EagleConfig, EagleHead
from vocabtrim_export.eagle.vocabulary import row_token_ids
from vocabtrim_export.models import Source
from vocabtrim_export.weight_files import PICKLES, count_weights

_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^verifier_")


@dataclass(frozen=True, slots=True)
class HeadSource(Source):
    """An EAGLE-3 head with its target's tokenizer. The digest covers the head's files and the target's.

    row_token_ids: int64[rows], the token of each row of the LM head. feature_layers: of the target, that it reads.
    notes: what a user should know about the checkpoint.
    """

    row_token_ids: NDArray[np.int64]
    feature_layers: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def head(self) -> EagleHead:
        assert isinstance(self.model, EagleHead)
        return self.model

    def rows_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these tokens, all of which have one."""
        order = np.argsort(self.row_token_ids)
        rows: NDArray[np.int64] = order[np.searchsorted(self.row_token_ids, token_ids, sorter=order)]
        return rows


def load_head(spec: str, target: Source) -> HeadSource:
    """Load the head in the directory `spec`, in the dtype of `target`, with the embedding and the LM head of `target`
    where it has none. Raises `VocabtrimError` with what is wrong with it, or why it is not a head of this target."""
    directory = Path(spec).expanduser()
    files = _weight_files(directory)
    config = read_head_config(directory)
    layers = _check_target(spec, config, target)
    tensors = _read(files)
    d2t, t2d = (tensors.pop(name, None) for name in ("d2t", "t2d"))
    biases = sorted({name.split(".")[-2] for name in tensors if name.endswith(".bias")})
    notes = []
    if config.target_digest not in (None, target.digest):
        notes.append(f"{spec} was trained with another file of its target than {target.name}: is it the same model?")
    embedding, head = (each.weight.detach() for each in _ends(target))
    stated = tensors.get("lm_head.weight", head if d2t is None else d2t)
    ids = row_token_ids(_array(d2t), _array(t2d), len(stated), target.vocab_size, spec)
    tensors.setdefault("embed_tokens.weight", embedding)
    tensors.setdefault("lm_head.weight", head if d2t is None else head[ids])
    model = _build(spec, config, len(layers), biases, tensors, target)
    if d2t is None and len(ids) < target.vocab_size:
        notes.append(f"{spec} has no d2t: its rows are taken for the tokens of t2d, in ascending order")
    parts = [*(file_digest(file) for file in files), target.digest]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return HeadSource(spec, model, target.tokenizer, digest, ids, layers, tuple(notes))


def _ends(target: Source) -> list[Any]:
    return [target.model.get_input_embeddings(), target.model.get_output_embeddings()]


def _array(tensor: Tensor | None) -> NDArray[np.generic] | None:
    if tensor is None:
        return None
    array: NDArray[np.generic] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        for pickle in sorted(file for file in directory.iterdir() if file.suffix in PICKLES):
            raise VocabtrimError(
                f"{pickle} is a pickle checkpoint, which can run code when opened: convert it on a machine that has "
                'nothing to lose: python -c "import torch; from safetensors.torch import save_file; '
                f"save_file(torch.load('{pickle.name}', weights_only=True), 'model.safetensors')\""
            )
        raise VocabtrimError(f"{directory} is an EAGLE head without .safetensors weights")
    return files


def _read(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of all files by the names of `EagleHead`."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        count_weights(file)
        try:
            loaded = load_file(file)
        except Exception as error:  # safetensors' own kinds, and torch's
            raise VocabtrimError(f"cannot load {file}: {brief(error)}") from error
        for name, tensor in loaded.items():
            if not _IGNORED.search(name):
                tensors[re.sub(r"^layers\.0\.", "midlayer.", name.removeprefix("model."))] = tensor
    return tensors


def _check_target(spec: str, config: HeadConfig, target: Source) -> tuple[int, ...]:
    """The layers of `target` that the head reads."""
    found = target.model.config.get_text_config()
    if config.target_hidden_size != found.hidden_size:
        raise VocabtrimError(
            f"{spec} is a head for targets of hidden size {config.target_hidden_size}, {target.name} has "
            f"{found.hidden_size}: give the target that it was trained for"
        )
    if config.layer.vocab_size != target.vocab_size:
        raise VocabtrimError(
            f"{spec} is a head for a vocabulary of {config.layer.vocab_size} tokens, {target.name} has "
            f"{target.vocab_size}: give the target that it was trained for"
        )
    depth = int(found.num_hidden_layers)
    layers = config.feature_layers or (2, depth // 2, depth - 3)
    if not all(0 <= layer < depth for layer in layers):
        raise VocabtrimError(
            f"{spec} reads what enters the layers {', '.join(map(str, layers))} of its target, {target.name} has "
            f"{depth}: give the target that it was trained for"
        )
    return layers


def _build(
    spec: str, config: HeadConfig, layers: int, biases: list[str], tensors: dict[str, Tensor], target: Source
) -> EagleHead:
    """The model with these tensors, checked against what config.json says."""
    numbers = {name: value for name, value in asdict(config.layer).items() if value is not None}
    try:
        full = EagleConfig(
            **numbers,
            num_hidden_layers=1,
            max_position_embeddings=getattr(target.model.config.get_text_config(), "max_position_embeddings", 4096),
            feature_size=layers * config.target_hidden_size,
            head_rows=len(tensors["lm_head.weight"]),
            biases=biases,
            norm_before_residual=config.norm_before_residual,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            model = EagleHead(full)
    except Exception as error:  # transformers raises many kinds
        raise VocabtrimError(f"{spec}: its config.json describes no EAGLE-3 head ({brief(error)})") from error
    _check_tensors(spec, {name: tuple(value.shape) for name, value in model.state_dict().items()}, tensors)
    dtype = target.model.dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    model.rotary_emb = LlamaRotaryEmbedding(full)
    model.generation_config = target.model.generation_config
    model.train(False)
    return model


def _check_tensors(spec: str, wanted: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    if missing := sorted(set(wanted) - set(tensors)):
        raise VocabtrimError(f"{spec} lacks tensors of an EAGLE-3 head: {', '.join(missing[:4])}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise VocabtrimError(f"{spec} has tensors that cannot be exported yet: {', '.join(unknown[:4])}")
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise VocabtrimError(
                f"{spec}: {name} is {list(found)}, by config.json and the target it must be {list(shape)}"
            )
