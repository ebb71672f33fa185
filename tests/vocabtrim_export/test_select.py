"""The choice of rows: the most counted, the structural ones always, and nothing that was not asked for."""

import sys
from subprocess import run
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import CalibrationRun, TokenCounts
from vocabtrim_export.calibration.likely_order import likely_order
from vocabtrim_export.cli.selection_text import parse_k
from vocabtrim_export.selection import Coverage, select_vocab, structural_token_ids

FULL = 300
tables = st.lists(st.integers(0, 5), min_size=FULL, max_size=FULL)
ids = st.frozensets(st.integers(0, FULL - 1), max_size=60)


def token_counts(counts, held_out=None):
    counts = np.array(counts, np.int64)
    held_out = np.zeros_like(counts) if held_out is None else np.array(held_out, np.int64)
    return TokenCounts(counts, held_out, "digest", (CalibrationRun("text", "corpus", 0),))


@settings(deadline=None, max_examples=60)
@given(tables, tables, ids, st.integers(1, 400), st.integers(100, FULL))
def test_what_is_kept_beats_what_is_cut(counts, held_out, always, k, limit):
    always = frozenset(sorted(always)[:k])
    chosen = select_vocab(token_counts(counts, held_out), k, always_keep=always, full_vocab=limit)
    kept = chosen.vocab_map.kept_token_ids.tolist()
    assert len(kept) == min(-(-k // 64) * 64, limit)
    assert max(kept) < limit
    kept_always = {token for token in always if token < limit}
    assert kept_always <= set(kept)
    # (count, smaller id): the worst that was kept on merit is better than the best that was cut.
    merit = [(counts[token], -token) for token in kept if token not in kept_always]
    cut = [(counts[token], -token) for token in range(limit) if token not in set(kept)]
    assert not merit or not cut or min(merit) > max(cut)
    assert chosen.counted == sum(counts[token] > 0 for token in kept)
    assert chosen.filler == sum(counts[token] == 0 and token not in kept_always for token in kept)
    assert chosen.always_kept == len(kept_always)
    total = sum(held_out)
    assert chosen.coverage == (sum(held_out[token] for token in kept) / total if total else None)
    assert chosen.is_noop == (len(kept) == limit)
    assert chosen.vocab_map.full_vocab == limit


@settings(deadline=None, max_examples=60)
@given(tables, tables, ids, st.floats(0.01, 1.0))
def test_coverage_is_reached_by_the_smallest_k(counts, held_out, always, target):
    held_out[0] += 1
    table = token_counts(counts, held_out)
    chosen = select_vocab(table, Coverage(target), always_keep=always)
    assert chosen.coverage >= target - 1e-9
    assert chosen.requested_coverage == target
    rows = len(chosen.vocab_map)
    smaller = (rows - 1) // 64 * 64
    if smaller >= max(1, len(always)):
        assert select_vocab(table, smaller, always_keep=always).coverage < target


def test_the_held_out_part_does_not_choose():
    counts, held_out = np.zeros(FULL), np.zeros(FULL)
    counts[200:264], held_out[:10] = 1, 100
    chosen = select_vocab(token_counts(counts, held_out), 64, always_keep=())
    assert chosen.vocab_map.kept_token_ids.tolist() == list(range(200, 264))
    assert chosen.coverage == 0.0


@pytest.mark.parametrize(("tokens", "place"), [(30_000, 1), (1_000_000, 6_025)])
def test_in_a_long_text_a_rare_token_comes_after_low_ids(tokens, place):
    counts = np.zeros(50_000, np.int64)
    counts[[100, 40_000]] = tokens - 3, 3
    order = likely_order(counts)
    assert order[0] == 100
    assert order[place] == 40_000
    rest = np.delete(order, [0, place])
    assert (np.diff(rest) > 0).all()


def test_a_k_of_the_whole_vocabulary_is_a_noop():
    chosen = select_vocab(token_counts([1] * FULL), 1000, always_keep=())
    assert chosen.is_noop
    assert chosen.vocab_map.kept_token_ids.tolist() == list(range(FULL))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "K = 0 must be positive"),
        ("32000", "K = '32000' is neither a whole number nor a Coverage"),
        (0.95, "K = 0.95 is neither"),
        (Coverage(0.9), "nothing was held out"),
        (64, "K = 64 is too small: 65 special and structural tokens are always kept; give at least 128"),
    ],
)
def test_a_k_that_cannot_be_is_one_clear_line(k, message):
    with pytest.raises(VocabtrimError, match=message):
        select_vocab(token_counts([1] * FULL), k, always_keep=range(65))


@pytest.mark.parametrize("text", ["many", "3.5", "coverage:x", "cover:0.5", ":0.5", ""])
def test_a_k_on_the_command_line_is_a_number_or_a_coverage(text):
    assert parse_k(" 32000 ") == 32000
    assert parse_k("coverage:0.95") == Coverage(0.95)
    with pytest.raises(VocabtrimError, match=f"K = '{text}' is not understood"):
        parse_k(text)


@pytest.mark.parametrize("share", [0, -1, 95, float("nan")])
def test_a_coverage_is_a_share(share):
    with pytest.raises(VocabtrimError, match="above 0 and at most 1"):
        Coverage(share)


def test_structure_is_kept_and_reserved_tokens_are_not(tokenizer):
    config = SimpleNamespace(eos_token_id=[7, 9])
    kept = structural_token_ids(tokenizer, config)
    names = set(tokenizer.convert_ids_to_tokens(sorted(kept)))
    # "system" has no special token here: the template writes it as plain text, which must be kept all the same.
    assert {"<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "Ċ", "<", "|"} <= names
    assert "<|unused_0|>" not in names
    assert {7, 9} <= kept
    written = tokenizer("<|system|>\n<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    assert set(written) <= kept
    assert not set(tokenizer("quick fox", add_special_tokens=False)["input_ids"]) & kept
    reserved = tokenizer.convert_tokens_to_ids("<|unused_0|>")
    assert reserved in structural_token_ids(tokenizer, SimpleNamespace(eos_token_id=reserved))


def test_selecting_needs_no_torch():
    code = (
        "import sys, vocabtrim_export.selection, vocabtrim_export.calibration.corpus\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0
