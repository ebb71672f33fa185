"""The part of a manifest that describes TensorRT plans, in bundles of `--format trt`."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["draft", "verify", "prefill"]
Flavor = Literal["none", "tensorrt", "rtx"]


@dataclass(frozen=True, slots=True)
class Profile:
    """One fixed shape of a graph.

    Attributes:
        phase: The phase that calls of this shape belong to.
        tokens: The tokens that a call feeds.
        keep: The positions that it predicts after.
        span: The slots of the KV cache that it attends to.
    """

    phase: Phase
    tokens: int
    keep: int
    span: int


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The TensorRT plans of a bundle of `--format trt`.

    Attributes:
        flavor: The library that built the plans; "none": there are only graphs.
        version: The library's version; no other version opens the plans.
        compute_capabilities: Those of the GPUs that the plans were built for, such as "8.6".
        profiles: The optimization profiles of `model.engine`, in its order.
        draft_length: γ, the tokens that one call of `draft.engine` drafts; 0 where there is none. `draft.engine` has
            one optimization profile for each of `spans`.
        weights_stripped: The plans hold no weights; `model.onnx` and `draft.onnx` refit them at load.
    """

    flavor: Flavor
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    draft_length: int
    weights_stripped: bool

    @property
    def spans(self) -> tuple[int, ...]:
        """Numbers of slots that attention can read, ascending; the last is the whole KV cache."""
        return tuple(sorted({profile.span for profile in self.profiles}))
