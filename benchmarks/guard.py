"""Has anything become slower? Ratios of times, measured here, against those that are committed.

    make bench-guard
    python benchmarks/guard.py [--update]

Absolute times tell machines apart; ratios of one interleaved run tell versions of the code apart. Exports random
weights in SmolLM2-135M's shape, in two minutes in all, and fails where a ratio is more than 10% below the one in
`benchmarks/results/guard.json`; `--update` writes that file instead. Every ratio is such that more is better.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from engines import load_engine
from engines.base import Engine
from runtime.loop import decode_rounds
from runtime.measure.environment import environment
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.random_weights.bundles import RandomSettings, random_bundles

RESULTS = Path(__file__).parent / "results" / "guard.json"
TOLERANCE = 0.1
SHAPE, ROWS = "smollm2-135m", 16384
PRECISIONS: dict[str, Quantization] = {"fp32": "none", "int8": "int8", "int4": "int4"}  # of the targets
PAST, PROMPT, NEW_TOKENS = 128, 256, 24  # tokens
TURNS = 15  # a ratio is a median of so many
DRAFTED, ACCEPTED = 4, 3  # tokens of a round of the loop; what is accepted is forced


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time.

    Attributes:
        run: Does it.
        prepare: Is called before, outside the time.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--update", action="store_true", help="record the ratios measured now as the new reference")
    options = parser.parse_args()
    conclude({"environment": environment(), "ratios": measure()}, RESULTS, options.update)


def conclude(measured: Mapping[str, Any], results: Path, update: bool) -> None:
    """Write what was measured to a file, or compare it with the file.

    Raises:
        SystemExit: A ratio has fallen, or nothing is committed yet.
    """
    if update:
        results.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
        return
    if not results.exists():
        print(table(measured["ratios"], {}))
        raise SystemExit(f"there is no {results.name} to compare with: run it with --update on a quiet machine first")
    committed = json.loads(results.read_text("utf-8"))
    print(table(measured["ratios"], committed["ratios"]))
    if fallen := fallen_ratios(measured["ratios"], committed["ratios"]):
        cpus = measured["environment"]["cpu"], committed["environment"]["cpu"]
        elsewhere = f" (committed on {cpus[1]}, measured on {cpus[0]})" if cpus[0] != cpus[1] else ""
        raise SystemExit(f"more than {TOLERANCE:.0%} below the committed ratio{elsewhere}: {', '.join(fallen)}")


def fallen_ratios(measured: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """Returns the names of the committed ratios that are not reached any more, or were not measured."""
    return [name for name, ratio in committed.items() if measured.get(name, 0.0) < ratio * (1 - TOLERANCE)]


def table(measured: Mapping[str, float], committed: Mapping[str, float]) -> str:
    """A line for each ratio: its name, what is committed, what was measured, the change."""
    lines = []
    for name, ratio in measured.items():
        before = committed.get(name)
        change = f"{before:7.2f} {ratio / before - 1:+7.1%}" if before else f"{'':7} {'new':>7}"
        lines.append(f"{name:44} {ratio:7.2f} {change}")
    return "\n".join(lines)


def measure() -> dict[str, float]:
    """Returns the ratios by name. All works take their turns, so that a machine that slows down slows all of them."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        targets, drafters = load(Path(directory), stack)
        pairs = loop_pairs(targets, drafters) | step_pairs(targets, drafters)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
        for turn in range(-1, TURNS):
            for name, (slow, fast) in pairs.items():
                works = (slow, fast) if turn % 2 else (fast, slow)
                times = [timed(work) for work in works]
                if turn >= 0:  # the first one is the warm-up
                    seconds[name].append((times[0], times[1]) if turn % 2 else (times[1], times[0]))
        return {name: round(median(slow / fast for slow, fast in each), 3) for name, each in seconds.items()}


def load(directory: Path, stack: ExitStack) -> tuple[dict[str, Engine], dict[str, Engine]]:
    """Export and load targets by their precision, and int4 drafters by their rows, which share the fp32 target's cache.

    Drafters of the two other targets are left out: their steps are the same.
    """
    targets, drafters = {}, {}
    for precision, quantization in PRECISIONS.items():
        rows = (None, ROWS) if precision == "fp32" else ()
        settings = RandomSettings(SHAPE, None, rows, "fp32", quantization, "int4")
        bundles = random_bundles(settings, directory, lambda *_: None)
        targets[precision] = stack.enter_context(load_engine(bundles.target))
        for name, path in bundles.drafters.items():
            drafters[name] = stack.enter_context(load_engine(path, share_cache_with=targets["fp32"]))
    return targets, drafters


def step_pairs(targets: Mapping[str, Engine], drafters: Mapping[str, Engine]) -> dict[str, tuple[Work, Work]]:
    """Works of which the second is the faster one for each token, by what their ratio is called."""
    full, trimmed = drafters.values()
    pairs: dict[str, tuple[Work, Work]] = {}
    for name, target in targets.items():
        pairs[f"{name}: 5 steps over verifying 5 tokens"] = steps(target, 1, 5), steps(target, 5, 1)
        pairs[f"{name}: {PROMPT} tokens by 8 over a prompt of {PROMPT}"] = (
            steps(target, 8, PROMPT // 8),
            prefill(target),
        )
    pairs["fp32 step over int8 step"] = steps(targets["fp32"], 1, 4), steps(targets["int8"], 1, 4)
    pairs["fp32 step over int4 step"] = steps(targets["fp32"], 1, 4), steps(targets["int4"], 1, 4)
    pairs["full draft step over trimmed draft step"] = steps(full, 1, 8), steps(trimmed, 1, 8)
    return pairs


def steps(engine: Engine, tokens: int, count: int) -> Work:
    """Feeds `count` times so many tokens after PAST cached ones."""
    text = np.arange(5, 5 + PAST)
    past = PAST if tokens * count < PROMPT else 0

    def prepare() -> None:
        if engine.length < past:
            engine.feed(text)

    def run() -> None:
        engine.rewind(past)
        for _ in range(count):
            engine.feed(text[:tokens], keep=tokens)

    return Work(run, prepare)


def prefill(engine: Engine) -> Work:
    text = np.arange(5, 5 + PROMPT)

    def run() -> None:
        engine.rewind(0)
        engine.feed(text)

    return Work(run)


def loop_pairs(targets: Mapping[str, Engine], drafters: Mapping[str, Engine]) -> dict[str, tuple[Work, Work]]:
    """The loop with the target alone and with each drafter, ACCEPTED of DRAFTED tokens accepted in each round."""
    target = targets["fp32"]
    alone = loop(target, None)
    return {f"fp32: target only over {name} drafter": (alone, loop(target, each)) for name, each in drafters.items()}


def loop(target: Engine, drafter: Engine | None) -> Work:
    prompt = list(range(5, 5 + PAST // 2))

    def run() -> None:
        forced = ACCEPTED if drafter else None
        for _ in decode_rounds(
            target, drafter, prompt, max_new_tokens=NEW_TOKENS, draft_length=DRAFTED, force_accepted=forced
        ):
            pass

    return Work(run)


def timed(work: Work) -> float:
    work.prepare()
    start = perf_counter()
    work.run()
    return perf_counter() - start


if __name__ == "__main__":
    main()
