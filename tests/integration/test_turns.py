"""Forks that generate at the same time take turns: a round has all cores, and long prompts hold nobody up."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from engines.ort.step import HostStep
from runtime import SpeculativeDecoder

PROMPTS = ["the quick brown fox", "the lazy dog", "system of tokens"]


@pytest.fixture
def forks(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        forks = [decoder.fork(), decoder.fork().fork()]
        yield [decoder, *forks]
        for fork in forks:
            fork.close()


@pytest.fixture
def runs(monkeypatch):
    """The thread of each run of a session, as it begins and as it ends; a run takes a while."""
    seen, run = [], HostStep.run

    def slow(step, end):
        seen.append(threading.get_ident())
        time.sleep(0.002)
        run(step, end)
        seen.append(threading.get_ident())

    monkeypatch.setattr(HostStep, "run", slow)
    return seen


def test_forks_compute_one_after_another_and_each_has_its_own_text(forks, runs):
    wanted = [forks[0].generate(prompt, max_new_tokens=24, chat=False).token_ids for prompt in PROMPTS]
    runs.clear()
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda fork, prompt: fork.generate(prompt, max_new_tokens=24, chat=False), forks, PROMPTS)
        assert [answer.token_ids for answer in answers] == wanted
    assert runs[::2] == runs[1::2]  # none began within another
    changes = sum(before != after for before, after in pairwise(runs[::2]))
    assert changes > 12  # they took turns


@pytest.mark.parametrize("work", ["generate", "prompt_logprobs"])
def test_rounds_of_others_come_between_the_parts_of_a_long_prompt(forks, runs, monkeypatch, work):
    monkeypatch.setattr("engines.ort.engine.CHUNK", 16)
    text = forks[0].tokenizer.encode("the quick brown fox jumps over the lazy dog " * 9)[:80]
    if work == "generate":
        wanted = forks[0].generate(text, max_new_tokens=1).token_ids
    else:
        forks[0].target.max_keep = 16
        wanted = forks[0].prompt_logprobs(text)
    with ThreadPoolExecutor(2) as pool:
        other = forks[1].stream("the", max_new_tokens=99, chat=False)
        next(other)
        runs.clear()
        rest = pool.submit(list, other)
        while len(runs) < 4:
            time.sleep(0.001)
        if work == "generate":
            found = pool.submit(lambda: forks[2].generate(text, max_new_tokens=1).token_ids)
        else:
            forks[2].target.max_keep = 16
            found = pool.submit(forks[2].prompt_logprobs, text)
        assert found.result(60) == wanted
        other.close()
        rest.result(60)
    mine = [index for index, thread in enumerate(runs[::2]) if thread != runs[0]]
    assert len(mine) == 5
    assert all(after - before > 1 for before, after in pairwise(mine))


def test_a_round_that_fails_and_a_stream_that_is_closed_hold_nobody_up(forks, monkeypatch):
    stream = forks[0].stream("the", max_new_tokens=99, chat=False)
    next(stream)
    stream.close()
    feed = forks[1].target.feed
    monkeypatch.setattr(forks[1].target, "feed", lambda *given, **more: feed([]))
    with pytest.raises(ValueError, match="cannot keep 1 of 0"):
        forks[1].generate("the", chat=False)
    texts = []
    thread = threading.Thread(
        target=lambda: texts.append(forks[2].generate("the", max_new_tokens=4, chat=False)), daemon=True
    )
    thread.start()
    thread.join(60)
    assert [text.finish_reason for text in texts] == ["length"]
