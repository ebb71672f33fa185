"""The meaning of token ids, and the ids that two models share."""

import pytest
from tokenizers import AddedToken, Tokenizer, models

from engines.bundle.vocabulary import Vocabulary, shared_tokens
from engines.errors import VocabtrimError


def vocabulary(ordinary, added=(), rows=None):
    """ordinary: token or None of each id from 0. added: tokens with the ids that follow."""
    table = {token: index for index, token in enumerate(ordinary) if token is not None}
    backend = Tokenizer(models.BPE(table | {token: len(ordinary) + i for i, token in enumerate(added)}, []))
    backend.add_special_tokens([AddedToken(token) for token in added])
    return Vocabulary.of(backend, rows or len(ordinary) + len(added))


@pytest.mark.parametrize(
    ("target", "drafter", "shared", "differing"),
    [
        (vocabulary("abc", ["<s>"]), vocabulary("abc", ["<s>"]), [0, 1, 2, 3], 0),
        (vocabulary("abc", ["<s>", "<t>"]), vocabulary("abc", ["<s>"]), [0, 1, 2, 3], 1),
        (vocabulary("abc", ["<s>"]), vocabulary("abc", ["<t>"]), [0, 1, 2], 1),
        (vocabulary(["a", "b", "[PAD2]", "[PAD3]"]), vocabulary("ab"), [0, 1], 0),
        (vocabulary(["a", "[PAD7]"]), vocabulary(["a", "[PAD7]"]), [0, 1], 0),  # a token: no converter gives it so
        (vocabulary("ab", ["<image>"], rows=2), vocabulary("ab"), [0, 1], 0),
        (vocabulary("ab", ["<image>"], rows=2), vocabulary("ab", ["<s>"]), [0, 1], 1),
        (vocabulary(["a", "\u2581\u2581"]), vocabulary("a", ["  "]), [0, 1], 0),  # as GGUF writes it
        (vocabulary(["a", "<unused1>"]), vocabulary("a", ["<tool>"]), [0], 1),
        (vocabulary("abc"), vocabulary("ab"), [0, 1], 1),
        (vocabulary("abc", rows=6), vocabulary("abc", rows=5), [0, 1, 2, 3, 4], 0),
        (vocabulary("abc", rows=6), vocabulary("abc", ["<s>"], rows=5), [0, 1, 2, 4], 1),
    ],
)
def test_ids_of_one_meaning_are_shared(target, drafter, shared, differing):
    for pair in ((target, drafter), (drafter, target)):
        found = shared_tokens(*pair)
        assert (found.token_ids.tolist(), found.differing) == (shared, differing)


@pytest.mark.parametrize(
    ("target", "drafter", "message"),
    [
        (
            vocabulary("abc"),
            vocabulary("acb"),
            "2 ordinary tokens differ, the first is 1, 'b' to the target and 'c'",
        ),
        (vocabulary("ab", ["<s>"]), vocabulary("abc"), "1 ordinary tokens differ, the first is 2"),
        (vocabulary("a", rows=1), vocabulary([None, "b"]), "no token of one"),
    ],
)
def test_ordinary_tokens_that_differ_are_refused(target, drafter, message):
    with pytest.raises(VocabtrimError, match=message):
        shared_tokens(target, drafter)


@pytest.mark.parametrize(("rows", "beyond"), [(5, None), (3, None), (2, 2)])
def test_only_added_tokens_may_lack_a_row(rows, beyond):
    assert vocabulary("abc", ["<image>", "<s>"], rows=rows).beyond == beyond
