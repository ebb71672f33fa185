"""The frozen target: a Llama read from a Hugging Face directory, with the three features that EAGLE-3 taps.

Written out rather than taken from transformers: decoding needs no padding and no mask here, features no hooks.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a Llama from its config.json; the head has the same sizes."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    eps: float
    theta: float
    max_positions: int
    eos: tuple[int, ...]

    @property
    def taps(self) -> tuple[int, int, int]:
        """Layers at whose entrance features are taken (the output of the layer before), as EAGLE-3 and vLLM do."""
        return 2, self.layers // 2, self.layers - 3


def read_sizes(config: dict) -> Sizes:
    """Read the sizes from a parsed config.json. SystemExit where this example does not cover the architecture."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rope.get("rope_type", "default") == "default" and not config.get("attention_bias")
    if config.get("model_type") != "llama" or not plain or config.get("mlp_bias"):
        raise SystemExit("this example covers Llama targets without biases and rope scaling")
    heads = config["num_attention_heads"]
    eos = config["eos_token_id"]
    return Sizes(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        max_positions=config["max_position_embeddings"],
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )


def rotary(sizes: Sizes, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0…length-1, float32 [length, head_dim], halves rotated."""
    half = torch.arange(0, sizes.head_dim, 2, dtype=torch.float32, device=device) / sizes.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), sizes.theta**-half)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., positions, head_dim]; cos, sin: [positions, head_dim]."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), -1) * sin.to(x.dtype)


def pick_device() -> torch.device:
    """The GPU if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every length, and decoding has a new one each step
    return torch.device("cuda")


class Target:
    """Weights on one device in one dtype; nothing here is ever trained."""

    def __init__(self, weights: dict[str, Tensor], sizes: Sizes, digest: str = "") -> None:
        self.sizes, self.digest = sizes, digest
        self.embedding = weights["model.embed_tokens.weight"]
        self.unembedding = weights.get("lm_head.weight", self.embedding)
        self.norm = weights["model.norm.weight"]
        self.layers = [_layer_weights(weights, f"model.layers.{i}.") for i in range(sizes.layers)]
        self.cos, self.sin = rotary(sizes, sizes.max_positions, self.embedding.device)

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> "Target":
        files = sorted(path.glob("*.safetensors"))
        if not files or not (path / "config.json").exists():
            raise SystemExit(f"{path} is no Hugging Face model directory: config.json or *.safetensors is missing")
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= {name: tensor.to(device, dtype) for name, tensor in load_file(file).items()}
        return cls(weights, read_sizes(json.loads((path / "config.json").read_text())), weights_digest(files))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: int64 [rows, length], padded at the right → features [rows, length, 3·hidden], final hidden states
        after the norm [rows, length, hidden]; `final @ unembedding.T` are the logits."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        taken = {}
        for index, weights in enumerate(self.layers):
            if index in self.sizes.taps:
                taken[index] = x
            q, k, v = self._qkv(weights, x, cos, sin)
            groups = self.sizes.heads // self.sizes.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            x = self._finish(weights, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return torch.cat([taken[tap] for tap in self.sizes.taps], -1), self._rms(x, self.norm)

    def new_cache(self, rows: int, length: int) -> Cache:
        shape = rows, self.sizes.kv_heads, length, self.sizes.head_dim
        return [(self.embedding.new_zeros(shape), self.embedding.new_zeros(shape)) for _ in self.layers]

    def decode(self, ids: Tensor, position: int, cache: Cache) -> Tensor:
        """One token a row, int64 [rows], all at the same position → logits [rows, vocab]. Writes the cache in place."""
        x = F.embedding(ids[:, None], self.embedding)
        cos, sin = self.cos[position : position + 1], self.sin[position : position + 1]
        for weights, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = self._qkv(weights, x, cos, sin)
            keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
            # a key head's queries stand side by side as if they were positions: every key is read once
            q = q.reshape(len(q), self.sizes.kv_heads, -1, self.sizes.head_dim)
            mixed = F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
            x = self._finish(weights, x, mixed.reshape(len(q), self.sizes.heads, 1, -1))
        return F.linear(self._rms(x[:, 0], self.norm), self.unembedding)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.sizes.hidden,), weight, self.sizes.eps)

    def _qkv(self, weights: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self.sizes
        packed = F.linear(self._rms(x, weights["input_layernorm"]), weights["qkv"])
        packed = packed.view(*x.shape[:2], -1, sizes.head_dim).transpose(1, 2)
        turned = rotate(packed[:, : sizes.heads + sizes.kv_heads], cos, sin)
        return turned[:, : sizes.heads], turned[:, sizes.heads :], packed[:, sizes.heads + sizes.kv_heads :]

    def _finish(self, weights: dict[str, Tensor], x: Tensor, mixed: Tensor) -> Tensor:
        """Compute the part of a layer after attention: output projection, residual, MLP, residual."""
        x = x + F.linear(mixed.transpose(1, 2).reshape(*x.shape[:2], -1), weights["self_attn.o_proj"])
        gate, up = F.linear(self._rms(x, weights["post_attention_layernorm"]), weights["gate_up"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, weights["mlp.down_proj"])


def _layer_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    layer = {name[len(prefix) :].removesuffix(".weight"): w for name, w in weights.items() if name.startswith(prefix)}
    layer["qkv"] = torch.cat([layer.pop(f"self_attn.{x}_proj") for x in "qkv"])
    layer["gate_up"] = torch.cat([layer.pop(f"mlp.{x}_proj") for x in ("gate", "up")])
    return layer


def weights_digest(files: list[Path]) -> str:
    """sha256 over the files' own sha256, as vocabtrim.json gives it for a source model."""
    parts = []
    for file in files:
        with file.open("rb") as stream:
            parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
