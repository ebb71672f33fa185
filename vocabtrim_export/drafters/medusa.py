"""Medusa heads (arXiv 2401.10774): their checkpoint, as FasterDecoding and its successors write it."""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from engines.bundle.read import file_digest
from engines.bundle.typed_json import decode, read
from engines.errors import VocabtrimError
from vocabtrim_export.drafters.source import HeadSource, assemble, read_tensors, weight_files
from vocabtrim_export.sources.source import Source
from vocabtrim_export.sources.weight_files import tensor_shapes

_PREFIX = re.compile(r"^(?:medusa_heads?\.|heads\.)?(?=\d+\.)")
_NUMBER = re.compile(r"^heads\.(\d+)\.")
_MOST = 64  # heads, and blocks of each: beyond any that exists


class MedusaConfig(LlamaConfig):
    """feature_size: the target's hidden size. head_rows: rows of each head. blocks: of each head, before its rows."""

    model_type = "medusa"
    feature_size: int = 0
    head_rows: int = 0
    num_heads: int = 0
    blocks: int = 0


class _Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(LlamaPreTrainedModel):
    """Head i, of blocks and a product behind them, predicts the token i + 2 places after the one whose features it
    reads."""

    config: MedusaConfig
    config_class = MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        size = config.feature_size
        self.heads = nn.ModuleList(
            nn.Sequential(*(_Block(size) for _ in range(config.blocks)), nn.Linear(size, config.head_rows, bias=False))
            for _ in range(config.num_heads)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> None:
        """None: there is more than one."""

    def forward(self, features: Tensor) -> Tensor:
        """features: [1, S, hidden] → logits [1, heads, S, head_rows]."""
        return torch.stack([head(features) for head in self.heads], 1)


def load_medusa(spec: str, target: Source) -> HeadSource:
    """Load the heads in the directory `spec`, in the dtype of `target`. Raises `VocabtrimError` with what is wrong with
    them, or why they are not heads of this target."""
    directory = Path(spec).expanduser()
    where = str(directory / "config.json")
    data = read(directory / "config.json")
    heads, blocks = (
        decode(int, data.get(name), f"{where}: {name}") for name in ("medusa_num_heads", "medusa_num_layers")
    )
    files = weight_files(directory, "Medusa heads")
    names = {file: {name: _PREFIX.sub("heads.", name) for name in tensor_shapes(file)} for file in files}
    found = {int(match[1]) for each in names.values() for name in each.values() if (match := _NUMBER.match(name))}
    if not 0 < heads <= _MOST or blocks > _MOST or found != set(range(heads)):
        raise VocabtrimError(f"{spec} holds {len(found)} Medusa heads, its config.json says {heads}: is it whole?")
    text = target.model.config.get_text_config()
    sizes = {"feature_size": text.hidden_size, "head_rows": target.vocab_size, "num_heads": heads, "blocks": blocks}
    context = getattr(text, "max_position_embeddings", 4096)
    config = {"hidden_size": text.hidden_size, "vocab_size": target.vocab_size, "max_position_embeddings": context}
    model = assemble(spec, "medusa", lambda: MedusaHeads(MedusaConfig(**config, **sizes)), read_tensors(names), target)
    digest = hashlib.sha256("\n".join([*map(file_digest, files), target.digest]).encode()).hexdigest()
    rows, features = np.arange(target.vocab_size), (int(text.num_hidden_layers),)
    return HeadSource(spec, model, target.tokenizer, digest, "medusa", rows, features)
