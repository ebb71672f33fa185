"""`Engine`: the interface of a loaded decoder with a KV cache, for every library and device."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.bundle.read import Manifest
from engines.bundle.vocab_map import HeadTokens, VocabMap
from engines.closing import Closing
from engines.errors import VocabtrimError
from engines.exclusive_use import ExclusiveUse
from engines.keys_values import KeysValues
from engines.outputs import Speculation, StepOutput
from engines.sampling_params import Sampling
from engines.slots import Slots

MAX_KEEP = 256
# The tokens that a drafter has not read after a round, at most: the last one that it drafted, and the target's own.
MOST_UNREAD = 2

DeviceName = Literal["cpu", "cuda"]
Neighbour = Callable[[], "Engine | None"]  # waits for an engine that is loaded at the same time


class Engine(Closing):
    """A decoder and its KV cache of `capacity` tokens, of which the first `length` are filled.

    Attributes:
        manifest: The bundle's manifest.
        vocab_map: The tokens of a trimmed head's rows; None for a full head.
        tokenizer_file: The bundle's `tokenizer.json`; None where there is none.
        capacity: The tokens that the KV cache can hold.
        length: The tokens that it holds.
        text: The text of the generation that has filled the cache, prompt included; its end may not have been fed.
            Empty where `rewind` was called since.
        cache: Identifies the memory of the KV cache. Engines of one model may share it (see `load_engine`); then what
            one of them fed, the others can `adopt`.
        use: Keeps a second generation from writing into the KV cache while one is unfinished.
        device: "cpu" or "cuda".
        max_keep: The positions that one run can predict after.
        unrolled: γ, the tokens that `draft` gives; 0 if it gives none.
        max_draft: The tokens that it can draft one after another; None: as many as the cache holds.
        features_given: The numbers in a row of `StepOutput.features`; 0 where there are none.
        features_read: The numbers in a row that `feed_features` takes; 0 for an engine that reads tokens alone.
        slots: The in-context slots of a drafter's head; None where it has none.
    """

    device: DeviceName = "cpu"

    def __init__(self, manifest: Manifest, vocab_map: VocabMap | None, tokenizer_file: Path | None = None) -> None:
        self.manifest = manifest
        self.vocab_map = vocab_map
        self.tokenizer_file = tokenizer_file
        self.capacity = manifest.context_length
        self.length = 0
        self.text: Sequence[int] = ()
        self.cache: object = object()
        self.use = ExclusiveUse()
        self.max_keep = MAX_KEEP
        self.unrolled = 0
        self.max_draft: int | None = None
        self.features_given = self.features_read = 0
        self.slots: Slots | None = None

    @property
    def head_tokens(self) -> HeadTokens | None:
        """The token of each column of the logits; None where column `i` is token `i`.

        `remember` and `rewind` change it for a drafter with slots.
        """
        return self.slots or self.vocab_map

    def remember(self, token_ids: Sequence[int]) -> None:
        """Put tokens of the text into the slots of a drafter that has some; it can propose them from now on.

        Nothing is fed.

        Args:
            token_ids: int64[n], the next tokens of the text. If they are more than the slots, the last ones stay.
        """
        if self.slots and token_ids:
            self.slots.see(token_ids)

    @abstractmethod
    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        """Append tokens to the cache and predict after the last of them. Long inputs run in chunks.

        Args:
            token_ids: int64[n], at least one.
            keep: The number of last positions to predict after, at most 256.

        Raises:
            ContextFull: The tokens do not fit; the cache is unchanged.
        """

    def rows_computed(self, rows: int) -> int:
        """Returns how many rows a call on so many tokens computes: more where some pad it."""
        return rows

    def check_feed(self, count: int, keep: int) -> None:
        """Check the arguments of a `feed`.

        Args:
            count: The tokens to feed.
            keep: The last positions to predict after.

        Raises:
            ContextFull: The tokens do not fit into the cache.
            ValueError: `keep` is not between 1 and both `count` and MAX_KEEP.
        """
        if not 1 <= keep <= min(count, MAX_KEEP):
            raise ValueError(f"cannot keep {keep} of {count} positions (at most {MAX_KEEP})")
        if self.length + count > self.capacity:
            raise ContextFull(f"{self.length} + {count} tokens, the cache holds {self.capacity}")

    def feed_features(
        self,
        token_ids: Sequence[int] | NDArray[np.int64],  # noqa: ARG002
        features: NDArray[np.float32],  # noqa: ARG002
        keep: int = 1,  # noqa: ARG002
    ) -> StepOutput:
        """Append tokens to the cache of a head, with the target's features, and predict after the last of them.

        Without features, `feed` goes on from the hidden state that the last position left, one token at a time.

        Args:
            token_ids: int64[n], at least one.
            features: float32[n, features_read]; row i belongs to the token before `token_ids[i]`, which the target has
                read.
            keep: The number of last positions to predict after.
        """
        raise ValueError("this engine reads no features")

    def draft(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:  # noqa: ARG002
        """Append tokens and draft after them greedily, in one call of the device.

        All drafted tokens but the last are then in the cache.

        Args:
            token_ids: int64[n], what the engine has not read.

        Returns:
            int64[unrolled]; None, with nothing done, where the engine has no graph for so many tokens or the cache has
            no room.
        """
        return None

    def speculate(
        self,
        drafter: "Engine",  # noqa: ARG002
        token_ids: Sequence[int] | NDArray[np.int64],  # noqa: ARG002
        draft_length: int,  # noqa: ARG002
        sampling: Sampling | None = None,  # noqa: ARG002
    ) -> Speculation | None:
        """Draft with `drafter` and verify the draft with this engine, the target, without the host in between.

        The target's cache then holds the whole draft, and the drafter's all but its last token. An EAGLE head reads the
        features of the target's last call on the device.

        Args:
            drafter: The engine that drafts.
            token_ids: int64[n], what `drafter` has not been fed; the target lacks only the last of them.
            draft_length: γ.
            sampling: None drafts greedily; else both sides sample, and the device decides what is accepted. Rules on
                logits are not applied: a generation that has any must not call this.

        Returns:
            The draft and its verification; None, with nothing done, where the two engines cannot do this together.
        """
        return None

    def fork(self, share_cache_with: "Engine | None" = None) -> "Engine":  # noqa: ARG002
        """Returns another engine over the same loaded weights, with an empty KV cache; it may run in another thread.

        Args:
            share_cache_with: See `load_engine`.

        Raises:
            VocabtrimError: The weights serve one cache only.
        """
        raise VocabtrimError("only ONNX Runtime on the CPU can fork an engine: load the bundle once more instead")

    def environment(self) -> dict[str, str]:
        """Describe the engine for a report: the library that computes, its version, and the GPU if there is one."""
        return {}

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens. No data is moved.

        Slots are only hints: 0 empties them, any other length leaves them as they are.

        Args:
            length: 0 to `self.length`, in tokens.

        Raises:
            ValueError: The cache does not hold so many tokens.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length
        self.text = ()
        if self.slots and length == 0:
            self.slots.clear()

    def restart(self, length: int) -> None:
        """Begin another text that shares its first tokens with the one in the cache: rewind, with empty slots.

        Args:
            length: 0 to `self.length`, in tokens.

        Raises:
            ValueError: The cache does not hold so many tokens.
        """
        self.rewind(length)
        if self.slots:
            self.slots.clear()

    def adopt(self, length: int) -> None:
        """Take over the first `length` tokens, which an engine with the same `cache` has fed."""
        self.length = length

    def snapshot(self) -> KeysValues | None:
        """Copy the keys and values of all cached tokens to the host; None where the engine cannot."""
        return None

    def restore(self, copied: KeysValues, length: int) -> None:  # noqa: ARG002
        """Replace what the cache holds by the first `length` tokens of the `snapshot` of an engine of this bundle."""
        raise ValueError("this engine cannot take over a copied cache")

    def close(self) -> None:
        """Release the model and the cache, after the round that runs now. Calling it again does nothing."""
        self.use.close()
        self.slots = None  # their memory is freed next, so nothing may write to them
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """Release the model and the cache. A second call does nothing."""


class ContextFull(Exception):
    """More tokens were fed than the KV cache has room for."""
