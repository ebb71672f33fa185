"""An EAGLE checkpoint loaded as the drafter of a given target."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle.read import file_digest
from engines.errors import VocabtrimError
from vocabtrim_export.drafters.base import FeatureHead
from vocabtrim_export.drafters.eagle3 import EagleConfig, EagleHead
from vocabtrim_export.drafters.eagle_config import HeadConfig, read_head_config
from vocabtrim_export.drafters.layer_head import llama_head
from vocabtrim_export.drafters.row_tokens import row_token_ids
from vocabtrim_export.drafters.source import HeadSource, LoadHead, assemble, own_ends, read_tensors, weight_files
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.source import Source
from vocabtrim_export.sources.weight_files import tensor_shapes

_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^verifier_")
_LAYER = re.compile(r"^(layers\.0|midlayer|transformer)\.")  # speculators call an EAGLE-1 head's layer `transformer`
_LAYER_NAMES = {"eagle": "layer.", "eagle3": "midlayer."}


def find_head(drafter: str, _target: str) -> LoadHead:
    """See `HeadKind.module`; the checkpoint itself is read when it is loaded."""
    return partial(load_head, drafter)


def load_head(spec: str, target: Source) -> HeadSource:
    """Load an EAGLE head.

    Args:
        spec: The directory of the checkpoint.
        target: The loaded target. The head gets its dtype, and its embedding and LM head where it has none.

    Raises:
        VocabtrimError: The checkpoint is incomplete or of an uncovered form, or is not a head of this target.
    """
    directory = local_path(spec)
    names = {file: list(tensor_shapes(file)) for file in weight_files(directory, "an EAGLE head")}
    config = read_head_config(directory, (name for listed in names.values() for name in listed))
    layers = _check_target(spec, config, target)
    tensors = read_tensors({file: _renamed(listed, config.kind) for file, listed in names.items()})
    d2t, t2d = (tensors.pop(name, None) for name in ("d2t", "t2d"))
    notes = []
    if config.target_digest not in (None, target.digest):
        notes.append(f"{spec} was trained with another file of its target than {target.name}: is it the same model?")
    embedding, head = own_ends(target)
    stated = tensors.get("lm_head.weight", head if d2t is None else d2t)
    ids = row_token_ids(_array(d2t), _array(t2d), len(stated), target.vocab_size, spec)
    tensors.setdefault("embed_tokens.weight", embedding)
    tensors.setdefault("lm_head.weight", head if d2t is None else head[ids])
    model = _build(spec, config, len(layers), tensors, target)
    if d2t is None and len(ids) < target.vocab_size:
        notes.append(f"{spec} has no d2t: its rows are taken for the tokens of t2d, in ascending order")
    parts = [*(file_digest(file) for file in names), target.digest]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return HeadSource(spec, model, target.tokenizer, digest, config.kind, ids, layers, notes=tuple(notes))


def _array(tensor: Tensor | None) -> NDArray[np.generic] | None:
    if tensor is None:
        return None
    array: NDArray[np.generic] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _renamed(names: Iterable[str], kind: str) -> dict[str, str]:
    """Returns our models' names for the tensors of a checkpoint, by the checkpoint's names."""
    renamed = {}
    for name in names:
        if not _IGNORED.search(name):
            ours = _LAYER.sub(_LAYER_NAMES[kind], name.removeprefix("model."))
            renamed[name] = ours.replace("fusion_fc.", "fc.")
    return renamed


def _check_target(spec: str, config: HeadConfig, target: Source) -> tuple[int, ...]:
    """Returns the layers of `target` that the head reads."""
    text = target.model.config.get_text_config()
    if config.target_hidden_size != text.hidden_size:
        raise VocabtrimError(
            f"{spec} is a head for targets of hidden size {config.target_hidden_size}, {target.name} has "
            f"{text.hidden_size}: give the target that it was trained for"
        )
    if config.layer.vocab_size != target.vocab_size:
        raise VocabtrimError(
            f"{spec} is a head for a vocabulary of {config.layer.vocab_size} tokens, {target.name} has "
            f"{target.vocab_size}: give the target that it was trained for"
        )
    depth = int(text.num_hidden_layers)
    if config.kind == "eagle":
        return (depth,)
    layers = config.feature_layers or (2, depth // 2, depth - 3)
    if not all(0 <= layer < depth for layer in layers):
        raise VocabtrimError(
            f"{spec} reads what enters the layers {', '.join(map(str, layers))} of its target, {target.name} has "
            f"{depth}: give the target that it was trained for"
        )
    return layers


def _build(spec: str, config: HeadConfig, layers: int, tensors: dict[str, Tensor], target: Source) -> FeatureHead:
    numbers = {name: value for name, value in asdict(config.layer).items() if value is not None}
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", 4096)
    biases = sorted({name.split(".")[-2] for name in tensors if name.endswith(".bias")})
    kind = EagleHead if config.kind == "eagle3" else llama_head()

    def build() -> FeatureHead:
        full = EagleConfig(
            **numbers,
            num_hidden_layers=1,
            max_position_embeddings=context,
            feature_size=layers * config.target_hidden_size,
            head_rows=len(tensors["lm_head.weight"]),
            biases=biases,
            norm_before_residual=config.norm_before_residual,
            tie_word_embeddings=False,
        )
        return kind(full)

    return assemble(spec, config.kind, build, tensors, target)
