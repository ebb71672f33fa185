"""Text counting against the tokenizer library's own batches: seconds, and peak memory over the size of the text.

    python benchmarks/text_counting.py --model MODEL --output FILE.json

counts a text by `--calibration-source text` and encodes the same texts with `tokenizers`' `encode_batch` and
`encode_batch_fast`, in turns, and checks that all counts are equal. The text is Python source of this interpreter's
libraries, as often as it takes, the files in another order each time. Ours is all that `vocabtrim calibrate` does after
its imports and the tokenizer: reading, cutting, choosing batches, encoding, counting. Theirs only encodes texts that
are in memory, in the order of the file. Peak memory is that of `vocabtrim calibrate` in a process of its own for each
of the `--memory` sizes, as one text and as JSON lines of conversations, which 1 GB keeps busy for ten minutes each, or
for two with `--memory-tokens auto`, which reads all and counts 20 million tokens; `--memory` without a size leaves it
out, `--rounds 0` the seconds.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.measure.environment import environment
from vocabtrim_export.calibration import CountSettings, calibrate, read_corpus
from vocabtrim_export.calibration.document import cut_text
from vocabtrim_export.calibration.generations import whole_texts
from vocabtrim_export.sources.source import load_tokenizer

MEGABYTE = 1_000_000
ALL = 10**12  # tokens: more than any text here has
BATCH = 1000  # texts that the library encodes at once


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        text, lines = Path(place, "text.txt"), Path(place, "lines.jsonl")
        report: dict[str, Any] = {"megabytes": options.megabytes, "peak_megabytes": {}}
        if options.rounds:
            write_text(text, options.megabytes)
            report |= speeds(options.model, text, options.rounds)
        for size, (form, path) in itertools.product(options.memory, {"text": text, "json_lines": lines}.items()):
            (write_text if path == text else write_lines)(path, size)
            peaks = report["peak_megabytes"].setdefault(form, {})
            peaks[str(size)] = peak(options.model, path, options.memory_tokens)
            print(f"{size} MB of {form}: {peaks[str(size)]} MB at most", flush=True)
            path.unlink()
    report["environment"] = environment()
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="the model whose tokenizer counts the text")
    parser.add_argument("--megabytes", type=int, default=100, help="text to count for the seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 100, 1000], help="megabytes of text to count")
    parser.add_argument("--memory-tokens", default=str(ALL), help="tokens to count of these: a number, or auto")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    return parser.parse_args()


def sources(megabytes: int) -> Iterator[str]:
    """Yield Python files of this size in all, in a new order each time that all were read."""
    left, order = megabytes * MEGABYTE, random.Random(0)
    places = {file for key in ("stdlib", "purelib") for file in Path(sysconfig.get_path(key)).rglob("*.py")}
    files = sorted(places)
    while True:
        for file in files:
            source = file.read_text("utf-8", "replace").replace("\0", "")[:left]
            left -= len(source.encode())
            yield source
            if left <= 0:
                return
        order.shuffle(files)


def write_text(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(sources(megabytes))


def write_lines(path: Path, megabytes: int) -> None:
    """Write conversations of a question and an answer: the first line of a piece of source, and the rest."""
    with path.open("w", encoding="utf-8") as out:
        for piece in cut_text(sources(megabytes)):
            asked, _, answer = piece.partition("\n")
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def speeds(model: str, text: Path, rounds: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    backend, corpus = whole_texts(tokenizer), read_corpus([text])
    texts = [each for document in corpus.documents for each in document.counted_texts]

    def ours() -> NDArray[np.int64]:
        counts = calibrate(None, tokenizer, read_corpus([text]), CountSettings("text", ALL))
        return counts.counts + counts.held_out

    def theirs(encode: Callable[..., Any]) -> None:
        for begin in range(0, len(texts), BATCH):
            encode(texts[begin : begin + BATCH], add_special_tokens=False)

    jobs: dict[str, Callable[[], object]] = {
        "ours": ours,
        "encode_batch": lambda: theirs(backend.encode_batch),
        "encode_batch_fast": lambda: theirs(backend.encode_batch_fast),
    }
    check(ours(), backend, texts)  # and everything is warm
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for number, name in itertools.product(range(rounds), jobs):
        seconds[name].append(clocked(jobs[name]))
        print(f"round {number + 1}, {name}: %.2f s, %.2f s of CPU time" % seconds[name][-1], flush=True)
    medians = {
        name: dict(zip(("wall", "cpu"), map(statistics.median, zip(*each, strict=True)), strict=True))
        for name, each in seconds.items()
    }
    ratios = {name: {clock: medians["ours"][clock] / each[clock] for clock in each} for name, each in medians.items()}
    print(json.dumps({"median_seconds": medians, "ours_over": ratios}, indent=1), flush=True)
    return {"texts": len(texts), "seconds": seconds, "median_seconds": medians, "ours_over": ratios}


def check(counts: NDArray[np.int64], backend: Any, texts: list[str]) -> None:
    plain = np.zeros_like(counts)
    for each in texts:
        ids = np.array(backend.encode(each, add_special_tokens=False).ids, np.int64)
        np.add.at(plain, ids, 1)
    if not np.array_equal(counts, plain):
        sys.exit("the counts differ from those of a plain loop")


def clocked(job: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a job takes, on the clock and of CPU time."""
    began, used = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - began, time.process_time() - used


def peak(model: str, text: Path, tokens: str) -> int:
    """The largest resident memory of `vocabtrim calibrate` on the text, in megabytes."""
    code = "import sys; from vocabtrim_export.cli.main import main; sys.exit(main())"
    how = ["--calibration", str(text), "--calibration-source", "text", "--calibration-tokens", tokens]
    output = str(text.with_name("counts.safetensors"))
    Path(output).unlink(missing_ok=True)
    command = [sys.executable, "-c", code, "calibrate", "--target", model, *how, "--output", output]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return round(usage.ru_maxrss * 1024 / MEGABYTE)


if __name__ == "__main__":
    main()
