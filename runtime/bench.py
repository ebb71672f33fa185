"""Measure what a drafter gains: every mode on every prompt, interleaved, warmed up, medians."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.errors import VocabtrimError
from runtime.bandwidth import read_bandwidth
from runtime.decoder import SpeculativeDecoder
from runtime.environment import environment
from runtime.report import BenchReport, mode_report
from runtime.timing import Run, timed_run

TARGET_ONLY = "target_only"
_WARM_UP_TOKENS = 16


def bench(
    target: Engine,
    drafters: Mapping[str, Engine],
    prompts: Sequence[Sequence[int] | NDArray[np.int64]],
    *,
    max_new_tokens: int = 128,
    draft_length: int | None = None,
    repeats: int = 3,
    bandwidth: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Decode all prompts greedily with the target alone, as mode "target_only", and with each of `drafters`.

    drafters: by the name of their mode, "full_drafter" and "trimmed_drafter" say. prompts: token ids.
    draft_length: see `SpeculativeDecoder`.
    bandwidth: bytes/s that the engines' memory delivers; None measures this machine's main memory (about 1 s).
    progress: called with the generations done and their number, the warm-up not counted.
    Raises `VocabtrimError` for input that cannot run.
    """
    if not prompts or repeats < 1 or max_new_tokens < 1:
        raise VocabtrimError("a bench needs at least one prompt, one repeat and one new token")
    modes: dict[str, Engine | None] = {TARGET_ONLY: None, **drafters}
    token_ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts]
    length = 1
    for drafter in modes.values():  # the first without a drafter
        # refuses what does not belong together
        length = SpeculativeDecoder(target, drafter, draft_length=draft_length).draft_length
        timed_run(target, drafter, token_ids[0], min(max_new_tokens, _WARM_UP_TOKENS), length)
    speed = bandwidth or read_bandwidth()
    runs = _measure(target, modes, token_ids, max_new_tokens, length, repeats, progress)
    reports = {
        mode: mode_report(
            runs[mode], runs[TARGET_ONLY], target.manifest, drafter.manifest if drafter else None, length, speed
        )
        for mode, drafter in modes.items()
    }
    made_by = {"source": target.manifest.source, "tool_versions": dict(target.manifest.tool_versions)}
    return BenchReport(reports, len(prompts), max_new_tokens, length, repeats, speed, environment() | made_by)


def _measure(
    target: Engine,
    modes: Mapping[str, Engine | None],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft_length: int,
    repeats: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[list[Run]]]:
    """Runs by mode, prompt and repeat. The modes take turns on each prompt and in who begins.

    A machine that slows down in between then slows all of them.
    """
    runs: dict[str, list[list[Run]]] = {mode: [[] for _ in prompts] for mode in modes}
    names, done = list(modes), 0
    for repeat in range(repeats):
        for index, prompt in enumerate(prompts):
            first = (repeat + index) % len(names)
            for mode in names[first:] + names[:first]:
                runs[mode][index].append(timed_run(target, modes[mode], prompt, max_new_tokens, draft_length))
                done += 1
                if progress:
                    progress(done, len(names) * len(prompts) * repeats)
    return runs
