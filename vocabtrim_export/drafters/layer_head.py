"""A head around one whole decoder layer: those of EAGLE-1 and EAGLE-2, and multi-token-prediction layers."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from vocabtrim_export.drafters.base import FeatureHead


class LayerHead(FeatureHead):
    """A head around one whole decoder layer, as in EAGLE-1, EAGLE-2 and multi-token prediction.

    The layer reads the output of `fc`, whose input is the token's embedding and the hidden state side by side. The
    features are the input of the target's LM head; the next draft step reads the input of this head's own LM head.

    The configuration holds the layer's own settings, and: head_rows, the rows of the LM head; biases, the layers that
    have a bias although the architecture has none there; has_norms, whether there are norms of the embedding, of the
    hidden state, of the layer's input and of its output (EAGLE has none of these); hidden_first, whether the hidden
    state comes before the embedding in front of `fc`.
    """

    layer_class: type[nn.Module]
    norm_class: type[nn.Module]
    rotary_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, has_norms = config.hidden_size, config.has_norms
        norm = partial(self.norm_class, size, eps=config.rms_norm_eps) if has_norms else nn.Identity
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embedding_norm, self.hidden_norm = norm(), norm()
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layer = self.layer_class(config, 0)
        if not has_norms:
            self.layer.input_layernorm = nn.Identity()
        self.norm = norm()
        for name, module in self.named_modules():
            if name.split(".")[-1] in config.biases and isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.empty(module.out_features))
        self.rotary_emb = self.rotary_class(config)
        self.lm_head = nn.Linear(size, config.head_rows, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> CausalLMOutput:
        by_type = "layer_type" in inspect.signature(self.rotary_class.forward).parameters
        options = {"layer_type": self.config.layer_types[0]} if by_type else {}
        rotation = self.rotary_emb(hidden, position_ids, **options)
        both = [self.embedding_norm(self.embed_tokens(input_ids)), self.hidden_norm(hidden)]
        fused = self.fc(torch.cat(both[::-1] if self.config.hidden_first else both, -1))
        hidden = self.norm(
            self.layer(fused, position_embeddings=rotation, position_ids=position_ids, attention_mask=None)
        )
        return CausalLMOutput(logits=self.lm_head(hidden), hidden_states=hidden)  # type: ignore[arg-type]


def layer_head(layer: type[nn.Module], norm: type[nn.Module], rotary: type[nn.Module]) -> type[LayerHead]:
    """Returns the class of heads around a layer of this class.

    The class counts as code of the layer's module, because that is where tracing looks for what it replaces.
    """
    parts = {"layer_class": layer, "norm_class": norm, "rotary_class": rotary, "__module__": layer.__module__}
    return type(f"{layer.__name__}Head", (LayerHead,), parts)


def llama_head() -> type[LayerHead]:
    """Returns the class of heads of EAGLE-1 and EAGLE-2."""
    return layer_head(LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding)
