"""The store of KV caches saves, loads and drops them, on engines that notice every token that they should not hold."""

import threading
from random import Random

import pytest

from runtime import SamplingParams, SpeculativeDecoder
from tests.runtime.conftest import make_drafter, make_target
from tests.runtime.test_loop import plain_greedy

CacheStore = pytest.importorskip("vocabtrim_export.serve.cache_store").CacheStore
A, B, C = ([Random(seed).randrange(2, 46) for _ in range(50)] for seed in (1, 2, 3))
GREEDY, SEEDED = SamplingParams(), SamplingParams(1.0, seed=5)


def make_decoder():
    return SpeculativeDecoder(make_target(), make_drafter(None, 0.5), draft_length=3)


def ask(store, decoder, prompt, sampling=GREEDY):
    """The text of an answer as a server makes it, and how many tokens of the prompt were fed."""
    store.prepare(decoder, prompt, not sampling.must_repeat_itself)
    decoder.target.fed.clear()
    result = decoder.generate(prompt, max_new_tokens=8, sampling=sampling)
    if sampling.is_greedy:
        assert list(result.token_ids) == plain_greedy(decoder.target, prompt, 8)
    assert store.bytes <= store.most_bytes
    return [*prompt, *result.token_ids], decoder.target.fed[0]


def test_a_second_turn_goes_on_after_another_conversation():
    store, decoder = CacheStore(1 << 20), make_decoder()
    text, _ = ask(store, decoder, A)
    ask(store, decoder, B)
    second, fed = ask(store, decoder, [*text, 7, 8, 9])
    assert fed == 4  # what is new, and the last token of the answer, which was not fed
    assert store.hits == 1
    third, fed = ask(store, decoder, [*second, 11])  # the worker has it still: nothing is copied
    assert (fed, store.hits, store.bytes) == (2, 1, pytest.approx(2 * 24 * 58, abs=100))
    seeded, fed = ask(store, decoder, [*third, 12], SEEDED)
    assert fed == len(third) + 1
    assert seeded == [*third, 12, *make_decoder().generate([*third, 12], max_new_tokens=8, sampling=SEEDED).token_ids]
    ask(store, decoder, [*B, 3], SEEDED)  # which loads nothing, but saves
    assert store.hits == 1
    _, fed = ask(store, decoder, [*third, 12, 13])
    assert (fed, store.hits) == (1, 2)


def test_a_new_conversation_starts_from_the_beginning_that_another_has():
    store, decoder = CacheStore(1 << 20), make_decoder()
    ask(store, decoder, A)
    ask(store, decoder, B)
    _, fed = ask(store, decoder, [*A[:40], *C[:5]])
    assert (fed, store.hits) == (5, 1)
    _, fed = ask(store, make_decoder(), [*B[:45], 9, 10])  # of a worker that has read nothing yet
    assert (fed, store.hits) == (2, 2)
    _, fed = ask(store, make_decoder(), A)  # the last token is fed for what it predicts
    assert (fed, store.hits) == (1, 3)


def test_the_least_recently_used_copies_make_room():
    one = CacheStore(1 << 20)
    decoder = make_decoder()
    ask(one, decoder, A)
    ask(one, decoder, B)
    size = one.bytes
    store, decoder = CacheStore(2 * size + 100), make_decoder()
    for prompt in (A, B, C, [2, *A], [3, *A]):  # each displaces the one before
        ask(store, decoder, prompt)
    assert (store.evictions, store.hits) == (2, 0)
    assert [store.longest_prefix(prompt) > 40 for prompt in (A, B, C, [2, *A])] == [False, False, True, True]
    ask(store, decoder, [*C, 5])  # C is used, so the other one makes room for [3, *A]
    assert [store.longest_prefix(prompt) > 40 for prompt in (C, [2, *A], [3, *A])] == [True, False, True]
    for most in (0, size - 1):  # nothing fits
        store, decoder = CacheStore(most), make_decoder()
        text, _ = ask(store, decoder, A)
        ask(store, decoder, B)
        _, fed = ask(store, decoder, [*text, 7])
        assert (fed, store.hits, store.bytes, store.evictions) == (len(text) + 1, 0, 0, 0)


def test_a_copy_that_is_being_made_counts(monkeypatch):
    store, decoder, seen = CacheStore(1 << 20), make_decoder(), []
    ask(store, decoder, A)
    size, snapshot = decoder.snapshot_bytes, decoder.snapshot
    monkeypatch.setattr(decoder, "snapshot", lambda: seen.append(store.bytes) or snapshot())
    store.prepare(decoder, B, keeps_prefix=True)
    assert seen == [store.bytes] == [size]


def test_what_is_short_known_or_continued_is_not_copied_again():
    store, decoder = CacheStore(1 << 20), make_decoder()
    ask(store, decoder, A[:20])
    text, _ = ask(store, decoder, A)
    assert store.bytes == 0  # 28 tokens are read again as soon
    ask(store, decoder, B)
    ask(store, decoder, [*text, 7, 8, 9])
    ask(store, decoder, B)
    assert store.bytes == pytest.approx(24 * (68 + 57), abs=100)  # A's second turn in place of its first, and B


def test_workers_threads_share_a_store():
    store = CacheStore(4000)  # of three texts
    prompts = [[number, *random.choices(range(2, 46), k=49)] for number, random in enumerate(map(Random, range(8)), 2)]
    failures = []

    def work(seed):
        random, decoder = Random(seed), make_decoder()
        try:
            for _ in range(30):
                prompt = random.choice(prompts)
                ask(store, decoder, [*prompt, *plain_greedy(decoder.target, prompt, random.choice([0, 4, 8])), 7])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.hits > 0
    assert store.evictions > 0
