"""Medusa heads: each drafts one token from the target's last hidden state, and the output is the target's."""

import json

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from engines import VocabtrimError, load_engine
from runtime import SamplingParams, SpeculativeDecoder
from runtime.verification.sampled import verify_sampling
from vocabtrim_export.sources.head_kinds import head_kind

from .eagle_heads import check_rules
from .test_eagle import PROMPTS, spied_rounds
from .test_mistakes import assert_one_line, attempt  # noqa: F401

VOCAB, HIDDEN, HEADS, BLOCKS = 448, 64, 3, 2
CONFIG = {"medusa_num_heads": HEADS, "medusa_num_layers": BLOCKS, "base_model_name_or_path": "someone/model"}


def make_tensors(prefix=""):
    chance = torch.Generator().manual_seed(4)
    tensors = {}
    for head in range(HEADS):
        for block in range(BLOCKS):
            tensors[f"{prefix}{head}.{block}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=chance) * 0.3
            tensors[f"{prefix}{head}.{block}.linear.bias"] = torch.randn(HIDDEN, generator=chance)
        tensors[f"{prefix}{head}.{BLOCKS}.weight"] = torch.randn(VOCAB, HIDDEN, generator=chance) * 0.3
    return tensors


@torch.no_grad()
def logits_of(model, text):
    """[heads, vocab]: what the heads make of the last hidden state of `text`."""
    tensors, rows = make_tensors(), []
    for head in range(HEADS):
        x = model.model(torch.tensor([text])).last_hidden_state[0, -1]
        for block in range(BLOCKS):
            name = f"{head}.{block}.linear"
            x = x + F.silu(F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
        rows.append(tensors[f"{head}.{BLOCKS}.weight"] @ x)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def target_model(model):
    return transformers.AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture(scope="module")
def pair(write_head, export_pair, model):
    return export_pair(write_head(make_tensors("medusa_head."), CONFIG), model)


@pytest.mark.parametrize("accepted", range(HEADS + 1))
def test_each_head_drafts_from_the_targets_last_hidden_state(accepted, pair, target_model):
    kept = torch.from_numpy(pair.selection.vocab_map.kept_token_ids.copy())
    assert (pair.drafter_manifest.kind, pair.drafter_manifest.head_rows) == ("medusa", 192)
    with load_engine(pair.target) as target, load_engine(pair.drafter) as drafter:
        for prompt in PROMPTS:  # asked for more tokens than there are heads
            seen, _ = spied_rounds(target, drafter, prompt, max_new_tokens=18, force_accepted=accepted)
            assert {len(drafted) for _, drafted in seen} >= {HEADS}
            for text, drafted in seen:
                assert drafted == kept[logits_of(target_model, text[:-1])[:, kept].argmax(-1)].tolist()[: len(drafted)]


def test_the_output_is_the_targets(pair, target_model):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=3) as decoder, decoder.fork() as other:
        assert decoder.draft_length == HEADS
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = target_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
            for each in (decoder, other):
                assert [*prompt, *each.generate(prompt, max_new_tokens=40).token_ids] == wanted[0].tolist()
            check_rules(decoder, target_model, prompt)
        assert verify_sampling(decoder, PROMPTS, [SamplingParams(temperature=0.5, seed=1)], draws=300).passed
    with pytest.raises(VocabtrimError, match=r"draft_length is 4: .*give a number from 1 to 3"):
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4)


def test_the_law_behind_each_drafted_token_is_its_own_heads(pair, target_model):
    kept = pair.selection.vocab_map.kept_token_ids.copy()
    with load_engine(pair.target) as target, load_engine(pair.drafter) as drafter:
        for prompt in PROMPTS[:2]:
            drafter.rewind(0)
            target.rewind(0)
            features = target.feed(prompt).features
            found = [drafter.feed_features([*prompt[1:], 9], features).logits[-1].copy()]
            found += [drafter.feed([8]).logits[-1].copy() for _ in range(HEADS - 1)]
            wanted = logits_of(target_model, prompt)[:, kept].numpy()
            np.testing.assert_allclose(np.stack(found), wanted, atol=2e-4 * wanted.std(), rtol=1e-4)
            with pytest.raises(ValueError, match="follow one another"):
                drafter.feed([8])


def test_int4_heads_draft_much_the_same_and_read_less(pair, write_head, export_pair, model):
    small = export_pair(write_head(make_tensors(), CONFIG), model, quantize_drafter="int4")
    each = (BLOCKS * (HIDDEN + 1) + 192) * HIDDEN * 4  # of one head, fp32
    assert 0 <= pair.drafter_manifest.weight_bytes_per_step - each < 16  # a row of the table of token ids
    assert small.drafter_manifest.weight_bytes_per_step < each / 4
    features = np.random.default_rng(0).standard_normal((12, HIDDEN)).astype(np.float32)
    with load_engine(small.drafter) as rounded, load_engine(pair.drafter) as exact:
        found, wanted = (engine.feed_features(range(12), features, keep=12).logits for engine in (rounded, exact))
        assert np.abs(found - wanted).mean() < 0.3 * wanted.std()


MISTAKES = {
    "another hidden size": ({"0.0.linear.weight": torch.ones(32, 32)}, {}, r"heads.0.0.linear.weight is \[32, 32\]"),
    "another vocabulary": (
        {f"1.{BLOCKS}.weight": torch.ones(500, HIDDEN)},
        {},
        r"is \[500, 64\].* must be \[448, 64\]",
    ),
    "fewer heads": ({}, {"medusa_num_heads": 5}, "holds 3 Medusa heads and its config.json says 5"),
    "no heads": ({}, {"medusa_num_heads": 0}, "holds 3 Medusa heads and its config.json says 0"),
    "a word": ({}, {"medusa_num_heads": "many"}, 'medusa_num_heads is "many"; expected a whole number'),
    "fewer blocks": (
        {},
        {"medusa_num_layers": 1},
        "has tensors that cannot be exported yet|lacks tensors of Medusa heads",
    ),
    "no bias": ({"2.1.linear.bias": None}, {}, "lacks tensors of Medusa heads: heads.2.1.linear.bias"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_heads_that_cannot_be(case, attempt, write_head):  # noqa: F811
    changed, changes, message = MISTAKES[case]
    held = {name: tensor for name, tensor in (make_tensors() | changed).items() if tensor is not None}
    assert_one_line(attempt(drafter=write_head(held, CONFIG | changes)), message)


def test_a_model_that_tells_of_its_heads_is_a_model(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | CONFIG))
    assert head_kind(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert head_kind(str(tmp_path)) == "medusa"


def test_other_mistakes(attempt, write_head, model, tmp_path):  # noqa: F811
    head = write_head(make_tensors(), CONFIG)
    assert_one_line(attempt(drafter=head, target=None), "reads its target's hidden states: give --target")
    assert_one_line(attempt(drafter=model, target=head), "is a head and no model: give it as --drafter")
    assert_one_line(attempt(drafter=head, format="genai"), "and this one is of medusa")
    (head / "model.safetensors").rename(head / "medusa_lm_head.pt")
    assert_one_line(attempt(drafter=head), r"medusa_lm_head.pt is a pickle checkpoint.*save_file")
    (head / "config.json").write_text(json.dumps(CONFIG)[:-1])
    assert_one_line(attempt(drafter=head), "is not valid JSON")
