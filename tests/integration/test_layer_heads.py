"""EAGLE-1 and EAGLE-2 heads and multi-token-prediction layers: what is drafted is the recurrence written out."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engines import load_engine
from runtime import SamplingParams, SpeculativeDecoder
from runtime.verification.sampled import verify_sampling
from vocabtrim_export.drafters.eagle_checkpoint import load_head
from vocabtrim_export.drafters.mtp import find_mtp
from vocabtrim_export.sources.source import load_source

from .layer_heads import (
    CONFIG,
    DEEPSEEK,
    HIDDEN,
    MIMO,
    NORMS,
    QWEN,
    ROTATION,
    VOCAB,
    beside_the_model,
    make_tensors,
    safeailab,
    sequential_drafts,
)
from .test_eagle import GAMMA, PROMPTS, spied_rounds


@pytest.fixture(scope="module")
def target_dir(random_model):
    return random_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def target_model(target_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(target_dir).eval()


@pytest.fixture(scope="module")
def first_eagle(write_head, export_pair, target_dir):
    return export_pair(write_head(safeailab(make_tensors()), CONFIG), target_dir)


@pytest.mark.parametrize("accepted", range(GAMMA + 1))
def test_an_eagle_1_head_drafts_its_recurrence(accepted, first_eagle, target_model):
    from engines.ort import engine as ort_engine

    kept = torch.from_numpy(first_eagle.selection.vocab_map.kept_token_ids.copy())
    assert (first_eagle.drafter_manifest.kind, len(kept)) == ("eagle", 192)
    assert first_eagle.target_manifest.feature_layers == (3,)
    with (
        load_engine(first_eagle.target) as target,
        load_engine(first_eagle.drafter) as drafter,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ort_engine, "CHUNK", 8)  # a prompt in several parts, in both engines
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=accepted)
            assert seen
            for text, drafted in seen:
                assert drafted == sequential_drafts(make_tensors(), target_model, text, kept, len(drafted))


def check_lossless(pair, model):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
            assert [*prompt, *decoder.generate(prompt, max_new_tokens=40).token_ids] == wanted[0].tolist()
        assert verify_sampling(decoder, PROMPTS, [SamplingParams(temperature=0.5, seed=1)], draws=300).passed


def test_the_output_is_the_targets(first_eagle, target_model):
    check_lossless(first_eagle, target_model)


def test_every_layout_of_an_eagle_1_head_is_the_same_head(write_head, target_dir, target_model):
    target = load_source(str(target_dir), torch.float32)
    tensors = safeailab(make_tensors())
    named = {**CONFIG, "architectures": ["LlamaForCausalLMEagle"]}
    inner = {name: value for name, value in CONFIG.items() if name != "architectures"}
    speculators = {"architectures": ["EagleSpeculator"], "speculators_model_type": "eagle"}
    speculators |= {"transformer_layer_config": inner, "layernorms": False, "fusion_bias": True}
    theirs = {
        name.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc."): tensor
        for name, tensor in tensors.items()
    }
    ends = {"embed_tokens.weight": torch.ones(VOCAB, HIDDEN), "lm_head.weight": torch.ones(VOCAB, HIDDEN)}
    queries = make_tensors(("q_proj", "k_proj", "v_proj"))
    for name, (held, config) in {
        "SafeAILab": (tensors, CONFIG),
        "with a prefix": ({f"model.{key}": tensor for key, tensor in tensors.items()}, named),
        "speculators": (theirs, speculators),
        "ends": ({**tensors, **ends}, CONFIG),
        "Qwen2's biases": (safeailab(queries), CONFIG),
    }.items():
        source = load_head(str(write_head(held, config)), target)
        assert (source.kind, source.feature_layers, source.notes) == ("eagle", (3,), ()), name
        assert np.array_equal(source.row_token_ids, np.arange(VOCAB)), name
        found = source.model.state_dict()
        ours = dict(queries if name == "Qwen2's biases" else make_tensors())
        own = target_model.state_dict()
        ours["embed_tokens.weight"] = (
            own["model.embed_tokens.weight"] * 0 + 1 if name == "ends" else own["model.embed_tokens.weight"]
        )
        ours["lm_head.weight"] = own["lm_head.weight"] * 0 + 1 if name == "ends" else own["lm_head.weight"]
        assert set(found) == set(ours), name
        assert all(torch.equal(found[key], tensor) for key, tensor in ours.items()), name


def add_tensors(directory, tensors, name="mtp.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)
    return directory


@pytest.fixture(scope="module")
def mimo(random_model):
    """A Qwen2 with MiMo's layer beside it → (directory, tensors)."""
    tensors = make_tensors(("q_proj", "k_proj", "v_proj"), NORMS)
    directory = random_model("qwen2", **ROTATION)
    return add_tensors(directory, beside_the_model(tensors, "model.mtp_layers.0.", MIMO)), tensors


@pytest.fixture(scope="module")
def deepseek_like(random_model):
    """A Llama with one more decoder layer, as DeepSeek and GLM append it."""
    tensors = make_tensors((), NORMS)
    directory = random_model("llama", **ROTATION, attention_bias=False)
    shared = {"model.layers.2.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    return add_tensors(directory, beside_the_model(tensors, "model.layers.2.", DEEPSEEK) | shared), tensors | {
        "embed_tokens.weight": shared["model.layers.2.embed_tokens.weight"]
    }


@pytest.mark.parametrize("checkpoint", ["mimo", "deepseek_like"])
def test_a_multi_token_prediction_layer_drafts_its_recurrence(checkpoint, request, export_pair):
    directory, tensors = request.getfixturevalue(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    pair = export_pair("mtp", directory)
    assert (pair.drafter_manifest.kind, pair.target_manifest.feature_layers) == ("mtp", (2,))
    kept = torch.from_numpy(pair.selection.vocab_map.kept_token_ids.copy())
    with load_engine(pair.target) as target, load_engine(pair.drafter) as drafter:
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=2)
            for text, drafted in seen:
                wanted = sequential_drafts(tensors, model, text, kept, len(drafted), checkpoint == "mimo")
                assert drafted == wanted
    check_lossless(pair, model)


def test_a_layer_drafts_as_transformers_own_multi_token_prediction_does(random_model, export_pair):
    """The reference is transformers' own Mellum, in which rotation differs by type of layer."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    dense = {"mlp_layer_types": ["dense", "dense"], "num_mtp_layers": 1, "mtp_mlp_layer_types": ["dense"]}
    types = {"layer_types": ["sliding_attention", "full_attention"], "mtp_layer_types": ["sliding_attention"]}
    directory = random_model("mellum", **dense, **types, head_dim=16, sliding_window=5)
    tensors = make_tensors((), NORMS) | {f"layer.self_attn.{x}_norm.weight": torch.rand(16) + 0.5 for x in "qk"}
    file = directory / "model.safetensors"
    beside = beside_the_model(tensors, "mtp.", QWEN, "layers.0.")
    save_file(load_file(file) | {key: tensor.contiguous() for key, tensor in beside.items()}, file, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    layer = MtpModel.from_pretrained(model).eval()
    pair = export_pair("mtp", directory)
    kept = torch.from_numpy(pair.selection.vocab_map.kept_token_ids.copy())

    @torch.no_grad()
    def drafts(text, steps):
        rows, drafted = model.model(torch.tensor([text[:-1]])).last_hidden_state, []
        for _ in range(steps):
            ids = torch.tensor([text[1:] + drafted])
            cache = MtpCache(config=model.config.get_mtp_config())
            last = layer.forward_layer(0, rows, torch.arange(ids.shape[1])[None], cache, input_ids=ids)[:, -1:]
            rows = torch.cat((rows, last), 1)
            drafted.append(int(kept[(last[0, 0] @ model.lm_head.weight.T)[kept].argmax()]))
        return drafted

    with load_engine(pair.target) as target, load_engine(pair.drafter) as drafter:
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=2)
            assert seen
            for text, drafted in seen:
                assert drafted == drafts(text, len(drafted))


def test_int4_heads_draft_much_the_same(write_head, export_pair, target_dir, first_eagle):
    head, ways = write_head(safeailab(make_tensors()), CONFIG), {"formats": ("sglang-token-map",)}
    small = export_pair(head, target_dir, quantize_drafter="int4", **ways)
    listed = torch.load(small.formats[0] / "hot_token_ids.pt", weights_only=True)
    assert listed == small.selection.vocab_map.kept_token_ids.tolist()
    assert small.drafter_manifest.weight_bytes_per_step < first_eagle.drafter_manifest.weight_bytes_per_step / 4
    features = np.random.default_rng(0).standard_normal((12, HIDDEN)).astype(np.float32)
    with load_engine(small.drafter) as rounded, load_engine(first_eagle.drafter) as exact:
        found, wanted = (engine.feed_features(range(30, 42), features, keep=12).logits for engine in (rounded, exact))
        assert np.abs(found - wanted).mean() < 0.3 * wanted.std()


@pytest.mark.parametrize(
    ("prefix", "names", "inner"),
    [
        ("model.mtp_layers.{}.", MIMO, ""),
        ("mtp.", QWEN, "layers.{}."),
        ("model.layers.{}.", DEEPSEEK, ""),
    ],
)
def test_only_the_first_of_several_layers_is_taken(prefix, names, inner, tmp_path):
    held = {}
    for number in (1, 0):
        held |= beside_the_model(make_tensors((), NORMS), prefix.format(number), names, inner.format(number))
    add_tensors(tmp_path, held)
    found = find_mtp(str(tmp_path))
    (renamed,) = found.files.values()
    assert found.layers == 2
    assert sorted(renamed.values()) == sorted(make_tensors((), NORMS))
    assert not any(".1." in name for name in renamed)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_a_head_that_is_the_model_again_is_always_right(kind, random_model, write_head, export_pair):
    """The model has one layer without attention: its hidden state depends on the token only, which the head reads."""
    directory = random_model("llama", num_hidden_layers=1, **ROTATION, attention_bias=False)
    file = directory / "model.safetensors"
    weights = load_file(file)
    # The padding token's row is all zeros and stays so.
    unit = torch.nn.functional.normalize(weights["model.embed_tokens.weight"], dim=-1)
    weights["model.embed_tokens.weight"] = unit * HIDDEN**0.5
    weights["model.layers.0.self_attn.o_proj.weight"] *= 0
    if kind == "eagle":  # the head has no norm in front of its LM head
        weights["model.norm.weight"] = torch.ones(HIDDEN)
    save_file(weights, file, {"format": "pt"})
    layer = {f"layer.{name[15:]}": tensor for name, tensor in weights.items() if name.startswith("model.layers.0.")}
    tensors = layer | {"fc.weight": torch.eye(HIDDEN, 2 * HIDDEN)}
    if kind == "eagle":
        del tensors["layer.input_layernorm.weight"]
        drafter = write_head(safeailab(tensors), CONFIG)
    else:
        tensors |= {f"{name}.weight": torch.ones(HIDDEN) for name in NORMS[:2]}
        tensors["norm.weight"] = weights["model.norm.weight"]
        add_tensors(directory, beside_the_model(tensors, "model.layers.1.", DEEPSEEK))
        drafter = "mtp"
    pair = export_pair(drafter, directory, k=100000)
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        made = [decoder.generate(prompt, max_new_tokens=40).stats for prompt in PROMPTS]
        assert sum(stats.drafted for stats in made) > 40
        assert all(stats.accepted == stats.drafted for stats in made)
        if kind == "mtp":  # p is q, but for rounding
            sampled = decoder.generate(PROMPTS[0], max_new_tokens=60, sampling=SamplingParams(seed=2)).stats
            assert sampled.accepted >= 0.95 * sampled.drafted > 20
