"""Measure what a drafter gains: every mode on every prompt, interleaved, warmed up, medians."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.decoder import SpeculativeDecoder
from runtime.draft_length import DraftLength, FixedLength
from runtime.loop import GREEDY
from runtime.measure.bandwidth import bandwidths
from runtime.measure.environment import environment
from runtime.measure.report import BenchReport
from runtime.measure.summary import way_report
from runtime.measure.timing import Way, measure
from runtime.pair import Auto, check_pair, make_draft_length, resolve_draft_length

TARGET_ONLY = "target_only"
ForceAccepted: TypeAlias = int | Literal["all"] | None


def bench(
    target: Engine,
    drafters: Mapping[str, Engine],
    prompts: Sequence[Sequence[int] | NDArray[np.int64]],
    *,
    max_new_tokens: int = 128,
    draft_length: int | Auto | None = None,
    repeats: int = 3,
    force_accepted: ForceAccepted = None,
    sampling: SamplingParams = GREEDY,
    bandwidth: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Decode all prompts greedily, with the target alone and with each drafter, interleaved.

    The target alone is the mode "target_only".

    Args:
        target: The target's engine.
        drafters: The drafters by the names of their modes, such as "full_drafter" and "trimmed_drafter".
        prompts: Token ids.
        max_new_tokens: The most tokens to generate for a prompt.
        draft_length: γ, None or "auto", see `SpeculativeDecoder`; where acceptance is forced, None is 4. What an
            adaptive length learns, in the warm-up too, it keeps from prompt to prompt, as a decoder does.
        repeats: The number of times that each mode decodes each prompt.
        force_accepted: The drafted tokens that each round accepts, see `decode_rounds`; "all" for γ. Nothing is then
            said of equal outputs.
        sampling: Greedy, with rules on logits that replace or add to those of the target's generation config.
        bandwidth: Bytes/s that the engines' memory delivers; None measures it, which takes about 1 s for main memory.
        progress: Called with the generations done and their number, the warm-up not counted.

    Raises:
        VocabtrimError: The input cannot run.
    """
    if not prompts or repeats < 1 or max_new_tokens < 1:
        raise VocabtrimError("a bench needs at least one prompt, one repeat and one new token")
    check_greedy(sampling)
    modes: dict[str, Engine | None] = {TARGET_ONLY: None, **drafters}
    token_ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts]
    is_forced = force_accepted is not None
    lengths = {mode: _draft_length(target, drafter, draft_length, is_forced) for mode, drafter in modes.items()}
    length = [*lengths.values()][-1]
    forced = resolve_force_accepted(force_accepted, length)
    ways = {
        mode: Way(drafter, lengths[mode], token_ids, max_new_tokens, forced, sampling)
        for mode, drafter in modes.items()
    }
    speeds = bandwidths((target, *drafters.values()), bandwidth)
    runs = measure(target, ways, repeats, progress)
    reports = {mode: way_report(target, way, runs[mode], runs[TARGET_ONLY], speeds) for mode, way in ways.items()}
    sizes = len(prompts), max_new_tokens, length.longest, length.adapts, repeats, forced
    return BenchReport(reports, *sizes, speeds[target.device], measured_on(target, drafters), sampling)


def _draft_length(
    target: Engine, drafter: Engine | None, draft_length: int | Auto | None, is_forced: bool
) -> DraftLength:
    """Returns the draft length of a mode, by default a fixed one where acceptance is forced.

    Raises:
        VocabtrimError: The two engines do not belong together.
    """
    check_pair(target, drafter)
    if is_forced and draft_length != "auto":
        return FixedLength(resolve_draft_length(target, drafter, draft_length))
    return make_draft_length(target, drafter, draft_length)


def check_greedy(sampling: SamplingParams) -> None:
    """Check that a bench can compare outputs, which differ from run to run where tokens are sampled.

    Raises:
        ValueError: `sampling` is not greedy.
    """
    if not sampling.is_greedy:
        raise ValueError("a bench decodes greedily: give rules on logits alone")


def measured_on(target: Engine, drafters: Mapping[str, Engine]) -> dict[str, Any]:
    """Describe, for a report, what was measured on what.

    Args:
        target: The target.
        drafters: The drafters by the names that the report gives them.

    Returns:
        The machine, the library that runs the target, the tools that made its bundle, and the digest and the LM head's
        rows of each bundle.
    """
    manifests = {name: engine.manifest for name, engine in {TARGET_ONLY: target, **drafters}.items()}
    bundles = {name: {"digest": each.digest, "head_rows": each.head_rows} for name, each in manifests.items()}
    made_by = {"source": target.manifest.source, "tool_versions": dict(target.manifest.tool_versions)}
    return environment() | target.environment() | made_by | {"bundles": bundles}


def resolve_force_accepted(force_accepted: ForceAccepted, length: DraftLength) -> int | None:
    """Returns the number of tokens that each round is forced to accept; None where acceptance is not forced.

    Raises:
        VocabtrimError: More tokens are to be accepted than are drafted, or drafts have no fixed length.
    """
    if force_accepted is not None and length.adapts:
        raise VocabtrimError("--force-accepted needs drafts of one length: give --draft-length a number")
    draft_length = length.longest
    if force_accepted == "all":
        return draft_length
    if force_accepted is not None and not 0 <= force_accepted <= draft_length:
        raise VocabtrimError(
            f"--force-accepted is {force_accepted} and a round drafts {draft_length} tokens: give a number from 0 to "
            f"{draft_length}"
        )
    return force_accepted
