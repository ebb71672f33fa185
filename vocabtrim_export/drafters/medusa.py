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
    """The configuration of Medusa heads.

    Attributes:
        feature_size: The target's hidden size.
        head_rows: Rows of each head.
        blocks: Residual blocks in front of each head's rows.
    """

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
    """Medusa heads: from the features of token t, head i predicts token t + i + 2.

    Each head is a few residual blocks and a product.
    """

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
        """Returns None, because there is more than one LM head."""

    def forward(self, features: Tensor) -> Tensor:
        """features: [1, S, hidden] → logits [1, heads, S, head_rows]."""
        return torch.stack([head(features) for head in self.heads], 1)

    def read_text(self, _token_ids: Tensor, features: Tensor) -> None:
        """Read a text by its features, [1, n, hidden]: what calibration measures the inputs of."""
        self(features)


def load_medusa(spec: str, target: Source) -> HeadSource:
    """Load Medusa heads.

    Args:
        spec: The directory of the checkpoint.
        target: The loaded target, whose dtype the heads get.

    Raises:
        VocabtrimError: The checkpoint is incomplete or of an uncovered form, or its heads are not for this target.
    """
    directory = Path(spec).expanduser()
    where = str(directory / "config.json")
    data = read(directory / "config.json")
    heads, blocks = (
        decode(int, data.get(name), f"{where}: {name}") for name in ("medusa_num_heads", "medusa_num_layers")
    )
    files = weight_files(directory, "Medusa heads")
    names = {file: {name: _PREFIX.sub("heads.", name) for name in tensor_shapes(file)} for file in files}
    numbers = {int(match[1]) for each in names.values() for name in each.values() if (match := _NUMBER.match(name))}
    if not 0 < heads <= _MOST or blocks > _MOST or numbers != set(range(heads)):
        raise VocabtrimError(f"{spec} holds {len(numbers)} Medusa heads, its config.json says {heads}: is it whole?")
    text = target.model.config.get_text_config()
    sizes = {"feature_size": text.hidden_size, "head_rows": target.vocab_size, "num_heads": heads, "blocks": blocks}
    context = getattr(text, "max_position_embeddings", 4096)
    config = {"hidden_size": text.hidden_size, "vocab_size": target.vocab_size, "max_position_embeddings": context}
    model = assemble(spec, "medusa", lambda: MedusaHeads(MedusaConfig(**config, **sizes)), read_tensors(names), target)
    digest = hashlib.sha256("\n".join([*map(file_digest, files), target.digest]).encode()).hexdigest()
    rows, features = np.arange(target.vocab_size), (int(text.num_hidden_layers),)
    return HeadSource(spec, model, target.tokenizer, digest, "medusa", rows, features)
