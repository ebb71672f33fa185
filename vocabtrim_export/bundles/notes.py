"""Notes for the user about the bundles of an export."""

from engines.bundle.read import Manifest
from runtime.measure.expert_reads import ExpertReads
from runtime.stats import mbsu

_GAINLESS = 0.8  # the drafter's share of the target's bytes per step from which no acceptance gains time
_DRAFTED = 4  # tokens, of which a mixture's verification is described
_LONGEST = 16  # tokens of a draft


def no_gain(drafter: Manifest, target: Manifest | None) -> tuple[str, ...]:
    """Find out whether the drafter reads about as much per step as its target, so that drafting cannot pay.

    Args:
        drafter: The drafter's manifest.
        target: The target's; None where no target was exported.

    Returns:
        A note for the user, or nothing.
    """
    if target is None or drafter.weight_bytes_per_step < _GAINLESS * target.weight_bytes_per_step:
        return ()
    share = drafter.weight_bytes_per_step / target.weight_bytes_per_step
    return (
        f"the drafter reads {share:.0%} of what its target reads per step, so the pair cannot be faster than the "
        "target alone: quantise the drafter (--quantize-drafter int4) or give a smaller one",
    )


def mixture_note(drafter: Manifest, target: Manifest | None) -> tuple[str, ...]:
    """Describe what a verification reads of a mixture of experts, and the most that drafts can gain by it.

    Args:
        drafter: The drafter's manifest.
        target: The target's; None where no target was exported.

    Returns:
        A note for the user, or nothing for a dense target.
    """
    reads = ExpertReads.of(target, _DRAFTED + 1) if target else None
    if target is None or reads is None:
        return ()
    cost, one = drafter.weight_bytes_per_step / target.weight_bytes(1), target.weight_bytes(1)
    gain, length = max((mbsu(n + 1, cost, n, target.weight_bytes(n + 1) / one), n) for n in range(1, _LONGEST + 1))
    most = f"drafts that are all accepted gain at most {gain:.2f}×, with {length} tokens a draft"
    verdict = most if gain > 1 else "speculation does not pay, even if all drafts are accepted"
    return (f"the target is a mixture of experts: {reads}. By the bytes that are read, {verdict}",)
