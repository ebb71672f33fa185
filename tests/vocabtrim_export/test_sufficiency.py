"""`--calibration-tokens auto`: it stops when more tokens would change little, wherever it was interrupted."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vocabtrim_export.calibration import (
    Corpus,
    CountEvents,
    CountSettings,
    Document,
    TokenCounts,
    batches,
    calibrate,
    counter,
)
from vocabtrim_export.calibration.counter import Listener
from vocabtrim_export.calibration.counting import CalibrationSettings, calibrate_models
from vocabtrim_export.calibration.sufficiency import FIRST_LOOK, Evidence, rows_of

VOCAB, MOST = 448, 60_000


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Looks follow the doubling of the tokens closely, though the texts are few."""
    monkeypatch.setattr(batches, "TEXT_BATCH", 64)


def corpus(tokenizer, spread):
    """3,000 documents of 20 tokens by Zipf's law; those of a topic share 12 tokens of their own where `spread` is 1."""
    random = np.random.default_rng(0)
    law = 1 / np.arange(1, 200)
    words = [tokenizer.decode([token]) for token in range(40, 400)]
    documents = []
    for index in range(3000):
        common = random.choice(199, 20 - 12 * spread, p=law / law.sum())
        topic = random.permutation(360)[: 12 * spread]
        documents.append(Document(" ".join(words[token] for token in [*common, *topic]), where=str(index)))
    return Corpus.of(documents, "test")


def test_auto_stops_where_the_kept_tokens_no_longer_change(tokenizer):
    totals = []
    for spread in (0, 1):
        looks = []
        settings, events = CountSettings("text", MOST, enough_for=64), CountEvents(on_look=looks.append)
        counts = calibrate(None, tokenizer, corpus(tokenizer, spread), settings, events=events)
        assert [look.is_enough for look in looks] == [False] * (len(looks) - 1) + [True]
        last, order = looks[-1], np.argsort(-counts.counts, kind="stable")[:64]
        assert last.low <= last.coverage <= last.high
        assert last.coverage == counts.held_out[order].sum() / counts.held_out.sum()
        totals.append(counts.total)
    assert 2 * totals[0] <= totals[1] < MOST


class Interrupted(Exception):
    pass


def test_auto_ends_with_the_same_file_wherever_it_was_interrupted(tokenizer, tmp_path):
    documents, settings = corpus(tokenizer, 0), CountSettings("text", MOST, enough_for=0.8)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    calibrate(None, tokenizer, documents, settings, checkpoint=whole)
    for limit in (3000, 5000, 9000, 12_000):

        def stop(done, _total, limit=limit):
            if done > limit:
                raise Interrupted

        with pytest.raises(Interrupted):
            calibrate(None, tokenizer, documents, settings, checkpoint=resumed, events=CountEvents(stop))
    calibrate(None, tokenizer, documents, settings, checkpoint=resumed)
    assert whole.read_bytes() == resumed.read_bytes()
    assert 12_000 < TokenCounts.load(whole).total < MOST
    calibrate(
        None, tokenizer, documents, settings, checkpoint=resumed, events=CountEvents(pytest.fail)
    )  # it is finished
    more = replace(settings, max_tokens=TokenCounts.load(whole).total + 7, enough_for=None)
    assert calibrate(None, tokenizer, documents, more, checkpoint=resumed).total == more.max_tokens


def test_auto_counts_all_of_a_text_up_to_a_bound(tokenizer, model, tmp_path, monkeypatch):
    """Where generations would have been enough long before: a text's tokens cost next to nothing."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [document.text.strip() for document in corpus(tokenizer, 0).documents]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    progress, notes = [], []
    listener = Listener(lambda *reported: progress.append(reported), on_note=notes.append)

    def count(name):
        settings = CalibrationSettings((str(tmp_path / "data.jsonl"),), "text")
        return calibrate_models(None, str(tmp_path / "model"), tmp_path / name, settings, listener)

    assert count("all.safetensors").total == tokens
    assert not notes
    assert [task for task, _, _ in progress] == ["calibrate"] * len(progress)
    assert all(0.9 * tokens < total < 1.1 * tokens for _, _, total in progress)
    assert progress[-1][1:] == (tokens, tokens)
    monkeypatch.setattr(counter, "MOST_OF_TEXT", tokens // 2)
    assert count("half.safetensors").total == tokens // 2
    assert notes == [
        f"{tokens // 2} tokens were counted, drawn from all of the text, and not the rest: "
        "--calibration-tokens NUMBER counts as many as you like"
    ]


def test_the_interval_is_over_documents_and_not_over_tokens():
    """Documents that are covered wholly or not at all: 40 of them say much less than their 4,000 tokens."""
    counts, evidence = np.zeros(VOCAB, np.int64), Evidence(2, VOCAB, {})
    counts[:2] = FIRST_LOOK
    evidence.add([np.full(100, document % 4) for document in range(40)])
    held_out = np.bincount(np.concatenate(evidence.held_out), minlength=VOCAB)
    assert evidence.look(counts, held_out) is None
    look = Evidence(2, VOCAB, evidence.tensors()).look(2 * counts, held_out)
    assert look.coverage == 0.5
    assert 0.25 < look.high - look.low < 0.4  # 2 · 1.96 · sqrt(0.25 / 40) = 0.31; over tokens it would be 0.03
    assert not look.is_enough
    assert "2 rows cover 50.00%" in str(look)
    few = Evidence(200, VOCAB, evidence.tensors()).look(4 * counts, held_out)
    assert "200 rows, 198 of them never counted, cover 100.00% of held-out tokens" in str(few)


def test_a_share_is_the_fewest_rows_that_cover_it():
    counts, held_out = np.array([5, 4, 3, 2]), np.array([2, 4, 2, 2])
    assert [rows_of(share, counts, held_out) for share in (0.2, 0.6, 0.61, 1.0)] == [1, 2, 3, 4]
