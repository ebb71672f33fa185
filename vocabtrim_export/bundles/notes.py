"""What a user should know about the bundles of an export."""

from engines.bundle.read import Manifest

# ONNX Runtime's float32 products add in another order beyond this, depending on how many keys they meet.
LARGEST_EXACT_HEAD = 128
_GAINLESS = 0.8  # of the target's bytes per step: with every token accepted, verification included, nothing is left


def target_notes(manifest: Manifest | None) -> tuple[str, ...]:
    """Notes on a target's bundle. manifest: None where none was exported."""
    if manifest is None or manifest.tensorrt is not None or manifest.quantization == "none":
        return ()
    if manifest.head_dim <= LARGEST_EXACT_HEAD:
        return ()
    return (
        f"the target is {manifest.quantization} and its attention heads have {manifest.head_dim} numbers: on the CPU "
        "its logits may depend on how many tokens it verifies at once, and then its text with a drafter differs from "
        "its text alone; check it with `vocabtrim verify`, or quantise the drafter alone with --quantize-drafter",
    )


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
