"""Many clients at once, a third of whom leave early: every text is its own. VOCABTRIM_LOAD_SECONDS=300 asks longer."""

import http.client
import json
import os
import threading
import time
from random import Random

import pytest

from runtime import SamplingParams, SpeculativeDecoder

helper = pytest.importorskip("tests.serving")
SECONDS = float(os.environ.get("VOCABTRIM_LOAD_SECONDS", "2"))
CLIENTS = 16
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "the", "system", "of", "tokens"]
MOST_GROWTH = 16 << 20  # bytes, over the second half
STORED = 1 << 18  # bytes of KV caches that no worker holds: a few texts


def make_jobs(pair, random):
    """Requests with prompts that share beginnings, of all lengths, and the texts that `generate` gives for them."""
    jobs = []
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        for _ in range(24):
            first = random.randrange(len(WORDS))
            words = (4 * WORDS)[first : first + random.randrange(1, 40)]
            prompt = " ".join([*words, *random.choices(WORDS, k=random.randrange(6))])
            sampling = random.choice([{"temperature": 0}, {"temperature": 1.0, "seed": random.randrange(99)}])
            new, params = random.randrange(1, 60), SamplingParams(**sampling)
            with decoder.fork() as fresh:
                text = fresh.generate(prompt, max_new_tokens=new, sampling=params, chat=False).text
            jobs.append(({"prompt": prompt, "max_tokens": new, "stream": True, **sampling}, text))
    return jobs


def read(port, body, most):
    """The first pieces of an answer, or all, and whether it came to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), helper.HEADERS)
        response, pieces = connection.getresponse(), []
        assert response.status == 200, response.read()
        for line in response:
            if line == b"data: [DONE]\n":
                return "".join(pieces), True
            if line.startswith(b"data: "):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if len(pieces) == most:
                    return "".join(pieces), False
        raise AssertionError("the stream broke off")
    finally:
        connection.close()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_text_is_its_own_under_load(pair):
    jobs, wrong, counts = make_jobs(pair, Random(0)), [], {True: 0, False: 0}
    with helper.serving(pair, workers=3, waiting=CLIENTS, cache_bytes=STORED) as served:
        until = time.monotonic() + SECONDS

        def client(random):
            while time.monotonic() < until and not wrong:
                body, text = random.choice(jobs)
                try:
                    answer, is_whole = read(served.port, body, random.choice([None, None, random.randrange(1, 9)]))
                    counts[is_whole] += 1
                    if answer != text if is_whole else not text.startswith(answer):
                        wrong.append((body, text, answer))
                except Exception as error:
                    wrong.append((body, repr(error)))

        threads = [threading.Thread(target=client, args=[Random(number)]) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 2)
        before = resident()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
        assert min(counts.values()) > 0
        helper.wait_until_idle(served)
        values = helper.gauges(served.url)
        assert values["vocabtrim_busy_workers"] == values["vocabtrim_waiting_requests"] == 0
        assert min(values["vocabtrim_cache_hits_total"], values["vocabtrim_cache_evictions_total"]) > 0
        assert values["vocabtrim_cache_bytes"] <= STORED
        grown = resident() - before
        print(f"{counts[True]} whole answers, {counts[False]} left early, {grown / 1e6:.1f} MB more in the second half")
        assert grown < MOST_GROWTH
