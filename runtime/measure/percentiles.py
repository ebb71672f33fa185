"""Percentiles of the times of calls, drafts and rounds, over the runs of one mode."""

from collections.abc import Sequence
from typing import Literal

from runtime.measure.timing import TimedGeneration
from runtime.round import Round
from runtime.stats import Percentiles


def call_percentiles(
    runs: Sequence[TimedGeneration], engine: Literal["target", "drafter"], tokens: int | None
) -> Percentiles | None:
    """Returns the milliseconds of an engine's calls. Prefills are left out, however short they are.

    Args:
        runs: The runs of one mode.
        engine: The engine that was called.
        tokens: The tokens of the calls that count; None for all calls.

    Returns:
        None where there was no such call.
    """
    feeds = [feed for run in runs for feed in (run.drafter if engine == "drafter" else run.target[1:])]
    return Percentiles.of(feed.seconds * 1e3 for feed in feeds if tokens in (None, feed.tokens))


def round_percentiles(runs: Sequence[TimedGeneration], length: int | None) -> Percentiles | None:
    """Returns the milliseconds of rounds that drafted `length` tokens, or of all rounds where `length` is None.

    The round in which a drafter reads the prompt is left out.
    """
    return Percentiles.of(entry.seconds * 1e3 for entry in _full_rounds(runs, length))


def host_percentiles(runs: Sequence[TimedGeneration], length: int | None) -> Percentiles | None:
    """Returns the milliseconds of rounds that are spent neither drafting nor verifying.

    Args:
        runs: The runs of one mode.
        length: Counts the rounds that drafted so many tokens; None counts all. The round in which a drafter reads the
            prompt is left out.
    """
    rounds = _full_rounds(runs, length)
    return Percentiles.of(1e3 * (entry.seconds - entry.draft_seconds - entry.verify_seconds) for entry in rounds)


def draft_percentiles(runs: Sequence[TimedGeneration], length: int) -> Percentiles | None:
    """Returns the milliseconds that a draft of `length` tokens takes per token.

    They include what a drafter with a KV cache of its own reads first.
    """
    return Percentiles.of(entry.draft_seconds * 1e3 / length for entry in _full_rounds(runs, length))


def _full_rounds(runs: Sequence[TimedGeneration], length: int | None) -> list[Round]:
    """Returns the rounds that drafted `length` tokens, or all where drafts have no fixed length."""
    rounds = [entry for run in runs for entry in run.rounds if not entry.is_prefill and not entry.prefill_seconds]
    return [entry for entry in rounds if length in (None, entry.drafted)]
