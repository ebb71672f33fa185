"""One decoder, several callers: never wrong text, and free again when a generation is over."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Thread

import pytest

from engines.errors import VocabtrimError
from runtime import SpeculativeDecoder

TOKENS = 12


@pytest.fixture
def decoder(make_target, make_drafter):
    return SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)


@pytest.fixture
def wanted(make_target):
    return lambda prompt: SpeculativeDecoder(make_target()).generate([prompt], max_new_tokens=TOKENS).token_ids


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=20)


@contextmanager
def halted(engine, at):
    """The `at`-th feed of `engine` waits until the block ends. Yields what is set when it waits."""
    feed, waits, go_on = engine.feed, Event(), Event()

    def waiting(token_ids, keep=1):
        if len(engine.fed) == at:
            waits.set()
            assert go_on.wait(20)
        return feed(token_ids, keep)

    engine.feed = waiting
    try:
        yield waits
    finally:
        go_on.set()


@pytest.mark.parametrize("second", ["generate", "stream", "another decoder", "its drafter's decoder"])
def test_while_a_generation_runs_another_thread_is_refused_at_once(decoder, make_target, wanted, second):
    others = {
        "generate": lambda: decoder.generate([5], max_new_tokens=TOKENS),
        "stream": lambda: next(decoder.stream([5], max_new_tokens=TOKENS)),
        "another decoder": lambda: SpeculativeDecoder(decoder.target).generate([5]),
        "its drafter's decoder": lambda: SpeculativeDecoder(make_target(), decoder.drafter, draft_length=4).generate(
            [5]
        ),
    }
    with ThreadPoolExecutor(1) as pool:
        with halted(decoder.target, at=2) as waits:
            first = pool.submit(decoder.generate, [3], max_new_tokens=TOKENS)
            assert waits.wait(20)
            with pytest.raises(VocabtrimError, match=r"another thread .* decoder\.fork\(\)"):
                others[second]()
        assert first.result(20).token_ids == wanted(3)
    others[second]()  # and is welcome afterwards
    assert decoder.generate([5], max_new_tokens=TOKENS).token_ids == wanted(5)


@pytest.mark.parametrize("leave", ["finish", "close", "drop", "raise"])
def test_an_open_stream_keeps_other_threads_out_until_it_is_left(decoder, wanted, leave):
    stream = decoder.stream([3], max_new_tokens=TOKENS)
    tokens = [next(stream).id for _ in range(3)]
    with pytest.raises(VocabtrimError, match="another thread"):
        in_thread(lambda: decoder.generate([5]))
    if leave == "finish":
        tokens += [token.id for token in stream]
        assert tuple(tokens) == wanted(3)
    elif leave == "close":
        stream.close()
        assert list(stream) == []
        with pytest.raises(VocabtrimError, match="was closed"):
            stream.finish()
    elif leave == "drop":
        gc.disable()  # it is freed by its last reference, not when the collector happens to run
        del stream
    else:
        decoder.target.fails_at = len(decoder.target.fed) + 1
        with pytest.raises(RuntimeError):
            list(stream)
    assert in_thread(lambda: decoder.generate([5], max_new_tokens=TOKENS)).token_ids == wanted(5)
    gc.enable()


def test_a_stream_of_a_thread_that_has_ended_keeps_nobody_out(decoder, wanted):
    streams = []
    thread = Thread(target=lambda: (streams.append(decoder.stream([3], max_new_tokens=TOKENS)), next(streams[0])))
    thread.start()
    thread.join()
    assert decoder.generate([5], max_new_tokens=TOKENS).token_ids == wanted(5)
    with pytest.raises(VocabtrimError, match="has ended this stream"):
        list(streams[0])


def test_a_stream_may_move_from_thread_to_thread(decoder, wanted):
    """Web frameworks iterate over an answer in a pool of threads."""
    stream = decoder.stream([3], max_new_tokens=TOKENS)
    assert tuple(in_thread(lambda: next(stream)).id for _ in range(TOKENS)) == wanted(3)


def test_a_closed_decoder_says_so(decoder, make_target):
    stream = decoder.stream([3], max_new_tokens=TOKENS)
    next(stream)
    decoder.close()
    decoder.close()
    for use in (lambda: decoder.generate([3]), lambda: decoder.stream([3]), decoder.fork, lambda: list(stream)):
        with pytest.raises(VocabtrimError, match="the decoder is closed"):
            use()


def test_closing_waits_for_the_round_that_runs(decoder):
    with ThreadPoolExecutor(2) as pool:
        with halted(decoder.target, at=2) as waits:
            running = pool.submit(decoder.generate, [3])
            assert waits.wait(20)
            closing = pool.submit(decoder.close)
            assert not closing.done()
            assert not decoder.target.closed
        closing.result(20)
        assert decoder.target.closed
        with pytest.raises(VocabtrimError, match="the decoder is closed"):
            running.result(20)


async def collect(decoder, prompt):
    return tuple([token.id async for token in decoder.stream([prompt], max_new_tokens=TOKENS)])


def test_async_streams_of_several_decoders_run_beside_each_other(make_target, make_drafter, wanted):
    decoders = {prompt: SpeculativeDecoder(make_target(), make_drafter(), draft_length=4) for prompt in (3, 5, 7)}

    async def serve():
        return await asyncio.gather(*(collect(decoder, prompt) for prompt, decoder in decoders.items()))

    assert asyncio.run(serve()) == [wanted(prompt) for prompt in decoders]


def test_async_streams_of_one_decoder_are_one_at_a_time(decoder, wanted):
    async def serve():
        stream = decoder.stream([3], max_new_tokens=TOKENS)
        tokens = [(await anext(stream)).id]
        with pytest.raises(VocabtrimError, match="asyncio task"):
            await collect(decoder, 5)
        tokens += [token.id async for token in stream]
        result = stream.finish()  # nothing is left to do
        return tuple(tokens), result.token_ids, await collect(decoder, 5)

    assert asyncio.run(serve()) == (wanted(3), wanted(3), wanted(5))


def test_an_async_stream_that_is_broken_off_frees_the_decoder(decoder, wanted):
    async def serve():
        async for _ in decoder.stream([3], max_new_tokens=TOKENS):
            break
        return await collect(decoder, 5)

    assert asyncio.run(serve()) == wanted(5)


def test_a_cancelled_async_stream_frees_the_decoder(decoder, wanted):
    """Cancelled within a round: the event loop goes on, the round ends, and the next text is right."""

    async def serve():
        task = asyncio.create_task(collect(decoder, 3))
        with halted(decoder.target, at=2) as waits:
            while not waits.is_set():
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        fed = len(decoder.target.fed)
        assert fed == 3  # the round that ran, and none after it
        return await collect(decoder, 5)

    assert asyncio.run(serve()) == wanted(5)
