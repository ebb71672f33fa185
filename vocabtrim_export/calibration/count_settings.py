"""The settings of `calibrate` for one corpus, and the functions that it calls as it counts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from engines.bundle.chat_template import ChatOptions
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import BatchLimits
from vocabtrim_export.calibration.document import Skipped
from vocabtrim_export.calibration.endpoint import Endpoint
from vocabtrim_export.calibration.sufficiency import HeadSize, Sufficiency

CalibrationSource = Literal["drafter", "target", "text"]


@dataclass(frozen=True, slots=True)
class CountSettings:
    """Settings for counting the tokens of one corpus.

    Attributes:
        source: "drafter" or "target": the role of the model that generates; "text": count the corpus itself.
        max_tokens: The number of tokens to count.
        seed: Seed of the random numbers that tokens are drawn with.
        temperature: Temperature of sampling; 0 is greedy.
        limits: The size of batches, prompts and continuations; None: the defaults of `BatchLimits`, with smaller
            batches for an endpoint.
        chat: The chat template that renders prompts, and its arguments.
        enough_for: The rows of a trimmed head, a number or the share of held-out tokens that they are to cover:
            counting stops before `max_tokens` where more tokens would change little for such a head. None: count
            `max_tokens`.
        endpoint: A server that generates instead of the model, with its own chat template.
        model_digest: Identifies the model's weights, so that a checkpoint of other weights is refused.

    Raises:
        VocabtrimError: A value is out of range.
    """

    source: CalibrationSource
    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    limits: BatchLimits | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)
    enough_for: HeadSize | None = None
    endpoint: Endpoint | None = None
    model_digest: str = ""

    def __post_init__(self) -> None:
        check_counting(self.source, self.max_tokens, self.seed, self.temperature)


def check_counting(source: str, max_tokens: int, seed: int, temperature: float) -> None:
    """Check the values that `CountSettings` describes.

    Raises:
        VocabtrimError: A value is out of range.
    """
    sources = get_args(CalibrationSource)
    if source not in sources:
        raise VocabtrimError(f"unknown calibration source {source!r}: choose from {', '.join(sources)}")
    if max_tokens < 1:
        raise VocabtrimError(f"the number of calibration tokens must be positive, not {max_tokens}")
    if seed < 0:
        raise VocabtrimError(f"the calibration seed must be 0 or more, not {seed}")
    if not 0 <= temperature < float("inf"):
        raise VocabtrimError(f"the calibration temperature must be 0 or more, not {temperature}")


@dataclass(frozen=True, slots=True)
class CountEvents:
    """Functions that `calibrate` calls as it counts.

    Attributes:
        progress: Called with (tokens so far, tokens expected at the end) as tokens come in.
        on_skip: Called at the end for each document that cannot be a prompt of this model.
        on_look: Called with each look at whether the tokens are enough; the last look is the one that stopped.
        on_prompts: Called with (prompt tokens read, all of them) while a batch's prompts are read, before its first
            token.
    """

    progress: Callable[[int, int], None] = lambda _done, _total: None
    on_skip: Callable[[Skipped], None] = lambda _skipped: None
    on_look: Callable[[Sufficiency], None] = lambda _sufficiency: None
    on_prompts: Callable[[int, int], None] = lambda _read, _total: None


NO_EVENTS = CountEvents()
