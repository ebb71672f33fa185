"""The tokens that stand in slots, and the file that their rows come from."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engines.bundle.head_rows import HeadRows
from engines.bundle.vocab_map import NOT_KEPT, VocabMap
from engines.errors import VocabtrimError
from engines.slots import Slots

VOCAB, HIDDEN = 40, 8
MAP = VocabMap.from_ids(range(0, VOCAB, 4), VOCAB)
LOST = np.setdiff1d(np.arange(VOCAB), [*MAP.kept_token_ids, 3])  # token 3 has no row anywhere
WEIGHT = np.random.default_rng(0).standard_normal((len(LOST), HIDDEN), np.float32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    save_file({"token_ids": LOST, "weight": WEIGHT, "bias": WEIGHT[:, 0].copy()}, path)
    return HeadRows(path, MAP, "none")


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, VOCAB + 2), max_size=30), max_size=8), count=st.integers(1, 12))
def test_the_least_recently_seen_token_leaves(rows, texts, count):
    """Tokens seen one by one in an OrderedDict and in pieces of any size by `Slots`; VOCAB and above are no tokens."""
    slots, model = Slots(MAP, rows, (HIDDEN, count), np.dtype(np.float32)), OrderedDict()
    arrays = slots.inputs
    for text in texts:
        slots.see(text)
        for token in text:
            if token in LOST:
                model[token] = None
                model.move_to_end(token)
                if len(model) > count:
                    model.popitem(last=False)
        ids = arrays["slot_token_ids"]
        filled = np.flatnonzero(ids != NOT_KEPT)
        assert sorted(ids[filled].tolist()) == sorted(model)
        where = np.searchsorted(LOST, ids[filled])
        np.testing.assert_array_equal(arrays["slot_weight"][:, filled], WEIGHT[where].T)
        np.testing.assert_array_equal(arrays["slot_bias"][filled], WEIGHT[where, 0])
        expected = MAP.inverse.copy()
        expected[ids[filled]] = len(MAP) + filled
        np.testing.assert_array_equal(slots.inverse, expected)
        np.testing.assert_array_equal(slots.kept_token_ids, [*MAP.kept_token_ids, *ids])
    slots.clear()
    np.testing.assert_array_equal(slots.inverse, MAP.inverse)
    assert (arrays["slot_token_ids"] == NOT_KEPT).all()
    slots.see(LOST[:1].tolist())
    assert LOST[0] in arrays["slot_token_ids"]


def test_bfloat16_stands_in_slots_as_its_bits(tmp_path):
    bits = (WEIGHT.view(np.uint32) >> 16).astype(np.uint16)
    save_file({"token_ids": LOST, "weight": bits, "bias": bits[:, 0].copy()}, tmp_path / "rows.safetensors")
    rows = HeadRows(tmp_path / "rows.safetensors", MAP, "none")
    weights, biases = rows.read(LOST[[3, 1]])
    np.testing.assert_array_equal(weights, (bits[[3, 1]].astype(np.uint32) << 16).view(np.float32))
    np.testing.assert_array_equal(biases, weights[:, 0])
    slots = Slots(MAP, rows, (HIDDEN, 2), np.dtype(np.uint16))
    slots.see(LOST[[3, 1]].tolist())
    np.testing.assert_array_equal(slots.inputs["slot_weight"], bits[[3, 1]].T)


def test_a_long_text_reads_no_more_rows_than_there_are_slots(rows, monkeypatch):
    read = []
    monkeypatch.setattr(rows, "read", lambda ids, real=rows.read: read.append(len(ids)) or real(ids))
    slots = Slots(MAP, rows, (HIDDEN, 4), np.dtype(np.float32))
    slots.see(LOST.tolist() * 100)
    slots.see(LOST[-4:].tolist())  # they are in already
    assert read == [4]


@pytest.mark.parametrize("block", [32, 64, 128])
def test_quantised_rows_are_read_by_their_blocks(tmp_path, block):
    rng = np.random.default_rng(block)
    quantized = rng.integers(256, size=(len(LOST), 2, block), dtype=np.uint8)
    scales = rng.random((len(LOST), 2), np.float32)
    zeros = rng.integers(256, size=(len(LOST), 2), dtype=np.uint8)
    tensors = {"token_ids": LOST, "quantized": quantized, "scales": scales, "zero_points": zeros}
    save_file(tensors, tmp_path / "rows.safetensors")
    rows = HeadRows(tmp_path / "rows.safetensors", MAP, "int8")
    assert rows.holds(2 * block)
    assert not rows.holds(block)
    weights, _ = rows.read(LOST[[3, 1]])
    dense = (quantized.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    np.testing.assert_allclose(weights, dense.reshape(len(LOST), -1)[[3, 1]], rtol=1e-6)


QUANTIZED = {"token_ids": LOST, "scales": np.ones((len(LOST), 1), np.float32)}
QUANTIZED["zero_points"] = np.zeros((len(LOST), 1), np.uint8)


def test_blocks_that_no_export_writes_are_refused(tmp_path):
    for shape in ((len(LOST), 1, 48), (len(LOST), 1, 0)):
        save_file(QUANTIZED | {"quantized": np.zeros(shape, np.uint8)}, tmp_path / "rows.safetensors")
        with pytest.raises(VocabtrimError, match="which no head has"):
            HeadRows(tmp_path / "rows.safetensors", MAP, "int8")


FILES = {
    "no tensors": ({}, "is not a file of head rows"),
    "another quantisation": ({"token_ids": LOST, "quantized": np.zeros((len(LOST), 1, 16), np.uint8)}, "is none"),
    "a kept token": ({"token_ids": LOST * 0, "weight": WEIGHT}, "a row twice, or one that the head keeps"),
    "a token beyond": ({"token_ids": LOST + VOCAB, "weight": WEIGHT}, "outside the vocabulary"),
    "fewer rows": ({"token_ids": LOST, "weight": WEIGHT[1:]}, "which no head has"),
    "integers": ({"token_ids": LOST, "weight": WEIGHT.astype(np.int32)}, "which no head has"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_other_rows_is_refused(tmp_path, name):
    tensors, message = FILES[name]
    save_file(tensors, tmp_path / "rows.safetensors")
    with pytest.raises(VocabtrimError, match=message):
        HeadRows(tmp_path / "rows.safetensors", MAP, "none")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.safetensors").write_bytes(b"nothing")
    with pytest.raises(VocabtrimError, match="is not a file of head rows"):
        HeadRows(tmp_path / "rows.safetensors", MAP, "none")
