"""The turns of a conversation, on real engines: a decoder that keeps what it has read gives what a fresh one gives."""

import numpy as np
import pytest

from runtime import SpeculativeDecoder
from runtime.drafting import Drafting

from . import eagle_heads, test_medusa

FIRST = list(range(40, 70))
# Turns after the first: the tokens of the text so far that stay, counted from the end, and what follows them.
TURNS = [(0, [7, 9, 11]), (0, [5]), (20, [17, 200, 33]), (1, [12]), (15, [300, 9]), (10_000, [40, 41, 9])]


def own_cache(random_model, export_pair, write_head):
    other = random_model("llama", seed=1, hidden_size=32, num_hidden_layers=1)
    return export_pair(other, target=random_model("llama"))


def slots(random_model, export_pair, write_head):
    other = random_model("llama", seed=1, hidden_size=32, num_hidden_layers=1)
    return export_pair(other, target=random_model("llama"), k=64, slots=16)


def one_cache(random_model, export_pair, write_head):
    return export_pair(random_model("llama"), quantize_drafter="int4")


def sliding_window(random_model, export_pair, write_head):
    return export_pair(random_model("gemma2"), quantize_drafter="int4")


def int8(random_model, export_pair, write_head):
    return export_pair(random_model("llama"), quantize="int8")


def eagle_3(random_model, export_pair, write_head):
    layers = {"eagle_aux_hidden_state_layer_ids": list(eagle_heads.LAYERS)}
    return export_pair(write_head(eagle_heads.make_tensors(), **layers), random_model("llama", num_hidden_layers=6))


def medusa(random_model, export_pair, write_head):
    tensors = test_medusa.make_tensors("medusa_head.")
    return export_pair(write_head(tensors, test_medusa.CONFIG), random_model("llama"))


def generate(decoder, prompt):
    """A generation, and what each of its rounds drafted."""
    drafts, propose = [], Drafting.propose

    def spied(*args):
        draft = propose(*args)
        drafts.append(draft.tokens)
        return draft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafting, "propose", spied)
        return decoder.generate(prompt, max_new_tokens=13), drafts


@pytest.mark.parametrize("pair_of", [own_cache, slots, one_cache, sliding_window, int8, eagle_3, medusa])
def test_what_is_kept_changes_neither_the_output_nor_the_drafts(pair_of, random_model, export_pair, write_head):
    pair = pair_of(random_model, export_pair, write_head)
    with (
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=3) as decoder,
        decoder.fork() as other,
    ):
        prompt, more, snapshot, copied = FIRST, [], None, {}
        for turn in range(len(TURNS) + 1):
            with decoder.fork() as alone:
                fresh, fresh_drafts = generate(alone, prompt)
            result, drafts = generate(decoder, prompt)
            assert (result.token_ids, drafts) == (fresh.token_ids, fresh_drafts)
            read_again = len(prompt) - result.stats.cached
            assert read_again <= len(more) + 3 or turn in (0, len(TURNS))  # a head needs a token or two more
            if snapshot:  # another decoder, which holds another text, goes on from a copy
                other.generate([9, 8, 7], max_new_tokens=3)
                other.restore(snapshot, min(snapshot.target.length, result.stats.cached + 1))
                restored, drafts = generate(other, prompt)
                assert (restored.token_ids, drafts) == (fresh.token_ids, fresh_drafts)
                assert restored.stats.cached == result.stats.cached
                for name, array in snapshot.target.arrays.items():  # generations since have changed nothing in it
                    np.testing.assert_array_equal(array, copied[name])
            snapshot = decoder.snapshot()
            copied = {name: array.copy() for name, array in snapshot.target.arrays.items()}
            assert snapshot.nbytes == decoder.snapshot_bytes
            text = [*prompt, *result.token_ids]
            if turn < len(TURNS):
                cut, more = TURNS[turn]
                prompt = [*text[: max(0, len(text) - cut)], *more]
