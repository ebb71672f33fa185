"""The EAGLE-3 head (arXiv 2503.01840) as a transformers model, so that it is traced as any other decoder."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from vocabtrim_export.drafters.base import FeatureHead


class EagleConfig(LlamaConfig):
    """The configuration of a Llama layer, and of the head around it.

    Attributes:
        feature_size: Numbers in the features of a token.
        head_rows: Rows of the LM head.
        biases: The names of the linear layers that have a bias.
        norm_before_residual: The residual stream starts from the normed hidden state instead of the raw one.
    """

    model_type = "eagle3"
    feature_size: int = 0
    head_rows: int = 0
    biases: list[str] | None = None
    norm_before_residual: bool = False
    has_norms: bool = False  # for this and the next field see `LayerHead`
    hidden_first: bool = False


class _Attention(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, 0, True
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.scaling, self.num_key_value_groups = self.head_dim**-0.5, heads // kv_heads
        queries, keys = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = _linear(config, "q_proj", 2 * config.hidden_size, queries)
        self.k_proj = _linear(config, "k_proj", 2 * config.hidden_size, keys)
        self.v_proj = _linear(config, "v_proj", 2 * config.hidden_size, keys)
        self.o_proj = _linear(config, "o_proj", queries, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over `x`, [1, S, 2·hidden]. Returns [1, S, hidden]."""
        q, k, v = (
            linear(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attend(self, q, k, v, None, scaling=self.scaling)
        out: Tensor = self.o_proj(mixed.reshape(*x.shape[:-1], -1))
        return out


class _MLP(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, "gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config, "up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config, "down_proj", config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class _EagleLayer(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)  # norms the token's embedding
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the layer on the embedded tokens and the hidden states, [1, S, hidden] both. Returns [1, S, hidden]."""
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.input_layernorm(embedded), normed), -1)
        residual = normed if self.norm_before_residual else hidden
        hidden = residual + self.self_attn(both, cos, sin)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class EagleHead(FeatureHead):
    """An EAGLE-3 head. The next draft step reads the layer's output before the norm."""

    config: EagleConfig
    config_class = EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = _linear(config, "fc", config.feature_size, config.hidden_size)
        self.midlayer = _EagleLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.head_rows, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def fuse(self) -> nn.Linear:
        fuse: nn.Linear = self.fc
        return fuse

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> CausalLMOutput:
        cos, sin = self.rotary_emb(hidden, position_ids)
        hidden = self.midlayer(self.embed_tokens(input_ids), hidden, cos, sin)
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)), hidden_states=hidden)  # type: ignore[arg-type]


def _linear(config: EagleConfig, name: str, inputs: int, outputs: int) -> nn.Linear:
    biases: Any = config.biases or ()
    return nn.Linear(inputs, outputs, bias=name in biases)
