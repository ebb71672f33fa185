"""`Snapshot`: a text and what both engines' KV caches hold of it, so that it can be gone on with later."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.manifest import Manifest
from engines.errors import VocabtrimError
from engines.keys_values import KeysValues
from runtime.kept_prefix import note_text


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of a decoder's text and KV caches, in the host's memory. Nothing changes it.

    In-context slots and prompt lookup are made from the text; a head's features are read again from its last token.

    Attributes:
        token_ids: int64[length + 1]; the target's cache holds all but the last.
        target: The target's keys and values.
        drafter: The drafter's, which may have read less; None where there is no drafter, or it shares the target's.
        manifests: The bundles of target and drafter: decoders over other bundles cannot use the copy.
    """

    token_ids: NDArray[np.int64]
    target: KeysValues
    drafter: KeysValues | None
    manifests: tuple[Manifest, ...]

    @property
    def nbytes(self) -> int:
        """The size of the copy, in bytes."""
        return self.token_ids.nbytes + self.target.nbytes + (self.drafter.nbytes if self.drafter else 0)

    def common_prefix(self, token_ids: NDArray[np.int64]) -> int:
        """Returns how many of the first tokens of a text the target need not read if it goes on from this copy.

        Args:
            token_ids: int64[n], the text.
        """
        most = min(self.target.length, len(token_ids))
        differs = self.token_ids[:most] != token_ids[:most]
        return int(differs.argmax()) if differs.any() else most


def take_snapshot(target: Engine, drafter: Engine | None) -> Snapshot | None:
    """Copy the text that both caches hold.

    Args:
        target: The target.
        drafter: The drafter; None for the target alone.

    Returns:
        The copy; None where the caches hold no text or an engine cannot copy its own.
    """
    if not _holds_text(target, drafter):
        return None
    own = _own_cache(target, drafter)
    copied, drafted = target.snapshot(), own.snapshot() if own else None
    if copied is None or (own and drafted is None):
        return None
    return Snapshot(np.array(target.text, np.int64), copied, drafted, manifests(target, drafter))


def restore_snapshot(target: Engine, drafter: Engine | None, snapshot: Snapshot, length: int) -> None:
    """Make both caches hold the beginning of a copied text.

    Args:
        target: The target.
        drafter: The drafter; None for the target alone.
        snapshot: The copy.
        length: The number of its tokens that the target's cache is to hold.

    Raises:
        VocabtrimError: The copy was made with other bundles.
        ValueError: The copy holds fewer tokens.
    """
    own = _own_cache(target, drafter)
    if snapshot.manifests != manifests(target, drafter) or (own is None) != (snapshot.drafter is None):
        raise VocabtrimError("the snapshot was made with other bundles than this decoder's: read the prompt again")
    if not 0 <= length <= snapshot.target.length:
        raise ValueError(f"cannot restore {length} tokens: the snapshot holds {snapshot.target.length}")
    target.restore(snapshot.target, length)
    if own and snapshot.drafter:
        own.restore(snapshot.drafter, min(length, snapshot.drafter.length))
    elif drafter:  # it reads the target's
        drafter.adopt(length)
    note_text(target, drafter, snapshot.token_ids[: length + 1].tolist())


def snapshot_bytes(target: Engine, drafter: Engine | None) -> int:
    """Returns the size that a snapshot would have now, in bytes; 0 where the caches hold no text."""
    if not _holds_text(target, drafter):
        return 0
    engines = [engine for engine in (target, _own_cache(target, drafter)) if engine]
    caches = sum(engine.length * engine.manifest.kv_bytes_per_token for engine in engines)
    return caches + (target.length + 1) * np.dtype(np.int64).itemsize


def manifests(target: Engine, drafter: Engine | None) -> tuple[Manifest, ...]:
    """Returns what identifies the bundles of a pair."""
    return tuple(engine.manifest for engine in (target, drafter) if engine)


def _holds_text(target: Engine, drafter: Engine | None) -> bool:
    own = _own_cache(target, drafter)
    is_one_text = own is None or own.text is target.text
    return is_one_text and 0 < target.length == len(target.text) - 1  # else something was fed since


def _own_cache(target: Engine, drafter: Engine | None) -> Engine | None:
    """Returns the drafter if it has a cache of its own."""
    return drafter if drafter and drafter.cache is not target.cache else None
