"""EAGLE-3 heads: what is drafted is the recurrence written out, whatever layout and vocabulary the head comes in."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from engines import VocabtrimError, load_engine
from runtime import SamplingParams, SpeculativeDecoder
from runtime.loop import decode_rounds
from runtime.timing import timed_run
from vocabtrim_export.eagle.checkpoint import load_head
from vocabtrim_export.models import load_source

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, LAYERS = 448, 64, 4, 2, 16, 96, (2, 4, 5)
GAMMA = 4
PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]
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


def make_tensors(rows=VOCAB, own=True, bias=False):
    """A head that is random, but for what lets the token, the features and the positions all count."""
    chance = torch.Generator().manual_seed(5)
    shapes = {
        "fc": (HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj": (HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.k_proj": (KV_HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.v_proj": (KV_HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.o_proj": (HIDDEN, HEADS * SIZE),
        "midlayer.mlp.gate_proj": (INNER, HIDDEN),
        "midlayer.mlp.up_proj": (INNER, HIDDEN),
        "midlayer.mlp.down_proj": (HIDDEN, INNER),
        "lm_head": (rows, HIDDEN),
    }
    norms = ["norm", *(f"midlayer.{x}" for x in ("input_layernorm", "hidden_norm", "post_attention_layernorm"))]
    tensors = {f"{name}.weight": torch.randn(shape, generator=chance) * 0.2 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": 1 + 0.3 * torch.randn(HIDDEN, generator=chance) for name in norms}
    if bias:
        tensors["midlayer.self_attn.k_proj.bias"] = torch.randn(KV_HEADS * SIZE, generator=chance)
    if not own:
        del tensors["lm_head.weight"]
    return tensors


@pytest.fixture(scope="module")
def target_dir(random_model):
    return random_model("llama", num_hidden_layers=8)


@pytest.fixture(scope="module")
def target_model(target_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(target_dir).eval()


@pytest.fixture(scope="module")
def write_head(tmp_path_factory):
    """write_head(tensors, **changes of config.json) → the directory of a head."""

    def write(tensors, config=CONFIG, **changes):
        path = tmp_path_factory.mktemp("head")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return write


@pytest.fixture(scope="module")
def export_head(export_pair, target_dir):
    return lambda head, k="100000", **changes: export_pair(head, target_dir, k=k, **changes)


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
def sequential_drafts(tensors, model, text, allowed=None, steps=GAMMA, normed_residual=False):
    """What the recurrence drafts after `text`, the last token of which the target has not read; all computed anew."""
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


def spied_rounds(target, drafter, prompt, **options):
    """(text before, drafted) of each round, and the text after them."""
    fed, feed = [], target.feed
    target.feed = lambda tokens, keep=1: fed.append(list(tokens)) or feed(tokens, keep)
    rounds = list(decode_rounds(target, drafter, prompt, draft_length=GAMMA, **options))
    target.feed = feed
    text, seen = [*prompt, *rounds[0].tokens], []
    for tokens, entry in zip(fed[1:], rounds[1:], strict=True):
        assert tokens[0] == text[-1]
        seen.append((list(text), tokens[1:]))
        text += entry.tokens
    return seen, text


@pytest.fixture(scope="module")
def pair(write_head, export_head):
    return export_head(write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS)))


@pytest.mark.parametrize("accepted", range(GAMMA + 1))
def test_drafts_are_the_recurrence_after_any_number_of_accepted_ones(accepted, pair, target_model):
    from engines import onnxruntime_engine

    with (
        load_engine(pair.target) as target,
        load_engine(pair.drafter) as drafter,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(onnxruntime_engine, "CHUNK", 8)  # a prompt in several parts, in both engines
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=accepted)
            for text, drafted in seen:
                assert drafted == sequential_drafts(make_tensors(), target_model, text, steps=len(drafted))


def test_the_output_is_the_targets(pair, target_dir, target_model):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = target_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
            assert [*prompt, *decoder.generate(prompt, max_new_tokens=40).token_ids] == wanted[0].tolist()
            run = timed_run(decoder.target, decoder.drafter, prompt, 40, GAMMA)
            assert [*prompt, *run.tokens] == wanted[0].tolist()
        sampling = SamplingParams(temperature=1.5, seed=3)
        first, again = (decoder.generate(PROMPTS[0], max_new_tokens=60, sampling=sampling) for _ in range(2))
        assert first.token_ids == again.token_ids
        assert first.stats.drafted > 20


def permuted(ids):
    """Offsets, as d2t has them, of rows in this order."""
    return torch.tensor(ids) - torch.arange(len(ids))


def layouts(kept, full):
    """name → (tensors, changes of config.json) of the same head with the rows `kept`."""
    listed = torch.zeros(VOCAB, dtype=torch.bool)
    listed[kept] = True
    shuffled = np.random.default_rng(3).permutation(kept)
    rows = {**full, "lm_head.weight": full["lm_head.weight"][kept]}
    mixed = {**full, "lm_head.weight": full["lm_head.weight"][shuffled]}
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in mixed.items()}
    top = {"eagle_aux_hidden_state_layer_ids": list(LAYERS)}
    size = {"draft_vocab_size": len(kept)}
    inner = {name: value for name, value in CONFIG.items() if name != "architectures"}
    speculators = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}
    speculators |= {"transformer_layer_config": inner, "norm_before_residual": False}
    assert (permuted(shuffled) < 0).any()
    return {
        "SafeAILab": ({**rows, "d2t": permuted(kept), "t2d": listed}, size),  # 2, L/2, L - 3 by default
        "SpecForge": ({**rows, "d2t": permuted(kept), "t2d": listed, "embed_tokens.weight": None}, size | top),
        "ModelOpt": ({**renamed, "d2t": permuted(shuffled)}, size | {"eagle_config": {**top, "use_aux": True}}),
        "speculators": ({**renamed, "d2t": permuted(shuffled), "t2d": listed}, speculators | size | top),
        "no d2t": ({**rows, "t2d": listed}, size | top),
        "absolute ids": ({**mixed, "d2t": torch.tensor(shuffled), "t2d": listed}, size | top),
        "the target's head": ({**{k: v for k, v in full.items() if k != "lm_head.weight"}, "d2t": permuted(kept)}, top),
    }


def test_every_layout_holds_the_same_head(write_head, target_dir, target_model):
    target = load_source(str(target_dir), torch.float32)
    kept = np.sort(np.random.default_rng(2).permutation(VOCAB)[:200])
    full = make_tensors()
    for name, (tensors, changes) in layouts(kept, full).items():
        if "embed_tokens.weight" in tensors:
            tensors["embed_tokens.weight"] = target_model.model.embed_tokens.weight.detach() * 2
        config = changes if name == "speculators" else CONFIG | changes
        if name == "ModelOpt":  # counts the layers by what they give
            config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [1, 3, 4]
        source = load_head(str(write_head(tensors, config)), target)
        head = target_model.lm_head.weight if name == "the target's head" else full["lm_head.weight"]
        assert np.array_equal(np.sort(source.row_token_ids), kept), name
        assert torch.equal(source.head.lm_head.weight[source.rows_of(kept)], head[kept]), name
        assert source.feature_layers == LAYERS, name
        assert bool(source.notes) == (name == "no d2t")
        assert torch.equal(source.head.midlayer.mlp.up_proj.weight, full["midlayer.mlp.up_proj.weight"]), name
        scale = 2 if name == "SpecForge" else 1
        assert torch.equal(source.head.embed_tokens.weight, target_model.model.embed_tokens.weight * scale), name


def test_a_reduced_head_is_trimmed_further(write_head, export_head, target_model):
    """Unsorted rows, some of them cut: drafts as the whole head gives them where only the kept tokens count."""
    full, ids = make_tensors(bias=True), np.random.default_rng(2).permutation(VOCAB)[:300]
    tensors = {**full, "lm_head.weight": full["lm_head.weight"][ids], "d2t": permuted(ids)}
    head = write_head(tensors, eagle_aux_hidden_state_layer_ids=list(LAYERS), norm_before_residual=True)
    whole, result = export_head(head), export_head(head, k="128")
    kept = result.selection.vocab_map.kept_token_ids
    assert len(kept) == result.drafter_manifest.head_rows == 128
    assert set(kept) < set(ids.tolist())
    assert np.array_equal(whole.selection.vocab_map.kept_token_ids, np.sort(ids))
    cut = whole.drafter_manifest.weight_bytes_per_step - result.drafter_manifest.weight_bytes_per_step
    assert cut == (300 - 128) * HIDDEN * 4
    with load_engine(result.target) as target, load_engine(result.drafter) as drafter:
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=16, force_accepted=2)
            for text, drafted in seen:
                options = {"allowed": torch.from_numpy(kept.copy()), "normed_residual": True}
                assert drafted == sequential_drafts(full, target_model, text, steps=len(drafted), **options)


def test_int4_heads_draft_much_the_same(write_head, export_head, pair):
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    result = export_head(head, quantize_drafter="int4")
    assert result.drafter_manifest.weight_bytes_per_step < pair.drafter_manifest.weight_bytes_per_step / 4
    features = np.random.default_rng(0).standard_normal((12, 3 * HIDDEN)).astype(np.float32)
    with load_engine(result.drafter) as small, load_engine(pair.drafter) as exact:
        found, wanted = (engine.feed_features(range(30, 42), features, keep=12).logits for engine in (small, exact))
        assert np.abs(found - wanted).mean() < 0.3 * wanted.std()


def test_only_a_target_that_gives_the_features_goes_with_a_head(pair, export_pair, target_dir):
    other = export_pair(target_dir)
    with pytest.raises(VocabtrimError, match="reads 192 features of the target's layers 2, 4, 5"):
        SpeculativeDecoder.load(other.target, pair.drafter)
    with pytest.raises(VocabtrimError, match="runs on the CPU only"):
        load_engine(pair.drafter, "cuda")
    with SpeculativeDecoder.load(pair.target, other.drafter) as decoder:  # features that nobody reads do no harm
        assert decoder.generate(PROMPTS[0], max_new_tokens=20).stats.drafted
