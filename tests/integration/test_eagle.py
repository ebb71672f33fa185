"""EAGLE-3 heads: what is drafted is the recurrence written out, whatever layout and vocabulary the head comes in."""

import numpy as np
import pytest
import torch
import transformers

from engines import VocabtrimError, load_engine
from runtime import SamplingParams, SpeculativeDecoder
from runtime.loop import decode_rounds
from runtime.measure.timing import timed_run
from runtime.verification.sampled import verify_sampling
from vocabtrim_export.drafters.eagle_checkpoint import load_head
from vocabtrim_export.sources.source import load_source

from .eagle_heads import CONFIG, HIDDEN, LAYERS, VOCAB, check_rules, make_tensors, permuted, sequential_drafts

GAMMA = 4
PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]


@pytest.fixture(scope="module")
def target_dir(random_model):
    return random_model("llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def target_model(target_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(target_dir).eval()


@pytest.fixture(scope="module")
def export_head(export_pair, target_dir):
    return lambda head, k=100000, **changes: export_pair(head, target_dir, k=k, **changes)


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
    from engines.ort import engine as ort_engine

    with (
        load_engine(pair.target) as target,
        load_engine(pair.drafter) as drafter,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ort_engine, "CHUNK", 8)  # a prompt in several parts, in both engines
        for prompt in PROMPTS:
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=accepted)
            for text, drafted in seen:
                assert drafted == sequential_drafts(make_tensors(), target_model, text, steps=len(drafted))


def test_the_output_is_the_targets(pair, target_dir, target_model):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = target_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
            assert [*prompt, *decoder.generate(prompt, max_new_tokens=40).token_ids] == wanted[0].tolist()
            check_rules(decoder, target_model, prompt)
            run = timed_run(decoder.target, decoder.drafter, prompt, 40, GAMMA)
            assert [*prompt, *run.tokens] == wanted[0].tolist()
        sampling = SamplingParams(temperature=1.5, seed=3)
        first, again = (decoder.generate(PROMPTS[0], max_new_tokens=60, sampling=sampling) for _ in range(2))
        assert first.token_ids == again.token_ids
        assert first.stats.drafted > 20
        report = verify_sampling(decoder, PROMPTS, [SamplingParams(temperature=0.5, seed=1)], draws=300)
        assert report.passed


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


def test_every_layout_holds_the_same_head(write_head, random_model):
    target_dir = random_model("llama", num_hidden_layers=8)  # LAYERS are its default
    target_model = transformers.AutoModelForCausalLM.from_pretrained(target_dir)
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
        assert torch.equal(source.model.lm_head.weight[source.rows_of(kept)], head[kept]), name
        assert source.feature_layers == LAYERS, name
        assert bool(source.notes) == (name == "no d2t")
        assert torch.equal(source.model.midlayer.mlp.up_proj.weight, full["midlayer.mlp.up_proj.weight"]), name
        scale = 2 if name == "SpecForge" else 1
        assert torch.equal(source.model.embed_tokens.weight, target_model.model.embed_tokens.weight * scale), name


def test_a_reduced_head_is_trimmed_further(write_head, export_head, target_model):
    """Unsorted rows, some of them cut: drafts as the whole head gives them where only the kept tokens count."""
    full, ids = make_tensors(bias=True), np.random.default_rng(2).permutation(VOCAB)[:300]
    tensors = {**full, "lm_head.weight": full["lm_head.weight"][ids], "d2t": permuted(ids)}
    head = write_head(tensors, eagle_aux_hidden_state_layer_ids=list(LAYERS), norm_before_residual=True)
    whole, result = export_head(head), export_head(head, k=128)
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


def test_a_reduced_head_with_all_of_its_tokens_in_slots_is_whole(write_head, export_head):
    full, ids = make_tensors(), np.random.default_rng(2).permutation(VOCAB)[:300]
    tensors = {**full, "lm_head.weight": full["lm_head.weight"][ids], "d2t": permuted(ids)}
    head = write_head(tensors, eagle_aux_hidden_state_layer_ids=list(LAYERS))
    whole, slotted = export_head(head), export_head(head, k=128, slots=1000)
    assert slotted.drafter_manifest.slots == 300 - 128
    features = np.random.default_rng(0).standard_normal((12, 3 * HIDDEN)).astype(np.float32)
    with load_engine(slotted.drafter) as engine, load_engine(whole.drafter) as other:
        engine.remember(range(VOCAB))
        found, wanted = (each.feed_features(range(30, 42), features, keep=12) for each in (engine, other))
        columns = engine.head_tokens.inverse[other.head_tokens.kept_token_ids]
        np.testing.assert_allclose(found.logits[:, columns], wanted.logits, atol=1e-4)
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
    with SpeculativeDecoder.load(slotted.target) as alone:
        wanted = alone.generate(PROMPTS[1], max_new_tokens=40).token_ids
    with SpeculativeDecoder.load(slotted.target, slotted.drafter, draft_length=4) as decoder:
        assert decoder.generate(PROMPTS[1], max_new_tokens=40).token_ids == wanted


def test_int4_heads_draft_much_the_same(write_head, export_head, pair):
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    result = export_head(head, quantize_drafter="int4")
    assert result.drafter_manifest.weight_bytes_per_step < pair.drafter_manifest.weight_bytes_per_step / 4
    features = np.random.default_rng(0).standard_normal((12, 3 * HIDDEN)).astype(np.float32)
    with load_engine(result.drafter) as small, load_engine(pair.drafter) as exact:
        found, wanted = (engine.feed_features(range(30, 42), features, keep=12).logits for engine in (small, exact))
        assert np.abs(found - wanted).mean() < 0.3 * wanted.std()
        exact.rewind(8)
        with pytest.raises(ValueError, match="the row that it computed last"):
            exact.feed([42])


def test_only_a_target_that_gives_the_features_goes_with_a_head(pair, random_model, export_pair):
    other = export_pair(random_model("llama"))
    with pytest.raises(VocabtrimError, match="reads 192 features of the target's layers 2, 4, 5"):
        SpeculativeDecoder.load(other.target, pair.drafter, draft_length=4)
    with SpeculativeDecoder.load(
        pair.target, other.drafter, draft_length=4
    ) as decoder:  # features that nobody reads do no harm
        assert decoder.generate(PROMPTS[0], max_new_tokens=20).stats.drafted


def test_a_head_that_was_trimmed_is_a_checkpoint_again(write_head, export_head):
    """`--format eagle3`: exported anew without a trim, it drafts what the trimmed bundle drafts."""
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    first = export_head(head, k=192, formats=("eagle3",))
    (written,) = first.formats
    again = export_head(written)
    maps, texts = [], []
    for result in (first, again):
        with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
            maps.append(decoder.drafter.vocab_map.kept_token_ids.tolist())
            made = decoder.generate(PROMPTS[0], max_new_tokens=40)
            texts.append((made.token_ids, made.stats.drafted, made.stats.accepted))
    assert len(maps[0]) == 192
    assert maps[0] == maps[1]
    assert texts[0] == texts[1]


def test_a_fork_of_a_head_and_its_target_is_another_pair(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder, decoder.fork() as other:
        made = [each.generate(PROMPTS[1], max_new_tokens=40) for each in (decoder, other)]
        assert made[0].token_ids == made[1].token_ids
        assert made[0].stats.accepted == made[1].stats.accepted


@pytest.mark.parametrize(("name", "message"), [("genai", "kind language-model, and"), ("hf", "one is of eagle3")])
def test_formats_of_language_models_are_refused(name, message, write_head, export_head):
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    with pytest.raises(VocabtrimError, match=message):
        export_head(head, formats=(name,))


def test_a_quantised_target_gives_a_row_of_features_for_each_token_and_none_for_its_padding(write_head, export_head):
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    result = export_head(head, quantize="int8")
    with (
        SpeculativeDecoder.load(result.target) as alone,
        SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as pair,
    ):
        wanted = alone.target.feed(PROMPTS[1]).features.copy()
        alone.target.rewind(0)
        single = [alone.target.feed([token]).features.copy() for token in PROMPTS[1]]
        np.testing.assert_array_equal(np.concatenate(single), wanted)
        for prompt in PROMPTS:
            expected, found = (each.generate(prompt, max_new_tokens=40).token_ids for each in (alone, pair))
            assert found == expected
