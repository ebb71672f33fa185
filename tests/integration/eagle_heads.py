"""A small random EAGLE-3 head, as a checkpoint and written out, and what it drafts."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from runtime import SamplingParams, SpeculativeDecoder
from runtime.drafting import Drafting
from runtime.loop import decode_rounds

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, LAYERS = 448, 64, 4, 2, 16, 96, (2, 4, 5)
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def make_tensors(rows=VOCAB, own=True, bias=False, hidden=HIDDEN, size=SIZE, inner=INNER, scale=0.2):
    """A head that is random, but for what lets the token, the features and the positions all count."""
    chance = torch.Generator().manual_seed(5)
    shapes = {
        "fc": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": (HEADS * size, 2 * hidden),
        "midlayer.self_attn.k_proj": (KV_HEADS * size, 2 * hidden),
        "midlayer.self_attn.v_proj": (KV_HEADS * size, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, HEADS * size),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (rows, hidden),
    }
    norms = ["norm", *(f"midlayer.{x}" for x in ("input_layernorm", "hidden_norm", "post_attention_layernorm"))]
    tensors = {f"{name}.weight": torch.randn(shape, generator=chance) * scale for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": 1 + 0.3 * torch.randn(hidden, generator=chance) for name in norms}
    if bias:
        tensors["midlayer.self_attn.k_proj.bias"] = torch.randn(KV_HEADS * size, generator=chance)
    if not own:
        del tensors["lm_head.weight"]
    return tensors


def permuted(ids):
    """Offsets, as d2t has them, of rows in this order."""
    return torch.tensor(ids) - torch.arange(len(ids))


def layer(tensors, hidden, embedded, normed_residual):
    """The head's layer written out for one text: [rows, hidden] twice → [rows, hidden]."""

    def linear(name, x):
        return F.linear(x, tensors[f"midlayer.{name}.weight"], tensors.get(f"midlayer.{name}.bias"))

    def norm(name, x):
        return F.rms_norm(x, (HIDDEN,), tensors[f"midlayer.{name}.weight"], 1e-5)

    normed = norm("hidden_norm", hidden)
    both = torch.cat((norm("input_layernorm", embedded), normed), -1)
    rows = len(both)
    angles = torch.outer(torch.arange(rows), 500.0 ** -(torch.arange(0, SIZE, 2) / SIZE)).repeat(1, 2)

    def heads(name, count, turn=True):
        x = linear(f"self_attn.{name}", both).view(rows, count, SIZE).transpose(0, 1)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin() if turn else x

    q, k, v = heads("q_proj", HEADS), heads("k_proj", KV_HEADS), heads("v_proj", KV_HEADS, turn=False)
    mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    out = (normed if normed_residual else hidden) + linear("self_attn.o_proj", mixed.transpose(0, 1).reshape(rows, -1))
    inner = norm("post_attention_layernorm", out)
    return out + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", inner)) * linear("mlp.up_proj", inner))


@torch.no_grad()
def sequential_drafts(tensors, model, text, allowed=None, steps=4, normed_residual=False):
    """Draft after `text` by the recurrence, computed anew; the target has not read the last token of `text`."""
    states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    rows = torch.cat([states[i][0] for i in LAYERS], -1) @ tensors["fc.weight"].T
    head = tensors.get("lm_head.weight", model.lm_head.weight)
    drafts = []
    for _ in range(steps):
        embedded = model.model.embed_tokens(torch.tensor(text[1:] + drafts))
        last = layer(tensors, rows, embedded, normed_residual)[-1:]
        rows = torch.cat((rows, last))
        logits = F.rms_norm(last[0], (HIDDEN,), tensors["norm.weight"], 1e-5) @ head.T
        if allowed is None:
            drafts.append(int(logits.argmax()))
        else:
            drafts.append(int(allowed[logits[allowed].argmax()]))
    return drafts


def moves(target, head, prompt, **options):
    """Returns the draft of each round of a generation, and its new tokens."""
    drafts, propose = [], Drafting.propose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafting, "propose", lambda *args: drafts.append(propose(*args)) or drafts[-1])
        rounds = list(decode_rounds(target, head, prompt, **{"max_new_tokens": 40, "draft_length": 4} | options))
    return [(draft.tokens, entry.tokens) for draft, entry in zip(drafts, rounds[1:], strict=True)]


def check_rules(decoder: SpeculativeDecoder, model: transformers.PreTrainedModel, prompt: list[int]) -> None:
    """Greedy output under rules that change it is that of transformers' `generate`."""
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    with torch.no_grad():
        wanted = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, **rules)[0].tolist()
    found = decoder.generate(prompt, max_new_tokens=40, sampling=SamplingParams(**rules))
    assert [*prompt, *found.token_ids] == wanted
    assert found.token_ids != decoder.generate(prompt, max_new_tokens=40).token_ids
