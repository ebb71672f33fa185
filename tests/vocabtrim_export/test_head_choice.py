"""`--k auto`: what is replayed, and what is chosen."""

import numpy as np
import pytest

from engines.errors import VocabtrimError
from tests.runtime.conftest import make_drafter, make_target
from vocabtrim_export.calibration import Corpus, Document
from vocabtrim_export.calibration.counting import CalibrationInput
from vocabtrim_export.calibration.domains import Domain
from vocabtrim_export.head_choice.choose import choose
from vocabtrim_export.head_choice.replay import NEVER_KEPT, Text, preferred, right_tokens, rounds_of
from vocabtrim_export.head_choice.steps import StepTimes, measure_steps
from vocabtrim_export.head_choice.texts import held_out_places

VOCAB = 40


def make_text(seed, domain="a", tokens=60, prompt=8):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, VOCAB)).astype(np.float32)
    right = np.where(rng.random(tokens) < 0.7, logits.argmax(1), rng.integers(VOCAB, size=tokens))
    return Text(domain, rng.integers(VOCAB, size=prompt).tolist(), right, preferred(logits, right)), logits


@pytest.mark.parametrize("k", [8, 24, VOCAB])
@pytest.mark.parametrize("slots", [0, 1, 5])
def test_a_replay_is_the_arg_max_over_what_the_head_and_the_slots_hold(k, slots):
    text, logits = make_text(k + slots)
    row_of = np.random.default_rng(1).permutation(VOCAB)
    wanted, recent = [], []
    for token in text.prompt:
        recent = [*(each for each in recent if each != token), token] if row_of[token] >= k else recent
    for row, token in zip(logits, text.tokens.tolist(), strict=True):
        recent = recent[-slots:] if slots else []
        allowed = np.array([row_of[i] < k or i in recent for i in range(VOCAB)])
        wanted.append(np.where(allowed, row, -np.inf).argmax() == token)
        recent = [*(each for each in recent if each != token), token] if row_of[token] >= k else recent
    assert right_tokens(text, row_of, k, slots).tolist() == wanted


def test_a_token_that_no_head_keeps_takes_no_slot():
    text = Text("a", [7], np.array([7, 7]), [np.empty(0, np.int64)] * 2)
    row_of = np.full(8, NEVER_KEPT)
    assert not right_tokens(text, row_of, 4, 2).any()


def test_of_equal_logits_the_smaller_id_is_preferred():
    logits = np.zeros((2, 4), np.float32)
    above = preferred(logits, np.array([2, 0]))
    assert [ids.tolist() for ids in above] == [[0, 1], []]


def test_what_the_drafter_may_never_propose_is_wrong():
    logits = np.array([[0, -np.inf]], np.float32)
    assert preferred(logits, np.array([1])) == [None]


def test_rounds():
    right = np.array([1, 1, 0, 1, 1, 1, 1], bool)
    assert [rounds_of(right, length) for length in (1, 2, 4)] == [4, 3, 2]


TIMES = StepTimes({1: 1.0, 5: 1.05, 17: 1.2}, draft_step=0.1, step_bytes=1000, row_bytes=0.01, slot_bytes=0.01)


def seen(tokens, domain="a", prompt=(0,)):
    """A text whose every token the full drafter proposes."""
    return Text(domain, prompt, np.array(tokens), [np.empty(0, np.int64)] * len(tokens))


def test_the_smallest_head_that_loses_nothing_is_chosen():
    rows = 40_000
    choice = choose([seen([5, 6, 7] * 20), seen([4000, 5000] * 30, "b")], np.arange(rows), TIMES, rows, (0,))
    assert (choice.best.k, choice.best.slots) == (8192, 0)
    assert choice.best.speedup > choice.full.speedup > 1
    assert choice.reasons()[0].startswith("--k auto chose 8192 rows: expected")


def test_slots_give_a_repeated_token_back():
    rows = 40_000
    choice = choose([seen([39_000, 39_001] * 40, prompt=(39_001, 39_000))], np.arange(rows), TIMES, rows, (0, 512))
    assert (choice.best.k, choice.best.slots) == (2048, 512)


def test_the_full_head_stays_where_a_trim_costs_one_domain_too_much():
    """Every ninth token of one file is rare: each trim is faster on the mean of all files, and slower on that one."""
    rows = 40_000
    easy = [seen([5, 6, 7] * 50, name) for name in ("a", "b", "c")]
    spread = seen([token for i in range(20) for token in [5] * 8 + [39_000 - 50 * i]], "spread")
    choice = choose([*easy, spread], np.arange(rows), TIMES, rows, (0, 512))
    assert choice.candidates[0].speedup > choice.full.speedup
    assert choice.best == choice.full
    assert "no trim is faster" in choice.reasons()[0]


def test_a_drafter_that_is_never_right_is_expected_to_draft_nothing():
    never = Text("a", [0], np.array([1] * 20), [None] * 20)
    choice = choose([never], np.arange(3000), TIMES, 3000, (0,))
    assert choice.best.domains[0].draft_length == 0
    assert "a: speculation does not pay" in choice.reasons()[1]
    assert choice.best.speedup == 1


def test_steps_are_timed_on_a_text():
    """Which experts a verification reads depends on its tokens; a text that is short is repeated."""
    target, drafter = make_target(), make_drafter()
    text = list(range(3, 28))
    assert set(measure_steps(target, drafter, 8, text).verify) == {1, 2, 3, 4, 5, 7, 9, 13, 17}
    assert (target.tokens, drafter.tokens) == ([*text, *text[:8]], text[:17])


def corpus_of(*files):
    """Sixteen documents of each file, two of which are held out."""
    return Corpus.of([Document(f"{file} {i}", where=f"{file}, line {i}") for file in files for i in range(16)], "tree")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (CalibrationInput(corpus=corpus_of("a.txt", "b.txt")), {"a.txt": 2, "b.txt": 2}),
        (CalibrationInput(corpus=corpus_of(*(f"{i}.py" for i in range(9)))), {"tree": 18}),
        (
            CalibrationInput(domains=(Domain("code", 1, corpus_of("a.py", "b.py")), Domain("chat", 1, corpus_of("c")))),
            {"code": 4, "chat": 2},
        ),
    ],
)
def test_held_out_texts_belong_to_the_domains_that_the_user_named_or_to_files(data, wanted):
    places = held_out_places(data)
    assert {domain: len(each) for domain, each in places.items()} == wanted
    assert all(int(documents[i].text.split()[-1]) % 8 == 7 for each in places.values() for documents, i in each)


def test_an_export_chooses_writes_and_says_why(random_model, tmp_path):
    from engines import load_engine
    from vocabtrim_export import CalibrationSettings, ExportSettings, export

    model = str(random_model("llama"))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("one.txt", "two.txt"):
        (data / name).write_text("\n\n".join(f"the {name} number {i} " * 60 for i in range(20)), "utf-8")
    calibration = CalibrationSettings((data,), "text", 2000)
    result = export(
        model, model, tmp_path / "out", ExportSettings("auto", quantize_drafter="int8", calibration=calibration)
    )
    chosen = [note for note in result.notes if note.startswith("--k auto chose")]
    assert len(chosen) == 1
    assert any(note.startswith("one.txt: ") for note in result.notes)
    with load_engine(result.target), load_engine(result.drafter) as drafter:
        assert drafter.manifest.head_rows == len(result.selection.vocab_map)
    assert not list((tmp_path / "out").glob("*full*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "needs --target"),
        ({"counts": True}, "token counts hold none"),
        ({"dtype": "bf16"}, "measures steps on the CPU"),
        ({"one": True}, "held-out documents"),
    ],
)
def test_what_auto_cannot_do_is_said(random_model, count_file, tmp_path, options, message):
    from vocabtrim_export import CalibrationSettings, ExportSettings, export

    model = str(random_model("llama"))
    text = tmp_path / "one.txt"
    text.write_text("a few words", "utf-8")
    data = count_file(random_model("llama")) if options.get("counts") else text
    calibration = CalibrationSettings((data,)) if options.get("counts") else CalibrationSettings((data,), "text", 100)
    settings = ExportSettings("auto", dtype=options.get("dtype"), calibration=calibration)
    with pytest.raises(VocabtrimError, match=message):
        export(model, options.get("target", model), tmp_path / "out", settings)
    assert not (tmp_path / "out" / "drafter").exists()
