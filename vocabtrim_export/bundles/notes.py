"""What a user should know about the bundles of an export."""

from engines.bundle.read import Manifest

# ONNX Runtime's float32 products add in another order beyond this, depending on how many keys they meet.
LARGEST_EXACT_HEAD = 128


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
