"""`HeadSource`: a head loaded for a given target, and the assembly of its model from tensors."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from engines.bundle.typed_json import brief
from engines.errors import VocabtrimError
from vocabtrim_export.sources.head_kinds import HEAD_KINDS
from vocabtrim_export.sources.source import Source
from vocabtrim_export.sources.weight_files import PICKLES, checkpoint_files, count_weights

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True)
class HeadSource(Source):
    """A head with its target's tokenizer. The digest covers the head's files and the target's.

    Attributes:
        kind: The kind of head, a key of `HEAD_KINDS`.
        row_token_ids: int64[rows], the token of each row of the LM head.
        feature_layers: The target's layers whose inputs the head reads.
    """

    kind: str
    row_token_ids: NDArray[np.int64]
    feature_layers: tuple[int, ...]

    def rows_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rows of these tokens, int64[n]; every token must have one."""
        order = np.argsort(self.row_token_ids)
        rows: NDArray[np.int64] = order[np.searchsorted(self.row_token_ids, token_ids, sorter=order)]
        return rows


LoadHead: TypeAlias = Callable[[Source], HeadSource]  # loads a head for its loaded target


def find_head(kind: str, drafter: str, target: str) -> LoadHead:
    """Find a head by the headers of its files.

    Args:
        kind: The kind of head, a key of `HEAD_KINDS`.
        drafter: MODEL of the drafter.
        target: MODEL of the target.

    Returns:
        A function that loads the head for its loaded target.

    Raises:
        VocabtrimError: The head cannot be exported.
    """
    module = importlib.import_module(f"vocabtrim_export.drafters.{HEAD_KINDS[kind].module}")
    load: LoadHead = module.find_head(drafter, target)
    return load


def read_tensors(files: Mapping[Path, Mapping[str, str]]) -> dict[str, Tensor]:
    """Read tensors of several .safetensors files.

    Args:
        files: For each file the names of the tensors to read and our names for them.

    Returns:
        The tensors by our names.

    Raises:
        VocabtrimError: A file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file, names in files.items():
        count_weights(file)
        try:
            with safe_open(file, framework="pt") as weights:
                tensors |= {ours: weights.get_tensor(theirs) for theirs, ours in names.items()}
        except Exception as error:  # safetensors and torch raise many kinds
            raise VocabtrimError(f"cannot load {file}: {brief(error)}") from error
    return tensors


def own_ends(target: Source) -> tuple[Tensor, Tensor]:
    """Returns the target's embedding and LM head, [vocab, hidden] each: a head without its own uses them."""
    embedding: Any = target.model.get_input_embeddings()
    head: Any = target.model.get_output_embeddings()
    return embedding.weight.detach(), head.weight.detach()


def weight_files(directory: Path, what: str) -> list[Path]:
    """Returns the .safetensors files of a head's checkpoint.

    Args:
        directory: The checkpoint.
        what: The contents of the directory, for the message.

    Raises:
        VocabtrimError: There is none.
    """
    files = checkpoint_files(directory)
    if not files:
        for pickle in sorted(file for file in directory.iterdir() if file.suffix in PICKLES):
            raise VocabtrimError(
                f"{pickle} is a pickle checkpoint, which can run code when opened: convert it on a machine that has "
                'nothing to lose: python -c "import torch; from safetensors.torch import save_file; '
                f"save_file(torch.load('{pickle.name}', weights_only=True), 'model.safetensors')\""
            )
        raise VocabtrimError(
            f"{directory} holds {what} and no .safetensors weights: fetch it again, or convert its weights"
        )
    return files


def assemble(spec: str, kind: str, build: Callable[[], Model], tensors: Mapping[str, Tensor], target: Source) -> Model:
    """Build a head's model and give it its tensors.

    Args:
        spec: The head as the user gave it, for messages.
        kind: The kind of head.
        build: Creates the model by its configuration; it runs without memory for weights.
        tensors: All of the model's tensors by name.
        target: The target, whose dtype the model gets.

    Raises:
        VocabtrimError: The configuration describes no such head, or the tensors do not fit it.
    """
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # transformers raises many kinds
        raise VocabtrimError(f"{spec}: its config.json describes no such head ({brief(error)})") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_tensors(spec, HEAD_KINDS[kind].title, wanted, tensors)
    dtype = target.model.dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    if (rotary := getattr(model, "rotary_emb", None)) is not None:
        model.rotary_emb = type(rotary)(model.config)  # on a real device, because it holds computed tensors
    model.generation_config = target.model.generation_config
    model.train(False)
    return model


def _check_tensors(spec: str, what: str, wanted: dict[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    if missing := sorted(set(wanted) - set(tensors)):
        raise VocabtrimError(f"{spec} lacks tensors of {what}: {', '.join(missing[:4])}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise VocabtrimError(f"{spec} has tensors that cannot be exported yet: {', '.join(unknown[:4])}")
    for name, shape in wanted.items():
        stored = tuple(tensors[name].shape)
        if stored != shape:
            raise VocabtrimError(
                f"{spec}: {name} is {list(stored)}, by config.json and the target it must be {list(shape)}"
            )
