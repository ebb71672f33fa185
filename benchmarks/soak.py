"""Many generations over one pair of loaded weights: does memory stay flat, and does none change another?

    python benchmarks/soak.py --target DIR --drafter DIR [--prompts PATH…] [--tokens N] [--decoders N] [--json FILE]
    python benchmarks/soak.py --random-weights tiny …

Each decoder, a fork of the first, has a thread. Prompts of all lengths, greedy and sampled, follow each other at
random; a third is cancelled after a random token. A third repeats one of REPEATS generations that a fresh fork gave
first, and must give the same tokens. Memory and Python's objects are counted between SLICES slices, when nothing runs,
and may not grow once a quarter is over. Exits with 1 if they do, if a token differs, or if the alarm for collapsed
acceptance rings.
"""

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

from engines.base import Engine
from engines.ort.engine import CACHED_LENGTHS
from runtime import SamplingParams, SpeculativeDecoder
from runtime.measure.environment import environment

SLICES, REPEATS = 20, 24
MOST_NEW = 96
MOST_GROWTH_MB, MOST_GROWTH = 8.0, 0.01  # the larger one; of what is resident after a quarter
MOST_NEW_OBJECTS = 100  # a generation leaves far more if it leaves its rounds
SAMPLINGS = (0.0, 1.0), (0.7, 0.9), (1.0, 1.0)  # temperature, top_p


@dataclass(frozen=True, slots=True)
class Job:
    prompt: list[int]
    new: int
    sampling: SamplingParams


@dataclass(slots=True)
class Found:
    tokens: int = 0
    generations: int = 0
    cancelled: int = 0
    repeats_compared: int = 0
    tokens_compared: int = 0
    differing: list[str] = field(default_factory=list)
    collapse: str | None = None


def make_job(random: Random, target: Engine, texts: list[list[int]]) -> Job:
    new = random.randint(1, MOST_NEW)
    length = random.randint(1, longest(target))
    if texts:
        prompt = random.choice(texts)[:length]
    else:
        prompt = [random.randrange(target.manifest.vocab_size) for _ in range(length)]
    temperature, top_p = random.choice(SAMPLINGS)
    return Job(prompt, new, SamplingParams(temperature, 0, top_p, random.randrange(2**32)))


def longest(target: Engine) -> int:
    """Tokens of a prompt that leave room for MOST_NEW."""
    return max(1, min(256, target.capacity - MOST_NEW))


def warm_up(decoder: SpeculativeDecoder) -> None:
    """Prompts of all lengths that engines keep bindings for, and longer ones, greedily and sampled."""
    most = longest(decoder.target)
    for length in (*range(1, min(CACHED_LENGTHS, most) + 1), *range(CACHED_LENGTHS, most, 16), most):
        sampling = SamplingParams(float(length % 2), seed=0)
        decoder.generate([*range(length)], max_new_tokens=4, sampling=sampling)


def run(decoder: SpeculativeDecoder, job: Job, most: int | None = None) -> tuple[tuple[int, ...], str | None]:
    """The tokens, up to `most`, and what the alarm says by then."""
    stream = decoder.stream(job.prompt, max_new_tokens=job.new, sampling=job.sampling)
    tokens = tuple(token.id for token in islice(stream, most))
    return tokens, str(stream.stats.collapse) if stream.stats.collapse else None


def work(
    decoder: SpeculativeDecoder,
    random: Random,
    texts: list[list[int]],
    repeats: list[tuple[Job, tuple[int, ...]]],
    until: int,
    found: Found,
) -> None:
    """Go on generating until `found.tokens` is at least `until`."""
    while found.tokens < until:
        is_repeat = random.random() < 1 / 3
        job, wanted = random.choice(repeats) if is_repeat else (make_job(random, decoder.target, texts), ())
        most = random.randint(1, job.new) if random.random() < 1 / 3 else None
        tokens, collapse = run(decoder, job, most)
        found.generations += 1
        found.tokens += len(tokens)
        found.cancelled += most is not None and len(tokens) == most
        found.collapse = found.collapse or collapse
        if is_repeat:
            found.repeats_compared += 1
            found.tokens_compared += len(tokens)
            if tokens != wanted[:most]:
                found.differing.append(f"{len(job.prompt)} tokens, {job.sampling}: {tokens}, at first {wanted}")


def fresh(decoder: SpeculativeDecoder, job: Job) -> tuple[Job, tuple[int, ...]]:
    with decoder.fork() as alone:
        return job, run(alone, job)[0]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def soak(first: SpeculativeDecoder, texts: list[list[int]], tokens: int, decoders: int) -> dict[str, object]:
    memory = {"loaded": resident_mb()}
    random = Random(0)
    repeats = [fresh(first, make_job(random, first.target, texts)) for _ in range(REPEATS)]
    forks = [first, *(first.fork() for _ in range(decoders - 1))]
    found, randoms = [Found() for _ in forks], [Random(i) for i in range(1, decoders + 1)]
    resident, objects, began = [], [], time.perf_counter()
    with ExitStack() as stack:
        # A thread for each decoder: libc gives threads memory of their own, which must be warm too.
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in forks]
        for warm in [thread.submit(warm_up, fork) for thread, fork in zip(threads, forks, strict=True)]:
            warm.result()
        memory["several_decoders"] = resident_mb()
        for number in range(1, SLICES + 1):
            until = round(tokens / decoders * number / SLICES)
            done = [
                thread.submit(work, fork, own, texts, repeats, until, each)
                for thread, fork, own, each in zip(threads, forks, randoms, found, strict=True)
            ]
            for each in done:
                each.result()
            gc.collect()
            resident.append(resident_mb())
            objects.append(len(gc.get_objects()))
            so_far = sum(each.tokens for each in found)
            print(f"{so_far} tokens, {resident[-1]:.1f} MB, {objects[-1]} objects", flush=True)
    seconds = time.perf_counter() - began
    return summary(found, resident, objects) | {"decoders": decoders, "seconds": seconds, "memory_mb": memory}


def summary(found: list[Found], resident: list[float], objects: list[int]) -> dict[str, object]:
    counts = ("tokens", "generations", "cancelled", "repeats_compared", "tokens_compared")
    quarter = SLICES // 4
    growth, new_objects = resident[-1] - resident[quarter], objects[-1] - objects[quarter]
    differing = [line for each in found for line in each.differing]
    collapse = next((each.collapse for each in found if each.collapse), None)
    calm = growth <= max(MOST_GROWTH_MB, MOST_GROWTH * resident[quarter]) and new_objects <= MOST_NEW_OBJECTS
    return {name: sum(getattr(each, name) for each in found) for name in counts} | {
        "differing": differing,
        "collapse": collapse,
        "resident_mb": resident,
        "growth_mb": growth,
        "objects": objects,
        "new_objects": new_objects,
        "passed": calm and not differing and collapse is None,
    }


def open_pair(options: argparse.Namespace, stack: ExitStack) -> SpeculativeDecoder:
    if options.random_weights:
        from vocabtrim_export.random_weights.bundles import RandomSettings, random_bundles

        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = random_bundles(RandomSettings(options.random_weights, drafter_rows=(256,)), directory, lambda *_: None)
        options.target, options.drafter = made.target, made.drafters["256 rows"]
    return stack.enter_context(SpeculativeDecoder.load(options.target, options.drafter))


def read_texts(paths: list[Path], decoder: SpeculativeDecoder) -> list[list[int]]:
    from vocabtrim_export.calibration import read_corpus

    documents = read_corpus(paths).documents if paths else ()
    chats = [[{"role": m.role, "content": m.content} for m in document.prompt] for document in documents]
    return [decoder.encode(chat) for chat in chats if chat]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", type=Path)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--random-weights", metavar="SHAPE")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        decoder = open_pair(options, stack)
        result = soak(decoder, read_texts(options.prompts, decoder), options.tokens, options.decoders)
    result |= {"environment": environment()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps({name: value for name, value in result.items() if not isinstance(value, list | dict)}))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
