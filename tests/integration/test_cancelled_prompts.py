"""A long prompt that nobody waits for any more is not read to its end."""

import asyncio
import http.client
import json
import threading
import time

import pytest

from engines.ort.step import HostStep
from runtime import SpeculativeDecoder

WORDS = "the quick brown fox jumps over the lazy dog " * 9


@pytest.fixture
def reads(monkeypatch):
    """What is set when a prompt's second part of 16 tokens is read, and the number of parts so far."""
    seen, run, begun = [], HostStep.run, threading.Event()

    def slow(step, end):
        if step.input_ids.shape[1] >= 16:
            seen.append(end)
            if len(seen) == 2:
                begun.set()
            time.sleep(0.2)
        run(step, end)

    monkeypatch.setattr("engines.ort.engine.CHUNK", 16)
    monkeypatch.setattr("engines.base.MAX_KEEP", 16)
    monkeypatch.setattr(HostStep, "run", slow)
    return begun, seen


@pytest.fixture
def prompt(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        yield decoder.tokenizer.encode(WORDS)[:100]


@pytest.mark.parametrize("how", ["close", "cancel a task"])
def test_a_stream_that_is_closed_reads_no_further(pair, prompt, reads, how):
    begun, seen = reads
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        wanted = decoder.generate(prompt[:5], max_new_tokens=9).token_ids
        seen.clear()
        if how == "close":
            stream, found = decoder.stream(prompt, max_new_tokens=9), []
            thread = threading.Thread(target=lambda: found.append(list(stream)))
            thread.start()
            assert begun.wait(20)
            stream.close()
            thread.join(20)
            assert found == [[]]
        else:

            async def leave():
                task = asyncio.ensure_future(anext(decoder.stream(prompt, max_new_tokens=9)))
                await asyncio.to_thread(begun.wait, 20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            asyncio.run(leave())
        assert len(seen) <= 3  # of 7
        assert decoder.generate(prompt[:5], max_new_tokens=9).token_ids == wanted
        decoder.target.feed(prompt[5:40])  # the caller's own reading is wanted


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 1}])
def test_a_client_that_leaves_frees_its_worker(pair, prompt, reads, fields):
    helper = pytest.importorskip("tests.serving")
    begun, seen = reads
    with helper.serving(pair, workers=1) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": prompt} | fields), helper.HEADERS)
        assert begun.wait(20)
        connection.close()
        helper.wait_until_idle(served)
        assert len(seen) <= 4  # of 7
