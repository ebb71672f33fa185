"""The multi-token-prediction layer that some checkpoints hold, which transformers leaves out."""

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from engines.errors import VocabtrimError
from vocabtrim_export.drafters.layer_head import LayerHead, layer_head
from vocabtrim_export.drafters.source import HeadSource, LoadHead, assemble, own_ends, read_tensors
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.source import Source
from vocabtrim_export.sources.weight_files import checkpoint_files, tensor_shapes
from vocabtrim_export.tracing.composites import rotary_modules
from vocabtrim_export.tracing.layers import decoder_layers

_MIMO = re.compile(r"model\.mtp_layers\.0\.")
_QWEN = re.compile(r"mtp\.(?:layers\.0\.|(?!layers\.))")  # Qwen3-Next, Qwen3.5, Mellum
_DEEPSEEK = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight$")  # GLM too: one more decoder layer, with this product
_NUMBERED = re.compile(r"(?:model\.mtp_layers|mtp\.layers)\.(\d+)\.")
_OURS = {
    **dict.fromkeys(("enorm", "pre_fc_norm_embedding", "token_layernorm"), "embedding_norm"),
    **dict.fromkeys(("hnorm", "pre_fc_norm_hidden", "hidden_layernorm"), "hidden_norm"),
    **dict.fromkeys(("eh_proj", "fc", "input_proj"), "fc"),
    **dict.fromkeys(("shared_head.norm", "norm", "final_layernorm"), "norm"),
    "shared_head.head": "lm_head",
    "embed_tokens": "embed_tokens",
}
_UNCOVERED = {"experts": "a mixture of experts", "kv_b_proj": "latent attention"}


@dataclass(frozen=True, slots=True)
class MtpTensors:
    """The first multi-token-prediction layer of a checkpoint.

    Attributes:
        files: For each file the names of its tensors and their names in `LayerHead`.
        layers: The number of such layers.
        hidden_first: See `LayerHead`.
    """

    files: Mapping[Path, Mapping[str, str]]
    layers: int
    hidden_first: bool


def find_head(_drafter: str, target: str) -> LoadHead:
    """See `HeadKind.module`."""
    return partial(load_mtp, find_mtp(target))


def find_mtp(target: str) -> MtpTensors:
    """Find the multi-token-prediction layer in the directory `target`, by the headers of its files.

    Raises:
        VocabtrimError: There is none, or it is of a kind that cannot be exported.
    """
    directory = local_path(target)
    if not directory.is_dir():
        raise VocabtrimError(
            f"--drafter mtp reads a layer from the target's files, and {target} is no local directory: download it and "
            "give its directory"
        )
    own = checkpoint_files(directory)
    beside = sorted(set(directory.glob("*.safetensors")) - set(own))
    for group in (own, beside):  # some releases hold the layer in a file that the model's index does not name
        names = {file: list(tensor_shapes(file)) for file in group}
        every = [name for listed in names.values() for name in listed]
        appended = [int(found[1]) for name in every if (found := _DEEPSEEK.match(name))]
        styles = [_MIMO, _QWEN, *(re.compile(rf"model\.layers\.{number}\.") for number in sorted(appended)[:1])]
        if style := next((each for each in styles if any(map(each.match, every))), None):
            break
    else:
        raise VocabtrimError(f"{target} has no multi-token-prediction layer in its files: give another drafter")
    for part, what in _UNCOVERED.items():
        if any(style.match(name) and part in name.split(".") for name in every):
            raise VocabtrimError(
                f"the multi-token-prediction layer of {target} is {what}, which cannot be exported yet"
            )
    files = {file: _renamed(style, listed) for file, listed in names.items()}
    layers = len({found[1] for name in every if (found := _NUMBERED.match(name))}) or max(1, len(appended))
    return MtpTensors(files, layers, hidden_first=style is _MIMO)


def load_mtp(layer: MtpTensors, target: Source) -> HeadSource:
    """Load the layer as the drafter of `target`, with the target's embedding, LM head and kind of decoder layer.

    Raises:
        VocabtrimError: The tensors are not those of such a layer.
    """
    tensors = read_tensors(layer.files)
    embedding, head = own_ends(target)
    tensors.setdefault("embed_tokens.weight", embedding)
    tensors.setdefault("lm_head.weight", head)
    text = target.model.config.get_text_config()
    config = _config(text, head_rows=target.vocab_size, hidden_first=layer.hidden_first)
    kind = _head_class(target)
    model = assemble(target.name, "mtp", lambda: kind(config), tensors, target)
    notes: tuple[str, ...] = ()
    if layer.layers > 1:
        notes = (f"only the first of {layer.layers} multi-token-prediction layers drafts, again from its own output",)
    digest = hashlib.sha256(f"mtp\n{target.digest}".encode()).hexdigest()
    rows, features = np.arange(target.vocab_size), (int(text.num_hidden_layers),)
    name = f"{target.name}, multi-token-prediction layer"
    return HeadSource(name, model, target.tokenizer, digest, "mtp", rows, features, notes=notes)


def _renamed(style: re.Pattern[str], names: list[str]) -> dict[str, str]:
    renamed = {}
    for name in names:
        if begin := style.match(name):
            module, _, leaf = name[begin.end() :].rpartition(".")
            renamed[name] = f"{_OURS.get(module, f'layer.{module}')}.{leaf}"
    return renamed


def _config(text: PreTrainedConfig, head_rows: int, hidden_first: bool) -> PreTrainedConfig:
    """Returns the configuration of the layer: the target's, with one layer.

    Its type is the one that the target states for such layers, or that of the target's last layer.
    """
    config: Any = copy.deepcopy(text)
    for name in ("layer_types", "mlp_layer_types"):
        if types := getattr(config, name, None):
            setattr(config, name, (getattr(config, f"mtp_{name}", None) or types[-1:])[:1])
    config.num_hidden_layers, config.tie_word_embeddings = 1, False
    config.feature_size, config.head_rows, config.biases = config.hidden_size, head_rows, []
    config.has_norms, config.hidden_first = True, hidden_first
    return config  # type: ignore[no-any-return]


def _head_class(target: Source) -> type[LayerHead]:
    layer = decoder_layers(target.model)[-1]
    norms: list[type[nn.Module]] = [type(module) for name, module in layer.named_modules() if "norm" in name]
    rotary = rotary_modules(target.model)
    if not norms or len(rotary) != 1:
        kind = target.model.config.model_type
        raise VocabtrimError(f"the multi-token-prediction layer of a {kind} model cannot be exported yet")
    return layer_head(type(layer), norms[0], type(rotary[0]))
