"""A server under load: is every text that of `generate`, does everything come back, how soon, and how fast?

    python benchmarks/serve_load.py --target DIR --drafter DIR --prompts FILE.jsonl… --output FILE.json
        [--clients 1 2 4 8 16] [--seconds 30] [--slots 2]
    python benchmarks/serve_load.py … --llama-server PROGRAM --model FILE.gguf

At each level so many clients ask one question after another, streamed and greedy, with prompts and lengths drawn at
random from JOBS pairs whose texts `generate` gave before; a third of the answers is left after a few pieces. All levels
draw the same sequence, which the clients of a level share: texts differ in how fast they come. Each text, or what was
read of it, must be `generate`'s. After each level the server's gauges must be zero; its memory, the CPU time that it
took and the tokens that it counted are noted.
Before, one client has a conversation of two turns, the first of which has LONG_TEXT tokens.
With --llama-server the same clients ask llama.cpp's server instead, whose texts are not compared; its levels are added
to FILE.json. Exits with 1 where a text differs, an answer fails or a slot does not come back.
"""

import argparse
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from serve_load_servers import Served, held, llama_server, our_server, versions

from runtime import SpeculativeDecoder
from runtime.measure.environment import environment
from runtime.stats import Percentiles

JOBS, LONGEST_PROMPT, LONG_TEXT = 16, 600, 1500
COUNTED = tuple(f"{name}_total" for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "rounds"))


@dataclass(frozen=True, slots=True)
class Job:
    """A question, how long its answer may be, and the answer."""

    prompt: str
    new_tokens: int
    text: str


@dataclass(slots=True)
class Tally:
    """Results of all clients at one level of load."""

    answers: int = 0
    left_early: int = 0
    characters: int = 0
    failures: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)


class Draws:
    """Questions, and after how many pieces their answers are left: one sequence, whichever client asks next."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._random, self._lock = jobs, Random(0), threading.Lock()

    def draw(self) -> tuple[Job, int | None]:
        with self._lock:
            job = self._random.choice(self._jobs)
            return job, self._random.randint(1, 6) if self._random.random() < 1 / 3 else None


def make_jobs(options: argparse.Namespace) -> tuple[list[Job], str]:
    """Draw the questions and let `generate` answer them; and make a text of LONG_TEXT tokens."""
    random = Random(0)
    records = [json.loads(line) for file in options.prompts for line in file.read_text("utf-8").splitlines()]
    prompts = [record.get("prompt") or record["turns"][0] for record in records]
    with SpeculativeDecoder.load(options.target, options.drafter) as decoder:
        fitting = [prompt for prompt in prompts if len(decoder.encode(prompt)) <= LONGEST_PROMPT]
        jobs = []
        for index, prompt in enumerate(random.sample(fitting, min(JOBS, len(fitting)))):
            new_tokens = options.new_tokens[index % len(options.new_tokens)]
            with decoder.fork() as fresh:
                jobs.append(Job(prompt, new_tokens, fresh.generate(prompt, max_new_tokens=new_tokens).text))
        assert decoder.tokenizer
        long = decoder.tokenizer.encode("\n\n".join(prompts[::-1]))[:LONG_TEXT]
        return jobs, decoder.tokenizer.decode(long)


def pieces(connection: http.client.HTTPConnection, messages: list[dict[str, str]], new_tokens: int) -> Iterator[str]:
    """Ask, and yield the text as it comes."""
    body = {"messages": messages, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data: "):
            event = json.loads(data)
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                yield text
    raise ValueError("the stream ended before its end")


def ask(served: Served, job: Job, leave_after: int | None, tally: Tally) -> None:
    """Read an answer, or its first pieces, and compare what was read."""
    began, read = time.perf_counter(), list[str]()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=300)
    try:
        for piece in pieces(connection, [{"role": "user", "content": job.prompt}], job.new_tokens):
            if not read:
                tally.first_token_seconds.append(time.perf_counter() - began)
            read.append(piece)
            tally.characters += len(piece)
            if len(read) == leave_after:
                break
    except (ValueError, OSError, http.client.HTTPException) as error:
        tally.failures.append(repr(error))
        return
    finally:
        connection.close()
    text, is_whole = "".join(read), len(read) != leave_after
    tally.answers += is_whole
    tally.left_early += not is_whole
    if served.is_ours and (text != job.text if is_whole else not job.text.startswith(text)):
        tally.differing.append(f"{job.prompt[:60]!r}: {text[-60:]!r}")


def run_level(served: Served, jobs: Sequence[Job], clients: int, seconds: float) -> dict[str, Any]:
    """Let so many clients ask for a while, and return what they saw."""
    draws, tallies = Draws(jobs), [Tally() for _ in range(clients)]
    before, memory, cpu = served.figures(), served.resident_mb, served.cpu_seconds
    began = time.perf_counter()

    def client(tally: Tally) -> None:
        while time.perf_counter() - began < seconds:
            ask(served, *draws.draw(), tally)

    threads = [threading.Thread(target=client, args=[tally]) for tally in tallies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    cpu_seconds, after = served.cpu_seconds - cpu, served.figures_afterwards()
    first = Percentiles.of(value for tally in tallies for value in tally.first_token_seconds)
    return {
        "clients": clients,
        "seconds": took,
        "answers": sum(tally.answers for tally in tallies),
        "left_early": sum(tally.left_early for tally in tallies),
        "failures": [failure for tally in tallies for failure in tally.failures],
        "differing": [text for tally in tallies for text in tally.differing],
        "characters_per_second": sum(tally.characters for tally in tallies) / took,
        "first_token_seconds": asdict(first) if first else None,
        "cpu_seconds": cpu_seconds,
        "resident_mb": [memory, served.resident_mb],
        "busy_or_waiting_afterwards": held(after) if served.is_ours else None,
        "counted": {name: after[name] - before[name] for name in COUNTED if name in after},
        "load_average": os.getloadavg()[0],  # far above the cores: others computed too, and times mean little
    }


def first_tokens_of_turns(served: Served, text: str) -> list[float]:
    """Returns the seconds to the first token of the two turns of a conversation that begins with `text`."""
    messages, seconds = [{"role": "user", "content": text}], []
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=300)
        began = time.perf_counter()
        answer = pieces(connection, messages, 16)
        first = next(answer)
        seconds.append(time.perf_counter() - began)
        messages += [{"role": "assistant", "content": first + "".join(answer)}]
        messages += [{"role": "user", "content": "What else? Answer in a few words."}]
        connection.close()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM")
    parser.add_argument("--model", type=Path, metavar="FILE.gguf")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    jobs, long_text = make_jobs(options)
    name, start = ("llama.cpp server", llama_server) if options.llama_server else ("vocabtrim serve", our_server)
    results: dict[str, Any] = {"servers": {}}
    if options.output.exists():
        results = json.loads(options.output.read_text())
    results |= {
        "jobs": len(jobs),
        "slots": options.slots,
        "tokens_of_first_turn": LONG_TEXT,
        "environment": environment(),
    }
    with start(options) as served:
        run_level(served, jobs, 1, 5)  # the first answers find no warm memory
        turns = first_tokens_of_turns(served, long_text)
        levels = [run_level(served, jobs, clients, options.seconds) for clients in options.clients]
    results["servers"][name] = {
        "versions": versions(options.llama_server),
        "first_token_seconds_of_turns": turns,
        "levels": levels,
    }
    print(name, turns)
    for level in levels:
        print(json.dumps(level), flush=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(each["failures"] or each["differing"] or each["busy_or_waiting_afterwards"] for each in levels))


if __name__ == "__main__":
    sys.exit(main())
