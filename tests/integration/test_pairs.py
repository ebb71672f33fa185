"""Models of one family that do not have one vocabulary draft for each other, and the output stays the target's."""

import json

import pytest
import torch
import transformers

from engines.errors import VocabtrimError
from runtime import SpeculativeDecoder

TOKENS = 309  # of the tests' tokenizer
PROMPTS = ([0, 40, 50, 60, 33], [*range(70, 90)], [65])


@pytest.fixture(scope="module")
def member(random_model):
    """member(added tokens beside the tests' own, rows=448, …) → the directory of a random model.

    swapped: two ordinary tokens that change places.
    """

    def make(*added, rows=448, seed=0, swapped=()):
        path = random_model("llama", seed=seed, vocab_size=rows, tie_word_embeddings=False)
        file = path / "tokenizer.json"
        said = json.loads(file.read_text())
        table = said["model"]["vocab"]
        table |= {token: table[other] for token, other in zip(swapped, swapped[::-1], strict=True)}
        first = max(table.values()) + 1
        like = said["added_tokens"][-1]
        said["added_tokens"] += [like | {"id": first + n, "content": token} for n, token in enumerate(added)]
        file.write_text(json.dumps(said))
        return path

    return make


def greedy(model, prompt):
    ids = transformers.AutoModelForCausalLM.from_pretrained(model).generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
    )
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def distilled(member):
    """A target with more rows and with added tokens of its own, and a drafter with another one."""
    return member("<think>", "</think>", rows=512), member("<fim>", seed=1)


@pytest.fixture(scope="module")
def pair(distilled, export_pair):
    target, drafter = distilled
    return export_pair(drafter, target, k=448)


def check_output(target, drafter, model):
    with SpeculativeDecoder.load(target=target, drafter=drafter, draft_length=4) as decoder:
        generated = [decoder.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]
    assert [list(each.token_ids) for each in generated] == [greedy(model, prompt) for prompt in PROMPTS]
    assert all(each.stats.drafted for each in generated)


def test_ids_that_differ_are_never_drafted(pair, distilled):
    kept = set(pair.selection.vocab_map.kept_token_ids.tolist())
    assert kept == set(range(448)) - {TOKENS, TOKENS + 1}
    assert ["2", "token", "ids"] in [note.split()[:3] for note in pair.notes]
    check_output(pair.target, pair.drafter, distilled[0])


def test_an_added_token_may_lack_a_row(member, export_pair):
    """Gemma 3's text models have such a token."""
    model = member("<image>", rows=TOKENS)
    result = export_pair(model)
    check_output(result.target, result.drafter, model)
    refused = pytest.raises(VocabtrimError, match=rf"token id {TOKENS} \(<image>\), for which the target has no row")
    with SpeculativeDecoder.load(target=result.target) as decoder, refused:
        decoder.generate("a <image> b", max_new_tokens=1)


def test_bundles_made_apart(pair, distilled, export_pair):
    """They go together where all that the drafter keeps means the same to the target."""
    drafter = distilled[1]
    alone = export_pair(drafter)
    check_output(alone.target, pair.drafter, drafter)
    with pytest.raises(VocabtrimError, match="can propose 1 tokens that the target does not have"):
        SpeculativeDecoder.load(target=pair.target, drafter=alone.drafter, draft_length=4)


def test_ordinary_tokens_that_differ_are_refused(member, export_pair):
    plain, swapped = member(), member(swapped=("a", "b"))
    with pytest.raises(
        VocabtrimError, match=r"cannot draft for .*: they have different vocabularies: 2 ordinary tokens"
    ):
        export_pair(swapped, plain)
