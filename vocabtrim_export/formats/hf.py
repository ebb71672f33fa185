"""`--format hf`: the trimmed drafter as a transformers checkpoint, for `generate(assistant_model=…)`.

transformers compares token ids, and none of its model classes maps the rows of a head to token ids. The checkpoint
therefore has a class of a few lines: the model's own, with K head rows, whose logits are put in their places after the
model's last step (which may cap or scale logits, and would change −inf).
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.formats.exported import Exported, copy_tokenizer
from vocabtrim_export.sources.precision import held_in
from vocabtrim_export.sources.source import DTYPES, Source

_MODULE = "modeling_trimmed"
_CODE = '''"""{base} whose LM head has {rows} of {vocab} rows. Written by vocabtrim-export."""

import functools

import torch
from transformers import {base}


class Trimmed{base}({base}):
    _tied_weights_keys = {{}}

    def __init__(self, config):
        super().__init__(config)
        head = self.get_output_embeddings()
        rows, has_bias = config.trimmed_head_rows, head.bias is not None
        self.set_output_embeddings(torch.nn.Linear(head.in_features, rows, bias=has_bias, dtype=head.weight.dtype))
        self.register_buffer("kept_token_ids", torch.zeros(rows, dtype=torch.int64))

    @functools.wraps({base}.forward)
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs | {{"return_dict": True}})
        kept = output.logits
        logits = kept.new_full((*kept.shape[:-1], self.config.get_text_config().vocab_size), -torch.inf)
        output.logits = logits.index_copy_(-1, self.kept_token_ids, kept)
        return output
'''


def write(exported: Exported, directory: Path) -> None:
    """Write the weights, configuration, tokenizer and, for a trimmed head, its class.

    The weights are unquantised, in the export's dtype.
    """
    source = exported.sources["drafter"]
    with held_in(source.model, DTYPES[exported.manifests["drafter"].dtype]):
        _write_model(exported, source, directory)


def _write_model(exported: Exported, source: Source, directory: Path) -> None:
    if exported.vocab_map is None:
        source.model.save_pretrained(directory)
    else:
        _write_trimmed(source, exported.vocab_map, directory)
    source.model.generation_config.save_pretrained(directory)
    copy_tokenizer(exported, "drafter", directory)


def _write_trimmed(source: Source, vocab_map: VocabMap, directory: Path) -> None:
    base = type(source.model).__name__
    if getattr(__import__("transformers"), base, None) is not type(source.model):
        raise VocabtrimError(f"--format hf: {base} is no class of transformers, so none can be derived from it")
    code = _CODE.format(base=base, rows=len(vocab_map), vocab=vocab_map.full_vocab)
    (directory / f"{_MODULE}.py").write_text(code, "utf-8")
    save_file(_weights(source.model, vocab_map), directory / "model.safetensors", {"format": "pt"})
    config: Any = copy.deepcopy(source.model.config)
    config.get_text_config().tie_word_embeddings = False
    config.architectures = [f"Trimmed{base}"]
    config.auto_map = {"AutoModelForCausalLM": f"{_MODULE}.Trimmed{base}"}
    config.trimmed_head_rows = len(vocab_map)
    config.save_pretrained(directory)


def _weights(model: torch.nn.Module, vocab_map: VocabMap) -> dict[str, Tensor]:
    """Returns the state of `model` with only the head's rows of `vocab_map`, and the map.

    A tied embedding keeps all of its rows.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is head)
    rows = torch.from_numpy(vocab_map.kept_token_ids.copy())
    cut = {f"{prefix}.{name}": tensor[rows] for name, tensor in head.state_dict().items()}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()} | cut | {"kept_token_ids": rows}
