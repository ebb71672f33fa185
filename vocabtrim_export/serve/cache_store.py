"""`CacheStore`: the KV caches of conversations that no worker holds any more, in memory."""

from threading import Lock

import numpy as np

from runtime import Snapshot, SpeculativeDecoder
from vocabtrim_export.memory import all_memory

LEAST_TOKENS = 32  # fewer are not worth a copy
_LEAST_SHARE = 8  # a text of which less than an eighth would be lost is not copied
_SHARE_OF_MEMORY = 8  # by default the store takes an eighth of the machine's memory


def default_cache_bytes() -> int:
    """Returns an eighth of the memory that this process may use, in bytes."""
    return all_memory() // _SHARE_OF_MEMORY


class CacheStore:
    """Copies of KV caches, the least recently used of which leave when there is no room. Threads may share it.

    Attributes:
        most_bytes: The most bytes of all copies; 0: nothing is stored.
        hits: Requests that began from a copy.
        evictions: Copies that left because others needed the room.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.hits = self.evictions = 0
        self._snapshots: list[Snapshot] = []  # the least recently used first
        self._reserved = 0  # bytes of copies that are being made
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """The bytes of all copies, those that are being made included."""
        with self._lock:
            return self._held()

    def longest_prefix(self, prompt: list[int]) -> int:
        """Returns how many of the first tokens of a prompt the best copy holds."""
        best = self._best(prompt)
        return best[1] if best else 0

    def prepare(self, decoder: SpeculativeDecoder, prompt: list[int], keeps_prefix: bool) -> None:
        """Make a decoder ready for a prompt: save what the prompt will overwrite, and load what it can go on from.

        Args:
            decoder: It generates nothing at present.
            prompt: Token ids.
            keeps_prefix: Whether the generation goes on from what the decoder holds.

        Raises:
            VocabtrimError: The decoder is in use or closed.
        """
        if not self.most_bytes:
            return
        kept = decoder.kept_prefix(prompt)
        best = self._best(prompt) if keeps_prefix else None
        if best and best[1] < kept + LEAST_TOKENS:
            best = None
        if best:
            self._use(best[0])
        if decoder.target.length - kept >= max(LEAST_TOKENS, decoder.target.length // _LEAST_SHARE):
            self._save(decoder)
        if best:
            decoder.restore(*best)

    def _best(self, prompt: list[int]) -> tuple[Snapshot, int] | None:
        """Returns the copy that holds most of a prompt, and how many of its tokens; None where there is no copy."""
        ids = np.array(prompt[:-1], np.int64)  # the last one is fed for what it predicts
        with self._lock:
            lengths = [(snapshot, snapshot.common_prefix(ids)) for snapshot in self._snapshots]
        return max(lengths, key=lambda pair: pair[1], default=None)

    def _save(self, decoder: SpeculativeDecoder) -> None:
        if not (size := decoder.snapshot_bytes):
            return
        text = np.array(decoder.target.text[:-1], np.int64)
        with self._lock:
            is_known = any(snapshot.common_prefix(text) == len(text) for snapshot in self._snapshots)
            if is_known or self._reserved + size > self.most_bytes:
                return
            self._snapshots = [each for each in self._snapshots if each.common_prefix(text) < each.target.length]
            self._make_room(size)
            self._reserved += size
        snapshot = None
        try:
            snapshot = decoder.snapshot()  # not under the lock: others look for their prompts meanwhile
        finally:
            with self._lock:
                self._reserved -= size
                if snapshot:
                    self._snapshots.append(snapshot)

    def _held(self) -> int:
        return self._reserved + sum(snapshot.nbytes for snapshot in self._snapshots)

    def _make_room(self, size: int) -> None:
        while self._snapshots and self._held() + size > self.most_bytes:
            self._snapshots.pop(0)
            self.evictions += 1

    def _use(self, snapshot: Snapshot) -> None:
        with self._lock:
            self.hits += 1
            if any(each is snapshot for each in self._snapshots):  # not evicted meanwhile
                self._snapshots = [*(each for each in self._snapshots if each is not snapshot), snapshot]
