"""Two bundles that were made apart draft together where their tokens mean the same, and are refused otherwise."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from runtime.pair import check_pair
from tests.runtime.conftest import VOCAB, FakeEngine, make_manifest

LETTERS = tuple(chr(97 + index) for index in range(41))


@pytest.fixture
def side(tmp_path):
    """side(role, added tokens, kept ids) → an engine whose ordinary tokens are 40 letters."""

    def make(role, added, kept=None, ordinary=LETTERS[:40]):
        backend = Tokenizer(models.BPE({token: index for index, token in enumerate((*ordinary, *added))}, []))
        backend.add_special_tokens([AddedToken(token) for token in added])
        path = tmp_path / f"{role}.json"
        backend.save(str(path))
        vocab_map = None if kept is None else VocabMap(np.array(kept), VOCAB)
        engine = FakeEngine(
            make_manifest(role=role, tokenizer=role, vocab_size=VOCAB, head_rows=len(kept or range(VOCAB)))
        )
        engine.vocab_map, engine.tokenizer_file = vocab_map, path
        return engine

    return make


def test_added_tokens_may_differ_where_they_are_not_drafted(side):
    target = side("target", ["<s>", "<e>"])
    check_pair(target, side("drafter", ["<s>", "<t>"], [0, 5, 40]))
    with pytest.raises(VocabtrimError, match="can propose 1 tokens"):
        check_pair(target, side("drafter", ["<s>", "<t>"], [0, 5, 40, 41]))
    with pytest.raises(VocabtrimError, match="can propose 1 tokens"):  # all of them, its head is whole
        check_pair(target, side("drafter", ["<s>", "<t>"]))


def test_other_words_are_refused(side):
    drafter = side("drafter", ["<s>"], [0, 5], ordinary=LETTERS[1:])
    with pytest.raises(VocabtrimError, match=r"cannot draft for this target: .* 40 ordinary tokens differ"):
        check_pair(side("target", ["<s>"]), drafter)


def test_without_a_tokenizer_only_equal_digests_go_together(side):
    target, drafter = side("target", ["<s>"]), side("drafter", ["<s>"], [0])
    drafter.tokenizer_file = None
    with pytest.raises(VocabtrimError, match="another tokenizer"):
        check_pair(target, drafter)
