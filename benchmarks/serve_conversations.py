"""More conversations than workers: how soon does a second turn begin, with and without stored KV caches?

    python benchmarks/serve_conversations.py --target DIR --drafter DIR --prompts FILE.jsonl… --output FILE.json
        [--conversations 8] [--slots 2]

Conversations of 500 to 1,500 tokens have a turn each, and then a second one, in the same order, one request after
another, so that every worker has held others' texts meanwhile. All answers are greedy; those of the servers with and
without a store must be equal. At last the copies themselves are timed, for the longest text.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from serve_load import pieces
from serve_load_servers import Served

from runtime import SpeculativeDecoder
from runtime.measure.environment import environment

SHORTEST, LONGEST, NEW_TOKENS, REPEATS = 500, 1500, 16, 7


def first_turns(options: argparse.Namespace) -> list[str]:
    """Returns texts of SHORTEST to LONGEST tokens, no two of which begin alike."""
    records = [json.loads(line) for file in options.prompts for line in file.read_text("utf-8").splitlines()]
    prompts = [record.get("prompt") or record["turns"][0] for record in records]
    Random(0).shuffle(prompts)
    with SpeculativeDecoder.load(options.target) as decoder:
        assert decoder.tokenizer
        ids = decoder.tokenizer.encode("\n\n".join(prompts))
        texts, step = [], (LONGEST - SHORTEST) // max(1, options.conversations - 1)
        for number in range(options.conversations):
            length = SHORTEST + number * step
            ids, begin = ids[length:], ids[:length]
            assert len(begin) == length, "the prompts are too few"
            texts.append(f"{number}. {decoder.tokenizer.decode(begin)}")
        return texts


def turns(options: argparse.Namespace, texts: list[str], memory: str) -> dict[str, Any]:
    """Let all conversations have two turns, and return the seconds to each first token, and the server's figures."""
    command = [sys.executable, "-m", "vocabtrim_export.cli.main", "serve", "--port", "0", "--cache-memory", memory]
    command += ["--target", str(options.target), "--slots-in-parallel", str(options.slots)]
    command += ["--drafter", str(options.drafter)] if options.drafter else []
    conversations = [[{"role": "user", "content": text}] for text in texts]
    seconds: list[list[float]] = []
    answers = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        port = int(process.stderr.readline().rsplit(":", 1)[1].split("/")[0])
        try:
            for _ in range(2):
                seconds.append([])
                for messages in conversations:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
                    began = time.perf_counter()
                    read = pieces(connection, messages, NEW_TOKENS)
                    first = next(read)
                    seconds[-1].append(time.perf_counter() - began)
                    answers.append(first + "".join(read))
                    messages += [{"role": "assistant", "content": answers[-1]}]
                    messages += [{"role": "user", "content": "What else? Answer in a few words."}]
                    connection.close()
            figures = gauges(port) | {"resident_mb": Served(port, process, is_ours=True).resident_mb}
        finally:
            process.terminate()
    return {"first_token_seconds": seconds, "answers": answers, "figures": figures}


def gauges(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = [line.rsplit(" ", 1) for line in connection.getresponse().read().decode().splitlines()]
    connection.close()
    return {name: float(value) for name, value in lines if name.startswith("vocabtrim_cache_")}


def copies(options: argparse.Namespace, text: str) -> dict[str, Any]:
    """Time a snapshot of a text, and its way back; and reading the text."""
    with SpeculativeDecoder.load(options.target, options.drafter) as decoder:
        began = time.perf_counter()
        decoder.generate(text, max_new_tokens=1)
        reading = time.perf_counter() - began
        snapshot = decoder.snapshot()
        assert snapshot
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            decoder.snapshot()
            between = time.perf_counter()
            decoder.restore(snapshot)
            seconds.append((between - began, time.perf_counter() - between))
        return {
            "tokens": snapshot.target.length,
            "bytes": snapshot.nbytes,
            "seconds_to_read": reading,
            "seconds_to_save": statistics.median(each[0] for each in seconds),
            "seconds_to_load": statistics.median(each[1] for each in seconds),
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    texts = first_turns(options)
    memories = {"store": "2GB", "no_store": "0"}
    results: dict[str, Any] = {name: turns(options, texts, memory) for name, memory in memories.items()}
    are_equal = results["store"].pop("answers") == results["no_store"].pop("answers")
    results |= {
        "conversations": options.conversations,
        "slots": options.slots,
        "answers_are_equal": are_equal,
        "copies": copies(options, texts[-1]),
        "load_average": os.getloadavg()[0],  # far above the cores: others computed too, and times mean little
        "environment": environment(),
    }
    for name in ("store", "no_store"):
        medians = [statistics.median(each) for each in results[name]["first_token_seconds"]]
        print(f"{name}: first token of first turns {medians[0]:.3f} s, of second turns {medians[1]:.3f} s (medians)")
    print(json.dumps(results["copies"]), "answers equal:", are_equal)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(not are_equal)


if __name__ == "__main__":
    sys.exit(main())
