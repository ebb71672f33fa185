"""Notes for the user about the bundles of an export."""

from engines.bundle.read import Manifest

_GAINLESS = 0.8  # the drafter's share of the target's bytes per step from which no acceptance gains time


def no_gain(drafter: Manifest, target: Manifest | None) -> tuple[str, ...]:
    """Find out whether the drafter reads about as much per step as its target, so that drafting cannot pay.

    Args:
        drafter: the drafter's manifest.
        target: the target's; None where no target was exported.

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
