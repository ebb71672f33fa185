"""Refusals that several loaders share."""

from pathlib import Path

from engines.bundle.read import Bundle
from engines.errors import VocabtrimError


def refuse_profile(profile: Path | None) -> None:
    """Refuse to profile operators on a backend that cannot.

    Args:
        profile: The file that was asked for; None where operators are not to be profiled.

    Raises:
        VocabtrimError: A file was asked for.
    """
    if profile:
        raise VocabtrimError("operators are profiled on the CPU, and in bundles of --format onnx: use those")


def refuse_bf16(bundle: Bundle) -> None:
    """Refuse a bundle whose dtype ONNX Runtime has no CPU kernels for.

    Raises:
        VocabtrimError: The bundle is bf16.
    """
    if bundle.manifest.dtype == "bf16":
        raise VocabtrimError(
            f"{bundle.path} is a bf16 bundle, which ONNX Runtime cannot run on the CPU: export it as fp32"
        )
