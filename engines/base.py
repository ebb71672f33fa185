"""`Engine`: a loaded decoder with its own KV cache, whatever runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from engines.bundle.read import Manifest
from engines.bundle.vocab_map import HeadTokens, VocabMap
from engines.errors import VocabtrimError
from engines.exclusive_use import ExclusiveUse
from engines.sampling_params import Sampling

MAX_KEEP = 256

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the last `keep` fed positions predict. All arrays are valid until the engine's next `feed` or `draft`.

    token_ids: int64[keep], the most likely next token of each position, as full-vocabulary ids.
    read_features: see `features`; None where the engine gives none.
    """

    token_ids: NDArray[np.int64]
    read_logits: Callable[[], NDArray[np.float32]]
    read_features: Callable[[], NDArray[np.float32]] | None = None

    @property
    def logits(self) -> NDArray[np.float32]:
        """float32[keep, columns]; column `i` of a trimmed drafter is token `Engine.head_tokens.kept_token_ids[i]`.

        Copied from where the engine runs when asked for: greedy decoding never needs them.
        """
        return self.read_logits()

    @property
    def features(self) -> NDArray[np.float32]:
        """float32[fed, features_given]: the hidden states of every position of the call, for a drafter to read."""
        if self.read_features is None:
            raise ValueError("this engine gives no features")
        return self.read_features()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first `count` drafted tokens stay, and `next_token`, the target's own, follows them."""

    count: int
    next_token: int


@dataclass(frozen=True, slots=True)
class Speculation:
    """A draft and the target's verdict on it, made by both engines in one go of their device.

    drafted: int64[γ]. verified: as the target's `feed` gives it for the last token before the draft and all of the
    draft, keep = γ + 1. draft_seconds, verify_seconds: by the device's clock. accepted: what stays of a sampled draft;
    None where it was greedy, and `verified` says it.
    """

    drafted: NDArray[np.int64]
    verified: StepOutput
    draft_seconds: float
    verify_seconds: float
    accepted: Accepted | None = None


class Engine(ABC):
    """A decoder and its KV cache of `capacity` tokens, of which the first `length` are filled.

    cache: identifies the memory of the KV cache. Engines of one model may share it (see `load_engine`); then what one
    of them fed, the others can `adopt`.
    tokenizer_file: the bundle's `tokenizer.json`, None where there is none.
    use: keeps a second generation from writing into the KV cache while one is unfinished.
    device: where it runs, "cpu" or "cuda".
    max_keep: positions that one run can predict after. unrolled: tokens that `draft` gives (γ), 0 if it gives none.
    max_draft: tokens that it can draft one after another; None: as many as the cache holds.
    features_given: numbers in a row of `StepOutput.features`, 0 where there are none. features_read: numbers in a row
    that `feed_features` takes, 0 for an engine that reads tokens alone.
    """

    device: Device = "cpu"

    def __init__(self, manifest: Manifest, vocab_map: VocabMap | None, tokenizer_file: Path | None = None) -> None:
        self.manifest = manifest
        self.vocab_map = vocab_map
        self.tokenizer_file = tokenizer_file
        self.capacity = manifest.context_length
        self.length = 0
        self.cache: object = object()
        self.use = ExclusiveUse()
        self.max_keep = MAX_KEEP
        self.unrolled = 0
        self.max_draft: int | None = None
        self.features_given = self.features_read = 0

    @property
    def head_tokens(self) -> HeadTokens | None:
        """The token of each column of the logits; None where column `i` is token `i`. Of a drafter with slots it
        changes with `remember` and `rewind`."""
        return self.vocab_map

    def remember(self, token_ids: Sequence[int]) -> None:  # noqa: B027
        """The text goes on with `token_ids`: a drafter with slots can propose them from now on, the latest of them if
        they are more. Feeds nothing."""

    @abstractmethod
    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        """Append `token_ids` (at least one) to the cache and predict after the last `keep` of them.

        Long inputs run in chunks; `keep` is at most 256.
        Raises `ContextFull` if they do not fit; the cache is then as before.
        """

    def feed_features(
        self,
        token_ids: Sequence[int] | NDArray[np.int64],  # noqa: ARG002
        features: NDArray[np.float32],  # noqa: ARG002
        keep: int = 1,  # noqa: ARG002
    ) -> StepOutput:
        """As `feed`, for a drafter that reads its target's features: float32[len(token_ids), features_read].

        Row i belongs to the token before `token_ids[i]`, which the target has read. Without features, `feed` goes on
        from the hidden state that the last position left, one token at a time.
        """
        raise ValueError("this engine reads no features")

    def draft(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:  # noqa: ARG002
        """Append `token_ids` and draft after them greedily, in one call of the device: int64[unrolled].

        All drafted tokens but the last are then in the cache. None, and nothing done, where the engine has no graph
        that does this for so many tokens or the cache has no room.
        """
        return None

    def speculate(
        self,
        drafter: "Engine",  # noqa: ARG002
        token_ids: Sequence[int] | NDArray[np.int64],  # noqa: ARG002
        draft_length: int,  # noqa: ARG002
        sampling: Sampling | None = None,  # noqa: ARG002
    ) -> Speculation | None:
        """As the target: have `drafter` draft, and verify the draft, without the host in between.

        token_ids: what `drafter` has not been fed; the last of them is the one that the target has not been fed either.
        sampling: None drafts greedily; else both sides sample, and the device decides what stays. Rules on logits are
        never applied: a generation that has any must not ask.
        The target then holds all of the draft, and the drafter all but its last token. An EAGLE head reads what the
        target's last call gave, where that lies. None, and nothing done, where the two cannot do this together.
        """
        return None

    def fork(self, share_cache_with: "Engine | None" = None) -> "Engine":  # noqa: ARG002
        """Another engine, with an empty KV cache, over the same loaded weights; it may run in another thread.

        share_cache_with: see `load_engine`. Raises `VocabtrimError` where weights serve one cache only.
        """
        raise VocabtrimError("only ONNX Runtime on the CPU can fork an engine: load the bundle once more instead")

    def environment(self) -> dict[str, str]:
        """What it runs on, for a report: the library that computes and its version, and the GPU if there is one."""
        return {}

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens. Moves no data. 0 also empties the slots of a drafter that
        has some; they hold no more than hints, so any other length keeps them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def adopt(self, length: int) -> None:
        """Take the first `length` tokens that an engine with the same `cache` has fed for this one's own."""
        self.length = length

    def close(self) -> None:
        """Release the model and the cache, after the round that runs now. Calling it again does nothing."""
        self.use.close()
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """What `close` does. May be called again, and then does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ContextFull(Exception):
    """More tokens were fed than the KV cache has room for."""
