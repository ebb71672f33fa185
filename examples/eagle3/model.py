"""The EAGLE-3 head (arXiv 2503.01840), in the layout and with the tensor names of the published checkpoints.

Row t stands for position t of the text: it reads the feature of token t and the embedding of token t + 1 and predicts
token t + 2, at position id t. k draft steps on, row t has become position t + k: its feature is then the head's own
output, its token the one k further, its position id t + k. It attends to the true rows 0…t and to its own k steps
(the diagonals), just as a drafter that read t + 1 features and then went on alone. Training (`train.py`) and drafting
(`evaluate.py`) use this one step. These position ids are those of SafeAILab's and vLLM's drafters.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from target import Sizes, Target, rotary, rotate
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(2 * sizes.hidden, queries, bias=False)
        self.k_proj = nn.Linear(2 * sizes.hidden, keys, bias=False)
        self.v_proj = nn.Linear(2 * sizes.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, sizes.hidden, bias=False)


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)


class MidLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.hidden, sizes.eps)  # of the token's embedding
        self.hidden_norm = nn.RMSNorm(sizes.hidden, sizes.eps)  # of the feature
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden, sizes.eps)
        self.mlp = MLP(sizes)


class Past:
    """Keys and values of the steps so far, [rows, kv_heads, 1, length, head_dim] each; step 0 made the true rows'."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


class Eagle3Head(nn.Module):
    """Embedding and unembedding are the target's and are no part of it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.fc = nn.Linear(3 * sizes.hidden, sizes.hidden, bias=False)
        self.midlayer = MidLayer(sizes)
        self.norm = nn.RMSNorm(sizes.hidden, sizes.eps)

    def step(self, hidden: Tensor, embedded: Tensor, past: Past) -> Tensor:
        """hidden: [rows, length, hidden], `fc(features)` first, then this method's own last output.
        embedded: the embeddings of the tokens one place further than hidden. → the next hidden, float32;
        `norm` of it times the unembedding are the draft logits. Appends to `past`."""
        layer, sizes = self.midlayer, self.sizes
        hidden = hidden.float()  # the residual stream keeps float32 under autocast, too
        both = torch.cat((layer.input_layernorm(embedded.float()), layer.hidden_norm(hidden)), -1)
        rows, length, _ = both.shape
        ago = len(past.keys)
        cos, sin = (table[ago:] for table in rotary(sizes, length + ago, both.device))

        def heads(x: Tensor) -> Tensor:  # → [rows, kv_heads, heads per kv head, length, head_dim]
            return x.view(rows, length, sizes.kv_heads, -1, sizes.head_dim).permute(0, 2, 3, 1, 4)

        query = rotate(heads(layer.self_attn.q_proj(both)), cos, sin)
        past.keys.append(rotate(heads(layer.self_attn.k_proj(both)), cos, sin))
        past.values.append(heads(layer.self_attn.v_proj(both)))
        mixed = attend(query, past).permute(0, 3, 1, 2, 4).reshape(rows, length, -1)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        inner = layer.post_attention_layernorm(hidden)
        return hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner))


def attend(query: Tensor, past: Past) -> Tensor:
    """query: [rows, kv_heads, group, length, head_dim] → the same shape. Row t sees the true rows up to t and row t of
    every later step."""
    rows, kv_heads, group, length, head_dim = query.shape
    query = query * head_dim**-0.5
    flat = query.reshape(rows, kv_heads, group * length, head_dim)
    scores = (flat @ past.keys[0][:, :, 0].transpose(-1, -2)).view(rows, kv_heads, group, length, length).float()
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = [scores.masked_fill(future, float("-inf"))]
    scores += [(query * keys).sum(-1, keepdim=True).float() for keys in past.keys[1:]]
    shares = torch.cat(scores, -1).softmax(-1).to(query.dtype)
    flat = shares[..., :length].reshape(rows, kv_heads, group * length, length)
    mixed = (flat @ past.values[0][:, :, 0]).view(query.shape)
    for step, values in enumerate(past.values[1:]):
        mixed = mixed + shares[..., length + step, None] * values
    return mixed


def head_from_target(target: Target) -> Eagle3Head:
    """A head to start training from: the target's last layer, reading its highest feature; the half that reads the
    embedding is small and random. float32, on the target's device."""
    head, sizes = Eagle3Head(target.sizes), target.sizes
    last = target.layers[-1]
    middle, attention = head.midlayer, head.midlayer.self_attn
    widths = [sizes.heads * sizes.head_dim] + [sizes.kv_heads * sizes.head_dim] * 2
    with torch.no_grad():
        head.fc.weight.normal_(std=0.002)
        head.fc.weight[:, -sizes.hidden :] += torch.eye(sizes.hidden)
        for linear, part in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), last["qkv"].split(widths), strict=True
        ):
            linear.weight[:, : sizes.hidden].normal_(std=0.02)
            linear.weight[:, sizes.hidden :] = part
        gate, up = last["gate_up"].chunk(2)
        for parameter, values in (
            (attention.o_proj.weight, last["self_attn.o_proj"]),
            (middle.hidden_norm.weight, last["input_layernorm"]),
            (middle.post_attention_layernorm.weight, last["post_attention_layernorm"]),
            (middle.mlp.gate_proj.weight, gate),
            (middle.mlp.up_proj.weight, up),
            (middle.mlp.down_proj.weight, last["mlp.down_proj"]),
            (head.norm.weight, target.norm),
        ):
            parameter.copy_(values)
    return head.to(target.embedding.device)


def head_config(target: Target) -> dict:
    """config.json of a saved head. Layer ids as vLLM counts them: id j is what enters layer j."""
    sizes = target.sizes
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.theta,
        "max_position_embeddings": sizes.max_positions,
        "vocab_size": sizes.vocab,
        "draft_vocab_size": sizes.vocab,
        "target_hidden_size": sizes.hidden,
        "eagle_aux_hidden_state_layer_ids": list(sizes.taps),
        "target_digest": target.digest,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def save_head(head: Eagle3Head, target: Target, directory: Path) -> None:
    """model.safetensors in bfloat16, and config.json; each appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in head.state_dict().items()}
    replace(directory / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    config = json.dumps(head_config(target), indent=2) + "\n"
    replace(directory / "config.json", lambda path: path.write_text(config))


def load_head(directory: Path, target: Target) -> Eagle3Head:
    """A saved head in float32 on the target's device. SystemExit if it belongs to another target."""
    if not (directory / "config.json").exists():
        raise SystemExit(f"{directory} holds no head: config.json is missing")
    if json.loads((directory / "config.json").read_text())["target_digest"] != target.digest:
        raise SystemExit(f"the head in {directory} was trained for another target; give that one with --target")
    head = Eagle3Head(target.sizes)
    head.load_state_dict(load_file(directory / "model.safetensors"))
    return head.to(target.embedding.device)


def replace(path: Path, write) -> None:  # noqa: ANN001  (any function of a path)
    """`write` beside `path`, then put it in its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
