"""Token counts: saved whole or not at all, added with care, resumed to the same end."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.chat_template import ChatOptions
from engines.errors import VocabtrimError
from vocabtrim_export.calibration import (
    BatchLimits,
    CalibrationRun,
    Corpus,
    CountEvents,
    CountSettings,
    Document,
    Message,
    TokenCounts,
    batches,
    calibrate,
    generate,
    read_corpus,
)
from vocabtrim_export.calibration.counts import is_held_out

RUN = CalibrationRun("target", "corpus-digest", seed=0, tokens=6, documents_done=3)
LIMITS = BatchLimits(batch_size=4, max_prompt_tokens=12, max_new_tokens=10)


def counts(*values, held_out=None, tokenizer="tokenizer-digest", run=RUN):
    array = np.array(values, np.int64)
    return TokenCounts(array, np.zeros_like(array) if held_out is None else np.array(held_out), tokenizer, (run,))


def same(left, right):
    return (left.digest, left.runs, left.total) == (right.digest, right.runs, right.total)


def test_a_saved_file_loads_as_it_was(tmp_path):
    before = counts(1, 0, 5, held_out=[0, 2, 0])
    before.save(tmp_path / "counts.safetensors")
    assert same(TokenCounts.load(tmp_path / "counts.safetensors"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.safetensors"]
    assert before.describe()["tokens"] == 8


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "counts.safetensors"
    counts(1, 2).save(path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(VocabtrimError, match="No space left on device"):
        counts(3, 4).save(path)
    assert same(TokenCounts.load(path), counts(1, 2))
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"counts": np.zeros(3, np.int64)}, tmp_path / "other")
    for name in ("text", "other", "missing"):
        with pytest.raises(VocabtrimError, match=name):
            TokenCounts.load(tmp_path / name)


def test_counts_of_one_tokenizer_add_up_and_others_do_not():
    one, two = counts(1, 2), counts(0, 3, held_out=[4, 0], run=replace(RUN, seed=1, source="text"))
    total = one + two
    assert total.counts.tolist() == [1, 5]
    assert total.held_out.tolist() == [4, 0]
    assert (total.source, total.total) == ("target+text", 10)
    with pytest.raises(VocabtrimError, match="same calibration"):
        total + two
    for other in (counts(1, 2, 3), counts(1, 2, tokenizer="other")):
        with pytest.raises(VocabtrimError, match="different tokenizers"):
            one + other


def test_counts_fit_a_head_padded_otherwise():
    assert counts(1, 2).resized(4).counts.tolist() == [1, 2, 0, 0]
    assert counts(1, 2, 0).resized(2).counts.tolist() == [1, 2]
    with pytest.raises(VocabtrimError, match="a head of 1 rows"):
        counts(1, 2).resized(1)


def test_an_eighth_is_held_out_and_of_few_documents_one():
    assert [index for index in range(24) if is_held_out(index, 24)] == [7, 15, 23]
    assert [index for index in range(3) if is_held_out(index, 3)] == [2]
    assert not is_held_out(0, 1)


def corpus(number):
    return Corpus.of([Document(f"the fox {index} " + "jumps over " * (index % 7)) for index in range(number)], "test")


class Interrupted(Exception):
    pass


def interrupted_at(tokens):
    def progress(done, total):
        if done >= tokens:
            raise Interrupted

    return CountEvents(progress)


@pytest.mark.parametrize("source", ["target", "text"])
def test_a_resumed_calibration_ends_as_an_uninterrupted_one(tmp_path, model, tokenizer, monkeypatch, source):
    monkeypatch.setattr(batches, "TEXT_BATCH", 32)
    path = tmp_path / "checkpoint"
    settings = CountSettings(source, max_tokens=900, seed=3, limits=LIMITS)
    documents = corpus(20 if source == "target" else 100)  # the model goes round more than once
    whole = calibrate(model, tokenizer, documents, settings)
    with pytest.raises(Interrupted):
        calibrate(model, tokenizer, documents, settings, checkpoint=path, events=interrupted_at(100))
    begun = TokenCounts.load(path)
    assert 0 < begun.total < whole.total
    assert same(calibrate(model, tokenizer, documents, settings, checkpoint=path), whole)
    assert whole.runs[0].documents_done > 20
    assert whole.runs[0].tokens == whole.total == 900
    assert whole.held_out.sum() > 0
    # A finished one returns at once.
    assert same(
        calibrate(model, tokenizer, documents, settings, checkpoint=path, events=CountEvents(pytest.fail)), whole
    )


KILLED = """
import os, sys
from pathlib import Path
from tests.vocabtrim_export.test_counts import KILLED_SETTINGS, corpus
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabtrim_export.calibration import CountEvents, calibrate, generate

where, path, deaths = sys.argv[1], Path(sys.argv[2]), iter(map(int, sys.argv[3:]))
model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
generate._PREFILL_TOKENS = 8
calls = 0


def progress(done, total):
    global calls
    calls += 1
    if calls in (1, death):
        print(done, flush=True)
    if calls == death:
        os.kill(os.getpid(), 9)


events = CountEvents(progress)
for death in deaths:  # the last one never comes: every process before is a fork that dies
    if death and (child := os.fork()):
        assert os.waitpid(child, 0)[1] == 9
        continue
    calibrate(model, tokenizer, corpus(9), KILLED_SETTINGS, checkpoint=path, save_seconds=0, events=events)
"""
KILLED_SETTINGS = CountSettings("target", max_tokens=300, seed=3, limits=LIMITS)


def test_a_run_killed_in_the_middle_of_a_batch_ends_with_the_same_file(tmp_path, model, tokenizer, monkeypatch):
    """Killed with -9 five times: while prompts are read, thrice within batches, and while the next prompts are read."""
    monkeypatch.setattr(generate, "_PREFILL_TOKENS", 8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = tmp_path / "whole", tmp_path / "killed" / "counts"
    files[1].parent.mkdir()
    calibrate(model, tokenizer, corpus(9), KILLED_SETTINGS, checkpoint=files[0])
    run = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(files[1]), *["3", "5", "8", "6", "19", "0"]]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    begun = list(map(int, done.stdout.split()))  # tokens at the first step of each run, and at its death
    assert begun[2::2] == begun[1::2]  # each goes on with the step that the one before it died in
    assert len(set(begun[1::2])) > 3
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in files[1].parent.iterdir()] == ["counts"]


@pytest.mark.parametrize("source", ["target", "text"])
def test_a_limit_that_is_raised_goes_on_within_the_document_it_cut(tmp_path, model, tokenizer, source):
    path, documents = tmp_path / "checkpoint", corpus(60)
    settings = CountSettings(source, max_tokens=137, seed=3, limits=LIMITS)
    whole = calibrate(model, tokenizer, documents, settings)
    for limit in (1, 2, 50, 51, 137):
        found = calibrate(model, tokenizer, documents, replace(settings, max_tokens=limit), checkpoint=path)
        assert found.total == found.runs[0].tokens == limit
    assert same(found, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chat": ChatOptions(template_args={"enable_thinking": False})}, "chat template"),
        ({"seed": 4}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"source": "drafter"}, "source"),
        ({"model_digest": "other"}, "model"),
        ({"limits": replace(LIMITS, max_new_tokens=11)}, "max new tokens"),
        ({"corpus": corpus(9)}, "text"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, model, tokenizer, change, named):
    settings, path = CountSettings("target", max_tokens=5, limits=LIMITS), tmp_path / "c"
    calibrate(model, tokenizer, corpus(8), settings, checkpoint=path)
    documents = change.pop("corpus", corpus(8))
    with pytest.raises(VocabtrimError, match=f"calibrated with another {named}: remove it"):
        calibrate(model, tokenizer, documents, replace(settings, **change), checkpoint=path)


def test_a_checkpoint_that_is_none_is_refused_with_what_to_do(tmp_path, tokenizer):
    (tmp_path / "text").write_text("no counts")
    (tmp_path / "directory").mkdir()
    for name, message in ("text", "is not a file of token counts"), ("directory", "is a directory"):
        with pytest.raises(VocabtrimError, match=f"{name} {message}.*: name another file to write, or remove this one"):
            calibrate(None, tokenizer, corpus(8), CountSettings("text", 5), checkpoint=tmp_path / name)


def test_text_counts_its_tokens_in_one_pass(tokenizer):
    found = calibrate(None, tokenizer, corpus(10), CountSettings("text", max_tokens=10**6))
    expected = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in corpus(10).documents]
    assert found.total == sum(map(len, expected))
    assert found.held_out.tolist() == np.bincount(expected[7], minlength=len(tokenizer)).tolist()


def test_recorded_traffic_without_a_response_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"request": {"prompt": "x"}, "response": {"error": "busy"}}\n"fox"\n')
    (skipped,) = read_corpus([tmp_path / "log.jsonl"]).skipped
    assert skipped.where.endswith("line 1")
    assert "needs `choices`" in skipped.reason


def test_a_prompt_that_the_model_cannot_take_is_left_out_and_named(model, tokenizer, monkeypatch):
    strict = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    chats = [Document("", (Message("user", text),), f"file, line {text}") for text in ("fox", "no", "dog")]
    skipped = []
    settings, events = CountSettings("target", max_tokens=60, limits=LIMITS), CountEvents(on_skip=skipped.append)
    assert calibrate(model, tokenizer, Corpus.of(chats, "test"), settings, events=events).total == 60
    assert [each.where for each in skipped] == ["file, line no"]  # once, though it comes round again
    with pytest.raises(VocabtrimError, match=r"counted no token: 1 record was skipped: file, line no: .* not this"):
        calibrate(model, tokenizer, Corpus.of(chats[1:2], "test"), settings)


def test_settings_that_cannot_work_are_refused(model, tokenizer):
    for change, message in [
        ({"model": None, "source": "drafter"}, "needs the drafter model"),
        ({"source": "web"}, "unknown calibration source 'web'"),
        ({"max_tokens": 0}, "must be positive"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"corpus": Corpus.of([], "nothing")}, "counted no token"),
    ]:
        asked = {"model": model, "corpus": corpus(2), "source": "target", "max_tokens": 5, **change}
        with pytest.raises(VocabtrimError, match=message):
            calibrate(asked.pop("model"), tokenizer, asked.pop("corpus"), CountSettings(**asked))


def test_counts_that_were_changed_are_refused(tmp_path):
    path = tmp_path / "counts.safetensors"
    counts(1, 2).save(path)
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the lowest byte of the last number
    path.write_bytes(data)
    with pytest.raises(VocabtrimError, match="does not match its own digest"):
        TokenCounts.load(path)


def test_counts_of_the_first_format_are_still_read(tmp_path):
    from safetensors.numpy import save_file

    metadata = {"format": "vocabtrim-token-counts-1", "tokenizer_digest": "tokenizer-digest", "runs": "[]"}
    save_file({"counts": np.array([1, 2]), "held_out": np.array([0, 1])}, tmp_path / "old", metadata)
    assert TokenCounts.load(tmp_path / "old").total == 4


def test_counts_of_a_run_with_fewer_fields_are_still_read(tmp_path, monkeypatch):
    path = tmp_path / "counts.safetensors"
    fewer = asdict(RUN)
    del fewer["chat"], fewer["next_done"]
    monkeypatch.setattr("vocabtrim_export.calibration.counts.asdict", lambda _run: fewer)
    counts(1, 5).save(path)
    monkeypatch.undo()
    assert same(TokenCounts.load(path), counts(1, 5))
