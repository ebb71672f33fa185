"""Small random heads around one decoder layer, and the recurrence by which they draft, written out in PyTorch."""

import torch
from torch.nn import functional as F

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, THETA, EPSILON = 448, 64, 4, 2, 16, 96, 500.0, 1e-5
CONFIG = {  # as SafeAILab writes it: nothing says that it is a head
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "bias": True,
}
NORMS = ("embedding_norm", "hidden_norm", "norm", "layer.input_layernorm")


def make_tensors(biases=("fc",), norms=(), seed=7):
    """A head that is random, but for what lets the token, the features and the positions all count."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {
        "fc": (HIDDEN, 2 * HIDDEN),
        "layer.self_attn.q_proj": (HEADS * SIZE, HIDDEN),
        "layer.self_attn.k_proj": (KV_HEADS * SIZE, HIDDEN),
        "layer.self_attn.v_proj": (KV_HEADS * SIZE, HIDDEN),
        "layer.self_attn.o_proj": (HIDDEN, HEADS * SIZE),
        "layer.mlp.gate_proj": (INNER, HIDDEN),
        "layer.mlp.up_proj": (INNER, HIDDEN),
        "layer.mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {f"{name}.weight": torch.randn(shape, generator=chance) * 0.2 for name, shape in shapes.items()}
    for name in (*norms, "layer.post_attention_layernorm"):
        tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=chance)
    for name in shapes:
        if name.split(".")[-1] in biases:
            tensors[f"{name}.bias"] = torch.randn(shapes[name][0], generator=chance)
    return tensors


def safeailab(tensors):
    """By the names of SafeAILab's checkpoints."""
    return {name.replace("layer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}


def step(tensors, features, embedded, hidden_first=False):
    """Returns the input of the LM head for each row of one text: [rows, hidden] twice → [rows, hidden]."""

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name, x):
        weight = tensors.get(f"{name}.weight")
        return x if weight is None else F.rms_norm(x, (HIDDEN,), weight, EPSILON)

    both = [norm("embedding_norm", embedded), norm("hidden_norm", features)]
    fused = linear("fc", torch.cat(both[::-1] if hidden_first else both, -1))
    normed, rows = norm("layer.input_layernorm", fused), len(fused)
    angles = torch.outer(torch.arange(rows), THETA ** -(torch.arange(0, SIZE, 2) / SIZE)).repeat(1, 2)

    def heads(name, count, turn=True):
        x = linear(f"layer.self_attn.{name}", normed).view(rows, count, SIZE).transpose(0, 1)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin() if turn else x

    q, k, v = heads("q_proj", HEADS), heads("k_proj", KV_HEADS), heads("v_proj", KV_HEADS, turn=False)
    mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    out = fused + linear("layer.self_attn.o_proj", mixed.transpose(0, 1).reshape(rows, -1))
    inner = norm("layer.post_attention_layernorm", out)
    inner = F.silu(linear("layer.mlp.gate_proj", inner)) * linear("layer.mlp.up_proj", inner)
    return norm("norm", out + linear("layer.mlp.down_proj", inner))


@torch.no_grad()
def sequential_drafts(tensors, model, text, allowed=None, steps=4, hidden_first=False):
    """Draft after `text` by the recurrence, computed anew; the target has not read the last token of `text`."""
    rows = model.model(torch.tensor([text[:-1]])).last_hidden_state[0]
    embedding = tensors.get("embed_tokens.weight", model.model.embed_tokens.weight)
    head = tensors.get("lm_head.weight", model.lm_head.weight)
    drafts = []
    for _ in range(steps):
        last = step(tensors, rows, embedding[torch.tensor(text[1:] + drafts)], hidden_first)[-1:]
        rows = torch.cat((rows, last))
        logits = head @ last[0]
        drafts.append(int(logits.argmax() if allowed is None else allowed[logits[allowed].argmax()]))
    return drafts


ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rms_norm_eps": EPSILON}
MIMO = {
    "embedding_norm": "token_layernorm",
    "hidden_norm": "hidden_layernorm",
    "fc": "input_proj",
    "norm": "final_layernorm",
}
QWEN = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "fc": "fc", "norm": "norm"}
DEEPSEEK = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "fc": "eh_proj", "norm": "shared_head.norm"}


def beside_the_model(tensors, prefix, names, layer=""):
    """The tensors as a checkpoint holds them: `prefix`, then theirs of `names`, or `layer` and the rest."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        own = layer + name.removeprefix("layer.") if name.startswith("layer.") else f"{names[module]}.{leaf}"
        renamed[prefix + own] = tensor
    return renamed
