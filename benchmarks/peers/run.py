"""The programs that people would use instead, on the same weights and prompts, in one interleaved run.

    python benchmarks/peers/run.py --models DIR --precision fp32|int8|int4 --prompts NAME=FILE [NAME=FILE …]
        [--repeats N] [--only TEXT …] --output STEM

DIR is what `prepare.py` wrote. Each way is a process of its own (`worker.py`) and decodes greedily, from a prompt's ids
to the last token; on each prompt every way takes its turn, and they take turns in who begins. Peers get prompts as ids,
so that chat templates do not matter. A repeat loads everything again. What STEM.json holds already of the same question
counts as repeats too. Writes STEM.json, STEM.md and STEM.svg.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import version
from views import markdown, summary, svg
from ways import targets, ways

from engines.bundle.read import WEIGHTS_NAME, read_bundle
from engines.bundle.tokenizer import TOKENIZER_NAME
from runtime import SpeculativeDecoder
from runtime.measure.environment import environment
from vocabtrim_export.calibration import read_corpus

PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "torch", "transformers")
FIRST_TOKEN_PROMPTS = (64, 512, 1500)  # tokens
WARM_UP = 32, 8  # tokens of the prompt, and new ones


class Worker:
    """A way's process."""

    def __init__(self, models: Path, precision: str, name: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(models), precision, name]
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
            raise SystemExit(f"{self.name} ended with {self._process.wait()}: run worker.py by hand to see why")
        reply: dict[str, Any] = json.loads(line)
        return reply


def main() -> None:
    options = parse()
    every = ways(options.models, options.precision)
    chosen = [name for name, way in every.items() if way.load and is_chosen(name, options.only)]
    check_targets(options)
    prompts = read_prompts(options)
    question = {
        "precision": options.precision,
        "max_new_tokens": options.max_new_tokens,
        "prompts": {name: len(each) for name, each in prompts.items()},
        "skipped": options.skip,
        "weights": {name: every[name].weights for name in chosen},
        "cannot": {name: way.cannot for name, way in every.items() if way.cannot},
    }
    passes = earlier_passes(options.output, question)
    for _ in range(options.repeats):
        passes.append(one_pass(options, chosen, prompts, seed=len(passes)))
        write(options, question, passes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", type=Path, required=True, metavar="DIR")
    parser.add_argument("--precision", required=True, choices=("fp32", "int8", "int4"), help="the target's precision")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--skip", type=int, default=0, help="prompts of each file to leave out")
    parser.add_argument("--num-prompts", type=int, default=3, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=(), metavar="TEXT", help="the ways whose names have one of these")
    parser.add_argument("--output", type=Path, required=True, metavar="STEM")
    return parser.parse_args()


def is_chosen(name: str, texts: Iterable[str]) -> bool:
    texts = list(texts)
    return not texts or any(text in name for text in texts)


def check_targets(options: argparse.Namespace) -> None:
    """Refuse two bundles of the target with different weights, as two versions of the exporter may write them."""
    bundles = [path for path in targets(options.models, options.precision) if path.exists()]
    if len({read_bundle(path).manifest.files[WEIGHTS_NAME].sha256 for path in bundles}) > 1:
        raise SystemExit(
            f"{' and '.join(map(str, bundles))} have different weights: remove both, and run prepare.py again"
        )


def read_prompts(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids by the set's name."""
    sets = {}
    with SpeculativeDecoder.load(targets(options.models, options.precision)[0]) as decoder:
        for name, _, path in (each.partition("=") for each in options.prompts):
            documents = read_corpus([Path(path)]).documents[options.skip : options.skip + options.num_prompts]
            messages = [[{"role": m.role, "content": m.content} for m in document.prompt] for document in documents]
            sets[name] = [
                decoder.encode(own or document.text) for own, document in zip(messages, documents, strict=True)
            ]
    return sets


def earlier_passes(output: Path, question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the passes in STEM.json; none where it is not there, or answers another question."""
    file = output.with_suffix(".json")
    if not file.exists():
        return []
    report = json.loads(file.read_text("utf-8"))
    passes: list[dict[str, Any]] = report["passes"] if report["question"] == question else []
    return passes


def one_pass(
    options: argparse.Namespace, names: Sequence[str], prompts: Mapping[str, Sequence[Sequence[int]]], seed: int
) -> dict[str, Any]:
    """Load every way, let each decode every prompt, and close them all.

    Args:
        options: The command line.
        names: The ways.
        prompts: Token ids, by the set's name.
        seed: The number of passes before. It decides who begins, and the random prompts.

    Returns:
        Load seconds and peak memory by way, first-token seconds by length and way, replies by set and way.
    """
    workers = [Worker(options.models, options.precision, name) for name in names]
    warm, new = WARM_UP
    for worker in workers:
        worker.decode(next(iter(prompts.values()))[0][:warm], new)
    replies = decode_all(workers, prompts, options.max_new_tokens, seed)
    first = first_tokens(workers, targets(options.models, options.precision)[0] / TOKENIZER_NAME, seed)
    last = {worker.name: worker.decode([1], 1) for worker in workers}
    for worker in workers:
        worker.close()
    return {
        "load_seconds": {worker.name: round(worker.load_seconds, 3) for worker in workers},
        "first_token_seconds": first,
        "peak_megabytes": {name: round(reply["peak_megabytes"]) for name, reply in last.items()},
        "replies": replies,
    }


def decode_all(
    workers: Sequence[Worker], prompts: Mapping[str, Sequence[Sequence[int]]], tokens: int, seed: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Replies by the prompts' set and the way: token ids and seconds."""
    replies: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {worker.name: [] for worker in workers} for name in prompts
    }
    turns = [(name, prompt) for name, each in prompts.items() for prompt in each]
    for turn, (name, prompt) in enumerate(turns):
        start = (turn + seed) % len(workers)
        for worker in [*workers[start:], *workers[:start]]:
            reply = worker.decode(prompt, tokens)
            replies[name][worker.name].append({"tokens": reply["tokens"], "seconds": round(reply["seconds"], 5)})
        print(f"{turn + 1} of {len(turns)} prompts", flush=True)
    return replies


def first_tokens(workers: Sequence[Worker], tokenizer: Path, seed: int) -> dict[str, dict[str, float]]:
    """Seconds to the first token of random prompts, by their length and the way.

    No two prompts begin alike, so that no cache of prompts helps.
    """
    rng = np.random.default_rng(seed)
    rows = len(json.loads(tokenizer.read_text("utf-8"))["model"]["vocab"])
    prompts = {length: rng.integers(rows, size=length).tolist() for length in FIRST_TOKEN_PROMPTS}
    return {
        str(length): {worker.name: round(worker.decode(prompt, 1)["seconds"], 4) for worker in workers}
        for length, prompt in prompts.items()
    }


def write(options: argparse.Namespace, question: Mapping[str, Any], passes: Sequence[Mapping[str, Any]]) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    rows = summary(question, passes)
    report = {
        "environment": environment(),
        "versions": {**versions, **version(options.models / "llama.cpp")},
        "question": question,
        "summary": rows,
        "passes": passes,
    }
    options.output.with_suffix(".json").write_text(json.dumps(report) + "\n", "utf-8")
    options.output.with_suffix(".md").write_text(markdown(rows, question), "utf-8")
    options.output.with_suffix(".svg").write_text(svg(rows, question), "utf-8")
    print(markdown(rows, question), flush=True)


if __name__ == "__main__":
    main()
