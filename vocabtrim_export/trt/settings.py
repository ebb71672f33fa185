"""The settings of `--format trt`, and the fixed shapes that follow from them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engines.bundle.read import Flavor, Profile, Role
from engines.errors import VocabtrimError

_LONGEST_DRAFT = 64
_LONGEST_CHUNK = 4096
_SLOTS = 64  # a KV cache has a multiple of them
_CAPABILITY = re.compile(r"[1-9]\d?\.\d")


@dataclass(frozen=True, slots=True)
class TensorRTSettings:
    """Settings for building a bundle of `--format trt`.

    Attributes:
        flavor: The library to build with; "auto": TensorRT where it is installed and there is a GPU, else TensorRT-RTX;
            "none": write graphs only.
        compute_capabilities: See `BuildOptions`.
        draft_length: γ, the tokens drafted in a round.
        prefill_chunk: The prompt tokens of one call.
        spans: Lengths that attention reads while a text is no longer than that; the full length is always one more.
            Attention takes as long as its span, whether tokens fill it or not.
        unroll: Draft γ tokens in one call.
        strip_weights: See `BuildOptions`.
        timing_cache: See `BuildOptions`.
        version_compatible: See `BuildOptions`.
    """

    flavor: Literal["auto"] | Flavor = "auto"
    compute_capabilities: tuple[str, ...] = ()
    draft_length: int = 4
    prefill_chunk: int = 256
    spans: tuple[int, ...] = ()
    unroll: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False

    def check(self) -> None:
        """Check that every value is valid.

        Raises:
            VocabtrimError: Names the first value that is not valid.
        """
        flavors = ("auto", *get_args(Flavor))
        if self.flavor not in flavors:
            raise VocabtrimError(f"--trt-flavor is {self.flavor!r}: choose one of {', '.join(flavors)}")
        for capability in self.compute_capabilities:
            if not _CAPABILITY.fullmatch(capability):
                raise VocabtrimError(f"--compute-capability is {capability!r}: write it like 8.6")
        _check_range("--draft-length", self.draft_length, 0, _LONGEST_DRAFT)
        _check_range("--prefill-chunk", self.prefill_chunk, 1, _LONGEST_CHUNK)
        for span in self.spans:
            if span < 1:
                raise VocabtrimError(f"--span is {span}: give 1 or more")
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise VocabtrimError(f"--timing-cache is {self.timing_cache}, a directory: name a file")
        if self.flavor == "none":
            self._check_unbuilt()
        if self.unroll and not self.draft_length:
            raise VocabtrimError("--unroll-draft needs a --draft-length of 1 or more")

    def _check_unbuilt(self) -> None:
        """Refuse what is for plans, where only graphs are written."""
        of_plans = ("compute_capabilities", "strip_weights", "timing_cache", "version_compatible")
        for name in of_plans:
            if getattr(self, name):
                option = name.replace("capabilities", "capability").replace("_", "-")
                raise VocabtrimError(
                    f"--{option} is for plans, and --trt-flavor none builds none: leave one of them out"
                )


def profiles(role: Role, settings: TensorRTSettings, max_length: int) -> tuple[Profile, ...]:
    """Returns the optimization profiles of a model, those of the shortest span first.

    Each span has two: one for decoding (a drafter's single step, or a target's verification of γ drafted tokens), and
    one for the prompt.

    Args:
        role: "drafter" or "target".
        settings: The settings of the build.
        max_length: Tokens that the KV cache holds.

    Raises:
        VocabtrimError: A span is not shorter than the cache.
    """
    for span in settings.spans:
        if span >= max_length:
            raise VocabtrimError(f"--span is {span}: give lengths below --max-length, which is {max_length}")
    lengths = (*settings.spans, max_length)
    result: list[Profile] = []
    for slots in sorted({cache_slots(length, settings.draft_length) for length in lengths}):
        if role == "drafter":
            result.append(Profile("draft", 1, 1, slots))
        else:
            result.append(Profile("verify", settings.draft_length + 1, settings.draft_length + 1, slots))
        result.append(Profile("prefill", min(settings.prefill_chunk, slots), 1, slots))
    return tuple(result)


def cache_slots(length: int, draft_length: int) -> int:
    """Returns the slots that a KV cache of `length` tokens needs: a padded verification writes up to γ more."""
    return -(-(length + draft_length) // _SLOTS) * _SLOTS


def dimensions(profile: Profile) -> dict[str, int]:
    """Returns the sizes of the graph's dynamic dimensions in `profile`, as `build_plan` takes them."""
    return {"sequence_length": profile.tokens, "keep": profile.keep, "span": profile.span}


def _check_range(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise VocabtrimError(f"{option} is {value}: give {least} to {most}")
