"""Every drafter at every draft length and context, interleaved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from engines.base import Engine
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.decoder import SpeculativeDecoder
from runtime.draft_length import FixedLength
from runtime.loop import GREEDY
from runtime.measure.bandwidth import bandwidths
from runtime.measure.bench import TARGET_ONLY, ForceAccepted, check_greedy, measured_on, resolve_force_accepted
from runtime.measure.report import ModeReport
from runtime.measure.summary import way_report
from runtime.measure.timing import Way, measure
from runtime.pair import check_pair, resolve_draft_length

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """The settings of a sweep: every combination is measured.

    Attributes:
        draft_lengths: Values of γ; empty: 4, or fewer where the target verifies no more.
        contexts: Lengths in tokens that the prompts are cut or repeated to; empty: the prompts as they are.
        max_new_tokens: Tokens generated for each prompt, at most.
        repeats: The number of times that each prompt is decoded in each combination.
        force_accepted: See `decode_rounds`; "all" accepts whole drafts.
        sampling: Greedy, with the rules on logits that are given in addition to the target's own.
    """

    draft_lengths: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    max_new_tokens: int = 128
    repeats: int = 3
    force_accepted: ForceAccepted = None
    sampling: SamplingParams = GREEDY


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One combination.

    Attributes:
        drafter: The drafter's name, or "target_only".
        head_rows: Rows of the drafter's LM head; the target's for "target_only".
        draft_length: γ; 0 for "target_only".
        context: Tokens of each prompt; None where the prompts were left as they are.
        report: The measured figures.
    """

    drafter: str
    head_rows: int
    draft_length: int
    context: int | None
    report: ModeReport


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The result of a sweep.

    Attributes:
        rows: One for each combination.
        prompts: The number of prompts.
        settings: The combined settings.
        bandwidth: Bytes/s that the target's memory was measured to deliver.
        environment: See `BenchReport`.
    """

    rows: tuple[SweepRow, ...]
    prompts: int
    settings: SweepSettings
    bandwidth: float
    environment: Mapping[str, Any]

    @property
    def lossless(self) -> bool | None:
        """Every row gave the tokens of target-only decoding on every prompt, but for near-ties.

        None where acceptance was forced.
        """
        if self.settings.force_accepted is not None:
            return None
        return not any(row.report.differences for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return {"kind": "sweep"} | asdict(self) | {"lossless": self.lossless}


def at_context(prompt: Sequence[int], tokens: int) -> list[int]:
    """Returns `prompt`, repeated and cut to `tokens` ids."""
    return [int(token) for token in (list(prompt) * -(-tokens // len(prompt)))[:tokens]]


def prompts_at(engines: Sequence[Engine], prompts: Prompts, settings: SweepSettings) -> Prompts:
    """Returns `prompts` at the one context of `settings`, or as they are.

    Raises:
        VocabtrimError: They do not fit into the bundles.
    """
    _check_contexts(engines, settings)
    return [at_context(prompt, settings.contexts[0]) for prompt in prompts] if settings.contexts else prompts


def sweep(
    target: Engine,
    drafters: Mapping[str, Engine],
    prompts: Prompts,
    settings: SweepSettings,
    *,
    bandwidth: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Decode `prompts` with the target alone and with each of `drafters` at every draft length and context.

    Args:
        target: The target.
        drafters: The drafters by name.
        prompts: Token ids of each prompt.
        settings: The settings to combine.
        bandwidth: Bytes/s of the target's memory; None measures it.
        progress: Called with the number of generations done and of all.

    Raises:
        VocabtrimError: The engines do not belong together, or cannot hold a prompt or a draft.
    """
    lengths = check_settings(target, drafters, prompts, settings)
    keys = [
        (name, length, context)
        for context, name in product(settings.contexts or (None,), (TARGET_ONLY, *drafters))
        for length in ((0,) if name == TARGET_ONLY else lengths)
    ]
    encoded = {context: encoded_at(target, prompts, context) for _, _, context in keys}
    ways = {
        _label(name, length, context): _way(drafters.get(name), length, encoded[context], settings)
        for name, length, context in keys
    }
    runs = measure(target, ways, settings.repeats, progress)
    speeds = bandwidths((target, *drafters.values()), bandwidth)

    def row(name: str, length: int, context: int | None) -> SweepRow:
        label = _label(name, length, context)
        report = way_report(target, ways[label], runs[label], runs[_label(TARGET_ONLY, 0, context)], speeds)
        return SweepRow(name, drafters.get(name, target).manifest.head_rows, length, context, report)

    rows = tuple(row(*key) for key in keys)
    used = replace(settings, draft_lengths=lengths)
    return SweepReport(rows, len(prompts), used, speeds[target.device], measured_on(target, drafters))


def _way(drafter: Engine | None, length: int, prompts: Prompts, settings: SweepSettings) -> Way:
    """Returns one combination as a way of decoding; `length` is γ, or 0 for the target alone."""
    accepted = None if settings.force_accepted is None else 0
    if length:
        accepted = resolve_force_accepted(settings.force_accepted, FixedLength(length))
    return Way(drafter, max(length, 1), prompts, settings.max_new_tokens, accepted, settings.sampling)


def check_settings(
    target: Engine, drafters: Mapping[str, Engine], prompts: Prompts, settings: SweepSettings
) -> tuple[int, ...]:
    """Check that a sweep can run.

    Args:
        target: The target.
        drafters: The drafters, by their names.
        prompts: Token ids of each prompt.
        settings: The settings of the sweep.

    Returns:
        The draft lengths, ascending.

    Raises:
        VocabtrimError: A setting cannot run with these engines.
    """
    if not prompts or settings.repeats < 1 or settings.max_new_tokens < 2:
        raise VocabtrimError("a sweep needs at least one prompt, one repeat and two new tokens")
    check_greedy(settings.sampling)
    lengths: set[int] = set()
    for drafter in drafters.values():
        for length in settings.draft_lengths or (None,):
            check_pair(target, drafter)
            lengths.add(resolve_draft_length(target, drafter, length))
    for length in lengths:
        resolve_force_accepted(settings.force_accepted, FixedLength(length))
    _check_contexts((target, *drafters.values()), settings)
    return tuple(sorted(lengths))


def _check_contexts(engines: Sequence[Engine], settings: SweepSettings) -> None:
    capacity = min(engine.capacity for engine in engines)
    for context in settings.contexts:
        if context < 1 or context + settings.max_new_tokens > capacity:
            raise VocabtrimError(
                f"a context of {context} tokens and {settings.max_new_tokens} new ones do not fit in the "
                f"{capacity} that the bundles hold: lower one of them, or export with a longer --max-length"
            )


def encoded_at(target: Engine, prompts: Prompts, context: int | None) -> list[list[int]]:
    """Returns the prompts' token ids, cut or repeated to `context` tokens; None leaves them as they are."""
    decoder = SpeculativeDecoder(target)
    whole = prompts if context is None else [at_context(prompt, context) for prompt in prompts]
    return [decoder.encode(prompt) for prompt in whole]


def _label(name: str, draft_length: int, context: int | None = None) -> str:
    return f"{name} γ={draft_length} {context}"
