"""EAGLE-1 and EAGLE-2 heads and multi-token-prediction layers: what is drafted is the recurrence written out."""

import numpy as np
import pytest
import torch
import transformers

from engines import load_engine
from runtime import SamplingParams, SpeculativeDecoder
from runtime.verify_sampling import verify_sampling
from vocabtrim_export.eagle.checkpoint import load_head
from vocabtrim_export.models import load_source

from .layer_heads import CONFIG, HIDDEN, VOCAB, make_tensors, safeailab, sequential_drafts
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
    from engines import onnxruntime_engine

    kept = torch.from_numpy(first_eagle.selection.vocab_map.kept_token_ids.copy())
    assert (first_eagle.drafter_manifest.kind, len(kept)) == ("eagle", 192)
    assert first_eagle.target_manifest.feature_layers == (3,)
    with (
        load_engine(first_eagle.target) as target,
        load_engine(first_eagle.drafter) as drafter,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(onnxruntime_engine, "CHUNK", 8)  # a prompt in several parts, in both engines
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=accepted)
            assert seen
            for text, drafted in seen:
                assert drafted == sequential_drafts(make_tensors(), target_model, text, kept, len(drafted))


def check_lossless(pair, model):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
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
        found = source.head.state_dict()
        ours = dict(queries if name == "Qwen2's biases" else make_tensors())
        own = target_model.state_dict()
        ours["embed_tokens.weight"] = (
            own["model.embed_tokens.weight"] * 0 + 1 if name == "ends" else own["model.embed_tokens.weight"]
        )
        ours["lm_head.weight"] = own["lm_head.weight"] * 0 + 1 if name == "ends" else own["lm_head.weight"]
        assert set(found) == set(ours), name
        assert all(torch.equal(found[key], tensor) for key, tensor in ours.items()), name
