"""The programs that people would use instead, on the same weights and prompts, in one interleaved run.

    vocabtrim-export --drafter MODEL.gguf --target MODEL.gguf --quantize-drafter int4 --k 16384 \\
        --calibration FILE --calibration-source text --format onnx hf genai openvino --output DIR
    python benchmarks/peers/run.py --export DIR --model MODEL.gguf --prompts NAME=FILE [NAME=FILE …] --output STEM

Each way is a process of its own (`worker.py`) and decodes greedily, from a prompt's ids to the last token; on each
prompt every way takes its turn, and they take turns in who begins. Peers get prompts as ids, so that chat templates
do not matter. Writes STEM.json and STEM.md.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from worker import ways

from runtime import SpeculativeDecoder
from runtime.measure.environment import environment
from vocabtrim_export.calibration import read_corpus

PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "torch", "transformers")
FIRST_TOKEN_PROMPTS = (64, 512, 1500)  # tokens


class Worker:
    """A way's process."""

    def __init__(self, name: str, export: Path, model: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), name, str(export), str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name = name
        self.load_seconds = float(self._reply()["load_seconds"])

    def decode(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        return json.loads(line)


@dataclass(frozen=True, slots=True)
class Row:
    """A way on a set of prompts.

    Attributes:
        prompts: The set's name.
        way: The way's name.
        tokens_per_second: End to end, median over the prompts.
        quartiles: Of the same.
        ratio: Median of the prompts' ratios to the first way.
        equal: Prompts whose text is the first way's.
    """

    prompts: str
    way: str
    tokens_per_second: float
    quartiles: tuple[float, float]
    ratio: float
    equal: int


def main() -> None:
    options = parse()
    prompts = read_prompts(options)
    workers = [Worker(name, options.export, options.model) for name in ways(options.export, options.model)]
    for worker in workers:  # warm
        worker.decode(next(iter(prompts.values()))[0][:32], 8)
    replies = measure(workers, prompts, options.max_new_tokens)
    first = first_tokens(workers, options.export)
    rows = [row(name, way, each) for name, each in replies.items() for way in each]
    report = {
        "environment": environment(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "max_new_tokens": options.max_new_tokens,
        "prompts": {name: len(each) for name, each in prompts.items()},
        "rows": [asdict(each) for each in rows],
        "load_seconds": {worker.name: round(worker.load_seconds, 2) for worker in workers},
        "first_token_seconds": first,
        "peak_megabytes": {
            worker.name: round(max(reply["peak_megabytes"] for each in replies.values() for reply in each[worker.name]))
            for worker in workers
        },
    }
    for worker in workers:
        worker.close()
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    options.output.with_suffix(".md").write_text(markdown(rows, report), "utf-8")
    print(markdown(rows, report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--skip", type=int, default=0, help="prompts of each file to leave out")
    parser.add_argument("--num-prompts", type=int, default=6, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    return parser.parse_args()


def read_prompts(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids by the set's name."""
    sets = {}
    with SpeculativeDecoder.load(options.export / "target") as decoder:
        for name, _, path in (each.partition("=") for each in options.prompts):
            documents = read_corpus([Path(path)]).documents[options.skip : options.skip + options.num_prompts]
            messages = [[{"role": m.role, "content": m.content} for m in document.prompt] for document in documents]
            sets[name] = [
                decoder.encode(own or document.text) for own, document in zip(messages, documents, strict=True)
            ]
    return sets


def measure(
    workers: Sequence[Worker], prompts: Mapping[str, Sequence[Sequence[int]]], tokens: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Replies by the prompts' set and the way."""
    replies: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {worker.name: [] for worker in workers} for name in prompts
    }
    turns = [(name, prompt) for name, each in prompts.items() for prompt in each]
    for turn, (name, prompt) in enumerate(turns):
        start = turn % len(workers)
        for worker in [*workers[start:], *workers[:start]]:
            replies[name][worker.name].append(worker.decode(prompt, tokens))
        print(f"{turn + 1} of {len(turns)} prompts", flush=True)
    return replies


def first_tokens(workers: Sequence[Worker], export: Path) -> dict[str, dict[str, float]]:
    """Seconds to the first token of random prompts, by their length and the way; the median of three.

    No two prompts begin alike, so that no cache of prompts helps.
    """
    rng = np.random.default_rng(0)
    rows = json.loads((export / "target" / "vocabtrim.json").read_text("utf-8"))["vocab_size"]
    found = {}
    for length in FIRST_TOKEN_PROMPTS:
        prompts = rng.integers(rows, size=(3, length)).tolist()
        seconds = {worker.name: [worker.decode(prompt, 1)["seconds"] for prompt in prompts] for worker in workers}
        found[str(length)] = {name: round(median(each), 4) for name, each in seconds.items()}
    return found


def row(name: str, way: str, replies: Mapping[str, Sequence[Mapping[str, Any]]]) -> Row:
    own, first = replies[way], next(iter(replies.values()))
    speeds = [len(reply["tokens"]) / reply["seconds"] for reply in own]
    base = [len(reply["tokens"]) / reply["seconds"] for reply in first]
    low, _, high = quantiles(speeds, n=4) if len(speeds) > 1 else (speeds[0],) * 3
    equal = sum(same_text(mine["tokens"], its["tokens"]) for mine, its in zip(own, first, strict=True))
    ratio = median(mine / its for mine, its in zip(speeds, base, strict=True))
    return Row(name, way, round(median(speeds), 2), (round(low, 2), round(high, 2)), round(ratio, 3), equal)


def same_text(mine: Sequence[int], its: Sequence[int]) -> bool:
    """Programs differ in whether the token that ends a text is part of it."""
    common = min(len(mine), len(its))
    return list(mine[:common]) == list(its[:common]) and abs(len(mine) - len(its)) <= 1


def markdown(rows: Sequence[Row], report: Mapping[str, Any]) -> str:
    """A line for each way: tokens/s and the ratio to the first way by set of prompts, then load and first token."""
    sets = list(report["prompts"])
    cells = {(each.prompts, each.way): each for each in rows}
    lengths = list(report["first_token_seconds"])
    heads = [*sets, "equal texts", "load", *(f"first token of {length}" for length in lengths), "peak memory"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for way, load in report["load_seconds"].items():
        own = [cells[name, way] for name in sets]
        speeds = [f"{each.tokens_per_second:.0f} ({each.ratio:.2f}×)" for each in own]
        equal = f"{sum(each.equal for each in own)} of {sum(report['prompts'].values())}"
        first = [f"{1000 * report['first_token_seconds'][length][way]:.0f} ms" for length in lengths]
        memory = f"{report['peak_megabytes'][way]} MB"
        lines.append(f"| {' | '.join([way, *speeds, equal, f'{load:.1f} s', *first, memory])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
